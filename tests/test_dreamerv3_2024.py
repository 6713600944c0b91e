"""Parts of DreamerV3 as of 2024, worked out by hand from arXiv 2301.04104v2's formulas, and its
presets.
"""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from test_agent import EVERYTHING, VECTOR, changed, make
from test_parts import KL

import models
import tools
from hidreamer.behavior import Behavior, Replayed
from hidreamer.checkpoint import save_checkpoint
from hidreamer.distributions import BINS, SymexpTwoHot, symexp
from hidreamer.dynamics.rssm import RSSM
from hidreamer.losses import PARTS
from hidreamer.nets import BlockGRUCell, BlockLinear, RMSNorm, SideBySide
from hidreamer.optim import make_optimizer
from run_state import load_weights

# Trainable numbers with 64x64 images and 18 actions.
COUNTS = {
    "1m": 763_372,
    "12m": 11_718_004,
    "25m": 26_242_852,
    "50m": 46_545_108,
    "100m": 104_481_844,
    "200m": 185_528_212,
}


def test_rms_norm_by_hand():
    norm = RMSNorm(3)
    norm.weight.data = torch.tensor([1.0, 2.0, -1.0])
    root = math.sqrt((1 + 4 + 4) / 3 + 1e-4)
    expected = [1 / root, 4 / root, 2 / root]
    assert norm(torch.tensor([1.0, 2.0, -2.0])).tolist() == pytest.approx(expected)
    assert norm(torch.tensor([1.0, 2.0, -2.0]).bfloat16()).dtype == torch.float32


def test_block_linear_keeps_blocks_apart():
    layer = BlockLinear(2, 3, 2)
    x = torch.randn(5, 2, 3)
    out = layer(x)
    for g in range(2):
        assert torch.allclose(out[:, g], x[:, g] @ layer.weight[g] + layer.bias[g], atol=1e-6)


def test_block_gru_by_hand():
    """Two blocks of one number: every product written out."""
    torch.manual_seed(3)
    cell = BlockGRUCell(2, 2, 1, 2, norm="rms").double()
    for p in cell.parameters():
        torch.nn.init.normal_(p)
    x, deter = (torch.tensor([row]).double() for row in ([0.25, -1.25], [0.5, -0.75]))
    silu = lambda v: v / (1 + math.exp(-v))
    sigmoid = lambda v: 1 / (1 + math.exp(-v))
    w, scale = cell.whole.linear.weight[0].tolist(), cell.whole.norm.weight.item()
    whole = w[0] * 0.5 + w[1] * -0.75 + cell.whole.linear.bias.item()
    whole = silu(whole / math.sqrt(whole**2 + 1e-4) * scale)
    hidden = []
    for g, own in enumerate((0.5, -0.75)):
        inputs = [own, whole, 0.25, -1.25]  # itself, all of memory, the input
        weights = cell.hidden.weight[g, :, 0].tolist()
        bias = cell.hidden.bias[g, 0].item()
        hidden.append(sum(a * b for a, b in zip(inputs, weights, strict=True)) + bias)
    root = math.sqrt(sum(h * h for h in hidden) / 2 + 1e-4)
    hidden = [silu(h / root * s) for h, s in zip(hidden, cell.norm.weight.tolist(), strict=True)]
    expected = []
    for g, own in enumerate((0.5, -0.75)):
        gates = [hidden[g] * cell.gates.weight[g, 0, i] + cell.gates.bias[g, i] for i in range(3)]
        reset, cand, update = (gate.item() for gate in gates)
        cand = math.tanh(sigmoid(reset) * cand)
        update = sigmoid(update - 1)
        expected.append(update * cand + (1 - update) * own)
    assert cell(x, deter)[0].tolist() == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match=r"dynamics\.deter 10 is no multiple of the 8 blocks"):
        BlockGRUCell(2, 10, 4, 8, norm="rms")


def test_inputs_side_by_side():
    layer = SideBySide((3, 2), 4, norm="rms", act="silu")
    x = torch.randn(6, 5)
    whole = layer(x)
    assert torch.allclose(whole[:, :4], layer.parts[0](x[:, :3]))
    split = layer.split([3, 2])
    assert torch.allclose(split(0, x[:, :3], split.project(1, x[:, 3:])), whole)


