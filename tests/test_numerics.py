"""Golden numbers: each expected value is worked out by hand or by a slow,
obvious computation beside it.
"""

import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import models
import networks
import tools
from hidreamer import distributions as dists
from hidreamer import nets
from hidreamer.optim import Optimizer
from hidreamer.parallel import Whole
from hidreamer.quantizer import Quantizer
from hidreamer.returns import ReturnNorm, lambda_return
from hidreamer.transformer import Transformer, rotary, rotate


def test_symlog():
    x = torch.tensor([-(math.e**2 - 1), -1e-4, 0.0, math.e - 1, 1000.0], dtype=torch.float64)
    assert torch.allclose(dists.symlog(x)[[0, 3]], torch.tensor([-2.0, 1.0], dtype=torch.float64))
    assert torch.allclose(dists.symexp(dists.symlog(x)), x, atol=1e-12)


class TestTwoHot:
    def test_uniform_output_is_exactly_zero(self):
        assert dists.TwoHot(torch.zeros(3, dists.BINS)).mode().tolist() == [0.0, 0.0, 0.0]
        assert dists.TwoHot(torch.full((1, dists.BINS), 7.3)).mode().item() == 0.0

    def test_mode_of_one_bin_is_that_bin(self):
        for k in (0, 126, 127, 128, 200, 254):
            logit = torch.full((dists.BINS,), -1e9)
            logit[k] = 0.0
            place = -20.0 + k * 40.0 / 254.0
            expected = math.copysign(math.expm1(abs(place)), place)
            assert dists.TwoHot(logit).mode().item() == pytest.approx(expected, rel=1e-4, abs=1e-6)

    def test_log_prob_splits_a_target_between_its_neighbours(self):
        logit = torch.randn(dists.BINS)
        logp = torch.log_softmax(logit, -1)
        width = 40.0 / 254.0
        target = math.expm1(30.25 * width)  # a quarter of the way from bin 127 + 30 to the next
        expected = 0.75 * logp[157] + 0.25 * logp[158]
        assert dists.TwoHot(logit).log_prob(torch.tensor(target)).item() == pytest.approx(
            expected.item(), abs=1e-4
        )

    def test_targets_beyond_the_bins_go_to_the_last(self):
        logit = torch.randn(dists.BINS)
        logp = torch.log_softmax(logit, -1)
        dist = dists.TwoHot(logit)
        assert dist.log_prob(torch.tensor(1e12)).item() == pytest.approx(logp[-1].item())
        assert dist.log_prob(torch.tensor(-1e12)).item() == pytest.approx(logp[0].item())

    def test_two_targets_are_the_sum(self):
        dist, a, b = dists.TwoHot(torch.randn(4, dists.BINS)), torch.randn(4), 10 * torch.randn(4)
        assert torch.allclose(dist.log_prob(a, b), dist.log_prob(a) + dist.log_prob(b))

    def test_gradient_is_softmax_minus_target(self):
        logit = torch.randn(dists.BINS, requires_grad=True)
        dists.TwoHot(logit).log_prob(torch.tensor(0.0)).backward()
        expected = -torch.softmax(logit.detach(), -1)
        expected[127] += 1.0
        assert torch.allclose(logit.grad, expected, atol=1e-6)


