"""What a finished stage was made from, and whether another one can be built on it.

``manifest.json`` is written last: a folder without it holds an unfinished stage. It has the hash of
every output, of the manifests that the stage was made from, the config keys that decide the
outputs, commit, command, seed and hardware.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hidreamer import checkpoint
from hidreamer.checkpoint import FolderError
from run_config import differences

NAME = "manifest.json"
FORMAT = 1
FIELDS = {"stage": str, "inputs": dict, "config": dict, "outputs": dict, "digest": str}


class InputError(FolderError):
    """One line: why a stage cannot be built on what is there, and what to run."""


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def relevant(flat: Mapping[str, Any], prefixes: Iterable[str]) -> dict[str, Any]:
    """The config keys of ``flat`` that are, or lie below, one of ``prefixes``."""
    prefixes = tuple(prefixes)
    found = {}
    for key, value in flat.items():
        if key in prefixes or key.startswith(tuple(prefix + "." for prefix in prefixes)):
            found[key] = value
    return found


def write(
    folder: Path, outputs: Iterable[Path], inputs: Mapping[str, str], facts: Mapping[str, Any]
) -> None:
    """Mark the stage in ``folder`` as finished. facts: "stage", "config" and whatever else."""
    hashes = {path.relative_to(folder).as_posix(): file_hash(path) for path in sorted(outputs)}
    body = {"format": FORMAT, **facts, "inputs": dict(inputs), "outputs": hashes}
    identity = [body["stage"], body["config"], body["inputs"], hashes]
    body["digest"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    checkpoint.replace_text(folder / NAME, json.dumps(body, indent=1) + "\n")


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest in ``folder``; None where there is none. Raises InputError for a damaged one."""
    path = folder / NAME
    try:
        body = json.loads(path.read_text("utf-8"))
        missing = [name for name in FIELDS if name not in body]
        wrong = [name for name in FIELDS if name not in missing]
        wrong = [name for name in wrong if not isinstance(body[name], FIELDS[name])]
    except FileNotFoundError:
        return None
    except NotADirectoryError:
        root = folder if folder.exists() else folder.parent
        raise InputError(f"{root} is a file, not a folder: choose another --logdir") from None
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is damaged ({reason}): {again(folder)}") from None
    if missing:
        raise InputError(f"{path} is damaged (it has no {missing[0]!r}): {again(folder)}")
    if wrong:
        raise InputError(f"{path} is damaged ({wrong[0]!r} is no value of it): {again(folder)}")
    if body.get("format", 0) > FORMAT:
        raise InputError(f"{path} was written by a newer version of this program: update it")
    return body


def again(folder: Path) -> str:
    """What to do about a stage that cannot be used."""
    return f"move {folder} away and run `python -m pipeline {folder.name}` again"


def check_outputs(folder: Path, body: Mapping[str, Any]) -> None:
    """Raises InputError where a file of a finished stage is missing or another one."""
    for name, expected in body["outputs"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path} is missing: put it back, or {again(folder)}")
        if file_hash(path) != expected:
            raise InputError(f"{path} is not what the stage wrote: put it back, or {again(folder)}")


def check_input(root: Path, name: str, asked_by: str, flat: Mapping[str, Any]) -> str:
    """The digest of stage ``name`` in ``root``, after all that it says of itself was checked.

    flat: the present config. Raises InputError.
    """
    folder = root / name
    body = read(folder)
    if body is None:
        state = "is not finished" if folder.is_dir() else "is not there"
        raise InputError(
            f"{asked_by} needs {name}, and {folder} {state}: run `python -m pipeline {name}` with"
            " the same --configs and --logdir"
        )
    if changed := differences(body["config"], flat):
        raise InputError(
            f"{folder} was made with another config ({changed}): give {asked_by} the keys that"
            f" {name} had, or choose another --logdir"
        )
    for other, digest in body["inputs"].items():
        below = read(root / other)
        if below is None or below["digest"] != digest:
            raise InputError(
                f"{folder} was made from another {other} than {root / other}: {again(folder)}"
            )
    check_outputs(folder, body)
    return body["digest"]