def test_the_length_of_an_action_is_seen():
    """Through a norm without a bias: layers have one before it, all blocks and convolutions."""
    torch.manual_seed(0)
    layer = SideBySide((3, 1), 64, norm="rms", act="silu")
    x = torch.tensor([[1.0, 0.0, 0.0]]).expand(2, -1)
    small, large = layer(torch.cat([x, torch.tensor([[0.3], [0.9]])], -1))
    assert (small - large).abs().max() > 0.1
    agent = new(obs=EVERYTHING)
    names = [name for name, module in agent.named_modules() if isinstance(module, RMSNorm)]
    assert len(names) > 10
    modules = dict(agent.named_modules())
    for name in names:
        parent, _, own = name.rpartition(".")
        before = f"{parent}.{int(own) - 1}" if own.isdigit() else f"{parent}.linear"
        layer = modules.get(before) or modules[f"{parent}.hidden"]
        assert layer.bias is not None, name


def test_the_cell_has_no_scan_of_its_own_and_trains():
    dynamics = RSSM(5, 3, KL, deter=16, hidden=8, stoch=2, classes=3, cell="block_gru", norm="rms")
    assert not dynamics.has_scan
    assert RSSM(5, 3, KL, deter=16, hidden=8, stoch=2, classes=3).has_scan
    assert not RSSM(5, 3, KL, deter=16, hidden=8, stoch=2, classes=3, norm="rms").has_scan


def test_symexp_two_hot_by_hand():
    """A number between two bins: shares by distance, and the mean of bins gives it back."""
    bins = symexp(torch.linspace(-20, 20, BINS, dtype=torch.float64))
    logit = torch.randn(BINS, dtype=torch.float64)
    logp = torch.log_softmax(logit, -1)
    dist = SymexpTwoHot(logit)
    for target in (0.0, 3.7, -250.0, 1e5):
        above = int((bins <= target).sum())
        share = (target - bins[above - 1]) / (bins[above] - bins[above - 1])
        expected = (1 - share) * logp[above - 1] + share * logp[above]
        found = dist.log_prob(torch.tensor(target, dtype=torch.float64))
        assert found.item() == pytest.approx(expected.item(), abs=1e-6)
        onto = torch.full((BINS,), -1e9, dtype=torch.float64)
        onto[above - 1], onto[above] = math.log(1 - share + 1e-300), math.log(share + 1e-300)
        assert SymexpTwoHot(onto).mode().item() == pytest.approx(target, rel=1e-6, abs=1e-6)
    mean = (torch.softmax(logit, -1) * bins).sum()
    assert dist.mode().item() == pytest.approx(mean.item(), rel=1e-6)
    assert SymexpTwoHot(torch.zeros(4, BINS)).mode().tolist() == [0.0] * 4
    two = torch.tensor(2.0), torch.tensor(5.0)
    both = dist.log_prob(*two)
    assert both.item() == pytest.approx(sum(dist.log_prob(x).item() for x in two), rel=1e-6)
    far = dist.log_prob(torch.tensor(1e12, dtype=torch.float64))
    assert far.item() == pytest.approx(logp[-1].item())