class TestCategorical:
    def test_kl_with_unimix_by_hand(self):
        # Two classes, 1% uniform: softmax (.8, .2) becomes (.797, .203), (.5, .5) stays.
        post = dists.unimix_probs(torch.tensor([[math.log(4.0), 0.0]], dtype=torch.float64), 0.01)
        prior = dists.unimix_probs(torch.zeros(1, 2, dtype=torch.float64), 0.01)
        expected = 0.797 * math.log(0.797 / 0.5) + 0.203 * math.log(0.203 / 0.5)
        assert dists.kl(post, prior).item() == pytest.approx(expected, abs=1e-6)

    def test_saturated_logits_stay_finite(self):
        # Without unimix in the KL this pair costs about 2,000 nats; with it, log(1 / (0.01 / 32))
        # at the most.
        logit = torch.zeros(2, 1, 32)
        logit[0, 0, 3], logit[1, 0, 5] = 1e3, 2e3
        post, prior = dists.unimix_probs(logit, 0.01)
        bound = -math.log(0.01 / 32)
        assert 0.9 * bound < dists.kl(post, prior).item() < bound

    def test_saturated_logits_stay_finite_without_a_uniform_share(self):
        logit = torch.tensor([[0.0, 110.0, 3.0]], requires_grad=True)
        policy, taken = dists.OneHotCategorical(logit, (3,), 0.0), torch.tensor([[0.0, 1.0, 0.0]])
        found = policy.log_prob(taken) + policy.entropy()
        grad = torch.autograd.grad(found.sum(), logit)[0]
        assert found.abs().item() < 1e-30
        assert torch.allclose(grad, torch.zeros(1, 3), atol=1e-30)
        probs = dists.unimix_probs(logit, 0.0).unsqueeze(0)
        assert dists.kl(probs, probs).item() == 0.0
        ordinary = torch.randn(5, 4)
        assert torch.equal(dists.unimix_probs(ordinary, 0.0), torch.softmax(ordinary, -1))

    def test_entropy_sums_over_variables(self):
        assert dists.entropy(torch.full((5, 4), 0.25)).item() == pytest.approx(5 * math.log(4))

    def test_draws_follow_the_probabilities(self):
        probs = torch.tensor([0.5, 0.3, 0.2]).expand(20_000, 3)
        assert torch.allclose(
            dists.sample_onehot(probs, torch.rand(len(probs), 1)).mean(0), probs[0], atol=0.02
        )
        assert torch.equal(dists.sample_onehot(probs, None)[0], torch.tensor([1.0, 0.0, 0.0]))

    def test_draw_is_straight_through(self):
        probs = torch.tensor([0.2, 0.8], requires_grad=True)
        (dists.sample_onehot(probs, torch.rand(1)) * torch.tensor([3.0, 5.0])).sum().backward()
        assert probs.grad.tolist() == [3.0, 5.0]

    def test_multidiscrete_log_prob_and_entropy(self):
        dist = dists.OneHotCategorical(torch.zeros(1, 5), (2, 3), 0.01)
        x = dist.sample()
        assert x[:, :2].sum() == 1 and x[:, 2:].sum() == 1
        assert dist.log_prob(x).item() == pytest.approx(-math.log(2) - math.log(3))
        assert dist.entropy().item() == pytest.approx(math.log(2) + math.log(3))


class TestClippedNormal:
    def dist(self, mean=0.3, std=0.2):
        return dists.ClippedNormal(torch.full((1, 1), mean), torch.full((1, 1), std), 0.1, 1.0)

    def test_density_and_both_tails_make_one(self):
        dist = self.dist(std=2.0)
        inside = torch.linspace(-1, 1, 20_001)[1:-1].unsqueeze(-1)
        mass = dist.log_prob(inside).exp().sum() * 1e-4
        tails = dist.log_prob(torch.tensor([[1.0], [-1.0]])).exp().sum()
        assert tails > 0.1  # so that leaving them out would show
        assert (mass + tails).item() == pytest.approx(1.0, abs=1e-3)

    def test_score_has_mean_zero(self):
        # E[d log p / d mean] = 0 is what makes REINFORCE unbiased; the unclipped density fails it
        # for clipped draws.
        mean = torch.full((1, 1), 1.2, requires_grad=True)
        dist = dists.ClippedNormal(mean.expand(200_000, 1), torch.full((200_000, 1), 2.0), 0.1, 1.0)
        x = dist.sample().detach()
        (right,) = torch.autograd.grad(dist.log_prob(x).mean(), mean, retain_graph=True)
        unclipped = -0.5 * ((x - dist.loc) / dist.std).square().sum(-1)
        (wrong,) = torch.autograd.grad(unclipped.mean(), mean)
        assert abs(right.item()) < 0.01 < 0.05 < abs(wrong.item())

    def test_samples_and_mode(self):
        dist = self.dist(mean=5.0)
        assert dist.sample().abs().max() <= 1.0
        assert dist.mode().item() == pytest.approx(math.tanh(5.0))


