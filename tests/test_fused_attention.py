"""The one kernel for the attention of dreams: when it is taken, and on a GPU what it computes."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hidreamer import cost
from hidreamer.transformer import KV, attend, attend_in_place, may_attend_in_place, score_bias


def inputs(dtype=torch.float32, device="cpu"):
    """-> q (B,h,n,Q,d), own and prefix K/V, masks: of 2 sequences with 3 branches each."""
    torch.manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=dtype, device=device)
    own = KV(*draw(2, 2, 4, 3, 5, 16).unbind())
    prefix = KV(*draw(2, 2, 4, 7, 16).unbind())
    seen = torch.rand(2, 3, 2, 7, device=device) < 0.5
    mine = torch.ones(2, 5, dtype=torch.bool, device=device).tril(3)
    return draw(2, 4, 3, 2, 16), own, prefix, seen, mine


@pytest.fixture
def stand_in(monkeypatch):
    """A kernel of the CPU, taken for one of CUDA's. -> what it was called with."""
    calls = []

    def shared_attention(q, keys, values, own_keys, own_values, bias):
        calls.append(q.dtype)
        every = lambda x: x.unsqueeze(2).expand(-1, -1, q.shape[2], -1, -1)
        both = [torch.cat([every(x), y], -2) for x, y in ((keys, own_keys), (values, own_values))]
        return F.scaled_dot_product_attention(q, *both, bias.expand(*q.shape[:-1], -1))

    module = SimpleNamespace(shared_attention=shared_attention, works=lambda *_: True)
    monkeypatch.setitem(sys.modules, "hidreamer.fused_attention", module)
    monkeypatch.setattr("hidreamer.fused_attention", module, raising=False)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    return SimpleNamespace(calls=calls, module=module)


def both_ways(dtype=torch.float32):
    q, own, prefix, seen, mine = inputs(dtype)
    found = attend_in_place(q, own, prefix, score_bias(mine, seen, dtype))
    assert torch.allclose(found, attend(q, own, mine, prefix, seen), atol=1e-5)


def test_it_is_taken_where_there_is_one(stand_in):
    both_ways()
    assert stand_in.calls == [torch.float32]


def test_it_is_not_taken_where_it_cannot_be(stand_in, monkeypatch):
    both_ways(torch.float64)
    stand_in.module.works = lambda *_: False
    both_ways()
    monkeypatch.setitem(sys.modules, "hidreamer.fused_attention", None)
    monkeypatch.delattr("hidreamer.fused_attention")
    both_ways()
    assert stand_in.calls == []


def test_under_vmap_products_are_in_place_only_in_one_kernel(stand_in):
    queries, seen = inputs()[0].unsqueeze(0), []
    look = lambda q: seen.append(may_attend_in_place(q)) or q
    with torch.no_grad():
        for works in (True, False):
            stand_in.module.works = lambda *_, works=works: works
            look(queries)
            torch.func.vmap(look)(queries)
    torch.func.vmap(look)(queries)
    assert seen == [True, True, True, False, False]


@pytest.mark.gpu
def test_it_is_attention(monkeypatch):
    """In float32, TF32 and bfloat16; with one and two new positions."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    import equality

    assert equality.dream_attention(torch.device("cuda"))


@pytest.mark.gpu
def test_members_of_a_population_are_more_sequences():
    q, own, prefix, seen, mine = inputs(device="cuda")
    bias = score_bias(mine, seen, q.dtype)
    run = lambda q, keys: attend_in_place(q, KV(keys, own.values), prefix, bias)
    queries, keys = torch.stack([q, -q]), torch.stack([own.keys, 2 * own.keys], 1)
    found = torch.func.vmap(run, in_dims=(0, 1))(queries, keys)
    alone = torch.stack([run(queries[i], keys[:, i]) for i in range(2)])
    assert torch.allclose(found, alone, atol=1e-6)


@pytest.mark.gpu
def test_its_products_count():
    q, own, prefix, seen, mine = inputs(device="cuda")
    bias = score_bias(mine, seen, q.dtype)
    run = lambda: attend_in_place(q, own, prefix, bias)
    run()  # the first call makes the operator
    assert cost.operators(run)["kernels"] == 1
    assert cost.flops(run) == 4 * (2 * 4 * 3 * 2) * 16 * (7 + 5)


@pytest.mark.gpu
def test_where_it_cannot_be_built_one_line_says_so(monkeypatch):
    from hidreamer import fused_attention

    def broken(*_):
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(fused_attention, "shared_attention", broken)
    fused_attention.works.cache_clear()
    with pytest.warns(RuntimeWarning, match="slower: no C compiler$"):
        q, own, prefix, seen, mine = inputs(device="cuda")
        found = attend_in_place(q, own, prefix, score_bias(mine, seen, q.dtype))
    fused_attention.works.cache_clear()
    assert torch.allclose(found, attend(q, own, mine, prefix, seen), atol=1e-4)
