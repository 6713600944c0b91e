"""Several seeds in one process: each member is the run of its seed alone."""

import copy
import itertools

import pytest
import torch
from other_device import CudaAutocast
from test_agent import EVERYTHING, make

import networks
from hidreamer import cost, objectives
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
SMALL = {"expl.models": 3, "expl.layers": 2, "expl.units": 16}
KINDS |= {"explorer": {"expl.behavior": "plan2explore"} | SMALL, "joint": {"optim": "joint"}}
for (kind, over), (name, obs), act in itertools.product(
    KINDS.items(), OBSERVATIONS.items(), ("discrete", "continuous")
):
    MORE[f"{kind}, {name}, {act}"] = (obs, act, over)
# What else of an update there is to choose, for a few updates.
REPLAYED = {"critic.replay_loss": 0.3, "critic.replay_grad": True}
LAPROP = {"algorithm": "laprop", "agc": 0.3, "clip": 0, "warmup": 3}
BLOCKS = ("model", "actor", "critic")
OF_2024 = {f"{block}.{key}": x for block in BLOCKS for key, x in LAPROP.items()}
CELL = {"cell": "block_gru", "blocks": 2, "prior_layers": 2, "norm": "rms"}
TOKENS = SEES | {f"dynamics.hrvq.{key}": x for key, x in CELL.items()}
NETS = {f"dynamics.rssm.{key}": x for key, x in CELL.items()} | {"imag.contdisc": True}
NETS |= {"encoder.norm": "rms", "critic.net.norm": "rms", "critic.net.bins": "symexp"}
WEIGHTS = {f"model.losses.{name}": 0.5 for name in ("ac_cpc", "barlow", "next_embed", "harmony")}
WEIGHTS |= {"model.ac_cpc.units": 16, "model.ac_cpc.steps": 3, "model.next_embed.units": 16}
ENSEMBLE = {"expl.behavior": "plan2explore", "expl.models": 2, "expl.layers": 1, "expl.units": 16}
OTHERS = {
    "plan2explore": (VECTOR, "discrete", ENSEMBLE),
    "agc, laprop, replayed critic": (VECTOR, "discrete", OF_2024 | REPLAYED),
    "the same, joint": (VECTOR, "discrete", OF_2024 | REPLAYED | NETS | {"optim": "joint"}),
    "replayed critic that leaves the model": (VECTOR, "continuous", {"critic.replay_loss": 0.3}),
    "tokens as of 2024": (VECTOR, "discrete", SAMPLED | TOKENS),
    "every objective": (VECTOR, "discrete", WEIGHTS),
    "no decoder": (GRID, "discrete", WEIGHTS | {"model.losses.decoder": 0, "decoder.probe": True}),
}


@pytest.fixture
def wide(monkeypatch):
    """All in float64: no rounding error grows into another sample."""
    before = networks.preprocess
    double = lambda obs: {key: x.double() for key, x in before(obs).items()}
    monkeypatch.setattr(networks, "preprocess", double)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(default)


def double(agent):
    agent.double().make_optimizers()
    for behavior in agent.behaviors().values():
        behavior.norm.float()  # which counts in float32
    for quantizer in (part for part in agent.modules() if isinstance(part, Quantizer)):
        for name in {"count", "total"} & dict(quantizer.named_buffers()).keys():
            setattr(quantizer, name, getattr(quantizer, name).float())  # so do these


def made(obs, act, over):
    """An agent, and two batches for each seed."""
    more = {"imag.horizon": 4, "imag.starts": 4, **over}
    agent, rows = make(obs, act, batch=4 * len(SEEDS), **more)
    rows["is_first"][::3, 5] = True
    parts = {key: x.chunk(2 * len(SEEDS)) for key, x in rows.items()}
    batches = [{key: x[i] for key, x in parts.items()} for i in range(2 * len(SEEDS))]
    return agent, {seed: batches[2 * i : 2 * i + 2] for i, seed in enumerate(SEEDS)}


def varied(agent, seed):
    """Another one, whose zeros, which would hide a mixture, are none."""
    torch.manual_seed(seed)
    agent = copy.deepcopy(agent)
    with torch.no_grad():
        for p in agent.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return agent


def stacked(template, batches, updates):
    """-> the members before, their stack, the metrics (M,P) of its updates."""
    agents = {seed: varied(template, seed) for seed in SEEDS}
    own = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    stack, metrics = Stack(template, copy.deepcopy(list(agents.values())), own), []
    for n in range(updates):
        rows = [batches[seed][n % 2] for seed in SEEDS]
        metrics.append(stack.update({key: torch.stack([x[key] for x in rows]) for key in rows[0]}))
    return agents, stack, metrics


