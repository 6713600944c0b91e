"""hidreamer.load: what it reads, encodes, dreams and decodes; the policy in a Gymnasium loop."""

import copy
import os
import re
import runpy
import sys

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import forked
import hidreamer
import networks
from conftest import ROOT
from hidreamer.checkpoint import FolderError
from hidreamer.episodes import load_episode
from library import agent as agents
from library.policy import fit

# every latent state, kind of observation and kind of action
CASES = [("rssm", "image"), ("hrssm", "grid"), ("hrvq", "vector"), ("hrvq", "multi")]
CASES += [("rssm", "continuous")]


@pytest.fixture(params=CASES, ids="-".join)
def agent(request, trained):
    return hidreamer.load(trained(*request.param))


@pytest.fixture
def episode(agent):
    return load_episode(agent.recorded()[1])


def random_actions(agent, *shape):
    space = agent.act_space
    return torch.stack(
        [agent.action_vector(space.sample()) for _ in range(int(np.prod(shape)))]
    ).reshape(*shape, agent.act_dim)


def close(a, b):
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


# ---------------------------------------------------------------- encoding


def test_a_continue_head_that_learned_the_discount_tells_probabilities(trained):
    """Else a dream would end at every step with a chance of 1 - discount."""
    agent = hidreamer.load(trained("rssm", "image"))
    head, feat = agent.world_model.cont, agent.dynamics.feat(agent.dynamics.initial(3))
    for wanted, bias in ((0.8, 0.4), (1.0, 0.5), (1.0, 0.6)):  # of a discount of 0.5
        torch.nn.init.zeros_(head.out.weight)
        torch.nn.init.constant_(head.out.bias, float(torch.logit(torch.tensor(bias))))
        head.discount = 0.5
        assert agent.heads(feat)[1].tolist() == pytest.approx([wanted] * 3, abs=1e-5)
        head.discount = 1.0
        assert agent.heads(feat)[1].tolist() == pytest.approx([bias] * 3, abs=1e-5)


def test_latents_have_the_documented_shapes(agent, episode):
    latents, dynamics = agent.encode(episode), agent.dynamics
    steps = len(episode["reward"])
    assert len(latents.levels) == len(dynamics.shapes)
    parts = zip(latents.levels, dynamics.shapes, dynamics.level_dims, strict=True)
    for level, (variables, classes), numbers in parts:
        assert level.index.shape == (steps, variables) and level.index.dtype == torch.int64
        assert level.post.shape == level.prior.shape == (steps, variables, classes)
        assert level.embed.shape == (steps, numbers)
        assert torch.equal(level.index, level.post.argmax(-1))  # not drawn
    assert latents.deter.shape == (steps, dynamics.deter_dim)
    assert torch.equal(torch.cat([level.embed for level in latents.levels], -1), latents.stoch)
    for numbers in (latents.reward, latents.cont, latents.value):
        assert numbers.shape == (steps,) and numbers.isfinite().all()
    assert latents.cont.min() >= 0.0 and latents.cont.max() <= 1.0


def test_encoding_is_what_training_sees(agent, episode):
    model = agent.world_model
    rows = {key: episode[key][None] for key in (*agent.obs_space, "prev_action", "is_first")}
    _, post, _ = model.observe(networks.preprocess(agent.model.tensors(rows)), sample=False)
    latents = agent.encode(episode)
    assert close([x[0] for x in post.feat], latents.feat)
    assert torch.allclose(model.reward(post.feat.cat()).mode()[0], latents.reward, atol=1e-5)


def test_a_long_episode_is_encoded_in_chunks(agent, episode, monkeypatch):
    whole, actions = agent.encode(episode), random_actions(agent, 3)
    dreams = {}
    for start in (2, 11, -1):
        dreams[start] = agent.dream(whole, actions, 3, start=start, sample=False)
    monkeypatch.setattr(agents, "CHUNK", 7)
    chunked = agent.encode(episode)
    assert close(whole.feat, chunked.feat) and len(chunked.starts) == 3
    for start, dream in dreams.items():
        again = agent.dream(chunked, actions, 3, start=start, sample=False)
        assert close(dream.feat, again.feat)
    several = agent.dream(chunked, actions, 3, start=list(dreams), sample=False)
    for row, dream in enumerate(dreams.values()):
        assert close([x[0] for x in dream.feat], [x[row] for x in several.feat])


