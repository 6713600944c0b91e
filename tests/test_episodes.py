"""Episodes on disk: what was saved comes back exactly, what is wrong is reported,
and nothing is deleted that is needed.
"""

import shutil

import numpy as np
import pytest
from gymnasium.spaces import Box
from test_replay import SPEC, block, fill, make, row

from hidreamer.episodes import EpisodeError, Episodes, load_episode, rows_held, save_episode
from hidreamer.replay import Replay, row_spec


def present(episodes):
    return sorted(episodes.folder.glob("*.npz"))


def test_restore_is_exact(tmp_path):
    replay, episodes = make(), Episodes(tmp_path, 2)
    fill(replay, 66, episodes=episodes)  # 50 rows a stream are kept; the last episode is unfinished
    state, running = episodes.state(), episodes.running_rows(replay)
    other, restored = make(), Episodes(tmp_path, 2)
    assert restored.restore(other, state, running) == []
    other.rng.bit_generator.state = replay.rng.bit_generator.state
    for _ in range(30):
        a, b = replay.sample(), other.sample()
        assert all((a[key] == b[key]).all() for key in a)
    # and both go on alike
    for store, record in ((replay, episodes), (other, restored)):
        for t in range(66, 80):
            rows = row(t, last=t % 7 == 6, first=t % 7 == 0)
            store.add(rows)
            record.add(store, rows["is_last"])
    assert restored.state() == episodes.state()
    assert all((replay.sample()[k] == other.sample()[k]).all() for k in ("time",))


def test_episodes_after_the_checkpoint_are_forgotten(tmp_path):
    replay, episodes = make(), Episodes(tmp_path, 2)
    fill(replay, 14, episodes=episodes)
    state = episodes.state()
    fill(replay, 14, episodes=episodes)
    (tmp_path / "20230101T000000-abc-5.npz").write_bytes(b"upstream's own")
    (tmp_path / "0000009-00-7.npz.tmp").write_bytes(b"half of what a killed process wrote")
    assert len(list(tmp_path.glob("*.npz"))) == 9
    Episodes(tmp_path, 2).restore(make(), state, {})
    assert len(list(tmp_path.iterdir())) == 5


def test_a_damaged_file_is_reported_and_skipped(tmp_path):
    replay, episodes = make(), Episodes(tmp_path, 2)
    fill(replay, 14, episodes=episodes)
    victim = tmp_path / episodes.files[0][0][0]
    victim.write_bytes(victim.read_bytes()[:100])
    other = make()
    problems = Episodes(tmp_path, 2).restore(other, episodes.state(), {})
    assert len(problems) == 1 and victim.name in problems[0]
    assert len(other) == 21


def test_format_is_upstreams(tmp_path):
    replay, episodes = make(), Episodes(tmp_path, 2)
    fill(replay, 7, episodes=episodes)
    path = tmp_path / "0000000-00-7.npz"  # upstream takes the number of rows from the name's end
    with np.load(path) as file:
        theirs = {"action", "reward", "discount", "logprob", "is_first", "is_terminal"}
        assert set(file) == {"time", *theirs}
        assert all(len(file[key]) == 7 for key in file)
        assert (file["action"][:, 0] == -np.arange(7)).all()
    rows = load_episode(path)
    assert rows["is_last"].tolist() == [False] * 6 + [True]


def test_upstreams_extra_keys_are_left_out(tmp_path):
    path = tmp_path / "20230101T000000-abc-3.npz"
    extra = {
        "logprob": np.zeros(3),
        "discount": np.ones(3),
        "log_x": np.zeros(3),
        "image": np.zeros((3, 4, 4, 3), np.uint8),
    }
    flags = {"is_first": np.array([True, False, False]), "is_terminal": np.zeros(3, bool)}
    np.savez_compressed(path, action=np.zeros((3, 2)), reward=np.zeros(3), **flags, **extra)
    spec = row_spec({"image": Box(0, 255, (4, 4, 3), np.uint8)}, 2)
    replay = Replay(spec, capacity=9, batch=1, length=2, streams=1, rng=np.random.default_rng(0))
    episodes = Episodes(tmp_path / "ours", 1)
    assert episodes.load(replay, [path]) == []
    assert set(replay.sample()) == set(spec) and len(replay) == 3
    assert len(episodes.load(make(), [path])) == 1  # one line, not a crash


def test_a_failed_write_leaves_nothing(tmp_path):
    class Full(OSError):
        pass

    class Breaks:
        def __array__(self, *args, **kwargs):
            raise Full

    rows = {
        "prev_action": Breaks(),
        "is_last": np.ones(1),
        "is_terminal": np.zeros(1),
        "reward": np.zeros(1),
    }
    with pytest.raises(Full):
        save_episode(tmp_path / "x.npz", rows)
    assert list(tmp_path.iterdir()) == []