def test_laprop_clipping_and_warmup_by_hand():
    """Three steps of one matrix and a scalar near 0, whose gradients are cut to 0.3 of their norm
    (or of 1e-3); the first step is none, the second has a half of the rate.
    """
    layer = torch.nn.Linear(2, 1)
    layer.weight.data, layer.bias.data = torch.tensor([[0.6, -0.8]]), torch.tensor([1e-6])
    settings = {"lr": 0.1, "eps": 1e-20, "clip": 0.0, "agc": 0.3, "warmup": 2}
    optimizer = make_optimizer("laprop", {"layer": layer}, **settings)
    given = [([3.0, 4.0], 2.0), ([0.03, 0.0], -2.0), ([-0.1, 0.1], 1e-5)]
    w, b = [0.6, -0.8], 1e-6
    state = {name: [0.0, 0.0] for name in ("w", "vw")} | {"b": 0.0, "vb": 0.0}
    for t, (of_w, of_b) in enumerate(given, 1):
        loss = (layer.weight * torch.tensor([of_w])).sum() + (layer.bias * of_b).sum()
        metrics = optimizer.step(loss)
        most = 0.3 * max(1e-3, math.hypot(*w)), 0.3 * max(1e-3, abs(b))
        cut = max(1.0, math.hypot(*of_w) / most[0]), max(1.0, abs(of_b) / most[1])
        assert metrics["agc_clipped"].item() == sum(c > 1 for c in cut) / 2
        rate = 0.1 * min(1.0, (t - 1) / 2)

        def step(p, g, m, v, rate=rate, t=t):
            v = 0.999 * v + 0.001 * g * g
            m = 0.9 * m + 0.1 * g / (math.sqrt(v / (1 - 0.999**t)) + 1e-20)
            return p - rate * m / (1 - 0.9**t), m, v

        for i in range(2):
            g = of_w[i] / cut[0]
            w[i], state["w"][i], state["vw"][i] = step(w[i], g, state["w"][i], state["vw"][i])
        b, state["b"], state["vb"] = step(b, of_b / cut[1], state["b"], state["vb"])
        assert layer.weight[0].tolist() == pytest.approx(w, abs=1e-6)
        assert layer.bias.item() == pytest.approx(b, abs=1e-6)


def test_both_clippings_leave_the_norm_of_the_second():
    """A weight of norm 1 and its gradient of norm 5,000: AGC leaves 0.3 of it, which is below one
    ``clip`` and above another.
    """
    for clip, left, clipped in ((1000.0, 0.3, 0.0), (0.1, 0.1, 1.0)):
        layer, found = torch.nn.Linear(2, 1, bias=False), []
        layer.weight.data = torch.tensor([[0.6, -0.8]])
        settings = {"lr": 0.1, "eps": 1e-8, "clip": clip, "agc": 0.3}
        optimizer = make_optimizer("adam", {"layer": layer}, **settings)
        optimizer._move = lambda layer=layer, found=found: found.append(layer.weight.grad.norm())
        metrics = optimizer.step((layer.weight * torch.tensor([[3e3, 4e3]])).sum())
        assert found[0].item() == pytest.approx(left, rel=1e-6)
        assert metrics["grad_norm"].item() == pytest.approx(5e3) and metrics["clipped"] == clipped


def test_what_starts_afresh_is_corrected_by_its_own_steps():
    """A module that a resumed run has more than its checkpoint, beside one that made 50 steps; and
    again after another resume. The first step of LaProp is the rate, along the gradient's signs.
    """
    settings = {"lr": 0.1, "eps": 1e-20, "clip": 0.0, "agc": 0.0, "warmup": 5}
    modules = {name: torch.nn.Linear(2, 1, bias=False) for name in ("old", "new", "newer")}
    two, made = {"old": modules["old"]}, {}
    for name in ("old", "new", "newer"):
        two = two | {name: modules[name]}
        optimizer = make_optimizer("laprop", two, **settings)
        optimizer.load_state_dict(made)
        before = modules[name].weight.detach().clone()
        for i in range(50):
            optimizer.step(sum((m.weight * torch.tensor([3.0, -0.02])).sum() for m in two.values()))
            if i == 0 and name != "old":
                moved = (modules[name].weight - before)[0].tolist()
                assert moved == pytest.approx([-0.1, 0.1], rel=1e-3)
        made = optimizer.state_dict()
    steps = [int(state["step"]) for state in made.values()]
    assert steps == [150, 100, 50]


@pytest.mark.parametrize("before", ["laprop", "adam"])
def test_another_algorithms_moments_are_not_taken_over(before, tmp_path):
    """LaProp's average is of normalised gradients; Adam's first steps from it were up to 38
    times the rate. ``--resume`` of another run says what starts afresh.
    """
    path, lines = tmp_path / "latest.pt", []
    agent, batch = make(**{"model.algorithm": before})
    for _ in range(3):
        agent.update(batch)
    state = {"config": agent.config.tree(), "agent": agent.save_state()}
    if before == "adam":
        del state["config"]["model"]["algorithm"]  # a checkpoint from before there was a choice
    save_checkpoint(path, state)
    for now in ("laprop", "adam"):
        other, _ = make(**{"model.algorithm": now})
        load_weights(SimpleNamespace(config=other.config, agent=other, report=lines.append), path)
        made = {name: len(opt.state_dict()) for name, opt in other.optimizers.items()}
        assert bool(made["model"]) == (before == now) and made["actor"] and made["critic"]
        assert ("fresh   model optimiser" in lines[-1]) == (before != now)
        weights = other.world_model.state_dict()
        weights = {key: x.clone() for key, x in weights.items()}
        other.update(batch)
        moved = [
            (x - weights[key]).abs().max() for key, x in other.world_model.state_dict().items()
        ]
        assert 0.5 < max(moved) / other.config.model.lr < 2


