"""Where sequences begin: from states that lie beside the steps of replay, and fresh ones first."""

import shutil
from collections import Counter

import numpy as np
import pytest
import torch
from small_runs import latest, one_line, records, run
from test_agent import make
from test_population_runs import same
from test_replay import SPEC, row

import models
import tools
from hidreamer import carries
from hidreamer.replay import STORED, Replay
from training import Run

KINDS = {
    "rssm": {"dynamics.type": "rssm"},
    "hrssm": {"dynamics.type": "hrssm"},
    "gru": {"dynamics.type": "hrvq", "dynamics.hrvq.memory": "gru"},
    "gru seen": {
        "dynamics.type": "hrvq",
        "dynamics.hrvq.memory": "gru",
        "dynamics.hrvq.posterior_sees": "memory",
        "dynamics.hrvq.copy": True,
    },
}
BOTH = ("--replay.write_back", "true", "--replay.online", "true")


# ---------------------------------------------------------------- the states


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_goes_on_from_what_was_found(kind):
    """Cut in two, with the second half begun from what the whole found before it."""
    agent, batch = make(**KINDS[kind])
    model = agent.world_model
    batch["is_first"][:] = False
    batch["is_first"][0, 6] = True
    obs = models.networks.preprocess(batch)
    with torch.no_grad():
        carry, whole, _ = model.observe(obs, sample=False)
        found = carries.found(model.dynamics, carry, whole)
        half = {key: x[:, 4:] for key, x in obs.items()}
        half |= {key: x[:, 3].float() for key, x in found.items()}
        begun = carries.given(model.dynamics, half)
        post = model.observe(half, begun, sample=False)[1]
        anew = model.observe(half, sample=False)[1]
    assert all(x.shape[:2] == (2, 7) for x in found.values())
    assert torch.allclose(post.feat.deter, whole.feat.deter[:, 4:], atol=2e-3)
    for level, expected in zip(post.levels, whole.levels, strict=True):
        assert torch.allclose(level.prior, expected.prior[:, 4:], atol=2e-2)
    assert not torch.allclose(anew.feat.deter[1], whole.feat.deter[1, 4:], atol=2e-3)


def test_updates_use_what_they_are_given():
    agent, batch = make(**{"replay.write_back": True, "dynamics.free": 0})
    batch["is_first"][:] = False
    spec = carries.carry_spec(agent.world_model.dynamics)
    given = {key: torch.full((2, *shape), 0.5) for key, (shape, _) in spec.items()}
    del given[STORED]
    losses = []
    for more in ({}, given):
        torch.manual_seed(0)
        losses.append(agent.world_model.loss(models.networks.preprocess(batch | more))[0]["dyn"])
    assert not torch.allclose(losses[0][:, 0], losses[1][:, 0])
    agent.update(batch | given)
    assert {key: x.shape[:2] for key, x in agent.carries.items()} == dict.fromkeys(given, (2, 7))
    assert not any(x.requires_grad for x in agent.carries.values())
    agent, batch = make()
    agent.update(batch)
    assert not agent.carries


@pytest.fixture
def started(tmp_path):
    """A run of two environments that has learned something."""
    values = {"task": "dummy_vector", "env.count": 2, "replay.write_back": True, "steps": 1000}
    values |= {"replay.ratio": 0, "logdir": str(tmp_path / "run"), "device": "cpu", "video": False}
    config = tools.load_config(["debug"], values)
    made = Run(config, tmp_path / "run", None, torch.device("cpu"), report=lambda line: None)
    yield made
    made.close()


