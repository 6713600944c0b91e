"""Batches to the device: on a stand-in for CUDA's streams, whose work is done as late as may be."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hidreamer import feed
from hidreamer.replay import Replay


class Event:
    """Of all that its stream was given before it was recorded."""

    stream = position = None

    def record(self, stream):
        self.stream, self.position = stream, len(stream.queue) + stream.done

    def synchronize(self):
        if self.stream is not None:
            self.stream.run(self.position)


class Stream:
    """Work is done when something waits for it, in order."""

    def __init__(self, *_):
        self.queue, self.done = [], 0

    def give(self, work):
        self.queue.append(work)

    def wait_event(self, event):
        stream, position = event.stream, event.position
        self.give(lambda: stream is not None and stream.run(position))

    def run(self, position=None):
        while self.queue and (position is None or self.done < position):
            work = self.queue.pop(0)
            self.done += 1
            work()


class Moved:
    """A device tensor; copies into it are the copying stream's work."""

    def __init__(self, cuda, x):
        self.cuda, self.x = cuda, torch.zeros_like(x)

    def copy_(self, x, non_blocking):
        assert non_blocking
        self.cuda.current.give(lambda: self.x.copy_(x))


@pytest.fixture
def cuda(monkeypatch):
    """-> the stand-in; ``.main`` is the stream that trains."""
    main = Stream()
    found = SimpleNamespace(main=main, current=main, created=[])

    @contextlib.contextmanager
    def using(stream):
        found.current = stream
        yield
        found.current = main

    for name, value in {
        "Event": Event,
        "Stream": lambda *_: found.created.append(Stream()) or found.created[-1],
        "stream": using,
        "current_stream": lambda *_: main,
    }.items():
        monkeypatch.setattr(feed.torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(feed.torch, "empty_like", lambda x, device: Moved(found, x))
    return found


def replay():
    spec = {"x": ((3,), np.dtype(np.float32)), "is_first": ((), np.dtype(bool))}
    made = Replay(spec, capacity=50, batch=4, length=5, streams=1, rng=np.random.default_rng(0))
    for i in range(30):
        made.add({"x": np.full((1, 3), i, np.float32), "is_first": np.zeros(1, bool)})
    return made


def test_every_update_sees_its_own_batch(cuda):
    """However late the device is: copies wait for updates, and the host for copies."""
    ours, plain, seen = replay(), replay(), []
    moving = feed.Feed(torch.device("cuda"))
    for _ in range(7):
        batch = moving.send(ours.sample(out=moving.rows()))
        cuda.main.give(lambda batch=batch: seen.append(batch["x"].x.clone()))
    assert len(cuda.created) == 1 and len(seen) < 7  # the host is ahead of the device
    cuda.main.run()
    expected = [torch.from_numpy(plain.sample()["x"]) for _ in range(7)]
    assert all(torch.equal(x, y) for x, y in zip(seen, expected, strict=True))


@pytest.mark.parametrize("missing", ["wait_event", "synchronize"])
def test_the_stand_in_sees_what_is_not_waited_for(cuda, missing, monkeypatch):
    monkeypatch.setattr(Stream if missing == "wait_event" else Event, missing, lambda *_: None)
    with pytest.raises(AssertionError):
        test_every_update_sees_its_own_batch(cuda)


def test_on_a_cpu_a_batch_is_what_was_sampled():
    moving, rows = feed.Feed(torch.device("cpu")), replay().sample()
    assert moving.rows() is None
    batch = moving.send(rows)
    assert batch["x"].data_ptr() == rows["x"].ctypes.data and batch.keys() == rows.keys()


@pytest.mark.gpu
def test_batches_on_a_gpu():
    device, ours, plain = torch.device("cuda"), replay(), replay()
    moving, sums = feed.Feed(device), []
    for _ in range(50):
        batch = moving.send(ours.sample(out=moving.rows()))
        torch.cuda._sleep(1_000_000)
        sums.append(batch["x"].sum() + batch["is_first"].sum())
    expected = []
    for _ in range(50):
        rows = plain.sample()
        expected.append(float(rows["x"].sum() + rows["is_first"].sum()))
    assert [float(x) for x in sums] == expected


def test_rows_that_replay_writes_over_are_as_fresh_ones():
    ours, plain = replay(), replay()
    rows = ours.sample()
    plain.sample()
    again, fresh = ours.sample(out=rows), plain.sample()
    assert again is rows and all(np.array_equal(again[key], x) for key, x in fresh.items())
