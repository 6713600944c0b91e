"""The dream as a Gymnasium environment, one and many at once."""

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import hidreamer
import networks
from hidreamer.checkpoint import FolderError
from library import dream_env
from tools import ConfigError

CASES = [("rssm", "image"), ("hrssm", "grid"), ("hrvq", "vector"), ("hrvq", "multi")]
CASES += [("rssm", "continuous")]
each = pytest.mark.parametrize("case", CASES, ids="-".join)


@each
@pytest.mark.parametrize("decode", [True, False], ids=["decoded", "features"])
def test_gymnasium_has_no_complaint(case, decode, trained):
    env = gymnasium.make(
        "hidreamer/Dream-v0", logdir=trained(*case), decode=decode, render_mode="rgb_array"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(infinity|not an image|symmetric|normalized).*")
        check_env(env.unwrapped)
    agent = env.unwrapped.dreams.agent
    if decode:
        spaces = agent.obs_space
        expected = gymnasium.spaces.Dict(spaces) if len(spaces) > 1 else next(iter(spaces.values()))
        assert env.observation_space == expected
    else:
        assert env.observation_space.shape == (agent.dynamics.feat_dim,)
    env.close()


@each
def test_one_of_many_is_one_alone(case, trained):
    """All that is random aside, rows of the vector version are dreams of the single one."""
    agent = hidreamer.load(trained(*case))
    envs = hidreamer.VectorDreamEnv(5, agent, horizon=3, decode=False)
    obs, _ = envs.reset(seed=3)
    assert envs.observation_space.contains(obs)
    actions, over = envs.action_space.sample(), np.zeros(5, bool)
    for _ in range(8):
        before = [x.clone() for x in agent.dynamics.feat(envs.dreams.carry)]
        obs, reward, terminated, truncated, _ = envs.step(actions)
        assert reward.shape == terminated.shape == truncated.shape == (5,)
        vector = agent.action_vector(actions)
        feat = agent.dynamics.feat(envs.dreams.carry)
        assert np.allclose(obs, feat.cat().numpy())
        expected = agent.heads(feat)[0].numpy()
        assert np.allclose(reward[~over], expected[~over], atol=1e-5)
        assert not reward[over].any() and not (terminated | truncated)[over].any()
        # every row that ended has begun again, no other has
        moved = [(a != b).any(-1).numpy() for a, b in zip(before, feat, strict=True)]
        assert (moved[0] | moved[1]).all() and vector.shape == (5, agent.act_dim)
        assert (envs.dreams.steps[over] == 0).all()
        assert ((envs.dreams.steps == 3) & ~terminated == truncated).all()
        over = terminated | truncated
    envs.close()


@each
def test_memory_follows_the_actions_of_its_own_row(case, trained):
    """After some rows began again the others dream on as if alone."""
    agent = hidreamer.load(trained(*case))
    dreams = dream_env.Dreams(agent, 10, False, "recorded", "cpu")
    dreams.seed(0)
    dreams.reset(4)
    actions = torch.stack([agent.action_vector(agent.act_space.sample()) for _ in range(12)])
    actions = actions.unflatten(0, (4, 3))  # (N, 3, A)
    alone = agent.dynamics.select(dreams.carry, torch.tensor([1, 3]))
    _, feat, _ = agent.dynamics.imagine(alone, actions[[1, 3]], 3, sample=False)
    with pytest.MonkeyPatch.context() as patch:
        whole = agent.dynamics.imagine
        patch.setattr(agent.dynamics, "imagine", lambda *args, **_: whole(*args, sample=False))
        for t, over in enumerate(([1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0])):
            dreams.step(actions[:, t], np.array(over, bool))
            found = agent.dynamics.feat(dreams.carry)
            for x, y in zip(found, feat, strict=True):
                assert torch.allclose(x[[1, 3]], y[:, t + 1], atol=1e-5)


def test_starts_are_states_of_recorded_episodes(trained):
    agent = hidreamer.load(trained("rssm", "image"))
    env = hidreamer.DreamEnv(agent, decode=False)
    env.reset(seed=0)
    contexts = [env.dreams._context() for _ in range(60)]
    lengths = {int((~rows["is_first"])[::-1].argmin()) for rows in contexts}
    assert len(lengths) == dream_env.CONTEXT  # from an episode's first step to a whole context
    frames = {x.tobytes() for rows in env.dreams.episodes for x in rows["image"][:-1]}
    assert all(x.tobytes() in frames for rows in contexts for x in rows["image"])
    # short contexts are what an episode's first rows alone lead to
    rows = next(
        rows for rows in contexts if rows["is_first"][-3] and not rows["is_first"][-2:].any()
    )
    whole, cut = ({key: x[None, -n:] for key, x in rows.items()} for n in (len(rows["image"]), 3))
    found = []
    for batch in (whole, cut):
        obs = networks.preprocess(agent.model.tensors(batch))
        found.append(agent.world_model.observe(obs, sample=False)[0])
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(*found, strict=True))


