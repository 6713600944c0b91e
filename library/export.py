"""A trained agent as a folder that a model hub takes as it is: weights, config, card."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from envs.base import one_line
from hidreamer import __version__, app
from hidreamer.checkpoint import FolderError, replace_file, replace_text
from library import source
from library.source import FORMAT, HUB, SPACES, WEIGHTS, Source
from tools import ConfigError, dump_yaml

PARTIAL = ".export-"  # of a folder with the files of an export that is being written
CARD = """\
---
license: mit
library_name: hidreamer
pipeline_tag: reinforcement-learning
tags: [reinforcement-learning, world-model, dreamerv3, {dynamics}, "{task}"]
model-index:
- name: {name}
  results:
  - task: {{type: reinforcement-learning, name: reinforcement-learning}}
    dataset: {{name: "{task}", type: "{task}"}}
    metrics:
{metrics}
---

# {name}

A DreamerV3 agent with the latent state `{dynamics}`, trained on `{task}` by
hidreamer {version}.

| | |
|---|---|
| task | `{task}` |
| environment frames | {step:,} |
| seed | {seed} |
| commit | {commit} |
| parameters | {params:,} |
{scores}
| licence | MIT |

The scores are the last ones that the run logged; returns are of single runs, one seed.

```python
import hidreamer

agent = hidreamer.load("FOLDER")  # or "hf:ORG/NAME"
env = agent.make_env()
obs, info = env.reset(seed=0)
agent.policy.reset()
done = False
while not done:
    obs, reward, terminated, truncated, info = env.step(agent.policy(obs))
    done = terminated or truncated
```

`{weights}` holds the parameters alone, without optimisers; `config.yaml` is the run's config.
"""
SENTENCES = {
    "eval_return": "mean return of its evaluation",
    "eval_return_std": "standard deviation over these episodes",
    "eval_episodes": "episodes of that evaluation",
    "train_return": "return of its last training episode",
}


def export(folder: str | os.PathLike, out: str | os.PathLike) -> Path:
    """Write the agent of a run to the folder ``out``: model.safetensors, config.yaml, README.md.

    folder: all that ``hidreamer.load`` takes. out: a new or empty folder, or an earlier export,
    which is replaced. -> ``out``.
    Raises ConfigError, FolderError, EnvError, OSError.
    """
    found, out = source.read(folder), source.path_of(out)
    if out.exists() and not out.is_dir():
        raise FolderError(f"{out} is a file: name a folder for the export")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        raise ConfigError("export needs the package safetensors: pip install safetensors") from None
    there = [] if not out.exists() else sorted(path.name for path in out.iterdir())
    others = [name for name in there if not name.startswith(PARTIAL)]
    if others and not source.is_export(out / WEIGHTS):
        raise FolderError(f"{out} holds {others[0]} and is no export: choose another folder")
    # clones: safetensors refuses parameters that share memory
    params = {name: x.detach().cpu().contiguous().clone() for name, x in found.params.items()}
    metadata = {"format": FORMAT, "facts": json.dumps(found.facts, sort_keys=True)}
    for name, space in zip(SPACES, (found.obs_space, found.action_space), strict=True):
        metadata[name] = json.dumps(source.encode_space(space))
    tree = found.config.tree()
    tree["logdir"] = ""  # a path of this machine
    texts = {"config.yaml": dump_yaml(tree), "README.md": card(found)}
    metadata["config"] = source.text_digest(texts["config.yaml"])
    metadata["sha256"] = source.digest(params, metadata)
    try:
        out.mkdir(parents=True, exist_ok=True)
        partial = tempfile.TemporaryDirectory(prefix=PARTIAL, dir=out)
    except OSError as error:
        raise FolderError(
            f"{out} cannot be written ({error.strerror}): name another folder"
        ) from None
    with partial as folder:  # a full disk changes none
        for name, text in texts.items():
            replace_text(Path(folder) / name, text)
        try:
            replace_file(Path(folder) / WEIGHTS, lambda path: save_file(params, path, metadata))
        except SafetensorError as error:
            raise OSError(f"{out} cannot be written: {one_line(error)}") from None
        for name in (*texts, WEIGHTS):
            os.replace(Path(folder) / name, out / name)
    return out


def card(found: Source) -> str:
    """The card of a model hub: facts as YAML, then as text."""
    facts, scores = found.facts, found.facts["scores"]
    metrics = [
        f"    - {{type: {name}, value: {scores[name]}, name: {text}}}"
        for name, text in SENTENCES.items()
        if name in scores
    ]
    rows = [f"| {text} | {scores[name]:g} |" for name, text in SENTENCES.items() if name in scores]
    dynamics = found.config.dynamics.type
    return CARD.format(
        name=f"{facts['task']}-{dynamics}-{facts['seed']}".replace("/", "-").replace(":", "-"),
        task=facts["task"],
        dynamics=dynamics,
        step=facts["step"],
        seed=facts["seed"],
        commit=facts["commit"] or "unknown",
        params=sum(x.numel() for x in found.params.values()),
        metrics="\n".join(metrics) or f"    - {{type: steps, value: {facts['step']}}}",
        scores="\n".join(rows) or "| scores | none were logged |",
        version=__version__,
        weights=WEIGHTS,
    )


def push(folder: str | os.PathLike, name: str, *, private: bool = False) -> Any:
    """Upload an exported folder to the hub as ``name``, "ORG/NAME" or "hf:ORG/NAME".

    The token is the hub's own (``hf auth login`` or HF_TOKEN). -> what its client returned, with
    the address of the commit. Raises ConfigError without the extra ``hub``, FolderError where the
    folder is no whole export or the hub refuses.
    """
    if not isinstance(name, str):
        raise ValueError(f"the name on the hub is {name!r}: write ORG/NAME")
    folder, repo = source.path_of(folder), name.removeprefix(HUB)
    if not (folder / WEIGHTS).is_file():
        problem = app.missing(folder) or f"{folder} is no export: make one with hidreamer.export"
        raise FolderError(problem)
    source.read_export(folder)
    api = source.hub().HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        patterns = [WEIGHTS, "config.yaml", "README.md"]
        return api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=patterns)
    except Exception as error:  # the hub, the network and its client may raise anything
        reason = one_line(error) or type(error).__name__
        raise FolderError(f"{name} cannot be uploaded: {reason}") from None
