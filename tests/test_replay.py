"""Rows stay together, in order, aligned with the actions that led to them,
in memory and on a disk.
"""

import errno
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from gymnasium.spaces import Box

from conftest import ROOT
from hidreamer import memory
from hidreamer.replay import Addresses, Replay, Stream, record, row_spec, rows_to_come

SPEC = row_spec({"time": Box(-np.inf, np.inf, (1,))}, 1)


def row(t, streams=2, last=False, first=False):
    """A counting environment: the observation is the time,
    the action that led to it is minus the time.
    """
    full = lambda x, dtype=np.float32: (
        np.full((streams, 1), x, dtype) + 1000 * np.arange(streams, dtype=dtype)[:, None]
    )
    flag = lambda x: np.full(streams, x, bool)
    return {
        "time": full(t),
        "prev_action": -full(t),
        "reward": full(t)[:, 0],
        "is_first": flag(first),
        "is_last": flag(last),
        "is_terminal": flag(last),
    }


def make(capacity=100, streams=2, length=5, batch=8, folder=None):
    rng = np.random.default_rng(0)
    return Replay(
        SPEC, capacity=capacity, batch=batch, length=length, streams=streams, rng=rng, folder=folder
    )


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


def block(start, stop):
    """Rows of one stream, for ``extend``."""
    rows = [{key: x[:1] for key, x in row(t, 1).items()} for t in range(start, stop)]
    return {key: np.concatenate([x[key] for x in rows]) for key in rows[0]}


@pytest.mark.parametrize("store", ["memory", "disk"])
@pytest.mark.parametrize(
    "sizes", [[3, 4, 5], [6, 6, 1, 7], [10, 10], [25], [3, 25, 1], [9, 3, 10, 3]]
)
def test_blocks_are_rows(sizes, store, tmp_path, monkeypatch):
    """Also those that reach over the ring's end or are longer than the ring,
    and files written in several pieces.
    """
    monkeypatch.setattr("hidreamer.replay.BLOCK_BYTES", 2 * record(SPEC).itemsize)
    one, many = (Stream(10, SPEC, tmp_path if store == "disk" else None) for _ in range(2))
    start = 0
    for size in sizes:
        many.extend(block(start, start + size))
        for t in range(start, start + size):
            one.extend(block(t, t + 1))
        start += size
    assert len(one) == len(many) == min(10, start)
    for key, x in many.slice(0, len(many)).items():
        assert (x == one.slice(0, len(one))[key]).all(), key
    assert (many.slice(0, len(many))["time"][:, 0] == np.arange(start - len(many), start)).all()


def test_the_store_does_not_matter(tmp_path):
    """The same samples, bit for bit; the file goes with the replay,
    and nothing of it is left in the folder.
    """
    one, other = make(), make(folder=tmp_path)
    for steps in (30, 43):
        fill(one, steps), fill(other, steps)
        for _ in range(20):
            a, b = one.sample(), other.sample()
            assert all(a[key].dtype == x.dtype and (a[key] == x).all() for key, x in b.items())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_raises(tmp_path):
    """A file that can hold 64 KB answers as a full disk does: with an error,
    where a mapping would kill the process.
    """
    code = """
import errno, resource, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from test_replay import fill, make
replay = make(capacity=100_000, streams=1, folder=Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    fill(replay, 10_000)
except OSError as error:
    assert error.errno == errno.EFBIG, error
    kept = len(replay)
    replay.sample()
    print(kept)
"""
    words = [sys.executable, "-c", code, str(tmp_path), str(ROOT), str(ROOT / "tests")]
    result = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 65536 // record(SPEC).itemsize


def test_capacity_is_what_the_streams_hold():
    """100 rows are 3 x 33: whoever waits for 100 would wait for ever."""
    replay = make(capacity=100, streams=3)
    assert replay.capacity == 99
    fill(replay, 50)
    assert len(replay) == replay.capacity
    assert make(capacity=4, streams=2, length=5).capacity == 10  # a sequence must fit


@pytest.mark.parametrize("streams", [1, 3])
def test_no_run_has_more_rows_than_were_counted_on(streams):
    """The worst that can be: episodes of one step, begun at different times."""
    for steps in range(0, 20):
        rows, taken, resets = 0, 0, np.arange(streams) % 2 == 0
        while taken < steps:
            rows += streams
            taken += int((~resets).sum())
            resets = ~resets
        assert rows + 5 * streams < rows_to_come(5, steps, streams)


