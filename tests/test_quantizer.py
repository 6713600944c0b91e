"""Codes near to what is left, gradients that arrive, codebooks that stay alive."""

import pytest
import torch

from hidreamer.quantizer import KINDS, Quantizer, onehots, per_level, split_codes

LEVELS, GROUPS, CODES, DIM = 3, 2, 8, 4


def make(kind, **sizes):
    sizes = {"levels": LEVELS, "groups": GROUPS, "codes": CODES, "dim": DIM} | sizes
    return Quantizer(kind, **sizes)


def data(n=64, dim=DIM, groups=GROUPS):
    return torch.randn(n, groups, dim, requires_grad=True)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_decode_to_the_sum_of_codes(kind, shared):
    quantizer, z = make(kind, shared=shared), data()
    codes = quantizer.encode(z)
    parts = [quantizer.decode(i, onehots(codes.index[:, i], CODES)) for i in range(LEVELS)]
    assert torch.equal(
        torch.stack(parts, 1), codes.code
    )  # no noise of rounding that features would show
    # Each level had to code what the coarser ones left.
    left = z - torch.cumsum(codes.code, 1).unbind(1)[1]
    assert torch.allclose(codes.residual[:, 2], left, atol=1e-5)
    assert codes.index.min() >= 0 and codes.index.max() < CODES


@pytest.mark.parametrize("kind", ["nearest", "frozen"])
def test_hard_codes_are_the_nearest(kind):
    quantizer, z = make(kind), data()
    codes = quantizer.encode(z)
    for level in range(LEVELS):
        for group in range(GROUPS):
            away = torch.cdist(codes.residual[:, level, group], quantizer.book[level, group])
            assert torch.equal(codes.index[:, level, group], away.argmin(-1))


def test_sampled_codes_follow_the_distances():
    quantizer = make("sampled", levels=1, groups=1)
    z = torch.randn(1, 1, DIM).expand(20_000, 1, DIM)
    codes = quantizer.encode(z)
    away = (z[0, 0] - quantizer.book[0, 0]).square().sum(-1)
    expected = torch.softmax(-away / quantizer.log_tau[0].exp(), -1)
    share = onehots(codes.index.flatten(), CODES).mean(0)
    assert torch.allclose(share, expected, atol=0.02)
    assert torch.equal(
        quantizer.encode(z, sample=False).index.unique(), expected.argmax().unsqueeze(0)
    )


@pytest.mark.parametrize("kind", ["sampled", "nearest", "fsq"])
def test_every_levels_code_has_a_gradient_at_the_input(kind):
    quantizer, z = make(kind), data()
    code = quantizer.encode(z).code
    for level in range(LEVELS):
        (grad,) = torch.autograd.grad(
            (code[:, level] * torch.randn(GROUPS, DIM)).sum(), z, retain_graph=True
        )
        assert grad.abs().max() > 1e-4


def test_every_levels_commitment_reaches_the_input():
    """In the lineage, levels behind the first had a gradient of exactly 0:
    their residuals were taken attached.
    """
    quantizer, z = make("nearest"), data()
    codes = quantizer.encode(z)
    for level in range(LEVELS):
        loss = (codes.residual[:, level] - codes.code[:, level].detach()).square().sum()
        (grad,) = torch.autograd.grad(loss, z, retain_graph=True)
        assert grad.abs().max() > 1e-2


def test_sampled_codebooks_learn_by_gradient():
    quantizer, z = make("sampled"), data()
    (quantizer.encode(z).code.sum(1) - z.detach()).square().mean().backward()
    assert (
        quantizer.book.grad.abs().amax((0, 1, 3)).min() >= 0 and quantizer.book.grad.abs().max() > 0
    )
    assert quantizer.log_tau.grad.abs().min() > 0


class TestNearest:
    def train(self, quantizer, steps=200, n=256, spread=1.0):
        torch.manual_seed(2)
        centres = torch.randn(12, GROUPS, DIM) * spread
        for _ in range(steps):
            z = centres[torch.randint(12, (n,))] + 0.1 * torch.randn(n, GROUPS, DIM)
            codes = quantizer.encode(z)
            quantizer.update_codebook(codes)
        return z, quantizer.encode(z)

    def test_codebooks_are_used_and_stay_near_the_data(self):
        quantizer = make("nearest")
        z, codes = self.train(quantizer)
        used = onehots(codes.index, CODES).amax(0).sum(-1)  # (L, G)
        assert (used > CODES / 2).all()
        assert quantizer.book.norm(dim=-1).max() < 10 * z.norm(dim=-1).max()
        usage = quantizer.usage(codes.index)
        assert all(usage[f"perplexity_{i}"] > 2 for i in range(LEVELS))
        # Averages of their residuals: most of the variance is explained by the three levels
        # together.
        assert (z - codes.code.sum(1)).square().mean() < 0.1 * z.square().mean()

    def test_unused_codes_do_not_move(self):
        quantizer = make("nearest")
        before = quantizer.book.clone()
        codes = quantizer.encode(data(4))
        quantizer.update_codebook(codes)
        unused = onehots(codes.index, CODES).amax(0) == 0  # (L, G, K)
        assert unused.any() and torch.allclose(quantizer.book[unused], before[unused], atol=1e-6)
        assert not torch.allclose(quantizer.book[~unused], before[~unused], atol=1e-4)

    def test_used_codes_move_to_the_mean_of_their_residuals(self):
        quantizer = make("nearest", levels=1, groups=1, codes=2)
        quantizer.book.copy_(torch.tensor([-5.0, 5.0])[:, None].expand(2, DIM))
        quantizer.total.copy_(quantizer.book)
        z = torch.full((10, 1, DIM), 3.0)
        quantizer.update_codebook(quantizer.encode(z))
        # count 1 -> .98 + .02 * 10, total 5 -> .98 * 5 + .02 * 30
        assert quantizer.book[0, 0, 1, 0].item() == pytest.approx(
            (0.98 * 5 + 0.02 * 30) / (0.98 + 0.2)
        )

    def test_collapse_is_reported_and_recovered_from(self):
        """One code for everything is easy to predict,
        so accuracy alone would call it success; perplexity does not.
        """
        quantizer = make("nearest")
        quantizer.book[:, :, 1:] = (
            1e3 + torch.arange(CODES - 1)[:, None]
        )  # nobody is near any but the first
        quantizer.total.copy_(quantizer.book)
        z = data(256)
        reported = quantizer.usage(quantizer.encode(z).index)
        assert all(
            reported[f"perplexity_{i}"] == 1.0 and reported[f"dead_{i}"] == CODES - 1
            for i in range(LEVELS)
        )
        _, codes = self.train(quantizer, steps=200)
        recovered = quantizer.usage(codes.index)
        assert all(recovered[f"perplexity_{i}"] > 2.0 for i in range(LEVELS))
        assert quantizer.book.norm(dim=-1).max() < 100

    def test_other_kinds_learn_nothing_here(self):
        for kind in ("sampled", "frozen", "fsq"):
            quantizer = make(kind)
            before = {key: x.clone() for key, x in quantizer.state_dict().items()}
            quantizer.update_codebook(quantizer.encode(data()))
            assert all(torch.equal(x, before[key]) for key, x in quantizer.state_dict().items())