def test_real_starts(trained):
    agent = hidreamer.load(trained("hrvq", "multi"))
    env = hidreamer.DreamEnv(agent, start="real", decode=False)
    first = [env.reset(seed=5)[0], env.reset()[0]]
    again = [env.reset(seed=5)[0], env.reset()[0]]
    assert np.array_equal(first, again) and not np.array_equal(*first)
    obs = agent.real_env(5).reset()
    assert all(agent.obs_space[key].contains(obs[key]) for key in agent.obs_space)
    env.close()


def test_the_continue_head_ends_episodes(trained):
    agent = hidreamer.load(trained("rssm", "image"))
    last = agent.world_model.cont.out
    torch.nn.init.zeros_(last.weight)
    envs = hidreamer.VectorDreamEnv(2000, agent, horizon=50, decode=False)
    for logit, share in ((50.0, 0.0), (-50.0, 1.0), (0.0, 0.5)):
        torch.nn.init.constant_(last.bias, logit)
        envs.reset(seed=0)
        _, _, terminated, truncated, _ = envs.step(envs.action_space.sample())
        assert abs(terminated.mean() - share) < 0.05 and not truncated.any()


def test_a_thousand_dreams_at_once(trained):
    envs = gymnasium.make_vec("hidreamer/Dream-v0", 1024, logdir=trained("hrvq", "multi"))
    obs, _ = envs.reset(seed=0)
    for _ in range(3):
        obs, reward, *_ = envs.step(envs.action_space.sample())
    assert obs["image"].shape == (1024, 64, 64, 3) and reward.shape == (1024,)
    assert len(np.unique(reward)) > 100
    envs.close()


def test_its_chance_is_its_own(trained):
    env = hidreamer.VectorDreamEnv(2, trained("hrvq", "vector"))
    before = torch.get_rng_state()
    first = [env.reset(seed=9)[0], *(env.step([1, 1])[0] for _ in range(3))]
    torch.manual_seed(99)
    again = [env.reset(seed=9)[0], *(env.step([1, 1])[0] for _ in range(3))]
    assert np.array_equal(first, again)
    torch.set_rng_state(before)
    env.step([0, 0])
    assert torch.equal(torch.get_rng_state(), before)


def test_pictures(trained):
    for case in CASES:
        env = hidreamer.DreamEnv(trained(*case), render_mode="rgb_array")
        env.reset(seed=0)
        frame = env.render()
        assert frame.dtype == np.uint8 and frame.shape[2] == 3 and frame.std() > 0
    envs = hidreamer.VectorDreamEnv(2, trained("hrssm", "grid"), render_mode="rgb_array")
    envs.reset(seed=0)
    assert len(envs.render()) == 2


class Pays(torch.nn.Module):
    """A reward head that pays for what an action does to the memory."""

    def __init__(self, agent, number):
        super().__init__()
        with torch.no_grad():
            rows = agent.encode(agent.recorded()[1])
            dreams = [agent.dream(rows, [i], 1, start=5, sample=False) for i in range(4)]
            deter = torch.stack([dream.feat.deter[0, 1] for dream in dreams])  # (4, D)
        others = [i for i in range(4) if i != number]
        self.way = deter[number] - deter[others].mean(0)
        self.middle = (deter[number] + deter[others].mean(0)) / 2
        self.size = len(self.way)

    def forward(self, x):
        deter = x[..., -self.size :]
        self.found = torch.sigmoid(
            20.0 * ((deter - self.middle) @ self.way) / self.way.square().sum()
        )
        return self

    def mode(self):
        return self.found


@pytest.mark.parametrize("kind", ["rssm", "hrvq"])
def test_an_agent_learns_in_the_dream(kind, trained):
    """Stable Baselines 3, a few hundred steps, of a task whose answer is known."""
    a2c = pytest.importorskip("stable_baselines3").A2C
    agent = hidreamer.load(trained(kind, "vector"))
    best = 2
    agent.world_model.reward = Pays(agent, best)
    env = hidreamer.DreamEnv(agent, horizon=10, decode=False)
    env.reset(seed=0)
    learner = a2c("MlpPolicy", env, learning_rate=0.02, gamma=0.0, seed=0, device="cpu")

    def play(policy):
        env.reset(seed=1)
        total, taken = 0.0, []
        for _ in range(10):
            obs, over = env.reset()[0], False
            while not over:
                taken.append(policy(obs))
                obs, reward, terminated, truncated, _ = env.step(taken[-1])
                total, over = total + reward, terminated or truncated
        return total / len(taken), np.mean(np.array(taken) == best)

    rng = np.random.default_rng(0)
    chance, _ = play(lambda obs: int(rng.integers(4)))
    learner.learn(600)
    learned, share = play(lambda obs: int(learner.predict(obs, deterministic=True)[0]))
    assert learned > chance + 0.1 and share > 0.8, (chance, learned, share)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"horizon": 0}, "horizon is 0"),
        ({"start": "middle"}, "start is 'middle'; it can be recorded, real"),
        ({"decode": "yes"}, "decode is 'yes'; it can be True, False"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"device": "tpu"}, "device is 'tpu'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, says, trained):
    make = hidreamer.VectorDreamEnv if "num_envs" in arguments else hidreamer.DreamEnv
    with pytest.raises(ConfigError, match=says):
        make(logdir=trained("rssm", "image"), **arguments)


