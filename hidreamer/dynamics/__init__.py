"""``make_dynamics``: the only place that knows the names of the latent states."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hidreamer.dynamics.base import Dynamics, KLConfig
from hidreamer.dynamics.hrssm import HRSSM
from hidreamer.dynamics.hrvq import HRVQ
from hidreamer.dynamics.hrvq_gru import RecurrentHRVQ
from hidreamer.dynamics.rssm import RSSM
from hidreamer.nets import by_name

TYPES = {"rssm": RSSM, "hrssm": HRSSM, "hrvq": HRVQ}
MEMORIES = {"interleaved": HRVQ, "stacked": HRVQ, "gru": RecurrentHRVQ}  # of hrvq


def make_dynamics(config: Mapping, embed_dim: int, act_dim: int, positions: int = 0) -> Dynamics:
    """The latent state ``config["type"]``, built from the ``dynamics`` block of a config.

    positions: of the feature map in an embedding, 0 where there is none: ``spatial`` deals out to
    its groups what has no place. Raises ValueError, one line, for a name that does not exist or
    sizes that do not fit together.
    """
    if config["type"] not in TYPES:
        raise ValueError(f"dynamics.type is {config['type']!r}; it can be {', '.join(TYPES)}")
    kl_config = KLConfig(config["dyn"], config["rep"], config["free"], config["unimix"])
    sizes = {"deter": config["deter"], "hidden": config["hidden"]}
    own = config[config["type"]]  # this type's block
    make = TYPES[config["type"]]
    if config["type"] == "hrvq":
        make = by_name(MEMORIES, own["memory"], "dynamics.hrvq.memory")
    dynamics = make(embed_dim, act_dim, kl_config, **sizes, **own)
    if config["action_scale"] != 1.0:  # an action's norm is 1, that of S one-hots or codes S ** 0.5
        with torch.no_grad():
            dynamics.action_weights().mul_(config["action_scale"])
    needed = dynamics.map_positions
    if needed and positions not in (0, needed):
        raise ValueError(
            f"dynamics.hrvq.spatial: groups is {needed} and the encoder's map has {positions} "
            "positions: set groups to encoder.minres x encoder.minres"
        )
    return dynamics