def test_a_drawn_encoding_differs_from_the_likeliest(agent, episode):
    drawn = agent.encode(episode, sample=True)
    assert not torch.equal(drawn.stoch, agent.encode(episode).stoch)
    torch.manual_seed(4)
    first = agent.encode(episode, sample=True)
    torch.manual_seed(4)
    assert torch.equal(agent.encode(episode, sample=True).stoch, first.stoch)


def test_episodes_come_as_files_and_as_rows(agent, episode):
    path = agent.recorded()[1]
    value = agent.encode(path).value
    assert torch.equal(agent.encode(str(path)).value, value)
    named = {key: x for key, x in episode.items() if key not in ("prev_action", "is_first")}
    assert torch.equal(agent.encode(named | {"action": episode["prev_action"]}).value, value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.pop("prev_action"), "no prev_action"),
        (lambda rows: rows.pop("image"), "the episode has no image; this agent sees image"),
        (lambda rows: rows.update(image=rows["image"][:, :8]), "image of the episode is"),
        (lambda rows: rows.update(prev_action=rows["prev_action"][:, :2]), "prev_action of the"),
        (lambda rows: rows.update(prev_action=rows["prev_action"][:5]), "image 21, prev_action 5"),
        (lambda rows: rows.update(is_first=rows["is_first"][:4]), "is_first 4"),
        (lambda rows: rows.update(prev_action=3), r"prev_action of the episode is \(\)"),
        (lambda rows: rows.update(prev_action=[[1], [1, 2]]), "prev_action of .* no array"),
        (lambda rows: rows["prev_action"].__setitem__((2, 0), np.nan), "prev_action .* not finite"),
        (lambda rows: rows.update(image=rows["image"] / 255.0), "image of the episode is float64"),
        (lambda rows: rows.update(image=rows["image"] + np.int64(256)), "not uint8 of 0 to 255"),
        (lambda rows: rows.update({key: x[:0] for key, x in rows.items()}), "has no steps"),
    ],
)
def test_a_wrong_episode_is_one_line(change, says, trained):
    agent = hidreamer.load(trained("rssm", "image"))
    rows = {key: x.copy() for key, x in load_episode(agent.recorded()[0]).items()}
    change(rows)
    with pytest.raises(ValueError, match=says) as error:
        agent.encode(rows)
    assert "\n" not in str(error.value)


def test_what_is_no_number_is_refused(trained):
    """NaN would be another agent's states for ever after; 0.5 of a picture would be black."""
    agent = hidreamer.load(trained("hrvq", "vector"))
    rows = {key: x.copy() for key, x in load_episode(agent.recorded()[0]).items()}
    before = agent.policy.state
    for bad in (np.nan, np.inf, -np.inf):
        rows["vector"][3, 1] = bad
        with pytest.raises(ValueError, match="vector of the episode is not finite"):
            agent.encode(rows)
        with pytest.raises(ValueError, match="observation 'vector' is not finite"):
            agent.policy(rows["vector"][3])
    assert agent.policy.state is before
    for bad in (None, "x", (np.zeros(4), {}), [[1], [1, 2]]):
        with pytest.raises(ValueError, match=r"observation 'vector' is a .*no array of numbers"):
            agent.policy(bad)
    with pytest.raises(ValueError, match=r"reset is \(2,\), not \(3,\)"):
        agent.make_policy(3)(np.zeros((3, 4)), reset=[True, False])
    image = hidreamer.load(trained("rssm", "image"))
    pictures = np.zeros((2, 32, 32, 3), np.uint8)
    for one, obs in ((agent, np.zeros((2, 4))), (agent, np.zeros(12)), (image, pictures)):
        with pytest.raises(ValueError, match="; 3 environments have one each: ") as error:
            one.make_policy(3)(obs)
        assert "\n" not in str(error.value)
    for bad in (None, 3, [rows], np.zeros((3, 4))):
        with pytest.raises(ValueError, match="an episode is a dict of arrays, or the path"):
            agent.encode(bad)