def test_foreign_rows_are_refused():
    replay = make()
    fill(replay, 3)
    with pytest.raises(ValueError, match="keys"):
        replay.add({"time": np.zeros((2, 1), np.float32)})
    with pytest.raises(ValueError, match="time"):
        replay.add(row(0) | {"time": np.zeros((2, 2), np.float32)})
    with pytest.raises(ValueError, match="time"):
        replay.add(row(0) | {"time": np.zeros((2, 1), np.float64)})


def test_too_short():
    replay = make()
    fill(replay, 4)
    assert not replay.ready()
    with pytest.raises(ValueError, match="5 consecutive"):
        replay.sample()


def peak_of(code, *words):
    """Bytes that a fresh process came to hold while ``code`` ran."""
    code = f"""
import re, sys
from pathlib import Path
import numpy as np
from gymnasium.spaces import Box
from hidreamer.replay import Stream, row_spec
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
{code}
print(peak() - before)
"""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300, env=env
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_data():
    """20,000 Atari rows in a ring for a million: the peak is within 3% of the data,
    so nothing is held twice.
    """
    peak = peak_of("""
spec = row_spec({"image": Box(0, 255, (64, 64, 3), np.uint8)}, 18)
stream = Stream(1_000_000, spec)
rows = {key: np.ones((1, *shape), dtype) for key, (shape, dtype) in spec.items()}
for _ in range(20_000):
    stream.extend(rows)
""")
    spec = row_spec({"image": Box(0, 255, (64, 64, 3), np.uint8)}, 18)
    data = 20_000 * record(spec).itemsize
    assert data < peak + 2**21 and peak < 1.03 * data
    assert 100_000 * record(spec).itemsize < 1.25e9


# ---------------------------------------------------------------- what is said of memory


