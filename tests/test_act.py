"""Acting as a recorded graph, on a stand-in for one: the same actions, whatever is kept of it."""

import warnings

import pytest
import torch
from test_agent import EVERYTHING, make

from hidreamer import capture, cost
from hidreamer.dynamics import TYPES


class Graph:
    """Like ``Captured`` on a CPU: its inputs and outputs are its own, and written over."""

    made = 0

    def __init__(self, fn, generator=None):
        self.fn, self.calls = fn, 0
        Graph.made += 1

    def __call__(self, inputs):
        self.calls += 1
        if self.calls <= capture.WARMUP:
            return self.fn(inputs)
        if self.calls == capture.WARMUP + 1:
            self.inputs = {key: x.clone() for key, x in inputs.items()}
            self.out = None
        for key, x in inputs.items():
            self.inputs[key].copy_(x)
        new = self.fn(self.inputs)
        if self.out is None:
            self.out = new._replace(carry=type(new.carry)(*map(torch.clone, new.carry)))
        for kept, x in zip(
            (*self.out.carry, self.out.action), (*new.carry, new.action), strict=True
        ):
            kept.copy_(x)
        return self.out


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("mode", ["train", "greedy"])
@pytest.mark.parametrize("kind", sorted(TYPES))
def test_captured_acting_is_acting(kind, mode, device):
    record = Graph if device == "cpu" else capture.Captured
    over = {"dynamics.type": kind, "dynamics.hrvq.window": 4}
    agent, batch = make(EVERYTHING, length=12, **over)
    batch["is_first"][1, 7] = True
    agent, batch = agent.to(device), {key: x.to(device) for key, x in batch.items()}
    runs = []
    Graph.made = 0
    for recorded in (False, True):
        agent.captured_act = capture.CapturedAct(agent, record=record) if recorded else None
        torch.manual_seed(3)
        state, actions, states = agent.initial(2), [], []
        for t in range(12):
            obs = {key: batch[key][:, t] for key in (*EVERYTHING, "is_first")}
            state = agent.act(state, obs, mode)
            actions.append(state.action.clone())
            states.append((state, state.carry.deter.clone()))
        assert all(torch.equal(state.carry.deter, deter) for state, deter in states)
        runs.append((torch.stack(actions), torch.stack([deter for _, deter in states])))
    assert len(agent.captured_act.graphs) == 1  # one shape, from the start
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.allclose(runs[0][1], runs[1][1], atol=1e-5)


def test_a_graph_for_every_count_mode_and_compilation():
    agent, batch = make(**{"expl.behavior": "plan2explore"})
    agent.captured_act, Graph.made = capture.CapturedAct(agent, record=Graph), 0

    def act(count, mode):
        obs = {key: batch[key][:count, 0] for key in ("vector", "is_first")}
        assert agent.act(agent.initial(count), obs, mode).action.shape[0] == count

    for _ in range(5):
        for count, mode in [(1, "train"), (2, "train"), (2, "greedy"), (2, "explore")]:
            act(count, mode)
    assert Graph.made == 4
    agent.world_model.encoder.compile(backend="eager")
    act(1, "train"), act(1, "train")
    assert Graph.made == 5
    torch._dynamo.reset()


def test_where_recording_fails_acting_continues(monkeypatch):
    """With the draws of an agent that never tried."""

    class Failing(Graph):
        def __call__(self, inputs):
            out = super().__call__(inputs)
            if self.calls > capture.WARMUP:
                raise RuntimeError("not permitted when stream is capturing\nmore")
            return out

    agent, batch = make()
    obs, found = {key: batch[key][:, 0] for key in ("vector", "is_first")}, []
    for recorded in (True, False):
        agent.captured_act = capture.CapturedAct(agent, record=Failing) if recorded else None
        torch.manual_seed(0)
        state = agent.initial(2)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(6):
                state = agent.act(state, obs)
        assert len(seen) == recorded
        assert not recorded or str(seen[0].message).endswith("stream is capturing")
        found.append((state.action, *state.carry))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_another_generator_than_the_runs_is_not_captured():
    agent, batch = make()
    own, other = torch.Generator(), torch.Generator()
    agent.captured_act, Graph.made = capture.CapturedAct(agent, own, Graph), 0
    obs = {key: batch[key][:, 0] for key in ("vector", "is_first")}
    agent.act(agent.initial(2), obs, "train", other)
    assert not agent.captured_act.graphs
    agent.act(agent.initial(2), obs, "train", own)
    assert len(agent.captured_act.graphs) == 1


GRU = {"dynamics.hrvq.memory": "gru", "dynamics.hrvq.posterior_sees": "memory"}


@pytest.mark.parametrize(
    ("kind", "settings", "kernels", "more"),
    [
        ("rssm", {}, 48, 19),
        ("hrssm", {}, 63, 27),
        ("hrvq", {}, 189, 0),
        ("hrvq", {"dynamics.hrvq.memory": "stacked"}, 185, 0),
        ("hrvq", GRU, 92, 34),
    ],
)
def test_kernels_of_a_step(kind, settings, kernels, more):
    """No priors, and an episode's first state only where one starts: with ``more`` kernels."""
    agent, batch = make(**{"dynamics.type": kind}, **settings)
    obs = {key: batch[key][:2, 0] for key in ("vector", "is_first")}
    state, found = agent.initial(2), []
    for _ in range(20):  # the window of a transformer is full then
        state = agent.act(state, obs)
    for first in (False, True):
        obs["is_first"] = torch.tensor([first, False])
        found.append(cost.operators(lambda: agent.act(state, obs))["kernels"])
    assert found[0] <= kernels and found[1] - found[0] <= more, found
