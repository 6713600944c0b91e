"""Precision of products: what it means on each device, and weights that are cast once."""

import ast
import collections
import warnings

import pytest
import torch
from test_agent import EVERYTHING, make
from torch.utils._python_dispatch import TorchDispatchMode

import models
import run_config
import tools
from conftest import ROOT
from hidreamer import precision
from hidreamer.dynamics import TYPES


@pytest.fixture
def matmul():
    """What the process has as precision is as before after a test."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("name", "tf32"), [("tf32", True), ("bfloat16", True), ("float32", False)])
def test_what_a_precision_means_on_cuda(name, tf32, matmul):
    config = tools.load_config(["debug"], {"precision": name})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.set_precision(config, torch.device("cuda"))
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert torch.backends.cudnn.allow_tf32 is tf32


def test_tf32_is_the_default_and_float32_on_a_cpu(matmul):
    before = torch.get_float32_matmul_precision()
    assert tools.load_config(["debug"], {}).precision == "tf32"
    found = []
    for name in ("tf32", "float32"):
        torch.manual_seed(0)
        agent, batch = make(precision=name)
        precision.set_precision(agent.config, torch.device("cpu"))
        found.append(agent.update(batch))
    assert torch.equal(*found) and torch.get_float32_matmul_precision() == before


def test_a_run_of_before_continues_in_its_precision_or_another(tmp_path):
    """Older runs have float32 in their config.yaml, which was the default."""
    old = tools.load_config(["debug"], {"precision": "float32"}).tree()
    run_config.check_same_run(tmp_path, old, tools.load_config(["debug"], {}))


class Casts(TorchDispatchMode):
    """How often each weight is cast to another type."""

    def __init__(self, params):
        super().__init__()
        self.names = {p.data_ptr(): name for name, p in params}
        self.seen, self.together = collections.Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sources = {torch.ops.aten._to_copy.default: args[:1]}
        if func is torch.ops.aten._foreach_copy_.default:
            sources[func] = args[1]
            self.together += 1
        for x in sources.get(func, ()):
            if x.data_ptr() in self.names:
                self.seen[self.names[x.data_ptr()]] += 1
        return func(*args, **(kwargs or {}))


def imagined(agent, batch):
    with torch.no_grad(), agent.autocast():
        carry, post, _ = agent.world_model.observe(models.networks.preprocess(batch))
        start = agent.world_model.dynamics.starts(carry, post, 0)
        torch.manual_seed(1)
        with Casts(agent.named_parameters()) as casts:
            ends = torch.zeros(batch["reward"].numel())
            return agent.behavior.imagine(agent.world_model, start, ends), casts.seen


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_imagination_casts_each_weight_once(kind, monkeypatch):
    agent, batch = make(EVERYTHING, **{"dynamics.type": kind, "precision": "bfloat16"})
    params = dict(agent.named_parameters())
    torch.manual_seed(0)
    found, casts = imagined(agent, batch)
    # not the codebooks of hrvq, which are no layers
    linear = [
        name for name in casts if ("dynamics" in name or "actor" in name) and "book" not in name
    ]
    assert len(linear) > 4 and max(casts[name] for name in linear) == 1
    assert all(p is params[name] for name, p in agent.named_parameters())
    monkeypatch.setattr(precision, "autocast_dtype", lambda device: None)  # at every use
    torch.manual_seed(0)
    other, casts = imagined(agent, batch)
    assert max(casts.values()) >= agent.config.imag.horizon
    assert torch.equal(found.x, other.x) and torch.equal(found.action, other.action)


@pytest.mark.parametrize("kind", sorted(TYPES))
def test_an_update_casts_the_weights_together(kind):
    """Those of the model for its loss and once more, when they have changed, for the dreams; and
    their gradients back.
    """
    agent, batch = make(EVERYTHING, **{"dynamics.type": kind, "precision": "bfloat16"})
    with Casts(agent.named_parameters()) as casts:
        agent.update(batch)
    layers = {}
    for name, module in agent.named_modules():
        if type(module) in precision.PRODUCTS:
            named = module.named_parameters(name)
            layers |= {key: casts.seen[key] for key, _ in named}
    assert len(layers) > 25 and max(layers.values()) == 2
    once = [n for name, n in layers.items() if name.startswith(("behavior", "world_model.enc"))]
    assert set(once) == {1}
    assert casts.together == 4 + 3  # model, actor, critic, model with slow critic; gradients


@pytest.mark.parametrize("kind", ["rssm", "hrssm"])
def test_the_scan_casts_each_weight_once(kind):
    over = {"dynamics.type": kind, "precision": "bfloat16"}
    agent, batch = make(EVERYTHING, length=16, **over)
    with agent.autocast(), Casts(agent.world_model.dynamics.named_parameters()) as casts:
        agent.world_model.loss(models.networks.preprocess(batch))
    alone = [n for name, n in casts.seen.items() if name.startswith(("obs", "post", "delta"))]
    assert len(alone) >= 3 and max(alone) == 1
    assert max(casts.seen.values()) <= 4  # the priors and an episode's start share two layers


def test_weights_return_where_imagination_fails():
    agent, _ = make(precision="bfloat16")
    params = dict(agent.named_parameters())
    cast = precision.cast_weights(agent.behavior.actor)
    with pytest.raises(ZeroDivisionError), agent.autocast(), torch.no_grad(), cast:
        assert agent.behavior.actor.out.weight.dtype == torch.bfloat16
        raise ZeroDivisionError
    assert all(p is params[name] for name, p in agent.named_parameters())
    with agent.autocast(), precision.cast_weights(agent.behavior.actor):  # gradients are recorded
        assert agent.behavior.actor.out.weight.dtype == torch.float32


def test_masked_attention_leaves_cudnn_and_flash_aside(monkeypatch):
    kernels, q = torch.backends.cuda, torch.zeros(3, 1)
    before = kernels.cudnn_sdp_enabled()
    with precision.masked_attention(q):
        assert kernels.cudnn_sdp_enabled() == before
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with precision.masked_attention(q):
        assert kernels.mem_efficient_sdp_enabled() and kernels.math_sdp_enabled()
        assert not kernels.cudnn_sdp_enabled() and not kernels.flash_sdp_enabled()

    def mapped(q):
        with precision.masked_attention(q):
            assert kernels.math_sdp_enabled() and not kernels.mem_efficient_sdp_enabled()
            assert not kernels.cudnn_sdp_enabled() and not kernels.flash_sdp_enabled()
        return q

    torch.func.vmap(mapped)(q)
    assert kernels.cudnn_sdp_enabled() == before


CALLS = {"observe", "imagine", "open_loop"}  # of a model or its dynamics
# Functions whose callers hold the context, and those of parts that only ever compute in float32:
# the staged pipeline's judgement, the smoke check, and benchmarks of configs without bfloat16.
EXEMPT = {
    "analysis/attention.py": {"look"},
    "analysis/heldout.py": {"predict"},
    "analysis/latents.py": {"open_loop", "read"},
    "benchmarks/experts.py": {"dreamer"},
    "benchmarks/quantisers.py": {"judge", "picture"},
    "pipeline/pictures.py": {"dreams"},
    "pipeline/token_agent.py": {"imagine"},
    "pipeline/world_model_gate.py": {"observed", "rollouts"},
    "simple_test.py": {"check"},
}


def callers(tree):
    """{function: whether every call of CALLS in it is inside a ``with`` of autocast}."""
    found = {}

    def visit(node, function, held):
        if isinstance(node, ast.FunctionDef):
            function, held = node.name, False
        if isinstance(node, ast.With):
            held = held or any("autocast" in ast.unparse(item) for item in node.items)
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr in CALLS:
            found[function] = found.get(function, True) and held
        for child in ast.iter_child_nodes(node):
            visit(child, function, held)

    visit(tree, "", False)
    return found


def test_whatever_calls_a_model_does_so_under_the_one_autocast():
    """Above hidreamer/, whose functions are called by ``models.Agent`` under it."""
    exposed, own = {}, []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith((".", "tests/", "legacy/", "hidreamer/", "runs/", "build/")):
            continue
        text = path.read_text()
        own += [name] if "torch.autocast(" in text else []
        bare = {name for name, held in callers(ast.parse(text)).items() if not held}
        if bare and name != "models.py":
            exposed[name] = bare
    # besides ``hidreamer.precision.autocast``: off for a frozen encoder, whose codes are stored;
    # float16, with a scaler of gradients
    assert own == ["pipeline/token_model.py", "pipeline/world_model.py"]
    assert exposed == EXEMPT
