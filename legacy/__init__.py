"""Reads what dreamerv3-torch (NM512, commit 6ef8646) wrote: checkpoints and config keys. Loaded
only when asked for.

Upstream repeats the world model under several prefixes, and torch.compile adds ``_orig_mod``; both
are undone here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# How upstream's module names read here, in order of application.
NAMES = (
    (r"\._cnn\.layers\.(\d+)\.(?:norm\.)?", r".image.layers.\1."),
    (r"\._cnn\._linear_layer", ".image.inp"),
    (r"\._mlp\.", ".vector."),
    (r"layers\.[A-Z][A-Za-z]*_(linear|norm)(\d+)", r"blocks.\2.\1"),
    (r"_(img_in|img_out|obs_out)_layers\.0", r"\1.linear"),
    (r"_(img_in|img_out|obs_out)_layers\.1", r"\1.norm"),
    (r"_cell\.layers\.GRU_", "cell."),
    (r"_imgs_stat_layer", "prior_out"),
    (r"_obs_stat_layer", "post_out"),
    (r"dynamics\.W$", "dynamics.initial_deter"),
    (r"^_wm\.(?:heads\.)?", "world_model."),
    (r"^_task_behavior\.(actor|_slow_value|value)\.", r"behavior.\1."),
    (r"^_task_behavior\.ema_vals$", "behavior.norm.range"),
    (r"^_expl_behavior\._networks\.", "explorer.ensemble."),
    (r"^_expl_behavior\._behavior\.(actor|_slow_value|value)\.", r"explorer.behavior.\1."),
    (r"^_expl_behavior\._behavior\.ema_vals$", "explorer.behavior.norm.range"),
    (r"behavior\._slow_value\.", "behavior.slow."),
    (r"behavior\.value\.", "behavior.critic."),
)
OURS = ("world_model.", "behavior.", "explorer.")
OPTIMIZERS = {  # upstream's name: ours, the part of the model it trains there, the same part here
    "_wm._model_opt._opt": ("model", "_wm.", "world_model."),
    "_task_behavior._actor_opt._opt": ("actor", "_task_behavior.actor.", "behavior."),
    "_task_behavior._value_opt._opt": ("critic", "_task_behavior.value.", "behavior."),
    "_expl_behavior._expl_opt._opt": ("expl_model", "_expl_behavior._networks.", "explorer."),
    "_expl_behavior._behavior._actor_opt._opt": (
        "expl_actor",
        "_expl_behavior._behavior.actor.",
        "explorer.behavior.",
    ),
    "_expl_behavior._behavior._value_opt._opt": (
        "expl_critic",
        "_expl_behavior._behavior.value.",
        "explorer.behavior.",
    ),
}


def rename(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's tensors by name -> ours. Duplicates, and what has no counterpart, are dropped."""
    out: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, x in tensors.items():
        name = key.replace("_orig_mod.", "")
        for pattern, ours in NAMES:
            name = re.sub(pattern, ours, name)
        if not name.startswith(OURS):
            continue
        if match := re.fullmatch(r"(.*)\.(mean|std)_layer(.*)\.(weight|bias)", name):
            # One layer for every vector key, or for mean and deviation, is one layer here: mean
            # first, keys sorted.
            head, which, entry, kind = match.groups()
            parts.setdefault(f"{head}.out.{kind}", {})[which + entry] = x
        else:
            out[name] = x.flatten() if name.endswith("dynamics.initial_deter") else x
    if (first := "world_model.encoder.vector.blocks.0.linear") + ".weight" in out:
        # upstream has none there
        out[first + ".bias"] = torch.zeros_like(out[first + ".weight"][:, 0])
    for name, part in parts.items():
        out[name] = torch.cat([part[key] for key in sorted(part)])
    return out


def convert(checkpoint: Mapping) -> dict[str, Any]:
    """dreamerv3-torch's ``latest.pt`` -> {"params": {name: tensor}, "optim": {optimiser:
    {parameter: state}}}.
    """
    params = checkpoint["agent_state_dict"]
    optim = {}
    for name, state in checkpoint.get("optims_state_dict", {}).items():
        if name.replace("_orig_mod.", "") not in OPTIMIZERS:
            continue
        ours, theirs, prefix = OPTIMIZERS[name.replace("_orig_mod.", "")]
        # Upstream numbers parameters in the order in which its state dict lists them.
        keys = [key for key in params if key.replace("_orig_mod.", "").startswith(theirs)]
        states = state["state"]
        if len(keys) != len(states):
            continue
        mean = rename({key: states[i]["exp_avg"] for i, key in enumerate(keys)})
        square = rename({key: states[i]["exp_avg_sq"] for i, key in enumerate(keys)})
        step, named = states[0]["step"], {}
        for key, x in mean.items():
            state = {"step": step, "exp_avg": x, "exp_avg_sq": square[key]}
            named[key.removeprefix(prefix)] = state
        optim[ours] = named
    return {"params": rename(params), "optim": optim}


def config(theirs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Upstream's resolved config and the observations' shapes -> overrides {"group.key": value}
    for ours.
    """
    out = {
        "dynamics.type": "rssm",
        "dynamics.deter": theirs["dyn_deter"],
        "dynamics.hidden": theirs["dyn_hidden"],
        "dynamics.rssm.stoch": theirs["dyn_stoch"],
        "dynamics.rssm.classes": theirs["dyn_discrete"],
        "dynamics.dyn": theirs["dyn_scale"],
        "dynamics.rep": theirs["rep_scale"],
        "dynamics.free": theirs["kl_free"],
        "dynamics.unimix": theirs["unimix_ratio"],
        "actor.net.unimix": theirs["actor"]["unimix_ratio"],
        "actor.net.min_std": theirs["actor"]["min_std"],
        "actor.net.max_std": theirs["actor"]["max_std"],
    }
    for name in ("encoder", "decoder"):
        part = theirs[name]
        used = []
        for key, shape in shapes.items():
            if re.match(part["cnn_keys" if len(shape) == 3 else "mlp_keys"], key):
                used.append(key)
        out |= {f"{name}.keys": "|".join(map(re.escape, used)), f"{name}.depth": part["cnn_depth"]}
        out |= {
            f"{name}.minres": part["minres"],
            f"{name}.layers": part["mlp_layers"],
            f"{name}.units": part["mlp_units"],
        }
    for ours, head in (
        ("reward", "reward_head"),
        ("cont", "cont_head"),
        ("actor.net", "actor"),
        ("critic.net", "critic"),
    ):
        out |= {f"{ours}.layers": theirs[head]["layers"], f"{ours}.units": theirs["units"]}
    return out
