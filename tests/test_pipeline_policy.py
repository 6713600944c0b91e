"""The policy stage: the lineage's faults, both algorithms, evaluation, resuming."""

import json

import numpy as np
import pytest
import torch
from gymnasium import spaces
from small_pipeline import copied, made, read, rows, run, run_killed, same
from small_runs import one_line
from test_pipeline import recording
from test_pipeline_world_model import CPU, toy_batch, toy_model

import networks
import run_config
import tools
from hidreamer import checkpoint, evaluation
from hidreamer.losses import clipped_gain, reinforce_gain
from pipeline import policy, training, world_model
from pipeline.token_agent import TokenAgent
from pipeline.token_model import TokenWorldModel, Windows, token_rows

STAGES = ("collect", "encoder", "tokenizer", "world_model")


def test_the_clipped_surrogate_by_hand():
    before = torch.zeros(4)
    after = torch.tensor([1.0, 1.5, 1.5, 0.5]).log().requires_grad_()
    adv = torch.tensor([2.0, 1.0, -1.0, -1.0])
    gain = clipped_gain(after, before, adv, 0.2)
    assert torch.allclose(gain, torch.tensor([2.0, 1.2, -1.5, -0.8]))
    gain.sum().backward()
    assert after.grad.tolist() == pytest.approx([2.0, 0.0, -1.5, 0.0])


def test_the_first_pass_of_ppo_is_reinforce():
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    adv = torch.tensor([0.5, -3.0])
    grads = []
    for gain in (reinforce_gain(logp, adv), clipped_gain(logp, logp.detach(), adv, 0.2)):
        grads.append(torch.autograd.grad(gain.sum(), logp)[0])
    assert torch.equal(*grads)


# ---------------------------------------------------------------- learning, and why theirs did not


@pytest.fixture(scope="module")
def toy():
    return toy_model()[:2]


def learned(toy, updates=60, blind=False, **overrides):
    """Mean reward of dreams before and after learning. blind: rewards are shuffled."""
    settings, model = toy
    settings = tools.load_config([], settings.flat() | overrides)
    torch.manual_seed(0)
    agent = TokenAgent(model.eval(), spaces.Discrete(2), settings)
    agent.make_optimizers()
    rng, paid = np.random.default_rng(1), []
    if blind:
        original = model.reward.forward
        agent.world_model.reward.forward = lambda x: original(x[torch.randperm(len(x))])
    try:
        for _ in range(updates):
            values = agent.update(agent.tensors(toy_batch(rng, 16)))
            paid.append(dict(zip(agent.metric_names, values.tolist(), strict=True)))
    finally:
        if blind:
            del agent.world_model.reward.forward
    mean = lambda part: np.mean([each["imag_reward"] for each in part])
    return mean(paid[:1]), mean(paid[-10:]), agent, paid


@pytest.mark.parametrize("algorithm", ["reinforce", "ppo"])
@pytest.mark.parametrize("memory", ["true", "false"])
def test_an_agent_learns_on_a_frozen_world_model(algorithm, memory, toy):
    before, after, _, _ = learned(
        toy, **{"pipeline.policy.algorithm": algorithm, "pipeline.policy.memory": memory}
    )
    assert before < 0.3 and after > 0.5


def test_it_does_not_learn_from_shuffled_rewards(toy):
    """The negative control of the test above."""
    _, after, _, _ = learned(toy, blind=True)
    assert after < 0.4


def test_the_critic_says_values_not_their_symlog(toy):
    """The lineage's critic learned symlog values and used them raw: 0.39 where 5 was right."""
    settings, model = toy
    quick = {"critic.lr": 1e-2, "critic.slow_rate": 0.1}
    torch.manual_seed(0)
    settings = tools.load_config([], settings.flat() | quick)
    agent = TokenAgent(model.eval(), spaces.Discrete(2), settings)
    agent.make_optimizers()
    agent.world_model.reward.forward = lambda x: Constant(x.shape[:-1], 0.5)
    agent.world_model.cont.forward = lambda x: Constant(x.shape[:-1], 1.0)
    rng = np.random.default_rng(0)
    try:
        for _ in range(200):
            values = agent.update(agent.tensors(toy_batch(rng, 8)))
    finally:
        del agent.world_model.reward.forward, agent.world_model.cont.forward
    found = dict(zip(agent.metric_names, values.tolist(), strict=True))
    assert found["imag_value"] == pytest.approx(0.5 / (1.0 - 0.9), rel=0.15)


class Constant:
    """A distribution that always says the same."""

    def __init__(self, shape, value):
        self.value = torch.full(shape, value)

    def mode(self):
        return self.value

    mean = mode