@pytest.mark.parametrize("bad", [0, -1, 1.5, "2", True])
def test_counts_are_whole_numbers(bad, trained):
    agent = hidreamer.load(trained("hrvq", "vector"))
    latents = agent.encode(agent.recorded()[0])
    for name, act in (
        ("count", lambda: agent.dream(latents, count=bad)),
        ("horizon", lambda: agent.dream(latents, horizon=bad)),
        ("steps", lambda: agent.collect(steps=bad)),
        ("count", lambda: agent.make_policy(bad)),
    ):
        with pytest.raises(ValueError, match=f"^{name} is {bad!r}; it must be a whole number"):
            act()
    for seed in (-1, 1.5, "x", 2**63):
        with pytest.raises(ValueError, match="seed is"):
            agent.collect(seed=seed)


def test_what_is_no_state_or_action_is_one_line(trained):
    agent = hidreamer.load(trained("hrvq", "vector"))
    other = hidreamer.load(trained("rssm", "image"))
    latents, zeros = agent.encode(agent.recorded()[0]), torch.zeros
    dream = agent.dream(latents, horizon=1)
    for act, says in (
        (lambda: agent.dream(None), "a NoneType is no Latents or Dream"),
        (lambda: agent.dream(latents.feat), "a Feat is no Latents or Dream"),
        (lambda: agent.decode(latents.stoch), "a Tensor is no Latents or Dream or Feat"),
        (lambda: agent.decode(latents, levels="L7"), "levels is 'L7'; it can be True, False, or"),
        (lambda: agent.decode(latents, levels=[True]), "levels is"),
        (lambda: agent.decode(latents, levels=-1), "levels is -1"),
        (lambda: agent.decode(latents, levels=None), "levels is None"),
        (lambda: agent.dream(latents, torch.eye(4)[0]), r"actions are \(4,\), not"),
        (lambda: other.dream(latents), "of another agent"),
        (lambda: other.decode(latents), "of another agent"),
        (lambda: agent.dream(dream, start=3), "a dream goes on from where it ended"),
        (lambda: agent.dream(dream, start=np.arange(2)), "a dream goes on from where it ended"),
        (lambda: agent.dream(dream, generator=3), "generator is a int; it must be a torch.Gen"),
        (lambda: agent.decode(dream, generator=3), "generator is a int"),
        (lambda: agent.encode(agent.recorded()[0], generator=3), "generator is a int"),
        (lambda: agent.make_policy(generator=np.random.default_rng()), "generator is a Gen"),
        (lambda: agent.dream(latents, lambda feat: zeros(1, 7)), r"\(1, 7, 4\), not \(1, 4\)"),
        (lambda: agent.dream(latents, lambda feat: zeros(5, 4)), r"\(5, 4\), not \(1, 4\)"),
        (lambda: agent.dream(latents, lambda feat: None), "None is no action"),
        (lambda: agent.dream(latents, [0.5, 1.0], 2), "an action is outside"),
    ):
        with pytest.raises(ValueError, match=says) as error:
            act()
        assert "\n" not in str(error.value)
    for start in (1.5, "x", [], None):
        with pytest.raises(IndexError, match="the latents have steps 0 to 20"):
            agent.dream(latents, start=start)
    assert agent.dream(latents, start=torch.tensor(3)).value.shape == (1, 16)


def test_a_config_can_be_copied(trained):
    config = hidreamer.load(trained("rssm", "image")).config
    assert copy.deepcopy(config).tree() == config.tree()


def test_a_file_that_is_no_episode_is_one_line(tmp_path, trained):
    agent = hidreamer.load(trained("rssm", "image"))
    (tmp_path / "x.npz").write_bytes(b"no")
    with pytest.raises(FolderError, match=r"x\.npz is no episode"):
        agent.encode(tmp_path / "x.npz")


# ---------------------------------------------------------------- dreaming and decoding


