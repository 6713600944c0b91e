"""Rows stay together, in order, aligned with the actions that led to them; what was saved comes back exactly."""

import numpy as np
import pytest

from hidreamer.replay import Episodes, Replay, Stream, load_episode, save_episode


def row(t, streams=2, last=False, first=False):
    """A counting environment: the observation is the time, the action that led to it is minus the time."""
    full = lambda x, dtype=np.float32: np.full((streams, 1), x, dtype) + 1000 * np.arange(streams, dtype=dtype)[:, None]
    flag = lambda x: np.full(streams, x, bool)
    return {
        "time": full(t),
        "prev_action": -full(t),
        "reward": full(t)[:, 0],
        "is_first": flag(first),
        "is_last": flag(last),
        "is_terminal": flag(last),
    }


def make(capacity=100, streams=2, length=5, batch=8):
    return Replay(capacity=capacity, batch=batch, length=length, streams=streams, rng=np.random.default_rng(0))


def fill(replay, steps, episode=7, episodes=None):
    for t in range(steps):
        rows = row(t, len(replay.streams), last=t % episode == episode - 1, first=t % episode == 0)
        replay.add(rows)
        if episodes:
            episodes.add(replay, rows["is_last"])


@pytest.mark.parametrize("steps", [30, 50, 73, 2500])
def test_sequences_are_contiguous_and_aligned(steps):
    replay = make()
    fill(replay, steps)
    assert len(replay) == min(2 * steps, 100)
    for _ in range(50):
        batch = replay.sample()
        time = batch["time"][..., 0]
        assert (np.diff(time) == 1).all()  # never across the write position, never between streams
        assert (batch["prev_action"][..., 0] == -time).all() and (batch["reward"] == time).all()
        step = time % 1000 if steps <= 1000 else None
        assert (time % 1000 >= max(0, steps - 50)).all() if step is not None else True
        assert batch["is_first"][:, 0].all()
        if step is not None:
            assert (batch["is_first"][:, 1:] == (step[:, 1:] % 7 == 0)).all()
            assert (batch["is_last"] == (step % 7 == 6)).all()


def test_marking_the_first_step_does_not_mark_the_store():
    replay = make()
    fill(replay, 30)
    for _ in range(20):
        replay.sample()
    assert (replay.streams[0].rows["is_first"][:30] == (np.arange(30) % 7 == 0)).all()


def test_every_run_is_drawn_equally_often():
    replay = make(streams=1, capacity=20, length=5, batch=1000)
    fill(replay, 33)
    starts = np.concatenate([replay.sample()["time"][:, 0, 0] for _ in range(20)])
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == list(range(13, 29))  # 16 runs of 5 among the last 20 steps
    assert abs(counts / counts.mean() - 1).max() < 0.15


def test_growth_keeps_rows():
    stream = Stream(5000)
    for t in range(3000):
        stream.add({"x": np.int64(t)})
    assert stream.allocated == 4096 and (stream.slice(0, 3000)["x"] == np.arange(3000)).all()


def test_foreign_rows_are_refused():
    replay = make()
    fill(replay, 3)
    with pytest.raises(ValueError, match="keys"):
        replay.add({"time": np.zeros((2, 1), np.float32)})
    with pytest.raises(ValueError, match="time"):
        replay.add(row(0) | {"time": np.zeros((2, 1), np.float64)})


def test_too_short():
    replay = make()
    fill(replay, 4)
    assert not replay.ready()
    with pytest.raises(ValueError, match="5 consecutive"):
        replay.sample()


class TestEpisodes:
    def test_restore_is_exact(self, tmp_path):
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

    def test_episodes_after_the_checkpoint_are_forgotten(self, tmp_path):
        replay, episodes = make(), Episodes(tmp_path, 2)
        fill(replay, 14, episodes=episodes)
        state = {**episodes.state(), "files": [list(files) for files in episodes.files], "running": [0, 0]}
        fill(replay, 14, episodes=episodes)
        (tmp_path / "20230101T000000-abc-5.npz").write_bytes(b"upstream's own")
        assert len(list(tmp_path.glob("*.npz"))) == 9
        Episodes(tmp_path, 2).restore(make(), state, {})
        assert len(list(tmp_path.glob("*.npz"))) == 5

    def test_a_damaged_file_is_reported_and_skipped(self, tmp_path):
        replay, episodes = make(), Episodes(tmp_path, 2)
        fill(replay, 14, episodes=episodes)
        victim = tmp_path / episodes.files[0][0][0]
        victim.write_bytes(victim.read_bytes()[:100])
        other = make()
        problems = Episodes(tmp_path, 2).restore(other, episodes.state(), {})
        assert len(problems) == 1 and victim.name in problems[0]
        assert len(other) == 21

    def test_format_is_upstreams(self, tmp_path):
        replay, episodes = make(), Episodes(tmp_path, 2)
        fill(replay, 7, episodes=episodes)
        path = tmp_path / "0000000-00-7.npz"  # upstream takes the number of rows from the name's end
        with np.load(path) as file:
            assert set(file) == {"time", "action", "reward", "discount", "is_first", "is_terminal"}
            assert (file["action"][:, 0] == -np.arange(7)).all()
        rows = load_episode(path)
        assert rows["is_last"].tolist() == [False] * 6 + [True]

    def test_upstreams_extra_keys_are_left_out(self, tmp_path):
        path = tmp_path / "20230101T000000-abc-3.npz"
        extra = {
            "logprob": np.zeros(3),
            "discount": np.ones(3),
            "log_x": np.zeros(3),
            "image": np.zeros((3, 4, 4, 3), np.uint8),
        }
        flags = {"is_first": np.array([True, False, False]), "is_terminal": np.zeros(3, bool)}
        np.savez_compressed(path, action=np.zeros((3, 2)), reward=np.zeros(3), **flags, **extra)
        replay, episodes = make(length=2), Episodes(tmp_path / "ours", 2)
        keys = {"image", "prev_action", "reward", "is_first", "is_last", "is_terminal"}
        assert episodes.load(replay, [path], keys) == []
        assert set(replay.sample()) == keys and len(replay) == 3
        assert len(episodes.load(replay, [path], keys | {"velocity"})) == 1  # one line, not a crash

    def test_a_failed_write_leaves_nothing(self, tmp_path):
        class Full(OSError):
            pass

        class Breaks:
            def __array__(self, *args, **kwargs):
                raise Full

        rows = {"prev_action": Breaks(), "is_last": np.ones(1), "is_terminal": np.zeros(1), "reward": np.zeros(1)}
        with pytest.raises(Full):
            save_episode(tmp_path / "x.npz", rows)
        assert list(tmp_path.iterdir()) == []

    def test_cut_ends_the_running_episode(self, tmp_path):
        replay, episodes = make(), Episodes(tmp_path, 2)
        fill(replay, 10, episodes=episodes)
        episodes.cut(replay, 1)
        assert episodes.running == [3, 0] and episodes.files[1][-1][1] == 3


def test_memory_of_100k_atari_steps():
    """64x64 RGB rows cost little more than their pixels: 100,000 of them stay under 2 GB, also while the ring grows."""
    stream = Stream(1_000_000)
    stream.add(
        {"image": np.zeros((64, 64, 3), np.uint8), "prev_action": np.zeros(18, np.float32), "reward": np.float32(0)}
    )
    bytes_per_row = sum(ring.nbytes for ring in stream.rows.values()) / stream.allocated
    assert 100_000 * bytes_per_row < 1.3e9