def test_bernoulli_and_mse():
    logit = torch.tensor([0.0, 2.0])
    expected = [math.log(0.5), math.log(1 / (1 + math.exp(-2)))]
    assert dists.Bernoulli(logit).log_prob(torch.ones(2)).tolist() == pytest.approx(expected)
    grid = dists.Bernoulli(torch.zeros(4, 2, 2, 3), event=3).log_prob(torch.zeros(4, 2, 2, 3))
    assert grid.tolist() == pytest.approx([12 * math.log(0.5)] * 4)
    assert (
        dists.MSE(torch.tensor([[1.0, 2.0]]), 1).log_prob(torch.tensor([[0.0, 4.0]])).item() == -5.0
    )
    squashed = dists.MSE(torch.tensor([[1.0]]), 1, in_symlog=True)
    assert squashed.log_prob(torch.tensor([[0.0]])).item() == -1.0
    assert squashed.mode().item() == pytest.approx(math.e - 1)


class TestReturns:
    def test_by_hand_with_termination_and_truncation(self):
        # Three steps, gamma .5, lambda .5. Row 0 goes on; row 1 terminates on arriving in state 2;
        # row 2 is cut by the horizon, which must bootstrap from the last value.
        rew = torch.tensor([[0.0, 1.0, 2.0, 4.0]] * 3)
        value = torch.tensor([[9.0, 10.0, 20.0, 40.0]] * 3)
        disc = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.0, 0.5], [0.5, 0.5, 0.5, 1.0]])
        r2 = 4 + 0.5 * 40
        r1 = 2 + 0.5 * (0.5 * 20 + 0.5 * r2)
        r0 = 1 + 0.5 * (0.5 * 10 + 0.5 * r1)
        ended = [1 + 0.5 * (0.5 * 10 + 0.5 * 2), 2.0, r2]
        cut2 = 4 + 40
        cut1 = 2 + 0.5 * (0.5 * 20 + 0.5 * cut2)
        expected = [[r0, r1, r2], ended, [1 + 0.5 * (0.5 * 10 + 0.5 * cut1), cut1, cut2]]
        assert torch.allclose(lambda_return(rew, value, disc, 0.5), torch.tensor(expected))

    def test_extremes_of_lambda(self):
        rew, value = torch.randn(5, 8), torch.randn(5, 8)
        disc = torch.rand(5, 8)
        assert torch.allclose(
            lambda_return(rew, value, disc, 0.0), rew[:, 1:] + disc[:, 1:] * value[:, 1:]
        )
        total = value[:, -1]
        for t in reversed(range(7)):
            total = rew[:, t + 1] + disc[:, t + 1] * total
        assert torch.allclose(lambda_return(rew, value, disc, 1.0)[:, 0], total, atol=1e-5)

    def test_normaliser_is_the_quantile(self):
        norm, x = ReturnNorm(rate=1.0), torch.randn(37, 11) * 30
        norm.update(x)
        assert np.allclose(norm.range, np.quantile(x.numpy(), [0.05, 0.95]), atol=1e-4)
        assert norm.scale().item() == pytest.approx((norm.range[1] - norm.range[0]).item())

    def test_normaliser_moves_by_a_hundredth(self):
        norm, x = ReturnNorm(), torch.arange(101.0)  # its 5th and 95th percentiles are 5 and 95
        norm.update(x)
        assert norm.range.tolist() == pytest.approx([0.05, 0.95])
        norm.update(x)
        assert norm.range.tolist() == pytest.approx([0.0995, 1.8905])
        assert norm.scale().item() == pytest.approx(1.791)

    def test_normaliser_never_magnifies(self):
        norm = ReturnNorm(rate=1.0)
        norm.update(torch.full((10,), 0.001))
        assert norm.scale().item() == 1.0


