"""Parameters by name: those of another model, fitted into one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# What may start afresh where nothing of it is there: younger or other parts than the source's.
OPTIONAL = ("explorer.", "world_model.harmony.", "world_model.decoder.")  # and objectives
NEEDED = ("world_model.reward.",)  # which is there without a weight as well
REWARD_OUT = "world_model.reward.out."  # zeros at first: the head says 0


def renamed(state: Mapping[str, Any], prefix: str, names: Mapping[str, str]) -> dict[str, Any]:
    """``state`` with new names for the parameters {old: new} below ``prefix``."""
    names = {prefix + old: prefix + new for old, new in names.items()}
    return {names.get(name, name): x for name, x in state.items()}


def module_name(parameter: str) -> str:
    """The module that a parameter belongs to, as reports name it."""
    return parameter.rpartition(".")[0] or parameter


def match(
    own: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    given: Mapping[str, Any],
    may_be_fresh: tuple[str, ...],
    optional: tuple[str, ...] = (),
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """``own`` with the values of ``params``, and {module: "mapped" | "split" | "fresh"}.

    given: the names that ``params`` had before it was converted. Names that begin with
    ``may_be_fresh`` keep their own values where ``params`` lacks them. Raises ValueError, naming
    the first that is missing, of another shape, or left over of a part that both have and that is
    not ``optional``.
    """
    matched, report = dict(own), {}
    for name, x in own.items():
        theirs = params.get(name)
        if theirs is None and name.startswith(may_be_fresh):
            report[module_name(name)] = "fresh"
            continue
        if theirs is None or theirs.shape != x.shape:
            shape = "nothing" if theirs is None else tuple(theirs.shape)
            raise ValueError(f"{name} is {tuple(x.shape)} here and {shape} there")
        report[module_name(name)] = "mapped" if name in given else "split"
        matched[name] = theirs
    part = lambda name: tuple(name.split(".")[:2])  # such as the encoder
    parts = {part(name) for name in own}
    for name in params:
        if name not in own and part(name) in parts and not name.startswith(optional):
            raise ValueError(f"{name} is nothing here and {tuple(params[name].shape)} there")
    return matched, report


def load_params(agent: Any, params: Mapping[str, Tensor]) -> dict[str, str]:
    """``load_state`` of parameters and buffers alone, for an agent that is not trained on."""
    prefix, dynamics = "world_model.dynamics.", agent.world_model.dynamics
    given = renamed(params, prefix, dynamics.former_names)
    params, theirs = {}, {}
    for name, x in given.items():
        if name.startswith(prefix):
            theirs[name.removeprefix(prefix)] = x
        else:
            params[name] = x
    params |= {prefix + name: x for name, x in dynamics.convert_state_dict(theirs).items()}
    own = (f"world_model.{name}." for name in agent.world_model.objectives)
    optional = (*OPTIONAL, *(prefix for prefix in own if prefix not in NEEDED))
    there = {prefix for prefix in optional for name in given if name.startswith(prefix)}
    fresh = tuple(prefix for prefix in optional if prefix not in there)
    if "reward" not in agent.world_model.objectives:  # what was trained there is not trained on
        learned = {name for name, x in params.items() if name.startswith(REWARD_OUT) and x.any()}
        params = {name: x for name, x in params.items() if name not in learned}
        fresh = (*fresh, *learned)
    matched, report = match(agent.state_dict(), params, given, fresh, optional)
    agent.load_state_dict(matched)
    return report


def load_state(agent: Any, state: Mapping[str, Any]) -> dict[str, str]:
    """What ``Agent.load_state`` does."""
    report, names = load_params(agent, state["params"]), agent.world_model.dynamics.former_names
    for name, opt in agent.optimizers.items():
        moments = renamed(state["optim"].get(name, {}), "dynamics.", names)
        opt.load_state_dict(moments)
        fresh = (key for key in opt.params if key not in moments)
        report |= {f"{name} optimiser, {module_name(key)}": "fresh" for key in fresh}
    return report


def former_hrvq_names(layers: int) -> dict[str, str]:
    """{former: now} of ``hrvq``'s parameters."""
    names = {
        "begin": "bos_token",
        "place": "level_emb",
        "inp.weight": "in_proj.weight",
        "inp.bias": "in_proj.bias",
    }
    for i in range(layers):
        for name in ("up.weight", "up.bias", "down.weight", "down.bias"):
            names[f"transformer.layers.{i}.{name}"] = f"transformer.layers.{i}.ffn.{name}"
    return names