def test_cut_ends_the_running_episode(tmp_path):
    replay, episodes = make(), Episodes(tmp_path, 2)
    fill(replay, 10, episodes=episodes)
    episodes.cut(replay, 1)
    assert episodes.running == [3, 0] and episodes.files[1][-1][1] == 3


def test_a_part_of_an_episode_begins_one(tmp_path):
    """An episode that is longer than its ring is saved without its start: behind another episode,
    it must not pass for its continuation. A run that goes on has it as it was.
    """
    replay, episodes = make(capacity=6, streams=1), Episodes(tmp_path, 1)
    fill(replay, 20, 20, episodes)
    (path,) = tmp_path.glob("*.npz")
    assert path.name.endswith("-6.npz") and load_episode(path, SPEC, 6)["is_first"][0]
    taken = make(streams=1)
    assert Episodes(tmp_path / "ours", 1).load(taken, [path, path]) == []
    assert taken.streams[0].slice(0, 12)["is_first"].tolist() == 2 * [True, *5 * [False]]
    restored = make(capacity=6, streams=1)
    assert Episodes(tmp_path, 1).restore(restored, episodes.state(), {}) == []
    assert not restored.streams[0].slice(0, 6)["is_first"].any()


# ---------------------------------------------------------------- what is wrong with a file


def episode(**changes):
    """Seven rows as ``np.savez`` wants them; a change of None leaves the key out."""
    rows = block(0, 7)
    rows["action"] = rows.pop("prev_action")
    del rows["is_last"]
    rows["reward"] = rows["reward"].astype(np.float64)  # as upstream's are
    return {key: x for key, x in (rows | changes).items() if x is not None}


def with_nan(x, value=np.nan):
    x = x.copy()
    x[3] = value
    return x