class TestOptimizer:
    def make(self, clip):
        a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
        return a, b, Optimizer({"a": a, "b": b}, lr=0.1, eps=1e-8, clip=clip)

    def test_norms_and_clipping(self):
        a, b, opt = self.make(clip=1.0)
        before = a.weight.detach().clone()
        metrics = opt.step(a(torch.tensor([3.0, 0.0])).sum() + b(torch.tensor([0.0, 4.0])).sum())
        got = [metrics[k].item() for k in ("grad_norm", "grad_norm_a", "grad_norm_b", "clipped")]
        assert got == pytest.approx([5.0, 3.0, 4.0, 1.0])
        # Adam's first step has length lr whatever the gradient's; its moments hold the clipped
        # gradient.
        assert torch.allclose(a.weight, before - torch.tensor([[0.1, 0.0]]), atol=1e-6)
        assert torch.allclose(
            opt.state_dict()["a.weight"]["exp_avg"], 0.1 * torch.tensor([[0.6, 0.0]])
        )

    def test_touches_nothing_else(self):
        a, b, _ = self.make(clip=0.0)
        opt = Optimizer({"a": a}, lr=0.1, eps=1e-8, clip=0.0)
        before = b.weight.detach().clone()
        opt.step((a(torch.ones(2)) + b(torch.ones(2))).sum())
        assert torch.equal(b.weight, before) and b.weight.grad is None and a.weight.grad is None

    def test_state_round_trip_keeps_the_new_rate(self):
        a, b, opt = self.make(clip=0.0)
        opt.step(a(torch.ones(2)).sum() + b(torch.ones(2)).sum())
        other = Optimizer({"a": a, "b": b}, lr=0.7, eps=1e-8, clip=0.0)
        other.load_state_dict(opt.state_dict())
        assert other.optim.param_groups[0]["lr"] == 0.7
        assert torch.equal(
            other.state_dict()["b.weight"]["exp_avg_sq"], opt.state_dict()["b.weight"]["exp_avg_sq"]
        )

    def test_the_rule_is_adams(self):
        """Three steps of one number by hand: rate .1, epsilon .5 so that it shows."""
        layer = nn.Linear(1, 1, bias=False)
        layer.weight.data.fill_(1.0)
        opt = Optimizer({"layer": layer}, lr=0.1, eps=0.5, clip=0.0)
        w, m, v = 1.0, 0.0, 0.0
        for step in (1, 2, 3):
            metrics = opt.step((layer.weight**2).sum())
            grad = 2 * w
            m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            w -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 0.5)
            assert layer.weight.item() == pytest.approx(w, abs=1e-6)
            assert (
                metrics["grad_norm"].item() == pytest.approx(grad, abs=1e-5)
                and "clipped" not in metrics
            )


class TestInitialWeights:
    """Deviations and limits in numbers: 0.0632 is the root of 2 / (200 + 300)."""

    def test_hidden_layers_are_truncated_normal(self):
        weight = nets.linear(200, 300).weight.detach()
        assert weight.std().item() == pytest.approx(0.0632, rel=0.02) and abs(weight.mean()) < 1e-3
        limit = 2 * 0.0632456 / 0.8796256  # cut at two deviations of the uncut normal
        assert 0.98 * limit < weight.abs().max() <= limit
        assert (weight.abs() < 0.0632).float().mean().item() == pytest.approx(
            0.652, abs=0.01
        )  # uniform: 0.577

    @pytest.mark.parametrize("scale", [1.0, 0.25, 0.0])
    def test_outputs_are_uniform(self, scale):
        layer = nets.linear(200, 300, scale)
        assert layer.weight.std().item() == pytest.approx(0.0632456 * math.sqrt(scale), rel=0.02)
        limit = 0.1095445 * math.sqrt(scale)  # the root of 3 / 250
        assert 0.99 * limit <= layer.weight.abs().max() <= limit + 1e-9
        assert not layer.bias.any()

    def test_convolutions_count_their_kernel(self):
        inner = networks.conv(nn.Conv2d(20, 30, 4, bias=False)).weight
        assert inner.std().item() == pytest.approx(math.sqrt(1 / (16 * 25)), rel=0.03)
        outer = networks.conv(nn.ConvTranspose2d(30, 20, 4), scale=1.0)
        assert outer.weight.std().item() == pytest.approx(math.sqrt(1 / (16 * 25)), rel=0.03)
        assert outer.weight.abs().max().item() == pytest.approx(math.sqrt(3 / (16 * 25)), rel=0.01)
        assert not outer.bias.any()

    def test_which_layer_begins_how(self):
        """Of every matrix of an agent: zero, uniform with variance 1 / mean fan,
        or truncated normal with the same.
        """
        obs = {
            "image": spaces.Box(0, 255, (16, 16, 3), np.uint8),
            "vector": spaces.Box(-np.inf, np.inf, (40,)),
        }
        wide = {
            "encoder.units": 100,
            "decoder.units": 100,
            "encoder.depth": 16,
            "decoder.depth": 16,
        }
        wide |= {
            "dynamics.deter": 100,
            "dynamics.hidden": 100,
            "dynamics.rssm.stoch": 10,
            "dynamics.rssm.classes": 10,
        }
        wide |= {f"{head}.units": 100 for head in ("reward", "cont", "actor.net", "critic.net")}
        agent = models.Agent(obs, spaces.Discrete(30), 30, tools.load_config(["debug"], wide))
        zero, uniform = set(), set()
        for name, p in agent.named_parameters():
            if p.ndim < 2:
                continue
            space = p[0, 0].numel()
            scale = math.sqrt(2 / (space * (p.shape[0] + p.shape[1])))
            if not p.any():
                zero.add(name.removesuffix(".weight"))
                continue
            assert p.std().item() == pytest.approx(scale, rel=0.15), name
            if p.abs().max() <= math.sqrt(3) * scale + 1e-9:
                uniform.add(name.removesuffix(".weight"))
        assert zero == {"world_model.reward.out", "behavior.critic.out", "behavior.slow.out"}
        model = (
            "dynamics.prior_out",
            "dynamics.post_out",
            "decoder.image.inp",
            "decoder.image.layers.3",
            "cont.out",
        )
        assert uniform == {f"world_model.{name}" for name in (*model, "decoder.vector.out")} | {
            "behavior.actor.out"
        }
        # A vector's length passes through a bias that begins as the weight of a constant 1 would.
        bias = agent.world_model.encoder.vector.blocks[0].linear.bias
        assert bias.std().item() == pytest.approx(math.sqrt(2 / 140), rel=0.25)
        biases = [name for name, p in agent.named_parameters() if name.endswith("linear.bias")]
        assert biases == ["world_model.encoder.vector.blocks.0.linear.bias"]

    def test_codes_and_temperatures_by_level(self):
        book = Quantizer("sampled", 3, 10, 64, 16)
        for level, scale in enumerate((1.0, 0.7, 0.5)):
            assert book.book[level].std().item() == pytest.approx(scale, rel=0.03)
            assert book.log_tau[level].exp().item() == pytest.approx(1.5 * 4.0 * scale**2)


