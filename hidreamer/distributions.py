"""The distributions of DreamerV3. Those of torch check arguments, which reads the host.

Every class wraps the tensors that a network emitted and offers what its callers use of
``log_prob(x)``, ``mode()``, ``mean()``, ``sample(generator)``, ``entropy()``. All is float32 or
wider, whatever autocast says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hidreamer.precision import is_mapped

BINS = 255  # of the two-hot distribution
MAX_BIN = 20.0  # its largest bin, in symlog space


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(|x| + 1) (Hafner et al. 2023, symlog predictions)."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """The inverse of ``symlog``."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


class StraightThrough(torch.autograd.Function):
    """The sample, whose gradient goes to the probabilities unchanged (Bengio et al. 2013)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(sample: Tensor, probs: Tensor) -> Tensor:
        return sample.view_as(sample)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def straight_through(sample: Tensor, probs: Tensor) -> Tensor:
    """``sample`` (a constant) with the gradient of ``probs``; the shapes are equal."""
    return StraightThrough.apply(sample, probs)


def unimix_probs(logit: Tensor, unimix: float) -> Tensor:
    """Probabilities (..., K) of logits: ``1 - unimix`` softmax + ``unimix`` uniform, never zero."""
    probs = torch.softmax(at_least_float32(logit), -1)
    # Without a uniform share a softmax may round to 0, whose logarithm times 0 is NaN. Added to all
    # that is above 1e-30, the smallest number changes no bit.
    share = unimix / logit.shape[-1] if unimix else torch.finfo(probs.dtype).tiny
    return torch.add(share, probs, alpha=1.0 - unimix)


def uniform(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers in [0, 1) on the device of ``like``, float64 if it is that, float32 otherwise.

    generator: None is torch's default one, here and wherever else a generator is asked for.
    """
    return torch.rand(*shape, generator=generator, **_where(like))


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers, otherwise as ``uniform``."""
    return torch.randn(*shape, generator=generator, **_where(like))


def _where(like: Tensor) -> dict[str, Any]:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return {"dtype": dtype, "device": like.device}


def uniforms(
    shapes: Sequence[Sequence[int]], like: Tensor, generator: torch.Generator | None
) -> list[Tensor]:
    """``uniform`` numbers of several shapes from one call, as in memory of one another: a CPU's
    generator gives the same numbers as one call for each.
    """
    sizes = [math.prod(shape) for shape in shapes]
    parts = uniform((sum(sizes),), like, generator).split(sizes)
    return [part.view(*shape) for part, shape in zip(parts, shapes, strict=True)]


def sample_onehot(probs: Tensor, noise: Tensor | None) -> Tensor:
    """One-hot (..., K) straight-through sample of ``probs``; without noise their mode.

    noise (..., 1): uniform in [0, 1), through the inverse of the cumulative distribution: one
    number a variable. A race of K exponentials does the same and costs ten times as much on a CPU,
    and ``multinomial`` as well.
    """
    with torch.no_grad():
        onehot = invert_cdf(probs, noise)
    return straight_through(onehot, probs)


def invert_cdf(probs: Tensor, noise: Tensor | None) -> Tensor:
    """One-hots (..., K) of ``class_drawn``."""
    zeros, drawn = torch.zeros_like(probs), class_drawn(probs, noise)
    if not torch.compiler.is_compiling() and is_mapped(drawn):
        return zeros.scatter(-1, drawn, 1.0)  # in place it would be a kernel for each member
    return zeros.scatter_(-1, drawn, 1.0)


def class_drawn(probs: Tensor, noise: Tensor | None) -> Tensor:
    """The class (..., 1), int64, where the cumulative ``probs`` (..., K) reach noise (..., 1); the
    likeliest one without noise.
    """
    if noise is None:
        return probs.argmax(-1, keepdim=True)
    # Rounding may leave the sum of all below 1: the last class has no bound.
    if torch.compiler.is_compiling():  # of one size throughout: one kernel with the softmax
        count = (probs.cumsum(-1) < noise).sum(-1, keepdim=True)
        return count.clamp(max=probs.shape[-1] - 1)
    below = probs[..., :-1].cumsum(-1)
    return torch.searchsorted(below, noise.expand(*below.shape[:-1], 1).contiguous())


def kl(post: Tensor, prior: Tensor) -> Tensor:
    """KL(post || prior) in nats of probabilities (..., S, K), summed over S and K -> (...)."""
    return (post * (post.log() - prior.log())).sum((-2, -1))


def entropy(probs: Tensor) -> Tensor:
    """Entropy in nats of (..., S, K), summed over S -> (...)."""
    return -torch.special.xlogy(probs, probs).sum((-2, -1))


class OneHotCategorical:
    """Independent categoricals, concatenated: ``logit`` (..., sum(sizes)).

    MultiDiscrete actions have several.
    """

    def __init__(self, logit: Tensor, sizes: tuple[int, ...], unimix: float):
        self.probs = [unimix_probs(x, unimix) for x in logit.split(sizes, -1)]
        self.sizes = sizes

    def sample(
        self, generator: torch.Generator | None = None, noise: Sequence[Tensor] | None = None
    ) -> Tensor:
        """noise: uniform numbers (..., 1) for each variable, instead of the generator's."""
        noise = noise or [uniform((*p.shape[:-1], 1), p, generator) for p in self.probs]
        drawn = [sample_onehot(p, x) for p, x in zip(self.probs, noise, strict=True)]
        return torch.cat(drawn, -1) if len(drawn) > 1 else drawn[0]

    def mode(self) -> Tensor:
        return torch.cat([sample_onehot(p, None) for p in self.probs], -1)

    def log_prob(self, x: Tensor) -> Tensor:
        onehots = x.split(self.sizes, -1)
        return sum((x * p.log()).sum(-1) for x, p in zip(onehots, self.probs, strict=True))

    def entropy(self) -> Tensor:
        return -sum(torch.special.xlogy(p, p).sum(-1) for p in self.probs)


