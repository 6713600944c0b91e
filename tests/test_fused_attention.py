"""The one kernel for the attention of dreams: when it is taken, and on a GPU what it computes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hidreamer import cost
from hidreamer.transformer import KV, Bias, as_bias, attend_shared


def inputs(dtype=torch.float32, device="cpu"):
    """-> q (B,h,n,Q,d), own K/V in two parts and prefix K/V, bias: of 2 sequences with 3 branches
    each.
    """
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
    near, far = (KV(*draw(2, 2, 4, 3, size, 16).unbind()) for size in (3, 2))
    prefix = KV(*draw(2, 2, 4, 7, 16).unbind())
    seen = torch.rand(2, 1, 3, 2, 7, device=device) < 0.5
    mine = torch.ones(2, 5, dtype=torch.bool, device=device).tril(3)
    bias = Bias(as_bias(seen, dtype), [as_bias(x, dtype) for x in (mine[:, :3], mine[:, 3:])])
    return draw(2, 4, 3, 2, 16), [near, far], prefix, bias


@pytest.fixture
def stand_in(monkeypatch):
    """A kernel of the CPU, taken for one of CUDA's. -> what it was called with."""
    calls = []

    def shared_attention(q, *given):
        calls.append(q.dtype)
        every = lambda x: x.unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1)
        keys, values = (torch.cat([every(x[0]), *x[1:]], -2) for x in (given[:6:2], given[1:6:2]))
        bias = torch.cat([x.expand(*q.shape[:-1], -1) for x in given[6:]], -1)
        out = F.scaled_dot_product_attention(q, keys, values, bias)
        return out.permute(0, 2, 3, 1, 4).flatten(-2)

    module = SimpleNamespace(shared_attention=shared_attention, works=lambda *_: True)
    monkeypatch.setitem(sys.modules, "hidreamer.fused_attention", module)
    monkeypatch.setattr("hidreamer.fused_attention", module, raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return SimpleNamespace(calls=calls, module=module)


def both_ways(dtype=torch.float32):
    """With a gradient it is always ordinary products; with cached steps and far positions, and
    without.
    """
    q, own, prefix, bias = inputs(dtype)
    near = own[:1], None, Bias(None, bias.own[:1])
    for given in ((own, prefix, bias), (own, None, bias._replace(prefix=None)), near):
        with torch.no_grad():
            found = attend_shared(q, *given)
        assert torch.allclose(found, attend_shared(q, *given), atol=1e-5)


def test_it_is_taken_where_there_is_one(stand_in):
    both_ways()
    assert stand_in.calls == [torch.float32] * 3


def test_it_is_not_taken_where_it_cannot_be(stand_in, monkeypatch):
    both_ways(torch.float64)
    stand_in.module.works = lambda *_: False
    both_ways()
    monkeypatch.setitem(sys.modules, "hidreamer.fused_attention", None)
    monkeypatch.delattr("hidreamer.fused_attention")
    both_ways()
    assert stand_in.calls == []


@torch.no_grad()
@pytest.mark.filterwarnings("error")  # that vmap would do something member by member
def test_members_are_not_multiplied_one_by_one():
    q, own, prefix, bias = inputs()
    (near_keys, near_values), far = own
    run = lambda q, keys: attend_shared(q, [KV(keys, near_values), far], prefix, bias)
    queries, keys = torch.stack([q, -q]), torch.stack([near_keys, 2 * near_keys])
    found = torch.func.vmap(run)(queries, keys)
    alone = torch.stack([run(queries[i], keys[i]) for i in range(2)])
    assert torch.allclose(found, alone, atol=1e-6)


@pytest.mark.gpu
def test_it_is_attention(monkeypatch):
    """In float32, TF32 and bfloat16; with one and two new positions."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import equality

    assert equality.dream_attention(torch.device("cuda"))


@pytest.mark.gpu
@torch.no_grad()
def test_members_of_a_population_are_more_sequences():
    q, own, prefix, bias = inputs(device="cuda")
    (near_keys, near_values), far = own
    run = lambda q, keys: attend_shared(q, [KV(keys, near_values), far], prefix, bias)
    queries, keys = torch.stack([q, -q]), torch.stack([near_keys, 2 * near_keys], 1)
    found = torch.func.vmap(run, in_dims=(0, 1))(queries, keys)
    alone = torch.stack([run(queries[i], keys[:, i]) for i in range(2)])
    assert torch.allclose(found, alone, atol=1e-6)


@pytest.mark.gpu
@torch.no_grad()
def test_its_products_count():
    q, *given = inputs(device="cuda")
    run = lambda: attend_shared(q, *given)
    run()  # the first call makes the operator
    assert cost.operators(run)["kernels"] == 1
    assert cost.flops(run) == 4 * (2 * 4 * 3 * 2) * 16 * (7 + 5)


@pytest.mark.gpu
def test_where_it_cannot_be_built_one_line_says_so(monkeypatch):
    from hidreamer import fused_attention

    def broken(*_):
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(fused_attention, "shared_attention", broken)
    fused_attention.works.cache_clear()
    q, *given = inputs(device="cuda")
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="slower: no C compiler$"):
        found = attend_shared(q, *given)
    fused_attention.works.cache_clear()
    assert torch.allclose(found, attend_shared(q, *given), atol=1e-4)