def test_replay_value_loss_by_hand():
    """Four steps, whose dreams began at the second and the last: their returns stand for the
    critic's values there, and the slow critic is a target as well.
    """
    values = {"critic": [1.0, 2.0, 3.0, 4.0], "slow": [1.0, 1.0, 2.0, 2.0]}

    class Known:
        """-log_prob is the squared distance to every target."""

        def __init__(self, value):
            self.value = torch.tensor([value])

        def mode(self):
            return self.value.clone()

        def log_prob(self, *targets):
            return -sum((target - self.value) ** 2 for target in targets)

    imag = SimpleNamespace(discount=0.9, lam=0.8)
    behavior = SimpleNamespace(replay_grad=False, imag=imag, loss_parts=PARTS)
    for name, value in values.items():
        setattr(behavior, name, lambda x, value=value: Known(value))
    x, reward = torch.zeros(1, 4, 2), torch.tensor([[9.0, 1.0, 2.0, 3.0]])
    first = torch.tensor([[True, False, False, False]])
    dreams = torch.tensor([5.0, 7.0])
    two = 3.0 + 0.9 * 7.0
    one = 2.0 + 0.9 * (0.2 * 3.0 + 0.8 * two)
    zero = 1.0 + 0.9 * (0.2 * 5.0 + 0.8 * one)
    assert [zero, one, two] == pytest.approx([8.54992, 9.236, 9.3])
    replayed = Replayed(x, reward, first, torch.zeros(1, 4), slice(1, 4, 2))
    found = Behavior.replay_loss(behavior, replayed, dreams).item()
    squares = (zero - 1) ** 2 + (one - 2) ** 2 + 1 + (two - 3) ** 2 + 1
    assert found == pytest.approx(squares / 3, rel=1e-6)


SMALL = {"dynamics.deter": 16, "dynamics.hidden": 8, "dynamics.rssm.stoch": 4}
SMALL |= {"dynamics.free": 0, "dynamics.rssm.classes": 4, "dynamics.hrssm.stoch": [2, 2]}
SMALL |= {"dynamics.hrssm.classes": [4, 4], "model.lr": 3e-3, "model.warmup": 4}
UNITS = ("encoder", "decoder", "reward", "cont", "actor.net", "critic.net")
SMALL |= {f"{name}.units": 16 for name in UNITS}


def new(kind="rssm", obs=VECTOR):
    config = tools.load_config(["debug", "dreamerv3_2024"], SMALL | {"dynamics.type": kind})
    agent = models.Agent(obs, spaces.Discrete(3), 3, config)
    agent.make_optimizers()
    return agent


@pytest.mark.parametrize("kind", ["rssm", "hrssm"])
def test_the_preset_trains_and_resumes_exactly(kind):
    agent, batch = new(kind), make()[1]
    before, found = copy.deepcopy(agent.state_dict()), []
    for i in range(30):
        if i == 3:  # in the midst of the warm-up
            other = new(kind)
            other.load_state(copy.deepcopy(agent.save_state()))
        torch.manual_seed(i)
        values = agent.update(batch)
        found.append(dict(zip(agent.metric_names, values.tolist(), strict=True)))
        if i == 3:
            torch.manual_seed(i)
            assert torch.equal(other.update(batch), values)
            assert not changed(agent.state_dict(), other.state_dict())
    still = set(before) - changed(before, agent.state_dict())
    assert not still, still
    assert found[-1]["model_loss"] < 0.8 * found[0]["model_loss"]
    assert {"joint_agc_clipped", "replay_critic_loss"} < found[-1].keys()


