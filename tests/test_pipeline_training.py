"""How the world model learns on tokens: accumulation, decay, rates, float16."""

import pytest
import torch
from test_pipeline_world_model import CPU, batch_of, config, make_model

from hidreamer import checkpoint, cost
from hidreamer.optim import Optimizer
from pipeline import training, world_model


def test_gradient_accumulation_equals_the_large_batch():
    settings = config()
    whole = batch_of(make_model(settings), 8)
    halves = [{key: x[i : i + 4] for key, x in whole.items()} for i in (0, 4)]
    grads = []
    for batches in ([whole], halves):
        model = make_model(settings)
        optimizer = world_model.make_optimizer(model, settings.pipeline.world_model, CPU)
        kept = {}
        optimizer.optim.step = lambda optimizer=optimizer, kept=kept: kept.update(
            {key: p.grad.clone() for key, p in optimizer.params.items()}
        )
        world_model.accumulate(model, optimizer, batches, settings)
        grads.append(kept)
    for key in grads[0]:
        assert torch.allclose(grads[0][key], grads[1][key], atol=1e-6), key


def test_weight_decay_is_of_matrices_only():
    net = torch.nn.Linear(3, 2)
    optimizer = Optimizer(
        {"net": net}, lr=0.1, eps=1e-8, clip=0.0, algorithm=training.adamw(0.5, (0.9, 0.95))
    )
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step(0.0 * (net.weight.sum() + net.bias.sum()))
    assert torch.allclose(net.weight, 0.95 * before[0]) and torch.equal(net.bias, before[1])


def test_the_learning_rate_by_hand():
    rate = lambda step: training.cosine(step, 12, 1.0, 0.1, 2)
    assert [rate(0), rate(1), rate(2)] == [0.5, 1.0, 1.0]
    assert rate(7) == pytest.approx(0.55) and rate(12) == pytest.approx(0.1)


def test_float16_scales_gradients_and_leaves_out_a_step_that_overflowed():
    settings = config(**{"pipeline.world_model.float16": "true"})
    models = [make_model(s) for s in (settings, config())]
    batch, found, moved = batch_of(models[0]), [], []
    for model, one in zip(models, (settings, config()), strict=True):
        optimizer = world_model.make_optimizer(model, one.pipeline.world_model, CPU)
        before = model.reward.state_dict().copy() | model.dynamics.state_dict()
        before = {key: x.clone() for key, x in before.items()}
        for _ in range(3):  # scales of too much are halved
            found.append(world_model.accumulate(model, optimizer, [batch], one))
        now = model.reward.state_dict() | model.dynamics.state_dict()
        moved.append(any(not torch.equal(x, now[key]) for key, x in before.items()))
    assert all(moved) and found[2]["skipped"] == 0.0
    # the first update is along the same gradient, to within half precision
    assert found[0]["model_loss"].item() == pytest.approx(found[3]["model_loss"].item(), rel=0.01)
    assert found[0]["grad_norm"].item() == pytest.approx(found[3]["grad_norm"].item(), rel=0.05)


def test_a_scaled_step_by_hand():
    net = torch.nn.Linear(2, 1, bias=False)
    algorithm = training.adamw(0.0, (0.9, 0.95))
    settings = {"lr": 0.1, "eps": 1e-8, "clip": 1.0, "algorithm": algorithm}
    optimizer = training.ScaledOptimizer({"net": net}, device=CPU, **settings)
    scale, before = optimizer.scaler.get_scale(), net.weight.detach().clone()
    steps = optimizer.step((net.weight * torch.tensor([3.0, 4.0])).sum())
    assert steps["grad_norm"] == 5.0 and steps["clipped"] == 1.0 and steps["skipped"] == 0.0
    assert torch.allclose(net.weight, before - 0.1)
    after = net.weight.detach().clone()
    steps = optimizer.step((net.weight * float("inf")).sum())
    assert steps["skipped"] == 1.0 and steps["grad_norm"] == 0.0
    assert torch.equal(net.weight, after) and optimizer.scaler.get_scale() == scale / 2
    other = training.ScaledOptimizer({"net": net}, device=CPU, **settings)
    other.load_state_dict(optimizer.state_dict())
    assert other.scaler.get_scale() == scale / 2
    assert other.optim.state[net.weight]["step"] == 1.0


def test_a_scaled_step_reads_nothing_on_the_host():
    net = torch.nn.Linear(2, 1)
    settings = {"lr": 0.1, "eps": 1e-8, "clip": 1.0, "algorithm": training.adamw(0.1, (0.9, 0.95))}
    optimizer = training.ScaledOptimizer({"net": net}, device=CPU, **settings)
    step = lambda: optimizer.step(net(torch.ones(3, 2)).sum())
    step()
    assert cost.operators(step)["host_reads"] == 0


def test_a_killed_float16_world_model_continues_to_the_same_end(tokenized, tmp_path):
    """Its scale is part of the state."""
    settings = config(**{"pipeline.world_model.float16": "true"})
    stages = []
    for kill in (False, True):
        torch.manual_seed(0)
        stage = world_model.WorldModel(settings, tokenized, CPU, print)
        for i in range(4):
            if kill and i == 2:
                state, rng = checkpoint.plain(stage.save_state()), torch.get_rng_state()
                checkpoint.write_tensors(tmp_path / "state", state)
                torch.manual_seed(0)
                stage = world_model.WorldModel(settings, tokenized, CPU, print)
                stage.load_state(torch.load(tmp_path / "state", weights_only=True))
                stage.step = i
                torch.set_rng_state(rng)
            stage.advance()
        stages.append(stage)
    for a, b in zip(*(stage.models[0].parameters() for stage in stages), strict=True):
        assert torch.equal(a, b)
    scales = {stage.optimizer.scaler.get_scale() for stage in stages}
    assert len(scales) == 1