def test_beside_a_step_lies_the_state_before_it(started):
    """What acting found, then what an update found; nothing beside random steps."""
    columns = lambda i: {key: started.replay.streams[i].rows[key] for key in started.replay.extra}
    while len(started.replay) < 60:
        acting = started._prefilled()
        started.advance()
        at = started.replay.streams[0].added - 1
        for i in (0, 1):
            assert columns(i)[STORED][at] == acting
            for name, x in started.act.carry._asdict().items() if acting else ():
                assert torch.equal(torch.from_numpy(columns(i)["carry." + name][at]), x[i].half())
    random = len(started.replay.streams[0]) - int(columns(0)[STORED].sum())
    assert 8 < random < 15
    before = {i: {key: x.copy() for key, x in columns(i).items()} for i in (0, 1)}
    started.learn()
    found, (stream, first) = started.agent.carries, started.write_back.sampled
    started.write_back.finish(started.replay)
    rows = {i: set() for i in (0, 1)}
    for i, start in zip(stream, first, strict=True):
        rows[i] |= set(range(start + 1, start + 8))
    last = len(stream) - 1  # of sequences that overlap the later one counts
    for t in range(7):
        at = first[last] + 1 + t
        for key, x in found.items():
            assert torch.equal(torch.from_numpy(columns(stream[last])[key][at]), x[last, t])
    for i, kept in before.items():
        others = sorted(set(range(len(started.replay.streams[i]))) - rows[i])
        for key, x in kept.items():
            assert (columns(i)[key][others] == x[others]).all()
        assert columns(i)[STORED][sorted(rows[i])].all()
    batch = started.sample()
    marked = batch["is_first"][:, 0]
    for b, (i, start) in enumerate(zip(*started.write_back.sampled, strict=True)):
        own = started.replay.streams[i].rows
        assert marked[b] == (own["is_first"][start] or not own[STORED][start])
    again = started.replay.read(started.write_back.sampled, {k: x.copy() for k, x in batch.items()})
    assert all(np.array_equal(again[key], x) for key, x in batch.items())
    apart = started.replay.sample_apart(np.random.default_rng(0))
    assert apart.keys() == SPEC.keys() - {"time"} | {"vector"} and apart["is_first"][:, 0].all()


@pytest.mark.parametrize("memory", ["interleaved", "stacked"])
def test_a_transformer_is_refused_in_one_line(memory, tmp_path, capsys):
    kind = ("--dynamics.type", "hrvq", "--dynamics.hrvq.memory", memory)
    assert run(tmp_path / "run", *kind, "--replay.write_back", "true", "--steps", 60) == 2
    one_line(capsys, "replay.write_back", "--replay.write_back false", "gru")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---------------------------------------------------------------- runs


STEPS = ("--env.count", 2, "--replay.ratio", 4, "--checkpoint_every", 45, "--log_every", 10)
STEPS += ("--replay.capacity", 100)  # so that rows leave


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "run"
    assert run(folder, *STEPS, *BOTH, "--steps", 150) == 0
    return folder


def parts(folder):
    with np.load(folder / "checkpoints" / latest(folder)["running_file"]) as file:
        return dict(file)


def exactly(folder, expected):
    assert records(folder) == records(expected)
    assert latest(folder)["replay_queue"] == latest(expected)["replay_queue"]
    ours, theirs = parts(folder), parts(expected)
    assert ours.keys() == theirs.keys() and any(key.startswith("extra.1.") for key in ours)
    for key, x in theirs.items():
        assert np.array_equal(ours[key], x), key
    for key, x in latest(expected)["agent"]["params"].items():
        assert torch.equal(latest(folder)["agent"]["params"][key], x), key


def test_what_a_kill_leaves_at_any_moment_goes_on_exactly(whole, tmp_path, monkeypatch):
    """A copy of the folder, as it is between two steps or updates, is what a kill leaves."""
    copies, original = [], Run.learn

    def learn(self):
        original(self)
        if self.updates % 12 == 7:
            copies.append(shutil.copytree(self.logdir, tmp_path / str(len(copies))))

    monkeypatch.setattr(Run, "learn", learn)
    assert run(tmp_path / "run", *STEPS, *BOTH, "--steps", 150) == 0
    monkeypatch.undo()
    exactly(tmp_path / "run", whole)
    assert len(copies) == 3 and latest(copies[-1])["step"] >= 45
    for copy in copies:
        assert run(copy, *STEPS, *BOTH, "--steps", 150) == 0
        exactly(copy, whole)


def test_a_lost_episode_leaves_no_states_and_no_queue(tmp_path, monkeypatch, capsys):
    """They are counted from a stream's newest row, and would be other rows'."""
    folder, loaded = tmp_path / "run", []
    more = (*STEPS, *BOTH, "--replay.prefill", 60)  # so that a queue is left
    assert run(folder, *more, "--steps", 60) == 0
    assert latest(folder)["replay_queue"]["queue"]
    max((folder / "train_eps").glob("*.npz")).unlink()
    monkeypatch.setattr(Replay, "load_queue", lambda self, state: loaded.append(state))
    monkeypatch.setattr(Replay, "load_extra_rows", lambda self, rows: loaded.append(rows))
    assert run(folder, *more, "--steps", 90) == 0
    assert [state["queue"] for state in loaded] == [[]]
    assert "sequences begin without stored states for now" in capsys.readouterr().out