def test_dreams_go_on_and_repeat(agent, episode):
    latents = agent.encode(episode)
    actions = random_actions(agent, 2, 6)
    whole = agent.dream(latents, actions, 6, start=[3, 8], sample=False)
    assert whole.action.shape == (2, 7, agent.act_dim)
    assert torch.equal(whole.action[:, :6], actions) and not whole.action[:, 6].any()
    assert close([x[:, 0] for x in whole.feat], [x[[3, 8]] for x in latents.feat])
    for numbers in (whole.reward, whole.cont, whole.value):
        assert numbers.shape == (2, 7) and numbers.isfinite().all()
    half = agent.dream(latents, actions[:, :2], 2, start=[3, 8], sample=False)
    rest = agent.dream(half, actions[:, 2:], 4, sample=False)
    assert close([x[:, 2:] for x in whole.feat], rest.feat)
    repeated = agent.dream(latents, actions[0], 6, start=3, count=4, sample=False)
    assert close(repeated.feat, [x[:1].expand(4, -1, -1) for x in whole.feat])


def test_a_dream_of_the_true_actions_starts_at_the_episode(agent, episode):
    """Teacher: the memory after one imagined step is that of the next real one."""
    latents = agent.encode(episode)
    actions = torch.from_numpy(episode["prev_action"])
    dream = agent.dream(latents, actions[6:7], 1, start=5)
    assert torch.allclose(dream.feat.deter[0, 1], latents.deter[6], atol=1e-5)


def test_actions_and_policies_of_a_dream(agent, episode):
    latents = agent.encode(episode)
    assert agent.dream(latents, None, 2).action.shape == (1, 3, agent.act_dim)
    fixed = random_actions(agent, 1)[0]
    dream = agent.dream(latents, lambda feat: fixed.expand(len(feat.deter), -1), 2, count=3)
    assert torch.equal(dream.action, fixed.expand(3, 3, -1))
    with pytest.raises(ValueError, match="actions are"):
        agent.dream(latents, fixed.expand(3, -1), 2)
    with pytest.raises(ValueError, match="horizon is 0"):
        agent.dream(latents, None, 0)
    with pytest.raises(IndexError, match=r"start is 99; the latents have steps 0 to"):
        agent.dream(latents, None, 2, start=99)


def test_numbers_of_choices_are_actions(trained):
    agent = hidreamer.load(trained("hrvq", "vector"))
    one_hot = torch.eye(4)
    assert torch.equal(agent.action_vector([2, 0]), one_hot[[2, 0]])
    assert torch.equal(agent.action_vector(3), one_hot[3])
    assert torch.equal(agent.action_vector(one_hot[1]), one_hot[1])
    several = hidreamer.load(trained("hrvq", "multi"))
    assert several.action_vector([2, 3]).tolist() == [0, 0, 1, 0, 0, 0, 1]


def test_a_seed_fixes_the_episode(agent):
    for greedy in (True, False):
        first, again = (agent.collect(seed=1, greedy=greedy, steps=15) for _ in range(2))
        assert first.keys() == again.keys()
        for key, x in first.items():
            np.testing.assert_array_equal(x, again[key], key)


def test_decoding(agent, episode):
    latents = agent.encode(episode)
    decoded = agent.decode(latents, levels=True)
    coarse = {"rssm": [], "hrssm": ["top"], "hrvq": ["L0"]}[agent.config.dynamics.type]
    assert list(decoded) == [*coarse, "all"]
    for obs in decoded.values():
        assert obs.keys() == agent.obs_space.keys()
        for key, x in obs.items():
            assert x.shape == episode[key].shape
            if agent.obs_space[key].dtype != np.float32:
                assert x.min() >= 0.0 and x.max() <= 1.0
    count = len(agent.dynamics.shapes)
    for i, name in enumerate([*coarse, "all"]):
        for one in (i, f"L{i}", name, [i]):
            assert list(agent.decode(latents, levels=one)) == list(dict.fromkeys([name, "all"]))
    everything = agent.decode(latents, levels=[f"L{i}" for i in reversed(range(count))])
    assert list(everything) == [*coarse, "all"]
    actions = random_actions(agent, 4)
    assert agent.dream(latents, actions).action.shape[1] == 5  # as many as there are actions
    assert agent.dream(latents).action.shape[1] == 16
    dream = agent.dream(latents, None, 2, count=3)
    for key, x in agent.decode(dream)["all"].items():
        assert x.shape == (3, 3, *agent.obs_space[key].shape)
    if coarse:
        pairs = zip(decoded[coarse[0]].values(), decoded["all"].values(), strict=True)
        assert any(not torch.equal(x, y) for x, y in pairs)