def test_agrees_with_vector_quantize_pytorch():
    library = pytest.importorskip("vector_quantize_pytorch")
    theirs = library.ResidualVQ(
        dim=DIM, num_quantizers=LEVELS, codebook_size=CODES, kmeans_init=False
    ).eval()
    ours = make("nearest", groups=1)
    for level, layer in enumerate(theirs.layers):
        ours.book[level, 0] = layer.codebook.detach()
    z = torch.randn(50, 1, DIM)
    with torch.no_grad():
        quantized, index, _ = theirs(z)
    codes = ours.encode(z)
    assert torch.equal(codes.index[:, :, 0], index[:, 0])
    assert torch.allclose(codes.code.sum(1)[:, 0], quantized[:, 0], atol=1e-5)


def test_shared_codebooks_are_one_per_level():
    quantizer = make("nearest", shared=True)
    assert quantizer.book.shape == (LEVELS, 1, CODES, DIM)
    z = data().detach()
    swapped = quantizer.encode(z.flip(1))
    assert torch.equal(swapped.index.flip(2), quantizer.encode(z).index)
    quantizer.update_codebook(swapped)


def test_use_of_a_shared_codebook_is_that_of_all_groups():
    """By hand: each group has one code, another one each;
    a shared codebook has two in use, one's own has one.
    """
    index = torch.tensor([0, 3]).expand(10, LEVELS, GROUPS)
    for shared, (perplexity, dead) in {False: (1.0, CODES - 1), True: (2.0, CODES - 2)}.items():
        use = make("sampled", shared=shared).usage(index)
        assert (
            use["perplexity_1"].item() == pytest.approx(perplexity) and use["dead_1"].item() == dead
        )


@pytest.mark.parametrize("kind", ["sampled", "nearest", "frozen"])
def test_autocast_does_not_move_what_is_chosen(kind):
    """In bfloat16 the distances of one residual to two codes can differ by less
    than they are rounded by.
    """
    quantizer, z = make(kind), 3.0 * data(500)
    with torch.no_grad():
        index = quantizer.encode(z, sample=False).index
        with torch.autocast("cpu", torch.bfloat16):
            low = quantizer.encode(z, sample=False).index
    assert torch.equal(low[:, 0], index[:, 0])


@pytest.mark.parametrize("kind", ["sampled", "nearest", "frozen"])
def test_autocast_does_not_round_a_code(kind):
    """Dreams look codes up: what is observed is the same numbers."""
    quantizer, z = make(kind), data(50)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer.encode(z, sample=False)
    for level in range(quantizer.levels):
        looked_up = quantizer.lookup(level, found.index[..., level, :])
        assert torch.allclose(found.code[..., level, :, :], looked_up, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("codes", "sides"), [(32, [8, 4]), (256, [8, 8, 4]), (16, [4, 4]), (5, [5]), (240, [8, 6, 5])]
)
def test_fsq_sides(codes, sides):
    assert split_codes(codes) == sides


def test_impossible_sizes_are_one_line():
    with pytest.raises(ValueError, match="fsq cannot make 22 codes"):
        split_codes(22)
    with pytest.raises(ValueError, match="commitment has 2 values for 3 levels"):
        per_level([0.1, 0.2], 3, "commitment")
    with pytest.raises(ValueError, match="sampled, nearest, frozen, fsq"):
        make("soft")
    assert per_level([0.5], 4, "x") == [0.5] * 4 and per_level([1, 2, 3], 2, "x") == [1, 2]


def test_fsq_reaches_all_its_codes():
    quantizer = make("fsq", codes=8, levels=1)
    assert quantizer.encode(20 * data(4000)).index.unique().numel() == 8


def test_fsq_rounds_to_the_nearest_step():
    quantizer, z = make("fsq", codes=8, levels=1), data()
    bound = torch.tanh(quantizer.down[0](z))  # (N, G, 1)
    steps = torch.linspace(-1.0, 1.0, int(quantizer.sides[0]))
    nearest = (bound - steps).abs().argmin(-1)  # (N, G)
    assert len(quantizer.sides) == 1 and torch.equal(quantizer.encode(z).index[:, 0], nearest)