def test_a_dream_that_is_over_needs_a_reset(trained):
    env = hidreamer.DreamEnv(hidreamer.load(trained("rssm", "image")), horizon=2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.step(0)
    env.render_mode = "rgb_array"
    with pytest.raises(gymnasium.error.ResetNeeded):
        env.render()
    env.reset(seed=0)
    over = False
    while not over:
        _, _, terminated, truncated, _ = env.step(0)
        over = terminated or truncated
    with pytest.raises(gymnasium.error.ResetNeeded, match="after its end"):
        env.step(0)
    env.reset()
    env.step(0)


def test_a_seed_for_each_dream(trained):
    env = hidreamer.VectorDreamEnv(3, hidreamer.load(trained("rssm", "image")), decode=False)
    first, other, again = (env.reset(seed=seeds)[0] for seeds in ([1, 2, 3], [1, 2, 4], [1, 2, 3]))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    for seeds, says in (([1, 2], "2 seeds for 3 dreams"), ([1, None, 2], "a seed is None")):
        with pytest.raises(ValueError, match=says):
            env.reset(seed=seeds)
    with pytest.raises(gymnasium.error.Error, match="integer"):
        env.reset(seed=1.5)


def test_without_episodes_it_says_what_else_there_is(trained, tmp_path):
    out = hidreamer.export(trained("hrvq", "vector"), tmp_path / "agent")
    with pytest.raises(FolderError, match=r'no recorded episodes .* start="real"') as error:
        hidreamer.DreamEnv(out)
    assert "\n" not in str(error.value)
    (out / "train_eps").mkdir()
    (out / "train_eps" / "0000000-00-9.npz").write_bytes(b"x")
    with pytest.raises(FolderError, match=r"0000000-00-9\.npz: it is damaged|whole npz"):
        hidreamer.DreamEnv(out)
    env = hidreamer.DreamEnv(out, start="real")
    assert env.observation_space.contains(env.reset(seed=0)[0])


@pytest.mark.parametrize("kind", ["rssm", "hrvq"])
def test_actions_that_are_none_are_one_sentence(kind, trained):
    dreams = hidreamer.DreamEnv(trained(kind, "image"))
    with pytest.raises(gymnasium.error.ResetNeeded):
        dreams.step(0)
    dreams.reset(seed=1)
    for action in (99, -1, "x", None, float("nan"), np.array([0])):
        with pytest.raises(ValueError, match="action"):
            dreams.step(action)
    assert np.isfinite(dreams.step(0)[1])
    vector = hidreamer.VectorDreamEnv(3, trained(kind, "image"))
    vector.reset(seed=1)
    with pytest.raises(ValueError, match="2 actions for 3 dreams"):
        vector.step(np.zeros(2, int))


def test_starts_are_drawn_and_renewed(trained):
    dreams = dream_env.Dreams(hidreamer.load(trained("rssm", "image")), 9, False, "recorded", "cpu")
    dreams.seed(0)
    dreams.reset(6)
    begun, begin = [], dreams.begin
    dreams.begin = lambda count: begun.append(count) or begin(count)
    actions = torch.stack([dreams.agent.action_vector(0)] * 6)
    for _ in range(dream_env.USES):
        dreams.step(actions, np.ones(6, bool))
        found = dreams.agent.dynamics.feat(dreams.carry).stoch
        pool = dreams.agent.dynamics.feat(dreams.pool).stoch
        assert len(found.unique(dim=0)) > 1
        assert all((row == pool).all(-1).any() for row in found)
    assert not begun
    dreams.step(actions, np.ones(6, bool))
    assert begun == [6] and dreams.used == 6


def test_starts_are_of_the_latest_episodes(trained, monkeypatch):
    agent = hidreamer.load(trained("rssm", "image"))
    monkeypatch.setattr(dream_env, "EPISODES", 2)
    found = dream_env.Dreams(agent, 9, False, "recorded", "cpu").episodes
    last = [agent.rows(path)["image"] for path in agent.recorded()[-2:]]
    assert len(agent.recorded()) > 2
    assert all(np.array_equal(a["image"], b) for a, b in zip(found, last, strict=True))


def test_dreamt_pictures_are_rounded(trained):
    dreams = dream_env.Dreams(hidreamer.load(trained("rssm", "image")), 9, True, "recorded", "cpu")
    dreams.seed(0)
    dreams.reset(2)
    shape = (2, *dreams.agent.obs_space["image"].shape)
    dreams.agent.decode = lambda feat: {"all": {"image": torch.full(shape, 0.999)}}
    assert (dreams.observations() == 255).all()