def test_rewards_and_actions_stay_with_the_row_they_led_to():
    """The lineage's context paired a frame with the action before the one that led there, and its
    seeds lay behind the rewards.
    """
    part = recording([30, 20, 30])
    part.reward = np.where(np.arange(80) % 7 == 3, 1.0, 0.0).astype(np.float32)
    part.action = np.eye(3, dtype=np.float32)[np.arange(80) % 3]
    windows = Windows([part], [token_rows(part, np.arange(80)[:, None], None)], 64, 6, True)
    places = set()
    for _ in range(20):
        batch = windows.sample()
        row = batch["index"][..., 0]
        assert np.array_equal(batch["reward"] == 1.0, row % 7 == 3)
        assert np.array_equal(batch["prev_action"].argmax(-1), row % 3)
        places |= set(np.nonzero(batch["reward"])[1].tolist())
    assert places == set(range(6)), "rewards lie at every place of a window, the last one too"


def test_frozen_is_frozen_and_finetuning_trains_all_but_encoder_and_codes(toy):
    settings, model = toy
    for finetune in ("false", "true"):
        changed = tools.load_config([], settings.flat() | {"pipeline.policy.finetune": finetune})
        model.requires_grad_(True)
        model.encoder.requires_grad_(False)
        model.dynamics.quantizer.requires_grad_(False)
        agent = TokenAgent(model, spaces.Discrete(2), changed)
        agent.make_optimizers()
        before = {key: x.clone() for key, x in agent.state_dict().items()}
        agent.update(agent.tensors(toy_batch(np.random.default_rng(0), 4)))
        now = agent.state_dict()
        moved = {key for key, x in before.items() if not torch.equal(x, now[key])}
        inside = {key for key in moved if key.startswith("world_model.")}
        assert bool(inside) == (finetune == "true")
        frozen = ("world_model.encoder.", "world_model.dynamics.quantizer.")
        assert not [key for key in moved if key.startswith(frozen)]
        assert any(key.startswith("behavior.actor.") for key in moved)


def test_the_continue_head_and_the_dreams_agree_on_the_discount(toy):
    """With ``imag.contdisc`` the head learns the discount, which dreams must not count again."""
    settings, model = toy
    changed = tools.load_config([], settings.flat() | {"imag.contdisc": True})
    made = TokenWorldModel(model.encoder, model.dynamics.quantizer, 2, changed)
    batch = TokenAgent(made, spaces.Discrete(2), changed).tensors(
        toy_batch(np.random.default_rng(0), 4)
    )
    torch.nn.init.zeros_(made.cont.out.weight)
    torch.nn.init.constant_(made.cont.out.bias, float(torch.logit(torch.tensor(0.9))))
    losses, carry, post, _, _ = made.loss(networks.preprocess(batch))
    entropy = -(0.9 * np.log(0.9) + 0.1 * np.log(0.1))  # the least that there is
    assert losses["cont"].mean().item() == pytest.approx(entropy, abs=1e-5)
    agent = TokenAgent(made, spaces.Discrete(2), changed)
    start = made.dynamics.starts(carry, post, 2)
    traj = agent.behavior.imagine(made, start, torch.zeros(8))
    assert traj.disc.unique().tolist() == pytest.approx([0.9])


def test_without_memory_the_policy_sees_codes_alone(toy):
    settings, model = toy
    changed = tools.load_config([], settings.flat() | {"pipeline.policy.memory": "false"})
    agent = TokenAgent(model, spaces.Discrete(2), changed)
    x = torch.randn(5, model.feat_dim)
    other = x.clone()
    other[:, model.dynamics.stoch_dim :] = 0.0
    assert torch.equal(agent.behavior.actor(x).probs[0], agent.behavior.actor(other).probs[0])
    assert agent.behavior.actor.net.blocks[0].linear.in_features == model.dynamics.stoch_dim


# ---------------------------------------------------------------- the stage


def test_the_gate(acting):
    gate = read(acting / "policy")
    row = rows(acting / "policy", "In the real game")["pong: mean return"]
    assert row["baselines"].keys() == {"random play", "online"}
    assert row["value"] == np.mean(gate["facts"]["returns"]["here"])
    assert all(len(x) == 2 for x in gate["facts"]["returns"].values())
    online = run_config.saved_config(acting / "policy" / "online")
    assert online["steps"] == 240 * 4 and online["task"] == "atari_pong"
    assert (acting / "policy/online/checkpoints/latest.pt").exists()


def test_episodes_that_were_cut_are_a_warning(acting):
    """Pong's score is final after 21 points: random play that is cut looks better than it is."""
    found = read(acting / "policy")  # env.time_limit cuts every episode of the debug preset
    assert any("cut by eval_time_limit 6" in warning for warning in found["warnings"])
    whole = {"return": -21.0, "truncated": 0.0}
    rows = policy.score_rows("pong", {"here": [whole, whole], "random play": [whole, whole]})
    above = "pong: above random play by"
    assert [row.metric for row in rows] == ["pong: mean return", above, "pong: standard error"]
    assert rows[1].beaten_by()  # as good is not better
    cut = policy.score_rows("pong", {"here": [whole], "random play": [whole | {"truncated": 1.0}]})
    assert cut[3].beaten_by() and cut[3].value == 1.0


