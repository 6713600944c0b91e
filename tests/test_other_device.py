"""What runs on a GPU, on a device that is none: no tensor is left behind on the CPU, and an update
reads nothing on the host (``other_device``; what needs a card is in ``test_gpu.py``).
"""

import copy

import pytest
import torch
from other_device import DEVICE, Remote, other_device
from test_agent import EVERYTHING, make
from test_population import KINDS, OTHERS, SEEDS, varied

from hidreamer.dynamics import TYPES
from hidreamer.stacked import Stack, stack_trees

CASES = {kind: (EVERYTHING, "discrete", over) for kind, over in KINDS.items() if kind != "joint"}
CASES |= {name: OTHERS[name] for name in ("the same, joint", "every objective", "no decoder")}
SHORT = {"imag.horizon": 3, "imag.starts": 4}


# ---------------------------------------------------------------- the device


def test_it_refuses_what_cuda_refuses():
    with other_device():
        x, y = torch.ones(2, 3, device=DEVICE), torch.ones(3)
        for wrong in (lambda: x + y, lambda: torch.cat([x[0], y]), lambda: x @ y):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x + y.sum()).tolist() == [[4.0] * 3] * 2  # a number is no tensor


def test_it_counts_copies_and_reads():
    with other_device() as device:
        x = torch.ones(3, device=DEVICE)
        x.add_(1).sum().sqrt()
        assert not device.copies and not device.reads
        torch.tensor([1.0, 2.0], device=DEVICE), torch.zeros(2).to(DEVICE), x[torch.arange(2)]
        x[:2] = torch.zeros(2)
        assert len(device.copies) == 4 and not device.reads
        for read in (lambda: x.sum().item(), lambda: bool(x.any()), x.nonzero, lambda: x[x > 0]):
            read()
        assert len(device.reads) == 4 and len(device.copies) == 4
        assert x.cpu().tolist() == x.tolist() == [0.0, 0.0, 2.0]
        assert len(device.reads) == 4 + 2 and len(device.copies) == 4


def test_weights_are_moved_trained_and_saved(tmp_path):
    with other_device():
        net = torch.nn.Linear(2, 1).to(DEVICE)
        assert all(isinstance(p, Remote) and p.requires_grad for p in net.parameters())
        before = net.weight.cpu()
        net(torch.ones(4, 2, device=DEVICE)).sum().backward()
        torch.optim.SGD(net.parameters(), 0.5).step()
        assert torch.equal(net.weight.cpu(), before - 2)
        torch.save(net.state_dict(), tmp_path / "net.pt")
    found = torch.load(tmp_path / "net.pt", weights_only=True)
    assert torch.equal(found["weight"], before - 2)


# ---------------------------------------------------------------- the agent


@pytest.mark.parametrize("case", CASES)
def test_an_update_is_the_same_there_and_reads_nothing(case):
    obs, act, over = CASES[case]
    agent, batch = make(obs, act, **SHORT | over)
    there = copy.deepcopy(agent)
    truth = agent.update(batch, torch.Generator().manual_seed(1))
    with other_device() as device:
        there.to(DEVICE).make_optimizers()
        batch = {key: x.to(DEVICE) for key, x in batch.items()}
        generator = torch.Generator(DEVICE).manual_seed(1)
        device.copies.clear()
        metrics = there.update(batch, generator)
        assert not device.copies and not device.reads, set(device.copies + device.reads)
        state = there.initial(2)
        start = {key: batch[key][:, 0] for key in (*obs, "is_first")}
        for _ in range(2):
            state = there.plain_act(state, start, "train", generator)
        assert not device.reads, set(device.reads)
        assert torch.allclose(metrics.cpu(), truth, rtol=1e-4, atol=1e-5)
    assert all(isinstance(p, Remote) for p in there.parameters())


@pytest.mark.parametrize("case", [*sorted(TYPES), "stacked", "experts"])
def test_members_learn_and_act_there(case):
    agent, batch = make(EVERYTHING, "discrete", **SHORT, **KINDS[case])
    agents = [varied(agent, seed) for seed in SEEDS]
    both = {key: torch.stack([x, x]) for key, x in batch.items()}  # (P,B,T,...)
    own = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    truth = Stack(copy.deepcopy(agent), copy.deepcopy(agents), own).update(both)  # (M,P)
    with other_device() as device:
        for one in (agent, *agents):
            one.to(DEVICE).make_optimizers()
        own = [torch.Generator(DEVICE).manual_seed(seed) for seed in SEEDS]
        stack = Stack(agent, agents, own)
        both = {key: x.to(DEVICE) for key, x in both.items()}
        device.copies.clear()
        metrics = stack.update(both)
        assert not device.copies and not device.reads, set(device.copies + device.reads)
        assert torch.allclose(metrics.cpu(), truth, rtol=1e-4, atol=1e-5)
        size = agent.world_model.dynamics.fixed_size
        states = [one.initial(2) for one in agents]
        state = stack_trees([one._replace(carry=size(one.carry)) for one in states])
        obs = {key: both[key][:, :, 0] for key in (*EVERYTHING, "is_first")}
        device.reads.clear()
        stack.act(state, obs, "train")
        assert not device.reads, set(device.reads)
        stack.dissolve()
        agents[0].update({key: x[0] for key, x in both.items()}, own[0])
    assert all(isinstance(p, Remote) for one in agents for p in one.parameters())
