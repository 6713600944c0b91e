"""``python -m analysis``: what is measured of trained agents, and its page in a real browser."""

import dataclasses
import json
import re
import sys
import types

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from small_runs import one_line
from test_agent import make
from test_report import BROWSER, FRAME, Page, browse

import analysis.__main__ as command
import dreamer
import forked
import networks
from analysis import (
    attention,
    factors,
    inspection,
    latents,
    loading,
    pictures,
    readout,
    recording,
    report,
    study,
    summary,
)
from analysis.latents import CONTEXT, HORIZONS
from comparison import runs
from conftest import ROOT
from envs import make_env
from hidreamer.dynamics.base import Feat
from hidreamer.spaces import random_action

STATES = ("rssm", "hrssm", "hrvq")


def train(folder, state, seed=0, task="minatar_breakout", *args):
    words = ["--configs", "debug", "--task", task, "--dynamics.type", state, "--seed", str(seed)]
    words += ["--steps", "60", "--video", "false", "--eval_episodes", "0"]
    words += ["--env.action_repeat", "1", *args, "--logdir", str(folder)]
    assert dreamer.main(words) == 0
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of seconds: a folder with two seeds of the flat state and one of the others."""
    folder = tmp_path_factory.mktemp("runs")
    for state in STATES:
        train(folder / state / "0", state)
    train(folder / "rssm" / "1", "rssm", 1)
    return folder


@pytest.fixture(scope="module")
def subjects(trained):
    return {subject.name: subject for subject in loading.load_all(runs.find([trained]))}


@pytest.fixture(scope="module")
def material(subjects):
    episodes = loading.collect(list(subjects.values()), 45, 80)
    return study.Material(episodes, "minatar_breakout")


@pytest.fixture(scope="module")
def page(trained, tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    words = [trained, "--episodes", "20", "--longest", "60", "--out", out]
    assert command.main(list(map(str, words))) == 0
    return out


# ---------------------------------------------------------------- factors


def test_breakout_is_read_from_its_planes():
    env = make_env("minatar_breakout", {**ENV, "minatar": {"sticky": 0.0, "actions": "minimal"}}, 3)
    obs, read = env.reset(), factors.reader(env, "minatar_breakout")
    rng = np.random.default_rng(0)
    for _ in range(12):
        game, values = env.suite.game.env, read(obs)
        assert values["paddle x"] == game.pos and values["ball x"] == game.ball_x
        assert values["ball y"] == game.ball_y
        assert values["number of bricks"] == game.brick_map.sum()
        assert values["ball dx"] == game.ball_x - game.last_x
        obs = env.step(random_action(env.act_space, 1, rng)[0])


ENV = {"action_repeat": 1, "time_limit": 0, "size": [64, 64], "invalid": "stop"}


@pytest.mark.parametrize("game", factors.PLANES)
def test_every_minatar_game_has_ego_and_world(game):
    env = make_env(f"minatar_{game}", {**ENV, "minatar": {}}, 0)
    values = factors.reader(env, f"minatar_{game}")(env.reset())
    kinds = {factors.kind(f"minatar_{game}", name) for name in values}
    assert kinds == {factors.EGO, factors.WORLD}


@pytest.mark.parametrize("name", [f"{base}-v1" for base in factors.CLASSIC])
def test_classic_control_has_its_state_by_name(name):
    name = name.replace("v1", "v0") if "Mountain" in name else name
    env = make_env(f"gym_{name}", {**ENV, "gym": {}}, 0)
    obs, read = env.reset(), factors.reader(env, f"gym_{name}")
    obs = env.step(random_action(env.act_space, 1, np.random.default_rng(0))[0])
    values = read(obs)
    assert np.isfinite(list(values.values())).all() and len(values) >= 2
    if name.startswith("CartPole"):
        assert list(values.values()) == pytest.approx(obs["vector"].tolist(), abs=1e-6)
    if name.startswith("Pendulum"):
        seen = [values["angle cosine"], values["angle sine"], values["angular velocity"]]
        assert seen == pytest.approx(obs["vector"].tolist(), abs=1e-6)


def test_pong_is_read_from_its_memory():
    env = make_env("atari_pong", {**ENV, "atari": {"noops": 0}}, 0)
    env.reset()
    read, ram = factors.reader(env, "atari_pong"), env.suite.ram()
    assert read({})["player y"] == ram[51] and np.isnan(read({})["ball x"])  # not in play yet
    assert factors.kind("atari_pong", "player score") == factors.WORLD


def test_doom_is_read_by_name_and_its_angle_goes_round():
    named = {"HEALTH": 70.0, "POSITION_X": -3.0, "ANGLE": 90.0, "KILLCOUNT": 2.0}
    values = factors.doom(dict(reversed(named.items())))
    assert values["health"] == 70.0 and values["position x"] == -3.0
    assert (values["angle sine"], values["angle cosine"]) == pytest.approx((1.0, 0.0))
    assert factors.kind("vizdoom_basic", "killcount") == factors.WORLD


def test_dmc_has_joints_by_name():
    pytest.importorskip("dm_control")
    env = make_env("dmc_walker_walk", {**ENV, "dmc": {"image": False, "proprio": True}}, 0)
    env.reset()
    values = factors.reader(env, "dmc_walker_walk")({})
    physics = env.suite._env.physics
    assert values["left_knee position"] == physics.named.data.qpos["left_knee"]
    assert list(values.values()) == pytest.approx(physics.get_state().tolist())


def test_a_task_without_named_factors_has_no_reader():
    env = make_env("dummy_vector", ENV, 0)
    assert factors.reader(env, "dummy_vector") is None


# ---------------------------------------------------------------- latents


def observed(subject, episode, seed=0):
    obs = loading.preprocessed(subject.agent, episode.rows)
    random = latents.generator(obs, seed)
    with torch.no_grad():
        return obs, *subject.agent.world_model.observe(obs, generator=random)


@pytest.mark.parametrize("state", STATES)
def test_levels_are_slices_of_the_state_and_their_classes_name_them(subjects, material, state):
    """One-hots of the classes, embedded again, are the numbers that the heads read."""
    subject = subjects[f"{state}/0"]
    dynamics = subject.agent.world_model.dynamics
    _, _, post, _ = observed(subject, material.episodes[0])
    parts = latents.parts(dynamics, post.feat)
    names = latents.names(dynamics)
    assert torch.equal(torch.cat([parts[name] for name in names], -1), post.feat.stoch)
    assert parts["all"].shape[-1] == dynamics.feat_dim
    found = dict(zip(latents.names(dynamics), dynamics.classes(post), strict=True))
    for i, name in enumerate(names):
        onehot = torch.nn.functional.one_hot(found[name], dynamics.shapes[i][1]).float()
        torch.testing.assert_close(latents.embedded(dynamics, i, onehot), parts[name])


@pytest.mark.parametrize("state", STATES)
def test_what_is_held_is_held(subjects, material, state):
    subject = subjects[f"{state}/0"]
    dynamics = subject.agent.world_model.dynamics
    _, _, post, _ = observed(subject, material.episodes[0])
    before = latents.parts(dynamics, post.feat)
    after = latents.parts(dynamics, latents.resampled(dynamics, post, {0}))
    for name in latents.names(dynamics):
        assert torch.equal(before[name], after[name]) == (name != "L0")
    assert torch.equal(before["deter"], after["deter"])


class Counter(torch.nn.Module):
    """A world model whose memory is the sum of all actions so far: its dreams are exact."""

    def __init__(self):
        super().__init__()
        self.dynamics = self

    def starts(self, carry, post, n):
        return post.feat.map(lambda x: x[0])

    def imagine(self, carry, action, horizon, generator):
        total = carry.deter[:, None] + action.cumsum(1)
        total = torch.cat([carry.deter[:, None], total], 1)  # (N, H+1, A)
        return None, Feat(total, total), None


def test_a_prediction_stands_at_the_step_that_it_is_about():
    """Sums of actions: any shift between prediction, action and step would show."""
    action = torch.randn(1, 40, 2)
    total = action.cumsum(1)
    model = Counter()
    post = type("Post", (), {"feat": Feat(total, total)})
    found = latents.open_loop(model, None, post, action)
    for horizon in HORIZONS[1:]:
        first = CONTEXT - 1 + horizon
        assert torch.isnan(found[horizon].deter[:first]).all()
        torch.testing.assert_close(found[horizon].deter[first:], total[0, first:])
    short = latents.open_loop(model, None, post, action[:, :CONTEXT])
    assert torch.isnan(short[15].deter).all()


def test_labels_of_a_real_agent_shifted_by_one_step_are_read_worse(material, tmp_path):
    """The whole way from episodes to scores, of what a random policy moves at random. (Where the
    ball was a step before is no such label: Breakout shows it as the ball's trail.)
    """
    sizes = ["--encoder.units", "128", "--encoder.depth", "8"]
    folder = train(tmp_path / "run", "rssm", 0, "minatar_breakout", *sizes)
    (subject,) = loading.load_all(runs.find([folder]))
    found = study.read_all(subject, subject.agent.world_model, material)
    embed = study.features(subject.agent.world_model, found, 0)["encoder"]
    y = material.factors["paddle x"][:, None]
    for x in (material.pixels(["grid"], 0), embed):
        right = readout.scores(x, y, material.episode)
        for shift in (-1, 1):
            wrong = readout.scores(x, np.roll(y, shift, 0), material.episode)
            for kind in ("linear", "mlp"):
                assert wrong[kind][0] < right[kind][0] - 0.2, (shift, kind, right, wrong)


def test_the_raw_observation_is_as_old_as_the_dream(material):
    now, late = material.pixels(["grid"], 0), material.pixels(["grid"], 5)
    start = 0
    for episode in material.episodes:
        end = start + len(episode)
        first = min(CONTEXT - 1 + 5, len(episode))
        assert np.isnan(late[start : start + first]).all()
        assert np.array_equal(late[start + first : end], now[start + first - 5 : end - 5])
        start = end


def test_all_are_judged_on_everybodys_episodes(subjects, material):
    by = [episode.by for episode in material.episodes]
    assert {by.count(name) for name in subjects} == {11, 12}
    assert material.episodes[0].rows["is_first"].sum() == 1
    assert (material.episodes[0].rows["prev_action"][0] == 0).all()


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 15])
def test_no_policy_has_all_episodes_that_probes_are_tested_on(count):
    """Every fifth episode is one, and of five runs in a fixed order the fifth played all of them;
    of four runs every fold of a contrast was one policy's.
    """
    by, episode = loading.turns(count, 40), np.arange(40)
    assert np.ptp(np.bincount(by, minlength=count)) <= 1
    for side in readout.split(episode):
        assert len(set(by[side])) > 1
    assert len(set(by[readout.split(episode).test])) >= min(count, 3)
    for fold in range(4):
        assert len(set(by[episode % 4 == fold])) > 1


def test_runs_that_differ_in_more_than_the_seed_are_said_to(subjects):
    """Runs of one latent state and two learning rates have an interval, and it is not of seeds."""
    alike = list(subjects.values())
    assert loading.differing(alike) == ""
    other = alike[1].run
    changes = {"config": other.config | {"model.lr": 0.5}, "step": 7, "complete": False}
    other = dataclasses.replace(other, **changes)
    text = loading.differing([alike[0], dataclasses.replace(alike[1], run=other), *alike[2:]])
    assert "model.lr: " in text and "frames of training: " in text and " 7 (minatar" in text
    report = {"models": {}, "runs": {}, "differing": text}
    (line,) = summary.limit_lines(report)
    assert text in line
    assert not summary.limit_lines(report | {"differing": ""})


def test_nats_are_of_the_posterior_over_the_prior():
    agent, batch = make(batch=1, length=6)
    model, obs = agent.world_model, networks.preprocess(batch)
    for p in model.dynamics.parameters():  # outputs that begin at zero would be uniform
        torch.nn.init.normal_(p, std=0.3)
    found = latents.read(model, obs, 0)
    with torch.no_grad():
        _, post, _ = model.observe(obs, generator=latents.generator(obs, 0))
    ((after, before),) = post.levels
    p, q = (0.99 * x[0].softmax(-1) + 0.01 / x.shape[-1] for x in (after, before))  # (T, S, K)
    nats = lambda p, q: (p * (p.log() - q.log())).sum((-2, -1)).numpy()
    assert np.allclose(found.kl[:, 0], nats(p, q), atol=1e-4)
    assert not np.allclose(found.kl[:, 0], nats(q, p), atol=1e-2)


def test_codes_that_change_are_counted_by_step():
    """Of 2 and 20 changes between steps; episodes alike, it would be 0.5."""
    one = lambda codes: types.SimpleNamespace(
        codes={"L0": np.array(codes)[:, None]},
        kl=np.zeros((len(codes), 1)),
        post_entropy=np.zeros((len(codes), 1)),
    )
    dynamics = types.SimpleNamespace(shapes=((1, 3),))
    model = types.SimpleNamespace(dynamics=dynamics)
    subject = types.SimpleNamespace(agent=types.SimpleNamespace(world_model=model))
    found = [one([0, 1, 2]), one([1] * 21), one([0])]
    assert study.code_use(subject, found)["L0"]["changed"] == pytest.approx(2 / 22)
    assert study.code_use(subject, [one([0])])["L0"]["changed"] is None
    even = one([0, 1, 0, 1])
    even.kl[:] = [[9.0], [1.0], [2.0], [3.0]]  # the first step has nothing before it
    found = study.code_use(subject, [even])["L0"]
    assert found["perplexity"] == pytest.approx(2.0) and found["kl"] == pytest.approx(2.0)


# ---------------------------------------------------------------- pictures


def test_attention_is_that_of_the_forward_pass(subjects, material):
    """Weights that were recomputed give the same output as the model's own attention did."""
    subject = subjects["hrvq/0"]
    model = subject.agent.world_model
    obs = loading.preprocessed(subject.agent, max(material.episodes, key=len).rows)
    found = attention.look(model, obs)
    again = attention.look(model, obs)  # codes are drawn, with the same numbers each time
    assert np.array_equal(found.by_level, again.by_level)
    assert found.by_level.sum(-1) == pytest.approx(np.ones(found.by_level.shape[:2]), abs=1e-5)
    assert found.by_distance.sum(-1) == pytest.approx(
        np.ones(found.by_distance.shape[:2]), abs=1e-5
    )
    # The hierarchical mask: finer levels and the action look at no level finer than L0 of the past.
    assert found.by_distance.shape[-1] == model.dynamics.window
    past_l1 = found.by_level[:, 0, 1]  # L0 may see the past of L1
    assert (past_l1 > 0).all() and (found.by_level[:, 0, 0] > 0).all()
    assert "project" not in vars(model.dynamics.transformer.layers[0])  # nothing stays behind
    assert attention.look(subjects["rssm/0"].agent.world_model, obs) is None


@pytest.mark.parametrize("state", STATES)
def test_counterfactual_dreams_start_alike_and_part(subjects, material, state):
    subject = subjects[f"{state}/0"]
    env = make_env("minatar_breakout", {**ENV, "minatar": {}}, 0)
    names = pictures.action_names(env)
    assert names == ["nothing", "left", "right"]
    scene = pictures.follow(subject, max(material.episodes, key=len))
    strip = pictures.counterfactual(scene, env.act_space, names)
    labels = [label for label, _ in strip.rows]
    assert labels == [
        "truth",
        "dream, with the actions that were taken",
        *(f"dream: {n}" for n in names),
    ]
    short = scene._replace(obs={key: x[:, :8] for key, x in scene.obs.items()})
    assert pictures.counterfactual(short, env.act_space, names) is None


def test_sequences_of_every_kind_of_action():
    from gymnasium import spaces

    box = pictures.sequences(spaces.Box(-1, 1, (3,)), [])
    assert list(box) == [
        "nothing",
        *(f"{w} of action {i}" for i in (0, 1) for w in ("least", "most")),
    ]
    multi = pictures.sequences(spaces.MultiDiscrete([3, 4]), [])
    assert len(multi) == 3 and all(x.sum() == 2 and len(x) == 7 for x in multi.values())


# ---------------------------------------------------------------- the page


def test_the_json_has_every_number(page, trained):
    found = json.loads((page / "analysis.json").read_text())
    assert set(found["runs"]) == {"rssm/0", "rssm/1", "hrssm/0", "hrvq/0"}
    assert found["episodes"]["by"] == dict.fromkeys(found["runs"], 5)
    for run in found["runs"].values():
        assert set(run["probes"]["trained"]) == {str(h) for h in HORIZONS}
        parts = set(run["probes"]["trained"]["0"])
        assert {"encoder", "deter", "all", *run["levels"]} <= parts
        assert set(run["information"]["levels"]) == set(run["levels"])
        cells = [x for level in run["information"]["levels"].values() for x in level.values()]
        assert any(x["untrained"] > 0 for x in cells)  # random codes of a board tell something
        assert any(x["untrained"] != x["bits"] for x in cells)
        assert (run["contrast"] is None) == (len(run["levels"]) == 1)
        for horizon, parts in run["probes"]["trained"].items():  # beside what a dream adds
            assert ("before the dream" in parts) == (horizon != "0")
    assert found["models"]["rssm"]["seeds"] == 2
    cell = found["models"]["rssm"]["means"]["linear"]["all"]
    assert cell["low"] <= cell["value"] <= cell["high"]
    assert found["models"]["hrvq"]["means"]["linear"]["all"]["low"] is None  # one seed
    assert "L0+L1" in found["models"]["hrvq"]["means"]["linear"]
    assert found["made"]["commit"]
    assert str(ROOT) not in found["made"]["command"]


def test_the_page_needs_nothing_else(page):
    text = (page / "analysis.html").read_text()
    seen = Page(text)
    assert not {"script", "link", "iframe"} & set(seen.tags)
    assert all(load.startswith("data:image/png;base64,") for load in seen.loads)
    assert seen.tags.count("img") > 30 and seen.tags.count("svg") >= 10
    assert len(text) < 3_000_000


@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(page, width, tmp_path):
    """Nothing sticks out sideways, every figure has a height, and pictures of boards are there."""
    import html

    frame = tmp_path / "frame.html"
    text = (page / "analysis.html").read_text()
    frame.write_text(FRAME.format(width=width, page=html.escape(text)))
    seen = json.loads(re.search(r"<title>(.*?)</title>", browse(frame, tmp_path, "--dump-dom"))[1])
    assert seen["width"] == width and seen["flat"] == 0 and seen["sections"] >= 10
    shot = tmp_path / "shot.png"
    browse(
        page / "analysis.html",
        tmp_path,
        f"--screenshot={shot}",
        f"--window-size={max(width, 500)},9000",
    )
    image = iio.imread(shot)[..., :3].astype(int)
    for colour in ("0b4f86", "d55e00", "7fec0f"):  # a heat map, hrssm's line, bricks
        near = np.abs(image - [int(colour[i : i + 2], 16) for i in (0, 2, 4)]).max(-1) < 24
        assert near.sum() > 200, colour


def test_compare_has_tables_and_no_pictures(trained, tmp_path):
    words = [
        trained / "rssm",
        trained / "hrssm",
        "--compare",
        "--episodes",
        "24",
        "--longest",
        "40",
    ]
    assert command.main([*map(str, words), "--out", str(tmp_path)]) == 0
    seen = Page((tmp_path / "analysis.html").read_text())
    assert "img" not in seen.tags and seen.tags.count("table") >= 4


def test_a_task_without_factors(tmp_path, capsys):
    run = train(tmp_path / "run", "hrvq", 0, "dummy_vector")
    capsys.readouterr()
    assert command.main([str(run)]) == 2
    one_line(capsys, "dummy_vector", "--pictures")
    assert command.main([str(run), "--pictures", "--episodes", "10"]) == 0
    text = (run / "analysis" / "analysis.html").read_text()
    assert "has no named factors" in text and "Codes over time" in text and "Attention" in text
    assert "Probes:" not in text


def test_why_there_are_no_probes_is_true():
    for found, asked, says in (
        ({}, True, "no named factors"),
        ({"ball x": None}, True, "--pictures"),
        ({"ball x": None}, False, "hardly vary"),
    ):
        episodes = [types.SimpleNamespace(factors=found)]
        material = types.SimpleNamespace(task="minatar_breakout", episodes=episodes)
        assert says in inspection.lacking(material, asked)


def test_a_horizon_that_no_episode_reaches_is_not_drawn_as_nothing(monkeypatch):
    kept = []
    monkeypatch.setattr(report.figures, "picture", lambda draw: kept.append(draw.keywords))
    cells = {str(h): {"linear": {"x": None if h else 0.5}} for h in HORIZONS}
    report.open_loop({"baseline": cells, "models": {}})
    assert kept[0]["baseline"] == [0.5, *(len(HORIZONS) - 1) * [None]]


@pytest.mark.parametrize("task", ["dummy_continuous", "dummy_image", "dummy_multi"])
def test_every_kind_of_observation_and_action_is_drawn(task, tmp_path):
    run = train(
        tmp_path / "run", "hrssm", 0, task, "--env.size", "16", "16", "--encoder.minres", "4"
    )
    words = [str(run), "--pictures", "--episodes", "10", "--out", str(tmp_path / "out")]
    assert command.main(words) == 0
    seen = Page((tmp_path / "out" / "analysis.html").read_text())
    assert seen.tags.count("img") >= (2 if task == "dummy_continuous" else 15)


def test_a_recording_has_every_step(material, subjects, tmp_path, monkeypatch):
    """Of a stand-in for rerun-sdk, which is an extra."""
    logged, clock = {}, []

    class Stream:
        save = flush = disconnect = lambda self, *args: None

        def __init__(self, name):
            pass

        def set_time(self, name, sequence):
            clock.append(sequence)

        def log(self, path, value):
            assert isinstance(path, list) or path.isidentifier()  # else rerun wants escapes
            path = path if isinstance(path, str) else "/".join(path)
            logged.setdefault(path, {})[clock[-1]] = value

    rerun = types.SimpleNamespace(RecordingStream=Stream, Scalars=lambda x: x, Image=lambda x: x)
    monkeypatch.setitem(sys.modules, "rerun", rerun)
    (name,) = [name for name in subjects if name.startswith("hrssm")]
    episode, subject = material.episodes[0], subjects[name]
    found = study.read_all(subject, subject.agent.world_model, material)
    recording.write(tmp_path / "x.rrd", episode, 0, [(subject, found)])
    steps = len(episode)
    assert all(list(series) == list(range(steps)) for series in logged.values())
    pictures_of = {key for key in logged if "/pictures/" in key}
    assert pictures_of == {f"{name}/pictures/{key}" for key in ("seen", "top", "all")}
    assert np.allclose([logged[f"{name}/kl/L1"][t] for t in range(steps)], found[0].kl[:, 1])
    assert np.array_equal(list(logged["reward"].values()), episode.rows["reward"])
    for factor, values in episode.factors.items():
        assert np.allclose(list(logged[f"factors/{factor}"].values()), values, equal_nan=True)


def test_a_recording_needs_its_extra(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    capsys.readouterr()
    assert command.main([str(trained / "rssm" / "0"), "--rerun"]) == 2
    one_line(capsys, "pip install -e '.[rerun]'")


def test_what_cannot_be_analysed_is_said_in_one_line(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    capsys.readouterr()

    def refused(*words, hints):
        assert command.main([*map(str, words)]) == 2
        one_line(capsys, *hints)

    run = trained / "rssm" / "0"
    refused(tmp_path / "nowhere", hints=["there is no folder", "a run, or one with runs below"])
    refused(hints=["LOGDIR", "--help"])
    (tmp_path / "file").write_text("")
    refused(run, "--out", tmp_path / "file", hints=["--out is", "a file: name a folder"])
    refused(run, "--longest", command.SHORTEST - 1, hints=["--longest is 6"])
    refused(tmp_path / "empty", hints=["there is no run in"])
    refused(run, "--episodes", 0, hints=["--episodes is 0", "at least"])
    refused(run, "--longest", 3, hints=["--longest"])
    refused(run, "--episodes", 10, "--longest", 7, hints=["14 are held out", "raise --episodes"])
    other = train(tmp_path / "other", "rssm", 0, "minatar_freeway")
    refused(run, other, hints=["minatar_breakout, minatar_freeway", "one task"])


def changed(run, folder, old, new):
    import shutil

    shutil.copytree(run, folder)
    text = (folder / "config.yaml").read_text()
    assert old in text
    (folder / "config.yaml").write_text(text.replace(old, new))
    return folder


def test_runs_of_another_version_or_without_weights(trained, tmp_path, capsys):
    run = trained / "rssm" / "0"
    newer = changed(run, tmp_path / "newer", "precision:", "precision_of_tomorrow:")
    shaped = changed(run, tmp_path / "shaped", "deter: 16", "deter: 24")
    bare = changed(run, tmp_path / "bare", "seed: 0", "seed: 5")
    (bare / "checkpoints" / "latest.pt").unlink()
    (bare / "checkpoints" / "previous.pt").unlink(missing_ok=True)
    broken = changed(run, tmp_path / "broken", "seed: 0", "seed: 6")
    (broken / "checkpoints" / "latest.pt").write_bytes(b"PK nothing")
    (broken / "checkpoints" / "previous.pt").unlink(missing_ok=True)
    seen = changed(run, tmp_path / "seen", "sticky: 0.1", "sticky: 0.2")
    capsys.readouterr()
    for folder, hint in (
        (newer, "another version"),
        (shaped, "another version"),
        (bare, "no checkpoint"),
        (broken, "damaged"),
    ):
        assert command.main([str(folder)]) == 2
        one_line(capsys, hint)
    text = (seen / "config.yaml").read_text()
    (seen / "config.yaml").write_text(text.replace("seed: 0", "seed: 7"))
    assert command.main([str(run), str(seen)]) == 2
    one_line(capsys, "sticky")


def test_the_installed_command_analyses(trained, tmp_path):
    words = ["-m", "hidreamer", "analyse", trained / "hrvq" / "0", "--compare", "--episodes", 24]
    words += ["--longest", 30, "--out", tmp_path]
    done = forked.run([sys.executable, *map(str, words)], cwd=ROOT)
    assert done.returncode == 0, done.stderr
    made = json.loads((tmp_path / "analysis.json").read_text())["made"]
    assert made["command"].startswith("hidreamer analyse ")


def test_intervals_are_over_seeds():
    cell = summary.over_seeds([0.4, 0.6, None])
    assert cell["value"] == pytest.approx(0.5)
    assert cell["high"] - cell["value"] == pytest.approx(12.706 * 0.1, abs=1e-3)  # t of one degree
    assert summary.over_seeds([None, float("nan")])["value"] is None


def test_the_strongest_baseline_of_each_factor_is_named():
    cells = lambda *values: {f: {"value": x} for f, x in zip("abc", values, strict=True)}
    probes = {"all": cells(0.77, 0.9, None), "untrained all": cells(0.3, 0.6, None)}
    probes["untrained encoder"] = cells(0.85, 0.7, None)
    report = {"models": {"m": {"probes": {"linear": probes}}}}
    report["baseline"] = {"0": {"linear": {"a": 0.5, "b": 0.8, "c": None}}}
    first, second = summary.read_lines(report)
    assert "untrained encoder, 77%, for 1 of 2 factors (not for a)" in first
    assert "raw observation, 65%, for 2 of 2 factors." in first.replace(";", ".")
    assert second.endswith("factor is not beaten on a 0.77 (untrained encoder 0.85).")
    probes["all"] = cells(0.86, 0.9, None)
    (line,) = summary.read_lines(report)
    assert line.count("for 2 of 2 factors") == 3
    probes["all"], probes["untrained encoder"] = cells(-0.1, 0.9, None), cells(-0.5, 0.7, None)
    report["baseline"]["0"]["linear"]["a"] = -1.0
    probes["untrained all"] = cells(-0.2, 0.6, None)
    assert "a −0.10 (the mean 0.00)" in summary.read_lines(report)[1]


def test_words_say_what_is_not_supported():
    found = {
        "top": "L0",
        "bottom": "L1",
        "factors": {
            "paddle": {"kind": "ego", "difference": [-0.1, -0.2, -0.05]},
            "ball": {"kind": "world", "difference": [-0.2, -0.3, -0.1]},
        },
        "value": 0.1,
        "low": -0.1,
        "high": 0.3,
        "control": [-0.05, 0.05],
        "supported": False,
        "divided": False,
    }
    (line,) = summary.contrast_lines({"runs": {"a/0": {"contrast": found}}})
    assert "not supported" in line and "L1 alone holds more of every factor" in line
    found |= {"supported": True, "low": 0.06}
    (line,) = summary.contrast_lines({"runs": {"a/0": {"contrast": found}}})
    assert "a/0: supported, L0 is worth more for ego than for world" in line
    assert "not supported, that the levels divide them" in line
    found |= {"divided": True}
    (line,) = summary.contrast_lines({"runs": {"a/0": {"contrast": found}}})
    assert "L0 alone holds more of ego, L1 alone more of world" in line
    (line,) = summary.contrast_lines({"runs": {"a/0": {"contrast": None}}})
    assert "one level" in line
    found["factors"]["paddle"]["difference"] = [-0.1, -0.2, 0.01]  # may be 0
    found["untrained"] = [0.05, 0.0, 0.1]
    other = found | {"top": "L1", "bottom": "L2", "untrained": [-0.2, -0.3, -0.1]}
    lines = summary.contrast_lines({"runs": {"a/0": {"contrast": found | {"pairs": [other]}}}})
    assert "every factor" not in lines[0]
    assert "Before training +0.05 [+0.00, +0.10], from which it is not told apart." in lines[0]
    assert "L1 alone holds more of ego" in lines[1] and "told apart" not in lines[1]


def test_a_middle_level_is_compared_as_well(monkeypatch):
    """Of three levels the one in the middle holds what the agent moves, and no end does."""
    rng = np.random.default_rng(0)
    episode, y = np.repeat(np.arange(12), 40), rng.normal(size=(480, 2))
    noise = lambda: rng.normal(size=(480, 2))
    held = {"L0": y * [0, 1] + noise() * [1, 0.1], "L1": y * [1, 0] + noise() * [0.1, 1]}
    held["L2"] = noise()
    none = {level: noise() for level in held}
    material = types.SimpleNamespace(
        kinds={"paddle": "ego", "ball": "world"}, factors=("paddle", "ball")
    )
    material.y, material.episode = y, episode
    monkeypatch.setattr(study.latents, "names", lambda dynamics: [*held])
    agent = types.SimpleNamespace(world_model=types.SimpleNamespace(dynamics=None))
    read = lambda model, *_: held if model is agent.world_model else none
    monkeypatch.setattr(study, "features", read)
    subject = types.SimpleNamespace(agent=agent, untrained=None)
    found = study.ego(subject, [], [], material)
    pairs = {(x["top"], x["bottom"]): x for x in (found, *found["pairs"])}
    assert list(pairs) == [("L0", "L2"), ("L0", "L1"), ("L1", "L2")]
    assert pairs["L0", "L1"]["divided"] and pairs["L0", "L1"]["value"] < -1.0
    assert not pairs["L0", "L2"]["divided"]
    for entry in pairs.values():
        value, low, high = entry["untrained"]
        assert low <= 0.0 <= high and abs(value) < 0.2
    wide = study.contrasted(held["L0"], held["L2"], material, 3)
    one = study.contrasted(held["L0"], held["L2"], material, 1)
    assert wide["high"] - wide["low"] > one["high"] - one["low"]