def test_random_play_seldom_passes_for_an_agent():
    """A higher mean of ten episodes is had by chance in every second try."""
    rng, passed = np.random.default_rng(0), 0
    for _ in range(200):
        here, other = rng.choice([-21.0, -20.0, -19.0], (2, 10), p=[0.7, 0.2, 0.1])
        as_episodes = lambda x: [{"return": float(y), "truncated": 0.0} for y in x]
        scores = {"here": as_episodes(here), "random play": as_episodes(other)}
        passed += not any(row.beaten_by() for row in policy.score_rows("pong", scores))
    assert 0 < passed < 12
    assert policy.shown_above([3.0, 3.0], [1.0, 1.0]) == 2.0


@pytest.mark.parametrize("preset", ["pipeline", "pipeline_small"])
def test_the_presets_play_whole_games_and_ten_of_them(preset):
    settings = tools.load_config([preset], {})
    assert evaluation.time_limit(settings) >= 108_000
    assert settings.pipeline.policy.eval_episodes >= 10


def test_the_online_baseline_has_the_steps_and_updates_of_the_stage(acting):
    log = (acting / "policy/online/metrics.jsonl").read_text().splitlines()
    assert any(json.loads(line).get("updates") for line in log)
    settings = tools.load_config(["pipeline_small"], {})
    changed = policy.online_config(settings, "pong")
    block = settings.pipeline.policy
    steps = changed.steps / settings.env.action_repeat - changed.replay.prefill
    updates = steps * changed.replay.ratio / (changed.replay.batch * changed.replay.length)
    assert updates == pytest.approx(block.updates, rel=0.1)


@pytest.mark.parametrize(
    ("key", "value"), [("replay.prefill", 7), ("expl.behavior", "random"), ("env.count", 3)]
)
def test_keys_of_the_online_baseline_are_the_stages_where_there_is_one(key, value):
    """Another --replay.prefill had shown the old numbers."""
    load = lambda online, **keys: policy.Policy.identity(
        tools.load_config(["pipeline_debug"], {"pipeline.policy.online": online, **keys})
    )
    before, now = load(True), load(True, **{key: value})
    assert run_config.differences(before, now).startswith(f"{key} ")
    assert load(False) == load(False, **{key: value})
    del before[key]  # as an older version wrote it: that is shown as it was
    assert not run_config.differences(before, now)


def test_a_killed_policy_continues_to_the_same_end(acting, tmp_path, monkeypatch):
    words = ["--online", "false"]
    whole = copied(acting, tmp_path / "whole", *STAGES)
    assert run("policy", whole, *words) == 0
    folder = copied(acting, tmp_path / "killed", *STAGES)
    run_killed(monkeypatch, "policy", folder, 3, *words)
    assert run("policy", folder, *words) == 0
    assert same(folder / "policy", whole / "policy")
    both = [read(x / "policy")["facts"]["returns"] for x in (folder, whole)]
    assert both[0] == both[1]
    assert made(whole / "policy") == made(acting / "policy")


def test_a_policy_that_was_begun_on_other_windows_is_refused(acting, tmp_path, monkeypatch, capsys):
    folder = copied(acting, tmp_path / "run", *STAGES)
    run_killed(monkeypatch, "policy", folder, 3, "--online", "false")
    latest = folder / "policy" / "checkpoints" / "latest.pt"
    state = checkpoint.load_checkpoint(latest)
    del state["body"]["across"]  # as an older version saved it
    for name in ("latest.pt", "previous.pt"):
        checkpoint.save_checkpoint(latest.with_name(name), state)
    capsys.readouterr()
    assert run("policy", folder, "--online", "false") == 2
    one_line(capsys, "begun by an older version", "move")


def test_a_damaged_online_baseline_is_told(acting, tmp_path, capsys):
    folder = copied(acting, tmp_path / "run", *STAGES, "policy")
    (folder / "policy" / "manifest.json").unlink()
    for path in (folder / "policy/online/checkpoints").glob("*.pt"):
        path.write_bytes(b"no checkpoint")
    capsys.readouterr()
    assert run("policy", folder) == 2
    one_line(capsys, "policy/online away", "python -m pipeline policy")


@pytest.mark.parametrize("words", [["--algorithm", "ppo"], ["--finetune"], ["--game", "breakout"]])
def test_variants(words, acting, tmp_path):
    folder = copied(acting, tmp_path / "run", *STAGES)
    assert run("policy", folder, *words, "--online", "false") == 0
    assert made(folder / "policy") != made(acting / "policy")


def test_wrong_settings_are_told(acting, tmp_path, capsys):
    folder = copied(acting, tmp_path / "run", *STAGES)
    assert run("policy", folder, "--game", "pacman") == 2
    one_line(capsys, "pipeline.policy.game", "breakout")
    assert run("policy", folder, "--imag.starts", 9) == 2
    one_line(capsys, "imag.starts")
    assert run("policy", folder, "--dynamics.deter", 18) == 2
    one_line(capsys, "world_model", "dynamics.deter 16 -> 18")


def test_what_was_trained_is_what_is_loaded(acting):
    settings = tools.load_config(["pipeline_debug"], {})
    model = world_model.load(acting, settings, CPU, 0)
    agent = TokenAgent(model, spaces.Discrete(6), settings)
    training.load_params(acting / "policy" / "agent.pt", agent)
    assert agent.act_dim == 6