def test_the_continue_head_learns_the_discount():
    """Its target is the discount; imagination does not count it twice."""
    agent, batch = make(**{"imag.contdisc": True, "imag.discount": 0.8})
    plain, _ = make(**{"imag.discount": 0.8})
    plain.load_state(agent.save_state())
    model, obs = agent.world_model, models.networks.preprocess(batch)
    obs["is_terminal"] = torch.zeros(2, 8)
    obs["is_terminal"][0, 3] = 1.0
    torch.manual_seed(0)
    losses, carry, post, _, _ = model.loss(obs)
    logit = model.cont(post.feat.cat()).logit
    target = torch.where(obs["is_terminal"] > 0, 0.0, 0.8)
    expected = -(
        target * torch.nn.functional.logsigmoid(logit)
        + (1 - target) * torch.nn.functional.logsigmoid(-logit)
    )
    assert torch.allclose(losses["cont"], expected, atol=1e-6)
    start, terminal = model.dynamics.starts(carry, post, 0), obs["is_terminal"].flatten()
    torch.manual_seed(1)
    traj = agent.behavior.imagine(model, start, terminal)
    torch.manual_seed(1)
    usual = plain.behavior.imagine(plain.world_model, start, terminal)
    assert torch.allclose(traj.disc[:, 0], usual.disc[:, 0])
    assert torch.allclose(traj.disc[:, 1:] * 0.8, usual.disc[:, 1:], atol=1e-6)


def original(config):
    """Trainable numbers of the original at such a size, from the shapes of its layers. Its depth is
    twice ours: four stages of kernels of 5, of 2 to 4 times the depth; the decoder's first layer
    reads the memory in 8 blocks.
    """
    deter, hidden, units = config.dynamics.deter, config.dynamics.hidden, config.cont.units
    blocks, stoch, channels = 8, 32 * config.dynamics.rssm.classes, 3
    stages = [2 * config.encoder.depth * times for times in (2, 3, 4, 4)]
    embed, feat = 4 * 4 * stages[-1], deter + stoch
    linear = lambda inp, out: (inp + 1) * out
    block = lambda inp, out: linear(inp, out) + out  # and its norm
    total = block(deter, hidden) + block(stoch, hidden) + block(18, hidden)
    total += (deter // blocks + 3 * hidden) * deter + 2 * deter  # each block's own layer
    total += deter // blocks * 3 * deter + 3 * deter  # its gates
    total += block(deter, hidden) + block(hidden, hidden) + linear(hidden, stoch)  # prior
    total += block(deter + embed, hidden) + linear(hidden, stoch)  # posterior
    for inp, out in itertools.pairwise([channels, *stages]):
        total += 2 * block(25 * inp, out)  # one in the encoder, as large a one in the decoder
    total += linear(25 * stages[0], channels) - block(25 * channels, stages[0])  # its last one
    total += sum(stages[:-1]) * 2 - sum(stages[1:]) * 2  # whose biases and norms are of its outputs
    total += deter // blocks * embed + embed + stages[-1]
    total += block(stoch, 2 * units) + linear(2 * units, embed)
    for layers, out in ((1, 255), (1, 1), (3, 18), (3, 255)):  # reward, continue, actor, critic
        total += block(feat, units) + (layers - 1) * block(units, units) + linear(units, out)
    return total


def test_sizes_of_2024():
    """Ours are an eighth larger than the original's: the decoder's first layer has no blocks."""
    images = {"image": spaces.Box(0, 255, (64, 64, 3), np.uint8)}
    found = {}
    for name in COUNTS:
        config = tools.load_config(["atari100k", "dreamerv3_2024", f"size{name}"], {})
        with torch.device("meta"):
            agent = models.Agent(images, spaces.Discrete(18), 18, config)
        parts = [m for group in agent.trained().values() for m in group.values()]
        found[name] = sum(p.numel() for part in parts for p in part.parameters())
        assert found[name] / original(config) == pytest.approx(1.115, abs=0.006), name
    assert found == COUNTS


def test_the_2023_preset_has_none_of_it():
    config = tools.load_config([], {})
    assert (config.dynamics.rssm.cell, config.critic.net.bins) == ("gru", "symlog")
    assert config.model.algorithm == "adam" and not config.imag.contdisc
    assert not config.replay.online and not config.replay.write_back
    assert config.critic.replay_loss == config.model.agc == config.model.warmup == 0
