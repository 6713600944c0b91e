"""Several seeds in one process: each member is the run of its seed alone."""

import itertools

import pytest
import torch
from test_agent import EVERYTHING, make

import networks
from hidreamer.dynamics import TYPES
from hidreamer.quantizer import Quantizer
from hidreamer.stacked import Stack

UPDATES, SEEDS = 20, (3, 1)
GRID = {"grid": EVERYTHING["grid"]}
VECTOR = {"vector": EVERYTHING["vector"]}
IMAGE = {"image": EVERYTHING["image"]}
SAMPLED, NEAREST, FSQ = (
    {"dynamics.type": "hrvq", "dynamics.hrvq.posterior": kind}
    for kind in ("sampled", "nearest", "fsq")
)
CASES = {
    "rssm, grid, discrete": (GRID, "discrete", {"dynamics.type": "rssm"}),
    "hrssm, vector, continuous": (VECTOR, "continuous", {"dynamics.type": "hrssm"}),
    "hrvq gru, grid, discrete": (GRID, "discrete", SAMPLED | {"dynamics.hrvq.memory": "gru"}),
    "hrvq, grid, discrete": (GRID, "discrete", SAMPLED),
    "hrvq nearest, vector, multi": (VECTOR, "multi", NEAREST),
}
MORE = {}
OBSERVATIONS = {"image": IMAGE, "grid": GRID, "vector": VECTOR}
KINDS = {kind: {"dynamics.type": kind} for kind in sorted(TYPES)}
KINDS |= {"nearest": NEAREST, "fsq": FSQ}
KINDS |= {"frozen": {"dynamics.type": "hrvq", "dynamics.hrvq.posterior": "frozen"}}
KINDS |= {"experts": {"dynamics.type": "hrvq", "dynamics.hrvq.ffn": "moe"}}
KINDS |= {"stacked": SAMPLED | {"dynamics.hrvq.memory": "stacked"}}
SEES = {"dynamics.hrvq.memory": "gru", "dynamics.hrvq.posterior_sees": "memory"}
KINDS |= {"sees memory": SAMPLED | SEES}
KINDS |= {"explorer": {"expl.behavior": "plan2explore"}, "joint": {"optim": "joint"}}
for (kind, over), (name, obs), act in itertools.product(
    KINDS.items(), OBSERVATIONS.items(), ("discrete", "continuous")
):
    MORE[f"{kind}, {name}, {act}"] = (obs, act, over)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """All in float64: no rounding error grows into another sample."""
    before = networks.preprocess
    double = lambda obs: {key: x.double() for key, x in before(obs).items()}
    monkeypatch.setattr(networks, "preprocess", double)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def member(seed, obs, act, over):
    torch.manual_seed(seed)
    over = {"imag.horizon": 4, "imag.starts": 4, **over}
    agent, _ = make(obs, act, **over)
    agent.double().make_optimizers()
    for behavior in agent.behaviors().values():
        behavior.norm.float()  # which counts in float32
    for quantizer in (part for part in agent.modules() if isinstance(part, Quantizer)):
        for name in {"count", "total"} & dict(quantizer.named_buffers()).keys():
            setattr(quantizer, name, getattr(quantizer, name).float())  # so do these
    torch.manual_seed(seed + 100)  # the critic's and the delta's zeros would hide a mixture
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.01 * torch.randn_like(p))
    generator = torch.Generator().manual_seed(seed)
    batches = [make(obs, act, **over)[1] for _ in range(2)]
    return agent, batches, generator


def stacked(cases):
    agents, batches, generators = zip(*(member(seed, *cases) for seed in SEEDS), strict=True)
    stack = Stack(member(0, *cases)[0], agents, generators)
    both = []
    for pair in zip(*batches, strict=True):
        both.append({key: torch.stack([rows[key] for rows in pair]) for key in pair[0]})
    return stack, both


def check(case):
    stack, batches = stacked(case)
    metrics = [stack.update(batches[n % 2]) for n in range(UPDATES)]
    for i, seed in enumerate(SEEDS):
        agent, own, generator = member(seed, *case)
        for n in range(UPDATES):
            found = agent.update(own[n % 2], generator)
            assert torch.allclose(metrics[n][:, i], found, rtol=1e-4, atol=1e-5), (n, seed)
        assert torch.equal(generator.get_state(), stack.own[i].get_state())  # the same draws
        assert stack.agent.metric_names == agent.metric_names
        alone, row = agent.save_state(), stack.agents[i].save_state()
        assert alone["params"].keys() == row["params"].keys()
        for name, x in alone["params"].items():
            assert torch.allclose(x, row["params"][name], rtol=1e-4, atol=1e-4), name
        for name, moments in alone["optim"].items():
            assert moments.keys() == row["optim"][name].keys()
            for key, state in moments.items():
                for what, x in state.items():
                    assert torch.allclose(x, row["optim"][name][key][what], atol=1e-4), key


@pytest.mark.parametrize("case", CASES)
def test_a_member_learns_what_its_seed_learns_alone(case):
    check(CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_every_kind_of_member_learns_what_its_seed_learns_alone(case):
    check(MORE[case])