def test_when_it_is_saved_changes_nothing(whole, tmp_path, monkeypatch):
    """As a signal saves: between an update and the next sample."""
    original = Run.learn

    def learn(self):
        original(self)
        if self.updates % 5 == 0:
            due = self.every["checkpoint"].last
            self.save()
            self.every["checkpoint"].last = due

    monkeypatch.setattr(Run, "learn", learn)
    assert run(tmp_path / "run", *STEPS, *BOTH, "--steps", 150) == 0
    exactly(tmp_path / "run", whole)


def test_each_of_the_keys_changes_what_is_learned(whole, tmp_path):
    """Else the comparisons above would show nothing."""
    early = lambda folder: [line for line in records(folder) if line["step"] <= 60]
    found = [early(whole)]
    for i, keys in enumerate((BOTH[:2], BOTH[2:])):
        assert run(tmp_path / str(i), *STEPS, *keys, "--steps", 70) == 0
        found.append(early(tmp_path / str(i)))
    assert all(a != b for n, a in enumerate(found) for b in found[:n])


def test_a_run_that_lost_episodes_forgets_its_states(whole, tmp_path, capsys):
    folder = shutil.copytree(whole, tmp_path / "run")
    min((folder / "train_eps").iterdir()).unlink()
    assert run(folder, *STEPS, *BOTH, "--steps", 170) == 0
    assert "begin without stored states" in capsys.readouterr().out
    assert latest(folder)["step"] == 170


def test_members_of_a_population_keep_their_own(whole, tmp_path):
    more = ("--steps", 60, *STEPS, *BOTH)
    assert run(tmp_path / "all", *more, "--seeds", 0, 1) == 0
    for seed in (0, 1):
        assert run(tmp_path / str(seed), *more, "--seed", seed) == 0
        same(records(tmp_path / "all" / str(seed)), records(tmp_path / str(seed)))


# ---------------------------------------------------------------- the online queue


def queued(capacity=200, streams=2):
    sizes = {"capacity": capacity, "batch": 3, "length": 4, "streams": streams}
    return Replay(SPEC, **sizes, rng=np.random.default_rng(0), online=True)


def test_every_fresh_sequence_is_sampled_once_and_first():
    replay, plain, seen = queued(), queued(), Counter()
    plain.online = False
    for t in range(22):
        for each in (replay, plain):
            each.add(row(t))
    expected = [(i, start) for start in range(0, 20, 4) for i in (0, 1)]
    for _ in range(3):
        seen.update(zip(*replay.sample_addresses(), strict=True))
    assert sorted(seen) == sorted(expected[:9]) and set(seen.values()) == {1}
    mixed = list(zip(*replay.sample_addresses(), strict=True))
    others = list(zip(*plain.uniform(plain.rng, 2), strict=True))
    assert mixed == [expected[9], *others]  # random numbers are drawn for the others alone
    assert list(zip(*replay.sample_addresses(), strict=True)) == list(
        zip(*plain.sample_addresses(), strict=True)
    )
    batch = replay.sample()
    assert batch["is_first"][:, 0].all() and (np.diff(batch["time"][..., 0]) == 1).all()


def test_sequences_that_left_are_passed_over():
    replay = queued(capacity=10, streams=1)
    for t in range(23):
        replay.add(row(t, 1))
    found = [int(start) for start in replay.sample_addresses().row]
    assert found[0] == 16 and all(13 <= start <= 19 for start in found)
    assert not replay.queue


def test_the_queue_is_saved_as_it_stands():
    """Also where the rows that come back are fewer, as those of full streams are."""
    replay, other = queued(capacity=40), queued(capacity=40)
    for t in range(27):
        replay.add(row(t))
    replay.sample_addresses()
    state = replay.queue_state()
    for ours, theirs in zip(other.streams, replay.streams, strict=True):
        ours.extend(theirs.slice(0, len(theirs)))
    other.rng.bit_generator.state = replay.rng.bit_generator.state
    other.load_queue(state)
    for t in range(27, 45):
        a, b = replay.sample(), other.sample()
        assert all((a[key] == x).all() for key, x in b.items())
        for each in (replay, other):
            each.add(row(t))
