"""Updates and acting of several seeds as recorded graphs, on stand-ins for these."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_act import Graph
from test_agent import make
from test_compile import FailingCapture

from hidreamer import capture
from hidreamer.dynamics import TYPES
from hidreamer.stacked import Stack, stack_trees


def members(count=2, **over):
    agents = [make(length=12, **over)[0] for _ in range(count)]
    own = [torch.Generator().manual_seed(seed) for seed in range(count)]
    return agents, own, make(length=12, **over)[1]


def both(x):
    return {key: torch.stack([value, value]) for key, value in x.items()}


def test_after_a_failed_recording_all_is_as_without(monkeypatch):
    """Weights, optimisers, the random numbers of every member."""
    agents, own, batch = members(**{"dynamics.type": "hrvq", "dynamics.hrvq.posterior": "nearest"})
    template, alike, batch = copy.deepcopy(agents[0]), copy.deepcopy(agents), both(batch)
    stack = Stack(copy.deepcopy(template), agents, own)
    plain = Stack(template, alike, [torch.Generator().manual_seed(seed) for seed in range(2)])
    monkeypatch.setattr(capture, "Captured", FailingCapture)
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "is_cuda", True)
        update = stack.make_update()
    with pytest.warns(RuntimeWarning, match=r"cannot record the update.*not permitted") as seen:
        found = torch.stack([update(batch) for _ in range(6)])
    assert sum("cannot record" in str(warning.message) for warning in seen) == 1
    assert not update.capture and stack.captured_act
    assert torch.equal(found, torch.stack([plain.update(batch) for _ in range(6)]))
    for agent, other in zip(agents, alike, strict=True):
        truth = other.save_state()
        for name, x in agent.save_state()["params"].items():
            assert torch.equal(x, truth["params"][name]), name
        for name, state in agent.save_state()["optim"].items():
            for key, moments in state.items():
                for what, x in moments.items():
                    assert torch.equal(x, truth["optim"][name][key][what]), key


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "train") for kind in sorted(TYPES)), ("rssm", "greedy")]
)
def test_captured_acting_of_all_is_that_of_each(kind, mode):
    """One has acted before, so that their memories differ in length."""
    agents, own, batch = members(**{"dynamics.type": kind, "dynamics.hrvq.window": 4})
    alone, size = copy.deepcopy(agents), agents[0].world_model.dynamics.fixed_size
    obs = [{key: batch[key][:, t] for key in ("vector", "is_first")} for t in range(12)]
    states = [agent.initial(2) for agent in alone]
    states[1] = alone[1].act(states[1], obs[0], "train", torch.Generator().manual_seed(5))
    stack = Stack(copy.deepcopy(agents[0]), agents, own)
    stack.captured_act, Graph.made = capture.CapturedAct(stack, stack.own, Graph), 0
    now = stack_trees([state._replace(carry=size(state.carry)) for state in states])
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    for x in obs:
        now = stack.act(now, both(x), mode)
        for i, agent in enumerate(alone):
            states[i] = agent.act(states[i], x, mode, generators[i])
            assert torch.equal(now.action[i], states[i].action)
            assert torch.allclose(now.carry.deter[i], states[i].carry.deter, atol=1e-4)
    assert Graph.made == 1 and next(iter(stack.captured_act.graphs.values())).calls == len(obs)
    for one, other in zip(own, generators, strict=True):
        assert torch.equal(one.get_state(), other.get_state())


def test_a_member_that_leaves_keeps_no_memory_of_the_others():
    agents, own, batch = members(**{"dynamics.type": "hrvq", "dynamics.hrvq.posterior": "nearest"})
    stack = Stack(copy.deepcopy(agents[0]), agents, own)
    stack.update(both(batch))
    before = [agent.state_dict() for agent in agents]
    before = [{key: x.clone() for key, x in state.items()} for state in before]
    stack.dissolve()
    for agent, state in zip(agents, before, strict=True):
        tensors = agent.state_dict()
        for optimizer in agent.optimizers.values():
            for key, moments in optimizer.state_dict().items():
                tensors |= {f"{key}.{what}": x for what, x in moments.items()}
        for name, x in tensors.items():
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), name
            assert name not in state or torch.equal(x, state[name])
        agent.update(batch, own[0])


def test_mapped_attention_takes_the_kernel_that_vmap_can_differentiate(monkeypatch):
    """The others fail on CUDA in the backward pass."""
    agents, own, batch = members(**{"dynamics.type": "hrvq"})
    kernels, taken, attention = torch.backends.cuda, [], F.scaled_dot_product_attention

    def spy(*args):
        off = kernels.flash_sdp_enabled, kernels.mem_efficient_sdp_enabled
        taken.append((kernels.math_sdp_enabled(), *(enabled() for enabled in off)))
        return attention(*args)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    Stack(copy.deepcopy(agents[0]), agents, own).update(both(batch))
    assert set(taken) == {(True, False, False)}