class TestGRUCell:
    def test_by_hand(self):
        cell = nets.GRUCell(2, 3)
        x, deter = torch.randn(4, 2), torch.randn(4, 3)
        parts = torch.cat([x, deter], -1) @ cell.linear.weight.T
        parts = (parts - parts.mean(-1, keepdim=True)) / (
            parts.var(-1, unbiased=False, keepdim=True) + 1e-3
        ).sqrt()
        sigmoid = lambda x: 1 / (1 + torch.exp(-x))
        for b in range(4):
            for i in range(3):
                reset, cand, update = parts[b, i], parts[b, 3 + i], parts[b, 6 + i]
                share = sigmoid(update - 1)
                expected = share * torch.tanh(sigmoid(reset) * cand) + (1 - share) * deter[b, i]
                assert cell(x, deter)[b, i].item() == pytest.approx(expected.item(), abs=1e-6)


class TestRotary:
    def test_angles_are_time_times_falling_rates(self):
        rope = rotary(
            torch.tensor([0, 1, -3]), 6, torch.float64
        )  # three pairs: rates 1, 10,000^(-1/3), 10,000^(-2/3)
        for row, time in zip(rope, (0, 1, -3), strict=True):
            for i, rate in enumerate((1.0, 0.0464158883, 0.00215443469)):
                cos, sin = math.cos(time * rate), math.sin(time * rate)
                assert row[:, i].tolist() == pytest.approx([cos, -sin])
                assert row[:, 3 + i].tolist() == pytest.approx([cos, sin])

    def test_products_depend_on_the_difference_of_times_alone(self):
        q, k = torch.randn(1, 8, dtype=torch.float64), torch.randn(1, 8, dtype=torch.float64)
        at = lambda x, time: rotate(x, rotary(torch.tensor(time), 8, torch.float64))
        score = lambda a, b: (at(q, a) * at(k, b)).sum()
        assert score(7, 4) == pytest.approx(score(3, 0)) and score(7, 4) != pytest.approx(
            score(4, 7)
        )
        a, b = (
            q[0, :4].tolist(),
            q[0, 4:].tolist(),
        )  # pair i is (x_i, x_{i+4}), turned as a complex number
        turned = [
            complex(x, y) * complex(math.cos(r), math.sin(r))
            for x, y, r in zip(a, b, RATES, strict=True)
        ]
        assert at(q, 1)[0].tolist() == pytest.approx(
            [z.real for z in turned] + [z.imag for z in turned]
        )