def machine(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


GB = 10**9
MEMINFO = (
    "MemTotal: 16000000 kB\nMemAvailable: 8000000 kB\nSwapTotal: 1000000 kB\nSwapFree: 500000 kB\n"
)
GROUPS = {
    "bare": ({}, 17_000_000 * 1024, 8_500_000 * 1024),
    "v2": (
        {
            "proc/self/cgroup": "0::/job/task\n",
            "sys/fs/cgroup/job/memory.max": f"{4 * GB}",
            "sys/fs/cgroup/job/memory.current": f"{3 * GB}",
            "sys/fs/cgroup/job/memory.stat": f"anon 5\ninactive_file {GB}\n",
            "sys/fs/cgroup/job/task/memory.max": "max\n",
            "sys/fs/cgroup/job/task/memory.current": "5\n",
        },
        4 * GB,
        2 * GB,
    ),
    "v2 in a container": (
        {
            "proc/self/cgroup": "0::/docker/abc\n",
            "sys/fs/cgroup/memory.max": f"{GB}",
            "sys/fs/cgroup/memory.current": "0",
        },
        GB,
        GB,
    ),
    "v1": (
        {
            "proc/self/cgroup": "4:memory:/job\n3:cpuset:/\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "0",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/job/memory.usage_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 7\ntotal_inactive_file 1000\n",
        },
        2 * GB,
        1000,
    ),
}


@pytest.mark.parametrize("kind", GROUPS)
def test_available_memory_is_what_the_group_allows(kind, tmp_path):
    files, total, free = GROUPS[kind]
    root = machine(tmp_path, {"proc/meminfo": MEMINFO, **files})
    assert memory.available_memory(root) == (total, free)
    assert memory.available_memory(tmp_path / "nothing") is None


def test_memory_is_message_before_it_is_spent(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "available_memory", lambda: memory.Capacity(16 * GB, 8 * GB))
    assert memory.check(1000, 12_000, None) == "replay: up to 1,000 steps of 12 kB, 12 MB of memory"
    message = memory.check(600_000, 12_000, None)  # 7.2 of 8 GB
    assert re.search(
        r"7\.2 GB of memory, of which 8 GB are free.*replay\.capacity.*env\.size.*store disk",
        message,
    )
    with pytest.raises(
        MemoryError,
        match=r"18 GB of memory, but there are only 16 GB.*replay\.capacity.*store disk",
    ):
        memory.check(1_500_000, 12_000, None)
    assert "\n" not in message and "on the disk of" in memory.check(1000, 12_000, tmp_path)
    message = memory.check(1000, 12_000, None, states=True)
    assert message == (
        "stored states: up to 1,000 steps of 12 kB, 12 MB of memory more while a checkpoint is"
        " written or read"
    )
    with pytest.raises(MemoryError, match=r"set --replay\.write_back false"):
        memory.check(10**9, 10**9, None, states=True)
    with pytest.raises(MemoryError, match=r"on the disk.*only.*replay\.capacity") as error:
        memory.check(10**9, 10**9, tmp_path)
    assert "store disk" not in str(error.value)
    monkeypatch.setattr(memory, "available_memory", lambda: None)
    assert memory.check(10**9, 10**9, None)  # nobody knows: nothing is refused


def test_memory_that_the_system_refuses_is_one_kind_of_error(monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(memory.mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="2 GB"):
        memory.anonymous(2 * GB)


EXTRA = {"latent": ((3,), np.dtype(np.float32)), "seen": ((), np.dtype(bool))}


def with_columns(folder, capacity=20, streams=2):
    sizes = {"capacity": capacity, "batch": 6, "length": 4, "streams": streams}
    return Replay(SPEC, **sizes, rng=np.random.default_rng(0), folder=folder, extra=EXTRA)


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_what_is_written_beside_rows_is_sampled_with_the_first(store, tmp_path):
    """Across the ring's end, and gone with the rows that it stood beside."""
    replay = with_columns(tmp_path if store == "disk" else None)
    plain = make(capacity=20, length=4, batch=6)
    # what the latest write put beside a row, by its time (which also tells the stream)
    written = {}
    for t in range(60):
        for each in (replay, plain):
            each.add(row(t, first=t % 7 == 0))
        if t < 5:
            continue
        where = replay.sample_addresses()
        batch, expected = replay.read(where), plain.sample()
        assert all(
            (batch[key] == x).all() for key, x in expected.items()
        )  # the same draws, with the columns or without
        time = batch["time"][..., 0]
        assert (time[:, 0] == where.row + 1000 * where.stream).all()
        for b, first in enumerate(time[:, 0]):
            latent, seen = written.get(first, (np.zeros(3), False))
            assert (batch["latent"][b] == latent).all() and batch["seen"][b] == seen
        latent = np.random.default_rng(t).normal(size=(6, 4, 3)).astype(np.float32)
        replay.write(where, {"latent": latent, "seen": np.ones((6, 4), bool)})
        for index in np.ndindex(time.shape):
            written[time[index]] = latent[index], True
    assert written


@pytest.mark.parametrize("store", ["memory", "disk"])
def test_rows_that_left_are_not_written_over(store, tmp_path):
    replay = with_columns(tmp_path if store == "disk" else None, capacity=10, streams=1)
    fill(replay, 10)
    where = Addresses(np.array([0]), np.array([6]))
    old = Addresses(np.array([0]), np.array([0]))
    for t in range(10, 12):
        replay.add(row(t, 1))
    latent = np.arange(1, 13, dtype=np.float32).reshape(1, 4, 3)
    replay.write(
        old, {"latent": latent}
    )  # rows 0 and 1 are gone: their places are those of 10 and 11
    replay.write(where, {"latent": -latent})
    found = replay.streams[0].rows["latent"]
    assert (
        (found[[0, 1]] == 0).all()
        and (found[[2, 3]] == latent[0, 2:]).all()
        and (found[6:10] == -latent[0]).all()
    )
    with pytest.raises(ValueError, match="rows 0 to 3 of stream 0"):
        replay.read(old)
    kept = replay.streams[0].slice(0, 10)
    assert kept.keys() == SPEC.keys() and (kept["time"][:, 0] == np.arange(2, 12)).all()
    for t in range(12, 22):
        replay.add(row(t, 1))
    assert (replay.streams[0].rows["latent"] == 0).all()


def test_only_declared_columns_are_written():
    replay = with_columns(None)
    fill(replay, 8)
    where, right = replay.sample_addresses(), np.zeros((6, 4, 3), np.float32)
    for values in (
        {"reward": right[..., 0]},
        {"latent": right[..., :2]},
        {"latent": right.astype(np.float64)},
    ):
        with pytest.raises(ValueError, match="cannot write"):
            replay.write(where, values)
    with pytest.raises(ValueError, match="rows 6 to 9 of 8"):
        replay.write(Addresses(np.array([0]), np.array([6])), {"latent": right[:1]})