GOOD = episode()
WRONG = {
    "shortened": ({key: x[:5] for key, x in GOOD.items()}, "5 rows, not 7"),
    "empty": ({key: x[:0] for key, x in GOOD.items()}, "0 rows"),
    "ragged": (episode(time=GOOD["time"][:5]), "7 rewards and 5 rows of time"),
    "no observation": (episode(time=None, other=GOOD["time"]), "no time"),
    "no action": (episode(action=None), "no action"),
    "no reward": (episode(reward=None), "no reward"),
    "no flag": (episode(is_first=None), "no is_first"),
    "shape": (episode(time=np.zeros((7, 2), np.float32)), r"time has shape \(2,\), not \(1,\)"),
    "action's width": (
        episode(action=np.zeros((7, 3), np.float32)),
        r"action has shape \(3,\), not \(1,\)",
    ),
    "reward's shape": (episode(reward=np.zeros((7, 1))), "reward has shape"),
    "one reward": (episode(reward=np.float32(0)), "no reward"),
    "one flag": (episode(is_first=np.bool_(True)), "is_first"),
    "type": (episode(time=np.full((7, 1), "x")), "time is <U1, not float32"),
    "complex": (episode(reward=np.zeros(7, complex)), "reward is complex128"),
    "flags": (episode(is_terminal=np.arange(7)), "is_terminal is int64, not bool"),
    "NaN in an observation": (episode(time=with_nan(GOOD["time"])), "time is nan in row 3"),
    "inf in an action": (
        episode(action=with_nan(GOOD["action"], -np.inf)),
        "action is -inf in row 3",
    ),
    "NaN in a reward": (episode(reward=with_nan(GOOD["reward"])), "reward is nan in row 3"),
    "beyond float32": (episode(reward=with_nan(GOOD["reward"], 1e300)), "reward is inf in row 3"),
    "NaN as a flag": (episode(is_first=with_nan(np.zeros(7))), "is_first is float64"),
    "objects": (episode(time=np.array([{}] * 7)), "damaged"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_file_is_told_and_no_row_of_it_is_added(kind, tmp_path):
    """When it is imported and when a run finds it in place of its own;
    what comes after it is not affected.
    """
    rows, says = WRONG[kind]
    replay, episodes = make(streams=1), Episodes(tmp_path, 1)
    fill(replay, 21, episodes=episodes)
    state = episodes.state()
    victim = tmp_path / episodes.files[0][1][0]
    np.savez_compressed(victim, **rows)

    other = make(streams=1)
    (problem,) = Episodes(tmp_path, 1).restore(other, state, {})
    assert str(victim) in problem and problem.count("\n") == 0
    imported, fresh = make(streams=1), Episodes(tmp_path / "ours", 1)
    (message,) = fresh.load(imported, sorted(tmp_path.glob("*.npz")))
    assert message == problem
    with pytest.raises(EpisodeError, match=says):
        load_episode(victim, SPEC, 7)
    for ring in (other, imported):
        assert (
            ring.streams[0].slice(0, 14)["time"][:, 0] == [*range(7), *range(14, 21)]
        ).all() and len(ring) == 14
    assert [count for _, count in fresh.files[0]] == [7, 7]


@pytest.mark.parametrize("bad_first", [True, False])
def test_the_first_file_does_not_decide(bad_first, tmp_path):
    source = tmp_path / "theirs"
    source.mkdir()
    for i in range(4):
        rows = WRONG["shape"][0] if (i == 0) == bad_first else GOOD
        np.savez_compressed(source / f"{i:07d}-00-7.npz", **rows)
    replay, episodes = make(streams=1), Episodes(tmp_path / "ours", 1)
    problems = episodes.load(replay, sorted(source.iterdir()))
    assert len(problems) == (1 if bad_first else 3) and len(replay) == 7 * (4 - len(problems))
    replay.add(row(0, 1))  # the environment's rows fit in any case


def test_numbers_that_mean_the_same_are_taken(tmp_path):
    """Upstream's rewards and flags have other types than ours."""
    path = tmp_path / "free-name-99.npz"  # neither ours nor upstream's: its number says nothing
    types = {
        "time": np.float64,
        "action": np.int64,
        "reward": np.int32,
        "is_first": np.float32,
        "is_terminal": int,
    }
    np.savez(path, **{key: GOOD[key].astype(kind) for key, kind in types.items()})
    rows = load_episode(path, SPEC)
    assert {key: (x.shape[1:], x.dtype) for key, x in rows.items()} == SPEC
    assert all(
        (rows[key] == x).all()
        for key, x in block(0, 7).items()
        if key not in ("is_last", "is_first")
    )


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY", b"plain text", None]
)
def test_a_file_that_is_no_archive_is_our_sentence(content, tmp_path):
    path = tmp_path / "0000000-00-7.npz"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(EpisodeError, match=r"damaged|cannot be read") as error:
        load_episode(path, SPEC, 7)
    assert (
        "pickle" not in str(error.value)
        and "zip" not in str(error.value)
        and "\n" not in str(error.value)
    )


@pytest.mark.parametrize("lost", ["folder", "half", "two"])
def test_many_lost_files_are_one_line(lost, tmp_path):
    replay, episodes = make(capacity=1000), Episodes(tmp_path / "eps", 2)
    fill(replay, 140, episodes=episodes)
    state, paths = episodes.state(), present(episodes)
    gone = {"folder": paths, "half": paths[::2], "two": paths[:2]}[lost]
    for path in gone:
        path.unlink()
    if lost == "folder":
        shutil.rmtree(tmp_path / "eps")
    other = make(capacity=1000)
    lines = Episodes(tmp_path / "eps", 2).restore(other, state, {})
    assert len(lines) == (2 if lost == "two" else 1) and len(other) == 280 - 7 * len(gone)
    assert all("no such file" in line for line in lines)
    if lost != "two":
        assert f"skipped {len(gone)} of 40 episodes" in lines[0] and paths[0].name in lines[0]


def test_running_rows_that_do_not_fit_are_refused_and_nothing_is_removed(tmp_path):
    replay, episodes = make(), Episodes(tmp_path, 2)
    fill(replay, 10, episodes=episodes)
    state, running = episodes.state(), episodes.running_rows(replay)
    fill(replay, 14, episodes=episodes)
    before = sorted(tmp_path.iterdir())
    shorter = {key: x[:2] for key, x in running.items()}
    foreign = {key: x for key, x in running.items() if key != "1.time"}
    for wrong in ({}, shorter, foreign, running | {"0.reward": running["0.reward"] * np.nan}):
        with pytest.raises(EpisodeError):
            Episodes(tmp_path, 2).restore(make(), state, wrong)
    assert sorted(tmp_path.iterdir()) == before and rows_held(state) == [10, 10]


# ---------------------------------------------------------------- what is deleted


def test_other_runs_episodes_are_never_deleted(tmp_path):
    """A copy of somebody's recordings has the names that this run's next episodes would have."""
    theirs = Episodes(tmp_path / "theirs", 2)
    fill(make(), 70, episodes=theirs)
    replay, episodes = make(), Episodes(tmp_path / "ours", 2)
    fill(replay, 14, episodes=episodes)
    state = episodes.state()
    fill(replay, 14, episodes=episodes)
    for path in present(theirs)[8:]:
        shutil.copy(path, tmp_path / "ours" / path.name)
    assert len(present(episodes)) == 20
    again = Episodes(tmp_path / "ours", 2, keep=False)
    again.restore(make(), state, {})
    left = {path.name: path.read_bytes() for path in present(again)}
    assert len(left) == 16 and all(
        left[path.name] == path.read_bytes() for path in present(theirs)[8:]
    )
    other = make()
    with pytest.raises(FileExistsError, match="another run"):  # nor overwritten
        fill(other, 70, episodes=again)


def test_a_new_run_sees_what_is_there(tmp_path):
    fill(make(), 14, episodes=Episodes(tmp_path, 2))
    names = [path.name for path in present(Episodes(tmp_path, 2))]
    assert len(names) == 4
    with pytest.raises(FileExistsError):
        fill(make(), 14, episodes=Episodes(tmp_path, 2))
    assert [path.name for path in present(Episodes(tmp_path, 2))] == names


def test_runs_that_began_before_files_had_their_name_go_on(tmp_path):
    replay, episodes = make(), Episodes(tmp_path, 2)
    episodes.run = ""
    fill(replay, 14, episodes=episodes)
    state = {key: x for key, x in episodes.state().items() if key != "run"}
    fill(replay, 14, episodes=episodes)
    again, other = Episodes(tmp_path, 2), make()
    assert again.restore(other, state, {}) == [] and len(present(again)) == 4
    fill(other, 14, episodes=again)
    assert len(present(again)) == 8


@pytest.mark.parametrize("seed", range(12))
def test_no_kill_loses_what_a_checkpoint_needs(seed, tmp_path):
    """Episodes that left the ring are deleted; killed at a random moment,
    either checkpoint restores exactly.

    A checkpoint is here what ``save`` writes: the state and the unfinished rows, the former one
    kept. The kill comes between any two file operations, deletions among them.
    """
    rng = np.random.default_rng(seed)

    class Killed(BaseException):
        pass

    left = int(rng.integers(20, 90))

    def tick():
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    class Fragile(type(tmp_path)):
        def unlink(self, *args, **kwargs):
            if self.suffix == ".npz":
                tick()
            super().unlink(*args, **kwargs)

    replay, episodes = make(capacity=40), Episodes(Fragile(tmp_path), 2, keep=False)
    saved = []  # latest last
    try:
        for t in range(10_000):
            rows = row(t, last=t % 7 == 6, first=t % 7 == 0)
            replay.add(rows)
            episodes.add(replay, rows["is_last"])
            if t % 7 == 6:
                tick()
            if t % 11 == 10:
                state, rings = (
                    episodes.state(),
                    [stream.slice(0, len(stream)) for stream in replay.streams],
                )
                running = episodes.running_rows(replay)
                tick()
                saved = [*saved[-1:], (state, running, rings)]
                tick()
                episodes.checkpointed(state)
    except Killed:
        pass
    assert len(saved) == 2 and t < 9_999
    for state, running, expected in saved[
        ::-1
    ]:  # from the latest, and from the one before where that is damaged
        shutil.copytree(tmp_path, tmp_path.with_name("copy"))
        other, again = make(capacity=40), Episodes(tmp_path.with_name("copy"), 2, keep=False)
        assert again.restore(other, state, running) == []
        for stream, rows in zip(other.streams, expected, strict=True):
            assert len(stream) == len(rows["time"]) == 20
            assert all((x == rows[key]).all() for key, x in stream.slice(0, 20).items())
        again.checkpointed(again.state())
        again.checkpointed(again.state())
        assert (
            len(present(again)) == sum(map(len, again.files)) <= 8
        )  # and what a killed process left is gone
        shutil.rmtree(tmp_path.with_name("copy"))


def test_a_resumed_run_keeps_what_it_began_from(tmp_path):
    """The checkpoint that it began from is the one to fall back on after its first own."""
    replay, episodes = make(capacity=40), Episodes(tmp_path, 2, keep=False)
    fill(replay, 42, episodes=episodes)
    state = episodes.state()
    other, again = make(capacity=40), Episodes(tmp_path, 2, keep=False)
    assert again.restore(other, state, {}) == []
    for _ in range(2):  # the second time another one is the one to fall back on
        lines = Episodes(shutil.copytree(tmp_path, tmp_path / "copy"), 2).restore(
            make(capacity=40), state, {}
        )
        assert lines == []
        shutil.rmtree(tmp_path / "copy")
        fill(other, 42, episodes=again)
        again.checkpointed(again.state())
    assert Episodes(tmp_path, 2).restore(make(capacity=40), state, {})


def test_kept_by_default(tmp_path):
    replay, episodes = make(capacity=40), Episodes(tmp_path, 2)
    fill(replay, 140, episodes=episodes)
    episodes.checkpointed(episodes.state())
    assert len(present(episodes)) == 40 and sum(map(len, episodes.files)) == 6