RATES = (1.0, 0.1, 0.01, 0.001)  # of heads of 8 numbers


class TestCodebookAverages:
    def test_one_update_by_hand(self):
        """Rate .02: counts and sums of residuals move by it, codes are their quotient."""
        quantizer = Quantizer("nearest", 1, 1, 2, 1)
        quantizer.book.copy_(torch.tensor([0.0, 10.0]).view(1, 1, 2, 1))
        quantizer.total.copy_(quantizer.book)
        quantizer.update_codebook(quantizer.encode(torch.tensor([1.0, 2.0, 12.0]).view(3, 1, 1)))
        count, total = [0.98 + 0.02 * 2, 0.98 + 0.02 * 1], [0.02 * 3.0, 0.98 * 10 + 0.02 * 12]
        assert quantizer.count.flatten().tolist() == pytest.approx(count)
        assert quantizer.book.flatten().tolist() == pytest.approx(
            [t / c for t, c in zip(total, count, strict=True)]
        )

    def test_a_code_is_revived_below_a_fifth_of_a_use(self):
        quantizer = Quantizer("nearest", 2, 1, 2, 1)
        quantizer.book.copy_(torch.tensor([[0.0, 100.0], [0.5, 100.0]]).view(2, 1, 2, 1))
        quantizer.total.copy_(quantizer.book)
        z = torch.full((4, 1, 1), 0.25)
        steps = next(n for n in range(1, 200) if 0.98**n < 0.2)  # 80
        for step in range(1, steps + 1):
            quantizer.update_codebook(quantizer.encode(z))
            far = quantizer.book[0, 0, 1, 0].item()
            assert far == pytest.approx(100.0 if step < steps else 0.25, rel=1e-3)
        # The finer level's unused code comes back on its own level's residual, which is about 0 by
        # now.
        assert quantizer.book[1, 0, 1, 0].item() == pytest.approx(
            0.25 - quantizer.book[0, 0, 0, 0].item(), abs=0.05
        )
        assert quantizer.count[0, 0, 1] == 1.0


def layer_norm(x, layer):
    """x (W,)."""
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-3).sqrt() * layer.weight + layer.bias


def test_transformer_by_hand():
    """Two layers, row by row: norms, queries, keys and values of each head, rotation,
    softmax, both residuals.
    """
    width, heads, steps = 8, 2, 5
    net = Transformer(width, layers=2, heads=heads, hidden=12).double()
    for p in net.parameters():
        nn.init.normal_(p, std=0.5)
    x, causal = torch.randn(steps, width).double(), torch.ones(steps, steps).tril().bool()
    turn = rotary(torch.arange(steps), width // heads, torch.float64)
    with torch.no_grad():
        level = torch.zeros(steps, dtype=torch.long)
        found = net(x[None, None], turn, level, Whole(causal))[0][0, 0]
        rotated = lambda x, t: rotate(x[None], rotary(torch.tensor(t), 4, torch.float64))[0]
        for layer in net.layers:
            qkv = [layer.qkv.weight @ layer_norm(row, layer.norm1) for row in x]
            qkv = [row.view(3, heads, 4) for row in qkv]
            rows = []
            for t in range(steps):
                gathered = []
                for head in range(heads):
                    q = rotated(qkv[t][0, head], t)
                    scores = torch.stack(
                        [q @ rotated(qkv[s][1, head], s) / 2.0 for s in range(t + 1)]
                    )  # root of 4
                    weight = torch.exp(scores) / torch.exp(scores).sum()
                    gathered.append(sum(weight[s] * qkv[s][2, head] for s in range(t + 1)))
                row = x[t] + layer.out.weight @ torch.cat(gathered)
                up = layer.ffn.up.weight @ layer_norm(row, layer.norm2) + layer.ffn.up.bias
                rows.append(
                    row + layer.ffn.down.weight @ (up * torch.sigmoid(up)) + layer.ffn.down.bias
                )
            x = torch.stack(rows)
        expected = torch.stack([layer_norm(row, net.norm) for row in x])
    assert torch.allclose(found, expected, atol=1e-10)