def check(case, updates=UPDATES):
    template, batches = made(*case)
    double(template)
    agents, stack, metrics = stacked(template, batches, updates)
    for i, (seed, agent) in enumerate(agents.items()):
        generator = torch.Generator().manual_seed(seed)
        for n in range(updates):
            found = agent.update(batches[seed][n % 2], generator)
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


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", CASES)
def test_a_member_learns_what_its_seed_learns_alone(case):
    check(CASES[case])


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("case", OTHERS)
def test_whatever_a_member_learns_from_its_seed_learns_alone(case):
    check(OTHERS[case], 4)


class OneNumber(torch.nn.Module):
    """An objective of one's own whose parameter has no axis."""

    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def loss(self, post, embed, obs, generator=None):
        return {"one": (embed.square().mean(-1) - self.log_scale.exp()).square()}, {}


@pytest.mark.usefixtures("wide")
def test_a_parameter_may_be_one_number(monkeypatch):
    """Also where members that have learned are put together again."""
    monkeypatch.setitem(objectives.OBJECTIVES, "barlow", lambda model, config: OneNumber())
    over = {"model.losses.barlow": 1, "model.agc": 0.3, "imag.horizon": 1, "imag.starts": 1}
    template, batches = made(VECTOR, "discrete", over)
    double(template)
    other = copy.deepcopy(template)
    stack = stacked(template, batches, 1)[1]
    before = [agent.save_state()["optim"]["model"] for agent in stack.agents]
    stack.dissolve()
    again = Stack(other, stack.agents, stack.own)
    for agent, moments in zip(again.agents, before, strict=True):
        found = agent.save_state()["optim"]["model"]
        assert found["barlow.log_scale"]["exp_avg"].shape == ()
        for key, state in moments.items():
            assert all(torch.equal(found[key][name], x) for name, x in state.items()), key
    assert before[0]["barlow.log_scale"]["exp_avg"] != before[1]["barlow.log_scale"]["exp_avg"]


@pytest.mark.usefixtures("wide")
@pytest.mark.slow
@pytest.mark.parametrize("case", MORE)
def test_every_kind_of_member_learns_what_its_seed_learns_alone(case):
    check(MORE[case])


@pytest.mark.parametrize("kind", ["rssm", "hrssm", "stacked", "sees memory"])
def test_more_members_are_no_more_kernels(kind):
    """But for what each draws from its own generator."""
    agent, rows = make(GRID, "discrete", **{"imag.horizon": 4, "imag.starts": 4} | KINDS[kind])
    found = []
    for count in (2, 4):
        own = [torch.Generator().manual_seed(seed) for seed in range(count)]
        stack = Stack(copy.deepcopy(agent), [copy.deepcopy(agent) for _ in own], own)
        both = {key: torch.stack([x] * count) for key, x in rows.items()}
        found.append(cost.operators(lambda: stack.update(both))["kernels"])  # noqa: B023
    assert found[0] <= found[1] <= found[0] + 20


@pytest.mark.parametrize(
    ("kind", "obs"), [*((kind, VECTOR) for kind in sorted(TYPES)), ("rssm", IMAGE)]
)
def test_members_in_bfloat16_differ_by_its_rounding(kind, obs):
    """A rounded number may turn a draw, and what follows from it: most metrics are compared."""
    over = {"dynamics.type": kind, "precision": "bfloat16"}
    template, batches = made(obs, "discrete", over)
    exact = made(obs, "discrete", over | {"precision": "float32"})[0]
    with CudaAutocast():
        agents, stack, metrics = stacked(template, batches, 2)
    gap = lambda x, truth: ((x - truth).abs() / truth.abs().clamp(min=0.1)).median().item()
    for i, (seed, agent) in enumerate(agents.items()):
        exact.load_state_dict(agent.state_dict())
        generator = torch.Generator().manual_seed(seed)
        truth = exact.update(batches[seed][0], generator.clone_state())
        assert gap(metrics[0][:, i], truth) > 1e-4
        for n in range(2):
            found = agent.update(batches[seed][n], generator)
            assert gap(metrics[n][:, i], found) < 0.005 < gap(metrics[n][:, 1 - i], found)
        assert torch.equal(generator.get_state(), stack.own[i].get_state())