# ---------------------------------------------------------------- the policy


def test_the_policy_acts_as_the_agent_does(agent):
    """In a Gymnasium loop of the suite, as ``models.Agent.act`` in the loop of a run."""
    real, env = agent.real_env(5), agent.make_env()
    obs, state = real.reset(), agent.model.initial(1)
    torch.manual_seed(1)
    expected = []
    for _ in range(25):
        inputs = {key: np.asarray(obs[key])[None] for key in (*agent.obs_space, "is_first")}
        state = agent.model.act(state, agent.model.tensors(inputs), "greedy")
        expected.append(state.action[0].numpy())
        obs = real.reset() if obs["is_last"] else real.step(expected[-1])
    obs, _ = env.reset(seed=5)
    agent.policy.reset()
    torch.manual_seed(1)
    over = False
    for action in expected:
        found = agent.policy(obs)
        assert env.action_space.contains(found)
        assert np.array_equal(agent.policy.state.action[0].numpy(), action)
        if over:
            (obs, _), over = env.reset(), False
            agent.policy.reset()
        else:
            obs, _, terminated, truncated, _ = env.step(found)
            over = terminated or truncated


def test_reset_forgets(trained):
    agent = hidreamer.load(trained("hrvq", "vector"))
    rng, results = np.random.default_rng(0), []
    first, later = rng.standard_normal((2, 4)).astype(np.float32)
    for how in ("reset", "flag", "neither"):
        policy = agent.make_policy()
        torch.manual_seed(0)
        policy(first)
        torch.manual_seed(7)
        if how == "reset":
            policy.reset()
        policy(later, reset=how == "flag")
        results.append(policy.post.feat.deter)
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_policies_side_by_side(trained):
    """Each row is an episode of its own, which the loop of the page begins where it begins."""
    agent = hidreamer.load(trained("rssm", "image"))
    envs = gymnasium.vector.SyncVectorEnv([agent.make_env] * 3)
    policy = agent.make_policy(3, greedy=False)
    obs, _ = envs.reset(seed=0)
    first, over, begun, memory = np.ones(3, bool), np.zeros(3, bool), 0, None
    for _ in range(25):
        new = np.array([env.unwrapped._steps == 0 for env in envs.envs])
        actions = policy(obs, reset=first)
        assert actions.shape == (3,)
        deter = policy.post.feat.deter[:, 0]
        memory = deter[0] if memory is None else memory  # at any episode's first step
        assert np.array_equal([torch.allclose(x, memory, atol=1e-5) for x in deter], new)
        begun += int(new.sum())
        obs, _, terminated, truncated, _ = envs.step(actions)
        first, over = over, terminated | truncated
    assert begun == 6
    envs.close()


def test_observations_of_other_environments(trained):
    """A bare array, another size of picture, a number of a choice, float64."""
    image = hidreamer.load(trained("rssm", "image")).policy
    assert image.read(np.zeros((64, 64, 3), np.uint8))["image"].shape == (64, 64, 3)
    picture = np.full((100, 80, 3), 7, np.uint8)
    assert (image.read({"image": picture, "more": 1})["image"] == 7).all()
    shuffled = np.random.default_rng(0).integers(0, 256, (3, 64, 64), np.uint8)  # channels first
    assert np.array_equal(image.read(shuffled)["image"], shuffled.transpose(1, 2, 0))
    assert image.read(shuffled[:, :32, :32])["image"].shape == (64, 64, 3)
    with pytest.raises(ValueError, match=r"observation 'image' is uint8 \(64, 3, 64\)"):
        image.read(shuffled.swapaxes(0, 1))
    with pytest.raises(ValueError, match=r"observation 'image' is float64"):
        image.read(np.zeros((3, 3)))
    with pytest.raises(ValueError, match="the observation has no image"):
        image.read({"pixels": picture})
    vector = hidreamer.load(trained("hrvq", "vector")).policy
    assert vector.read(np.ones((2, 2)))["vector"].dtype == np.float32
    assert vector.read(2)["vector"].tolist() == [0, 0, 1, 0]
    assert fit("number", Box(-np.inf, np.inf, (1,)), 0, ()).tolist() == [0]  # no choice
    several = hidreamer.load(trained("hrvq", "multi")).policy
    with pytest.raises(ValueError, match="a dict of image, vector"):
        several.read(np.ones(4))


