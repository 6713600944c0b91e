"""``make_dynamics``: the only place that knows the names of the latent states."""

from __future__ import annotations

from collections.abc import Mapping

from hidreamer.dynamics.base import Dynamics, KLConfig
from hidreamer.dynamics.hrssm import HRSSM
from hidreamer.dynamics.hrvq import HRVQ
from hidreamer.dynamics.rssm import RSSM

TYPES = {"rssm": RSSM, "hrssm": HRSSM, "hrvq": HRVQ}


def make_dynamics(config: Mapping, embed_dim: int, act_dim: int) -> Dynamics:
    """The latent state ``config["type"]``, built from the ``dynamics`` block of a config.

    Raises ValueError, one line, for a name that does not exist or sizes that do not fit together.
    """
    if config["type"] not in TYPES:
        raise ValueError(f"dynamics.type is {config['type']!r}; it can be {', '.join(TYPES)}")
    kl_config = KLConfig(config["dyn"], config["rep"], config["free"], config["unimix"])
    sizes = {"deter": config["deter"], "hidden": config["hidden"]}
    own = config[config["type"]]  # this type's block
    return TYPES[config["type"]](embed_dim, act_dim, kl_config, **sizes, **own)