class ClippedNormal:
    """A normal with mean tanh(m) whose samples are clipped to [-1, 1]: the continuous policy.

    Upstream clips the sample and then scores it with the density of the unclipped normal, which is
    the wrong likelihood for every sample at a bound. Here a sample at a bound has the probability
    of the tail beyond it (Fujita and Maeda 2018, Clipped Action Policy Gradient). The entropy is
    the unclipped normal's.

    mean, std: (..., A); ``log_prob`` and ``entropy`` sum over A.
    """

    def __init__(self, mean: Tensor, std: Tensor, low: float, high: float):
        self.loc = torch.tanh(at_least_float32(mean))
        self.std = (high - low) * torch.sigmoid(at_least_float32(std) + 2.0) + low

    def sample(
        self, generator: torch.Generator | None = None, noise: Sequence[Tensor] | None = None
    ) -> Tensor:
        """noise: one tensor of standard normal numbers (..., A), instead of the generator's."""
        (noise,) = noise or (normal(self.std.shape, self.std, generator),)
        return torch.clamp(torch.addcmul(self.loc, self.std, noise), -1.0, 1.0)

    def mode(self) -> Tensor:
        return self.loc

    def log_prob(self, x: Tensor) -> Tensor:
        z = (x - self.loc) / self.std
        inside = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2.0 * math.pi)
        above, below = torch.special.log_ndtr(-z), torch.special.log_ndtr(z)
        return torch.where(x >= 1.0, above, torch.where(x <= -1.0, below, inside)).sum(-1)

    def entropy(self) -> Tensor:
        return (self.std.log() + 0.5 * math.log(2.0 * math.pi * math.e)).sum(-1)


class TwoHot:
    """A categorical over 255 bins in symlog space, trained with two-hot targets.

    Hafner et al. 2023, critic learning.
    logit: (..., 255). ``mode`` and ``mean`` are the same: symexp of the expected bin, (...).
    """

    def __init__(self, logit: Tensor):
        self.logit = at_least_float32(logit)

    def __getitem__(self, index: Any) -> TwoHot:
        """Of some of its leading axes."""
        return type(self)(self.logit[index])

    def mode(self) -> Tensor:
        half = BINS // 2
        where = {"device": self.logit.device, "dtype": self.logit.dtype}
        return symexp(self._expected(torch.linspace(0.0, MAX_BIN, half + 1, **where)[1:]))

    mean = mode

    def _expected(self, bins: Tensor) -> Tensor:
        """bins: the positive ones (127,). -> (...)."""
        # Bins come in pairs of opposite sign: pair by pair, a uniform output decodes to exactly 0.
        probs, half = torch.softmax(self.logit, -1), BINS // 2
        pairs = probs[..., half + 1 :] - probs[..., :half].flip(-1)  # (..., 127)
        return (pairs * bins).sum(-1)  # no matrix product: autocast would round it

    def log_prob(self, *targets: Tensor) -> Tensor:
        """Summed log-likelihood of one or more targets (...), which share one log-softmax."""
        logp = torch.log_softmax(self.logit, -1)
        total = 0.0
        for target in targets:
            position = (symlog(target).clamp(-MAX_BIN, MAX_BIN) + MAX_BIN) * (
                (BINS - 1) / (2.0 * MAX_BIN)
            )
            below = position.floor().clamp(max=BINS - 2)
            # A NaN stays one, but not as an index.
            index = below.nan_to_num().long().unsqueeze(-1)  # (..., 1)
            index = torch.cat([index, index + 1], -1)  # (..., 2)
            pair = logp.gather(-1, index)  # (..., 2)
            share = self._share(target, position - below, index)
            total = total + torch.lerp(pair[..., 0], pair[..., 1], share)
        return total

    def _share(self, target: Tensor, way: Tensor, index: Tensor) -> Tensor:
        """How much of a target (...) is the upper one's of the bins ``index`` (...,2) around it.

        way: how far it is from the lower one to the upper one in symlog space, 0 to 1 (...).
        """
        return way


