"""Where random numbers come from: an explicit generator, through every sample there is."""

import pytest
import torch
from small_runs import latest, records, run
from test_agent import ACTIONS, EVERYTHING, make

from hidreamer import distributions as dists
from hidreamer import evaluation
from hidreamer.dynamics import TYPES

VARIANTS = {kind: {"dynamics.type": kind} for kind in sorted(TYPES)}
VARIANTS |= {
    "nearest": {"dynamics.type": "hrvq", "dynamics.hrvq.posterior": "nearest"},
    "explorer": {"expl.behavior": "plan2explore"},
}


def everything(agent, batch, generator):
    """Whatever an agent does, and what comes of it."""
    found = []
    for _ in range(3):
        found.append(agent.update(batch, generator))
    obs = {key: x[:, 0] for key, x in batch.items() if key in (*EVERYTHING, "is_first")}
    state = agent.act(agent.initial(2), obs, generator=generator)
    found += [*state.carry, state.action]
    rows = agent.world_model.open_loop(batch, 3, True, generator)
    rows += agent.decode_state(obs, state, generator)
    found += [x for row in rows for x in row.values()]
    return [x for x in found if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("act", ["discrete", "continuous"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_an_agent_samples_comes_from_the_given_generator(variant, act):
    assert act in ACTIONS
    agent, batch = make(EVERYTHING, act, **VARIANTS[variant])
    again, other = (make(EVERYTHING, act, **VARIANTS[variant])[0] for _ in range(2))
    again.load_state_dict(agent.state_dict())
    other.load_state_dict(agent.state_dict())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    given = torch.Generator().manual_seed(7)
    found = everything(agent, batch, given)
    assert torch.equal(torch.get_rng_state(), before)  # not one number of torch's own
    torch.manual_seed(7)
    default = everything(again, batch, None)
    assert torch.equal(torch.get_rng_state(), given.get_state())  # as many, in the same order
    for x, y in zip(found, default, strict=True):
        assert torch.equal(x, y)
    different = everything(other, batch, torch.Generator().manual_seed(8))
    assert not torch.equal(found[0], different[0])


def test_runs_and_their_evaluations_leave_torch_s_numbers_alone(tmp_path, monkeypatch):
    before, play = [], evaluation.play

    def spy(agent, *args, generator, **kwargs):
        before.append(generator.get_state())
        return play(agent, *args, generator=generator, **kwargs)

    monkeypatch.setattr(evaluation, "play", spy)
    assert run(tmp_path / "a", "--steps", 90, "--eval_every", 40, "--video", "true") == 0
    assert len({x.numpy().tobytes() for x in before}) == len(before) >= 2
    # Numbers that the program draws for itself change nothing.
    rand = torch.rand
    monkeypatch.setattr(evaluation, "play", lambda *a, **k: (rand(3), play(*a, **k))[1])
    assert run(tmp_path / "b", "--steps", 90, "--eval_every", 40, "--video", "true") == 0
    assert records(tmp_path / "a") == records(tmp_path / "b")
    one, two = latest(tmp_path / "a"), latest(tmp_path / "b")
    assert torch.equal(one["torch_rng"], two["torch_rng"])


def test_samples_of_several_members_are_those_of_each(seeds=(1, 2, 3)):
    """What ``torch.func`` maps over members: the noise given, the gradient straight through."""
    logit = torch.randn(len(seeds), 5, 4)
    noise = torch.stack(
        [torch.rand(5, 1, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    weight = torch.randn(4)

    def loss(logit, noise):
        onehot = dists.sample_onehot(dists.unimix_probs(logit, 0.1), noise)
        return (onehot * weight).sum(), onehot

    grad, onehot = torch.func.vmap(torch.func.grad(loss, has_aux=True))(logit, noise)
    for i in range(len(seeds)):
        x = logit[i].clone().requires_grad_()
        expected, sample = loss(x, noise[i])
        expected.backward()
        assert torch.equal(sample, onehot[i]) and torch.allclose(x.grad, grad[i])
        assert x.grad.abs().sum() > 0
