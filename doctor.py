"""What is installed, which device and how many threads, which suites work, and what installs the
rest.

    python doctor.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hidreamer import __version__, app

PROJECT = "hidreamer"
# {what it is for: (a task to build and step, extra)}
SUITES = {
    "Atari": ("atari_pong", ""),
    "MinAtar": ("minatar_breakout", ""),
    "Gymnasium": ("gym_CartPole-v1", ""),
    "DeepMind Control, joints": ("dmc_cartpole_balance", "dmc"),
    "DeepMind Control, camera": ("dmc_cartpole_balance", "dmc"),
    "Crafter": ("crafter_reward", "crafter"),
    "ViZDoom": ("vizdoom_basic", "vizdoom"),
    "MiniGrid": ("minigrid_MemoryS7", "minigrid"),
    "POPGym": ("popgym_RepeatPreviousEasy", "popgym"),
    "Pin Pad": ("pinpad_three", ""),
}
CAMERA = "DeepMind Control, camera"
# {extra: (a module that it brings, what it is for)}
EXTRAS = {
    "compare": ("rliable", "comparisons, analyses, the pipeline, the demo's curve"),
    "play": ("starlette", "the page that plays in a dream"),
    "hub": ("huggingface_hub", "model hubs"),
    "ray": ("ray", "comparisons on a Ray cluster"),
    "slurm": ("submitit", "comparisons on Slurm"),
    "minari": ("minari", "Minari data sets"),
    "dinov2": ("transformers", "a frozen DINOv2 in the pipeline"),
    "rerun": ("rerun", "analyses in rerun.io's viewer"),
    "wandb": ("wandb", "--logger wandb"),
    "trackio": ("trackio", "--logger trackio"),
}


def requirements() -> list[str]:
    """Packages that every installation needs, by name; [] where the project is not installed."""
    try:
        found = importlib.metadata.requires(PROJECT) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [re.match(r"[\w.-]+", line)[0] for line in found if "extra ==" not in line]


def packages() -> Iterator[tuple[bool, str, str]]:
    """(whether it is there, package, version or what installs it)."""
    for name in requirements():
        try:
            yield True, name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield False, name, f"pip install {name}"


def extras() -> Iterator[tuple[bool, str, str]]:
    """(whether it is there, extra, what it is for and what installs it)."""
    for name, (module, what) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        yield there, name, what if there else f"{what}: {app.install_line(name)}"


def machine() -> list[tuple[str, str]]:
    """Versions, device, threads and memory."""
    import torch

    from hidreamer import process

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = [
        (PROJECT, f"{__version__} in {app.ROOT}"),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
    ]
    if torch.cuda.is_available():
        name, free = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]
        rows.append(("device", f"cuda: {name}, {free / 1e9:.1f} GB free"))
    else:
        rows.append(("device", "cpu (torch sees no CUDA device)"))
    threads = f"{process.AVAILABLE}, of {cores} cores; small networks without images use one"
    rows.append(("threads", f"{threads} (--threads N)"))
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
        busy = ": others compute here, expect a run to take longer" if load > 0.5 * cores else ""
        rows.append(("load", f"{load:.1f} of {cores} cores{busy}"))
    rows.append(("disk", f"{shutil.disk_usage('.').free / 1e9:.0f} GB free in this folder"))
    return rows


def suite(name: str, task: str, extra: str) -> tuple[bool, str]:
    """Build, reset and step an environment. -> whether that works, and if not what to do."""
    import numpy as np

    import tools
    from envs import EnvError, make_env
    from hidreamer.spaces import random_action

    block = tools.load_config([], {"env.dmc.image": name == CAMERA, "env.dmc.proprio": True}).env
    try:
        env = make_env(task, block.tree(), 0)
        try:
            env.reset()
            env.step(random_action(env.act_space, 1, np.random.default_rng(0))[0])
        finally:
            env.close()
    except EnvError as error:
        if extra and isinstance(error.__cause__, ImportError):
            return False, app.install_line(extra)
        return False, str(error)
    except Exception as error:  # a renderer or a game may raise anything
        cause = (str(error) or type(error).__name__).splitlines()[0]
        remedy = ": apt install libegl1 libgl1-mesa-dri" if name == CAMERA else ""
        return False, f"{cause}{remedy}"
    return True, task


def table(rows: Sequence[tuple[bool, str, str]]) -> list[str]:
    width = max((len(name) for _, name, _ in rows), default=0)
    return [f"  {'ok' if there else '--'}  {name:<{width}}  {text}" for there, name, text in rows]


def report(out: Callable[[str], Any] = print) -> bool:
    """Everything, a line each. -> whether all works that needs no extra."""
    for name, text in machine():
        out(f"{name:<10} {text}")
    needed = list(packages())
    missing = [row for row in needed if not row[0]]
    out("")
    versions = ", ".join(f"{name} {text}" for there, name, text in needed if there)
    out(f"packages   {versions or f'not installed as a package: {app.install_line()}'}")
    for line in table(missing):
        out(line)
    out("\nsuites (one environment of each, reset and stepped)")
    works = True
    rows = []
    for name, (task, extra) in SUITES.items():
        there, text = suite(name, task, extra)
        works &= there or bool(extra)
        rows.append((there, name, text))
    for line in table(rows):
        out(line)
    out("\nextras")
    for line in table(list(extras())):
        out(line)
    fine = works and not missing
    train = " ".join(app.command("demo"))
    out(f"\n{f'ready: {train}' if fine else 'not ready: see the lines with --'}")
    return fine


def main(argv: Sequence[str]) -> int:
    """-> exit status: 0 ready, 1 something that every installation has does not work, 2 bad
    arguments.
    """
    if argv:
        wants_help = argv[0] in ("-h", "--help")
        name = " ".join(app.command("doctor"))
        text = __doc__.strip().replace("python doctor.py", name)
        if not wants_help:
            text = f"error: {name} takes no arguments"
        print(text, file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    return 0 if report() else 1


if __name__ == "__main__":
    app.plain_warnings()
    sys.exit(app.run(main))