class SymexpTwoHot(TwoHot):
    """A categorical over the 255 bins symexp(-20) .. symexp(20), trained with two-hot targets
    between the numbers themselves (Hafner et al. 2024, robust predictions).

    ``mode`` and ``mean`` are the expected bin: a mean of numbers, not of their logarithms.
    """

    def mode(self) -> Tensor:
        return self._expected(self._bins()[BINS // 2 + 1 :])

    mean = mode

    def _bins(self) -> Tensor:
        """(255,), of which opposite ones are equal but for their sign."""
        where = {"device": self.logit.device, "dtype": self.logit.dtype}
        half = symexp(torch.linspace(0.0, MAX_BIN, BINS // 2 + 1, **where))  # (128,)
        return torch.cat([-half[1:].flip(0), half])

    def _share(self, target: Tensor, way: Tensor, index: Tensor) -> Tensor:
        low, high = self._bins()[index].unbind(-1)  # (...) each
        return ((target.to(low.dtype) - low) / (high - low)).clamp(0.0, 1.0)


# {name: class of logits (..., 255)}: what an expected bin is the mean of.
TWO_HOTS = {"symlog": TwoHot, "symexp": SymexpTwoHot}


class Bernoulli:
    """logit (...): continue flags, binary grids; ``log_prob`` sums the last ``event`` axes."""

    def __init__(self, logit: Tensor, event: int = 0):
        self.logit, self.event = at_least_float32(logit), event

    def mean(self) -> Tensor:
        return torch.sigmoid(self.logit)

    def mode(self) -> Tensor:
        return (self.logit > 0).float()

    def undiscounted(self) -> Bernoulli:
        """What it says of the flags themselves, whatever it is trained on."""
        return self

    def log_prob(self, x: Tensor) -> Tensor:
        x = x.to(self.logit.dtype)
        logp = -F.binary_cross_entropy_with_logits(self.logit, x, reduction="none")
        return logp.flatten(-self.event).sum(-1) if self.event else logp


class DiscountedBernoulli(Bernoulli):
    """logit (...) of a continue flag whose ones were taught as ``discount`` (``imag.contdisc``).

    ``mean`` is that of the flag itself; while it is learned it may exceed 1 by a little.
    ``log_prob`` is for training: of the flag times the discount.
    """

    def __init__(self, logit: Tensor, discount: float):
        super().__init__(logit)
        self.discount = discount

    def mean(self) -> Tensor:
        return super().mean() / self.discount

    def mode(self) -> Tensor:
        return (self.mean() > 0.5).float()

    def log_prob(self, x: Tensor) -> Tensor:
        return super().log_prob(self.discount * x)

    def undiscounted(self) -> Bernoulli:
        """The distribution of the flag itself."""
        return Bernoulli(torch.logit(self.mean(), eps=1e-6))


class MSE:
    """A regression: the mean of a normal distribution of variance 1/2, up to constants.

    ``log_prob`` is minus the squared error summed over ``event`` axes, as in Hafner et al.'s code;
    their paper halves it (2023, eq. 2).
    With ``in_symlog`` the error is that in symlog space, for vectors of unknown scale (Hafner et
    al. 2023, symlog predictions).
    """

    def __init__(self, out: Tensor, event: int, in_symlog: bool = False):
        self.out, self.event, self.in_symlog = at_least_float32(out), event, in_symlog

    def mode(self) -> Tensor:
        return symexp(self.out) if self.in_symlog else self.out

    mean = mode

    def log_prob(self, x: Tensor) -> Tensor:
        x = symlog(x) if self.in_symlog else x
        return -(self.out - x).square().flatten(-self.event).sum(-1)