def test_a_time_limit_cuts_where_training_cuts(trained):
    """Also one that is no multiple of the action repeat, or below it."""
    agent = hidreamer.load(trained("rssm", "image"))
    assert agent.config.env.action_repeat == 2
    for frames, steps in ((5, 3), (1, 1)):
        tree = agent.config.tree()
        tree["env"]["time_limit"] = frames
        agent.config = type(agent.config)(tree)
        rows, env, taken, over = agent.collect(seed=0), agent.make_env(), 0, False
        assert len(rows["reward"]) == steps + 1 and rows["is_last"][-1]
        env.reset(seed=0)
        while not over:
            _, _, terminated, over, _ = env.step(0)
            taken += 1
        assert taken == steps and not terminated


def test_its_environment_is_that_of_an_evaluation(agent, monkeypatch):
    """Whole games also where training ends an episode with a life."""
    from envs import open_env

    asked = []
    opened = lambda *args, **keys: asked.append(keys) or open_env(*args, **keys)
    monkeypatch.setattr("library.agent.envs.open_env", opened)
    agent.make_env().close()
    assert asked == [{"evaluation": True}]
    block = agent.config.env.tree()
    block["atari"] = block["atari"] | {"lives": "reset"}
    lives = [open_env("atari_breakout", block, 0, evaluation=x).suite._lives for x in (True, False)]
    assert lives == ["unused", "reset"]


def test_collected_episodes_can_be_encoded(agent):
    rows = agent.collect(seed=3)
    assert len(rows["reward"]) == 21 and rows["is_last"].tolist() == [False] * 20 + [True]
    assert len(agent.encode(rows).value) == 21
    assert len(agent.collect(seed=3, steps=4)["reward"]) == 5
    assert not rows["prev_action"][0].any() and rows["prev_action"][1:].any(-1).all()


# ---------------------------------------------------------------- the documentation


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_the_example(case, trained, tmp_path):
    """From another folder, as it is."""
    words = [sys.executable, str(ROOT / "examples" / "look_inside.py"), str(trained(*case))]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = forked.run(words, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "L0: (21, " in done.stdout and "return of chance in the dream" in done.stdout
    assert (tmp_path / "levels.png").exists() == (case[1] in ("image", "grid", "multi"))


def test_the_example_without_a_run_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["look_inside.py", "nope"])
    with pytest.raises(SystemExit, match=r"^error: there is no folder nope: name that of a run"):
        runpy.run_path(str(ROOT / "examples" / "look_inside.py"))


def test_the_code_of_the_page_runs(trained, tmp_path, monkeypatch):
    """Every block of docs/library.md, in order, of the agent that it names."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(trained("hrvq", "multi"))
    text = (ROOT / "docs" / "library.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 5
    monkeypatch.setattr("library.push", lambda folder, name: None)  # there is no network
    names = {}
    for block in blocks:
        exec(block.replace('"hf:ORG/NAME"', '"breakout-agent"').replace("1024", "3"), names)
    assert names["pictures"]["L0"]["image"].shape == (1, 16, 64, 64, 3)
    assert names["envs"].num_envs == 3 and (tmp_path / "breakout-agent" / "README.md").exists()


def test_several_dreams_of_several_starts_lie_start_by_start(trained):
    agent = hidreamer.load(trained("rssm", "image"))
    latents = agent.encode(agent.recorded()[1])
    dream = agent.dream(latents, start=[2, 5], count=3, horizon=1)
    assert torch.allclose(dream.feat.deter[:, 0], latents.deter[[2, 2, 2, 5, 5, 5]], atol=1e-5)
