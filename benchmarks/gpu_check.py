"""Whether the update is right and how fast it is on this machine's GPU: what is worth most comes
first.

    python benchmarks/gpu_check.py [--seconds 900] [--out runs/gpu_check] [--only WORD ...] [--dry]

One JSON line an item, a table at the end. It stops itself; what failed or was wrong is listed in
errors.txt of the folder --out, and the next item begins. --dry runs every item at debug sizes on
the CPU, where an update is not captured and compiled code is not generated.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import measure
import numpy as np
import torch
from equality import (
    IMAGE,
    Wrong,
    attention,
    captured,
    compiled_equals_eager,
    dream_attention,
    log_ndtr,
    make_agent,
    population_equals_alone,
    population_replays_equal_eager,
    replay_equals_eager,
    resume_equals_going_on,
    seeded,
)
from equality import (
    compiled as make_compiled,
)
from populations import going_on, recorded_acting, without_graphs
from tiles import tiles
from torch import Tensor

import models
import networks
from hidreamer import capture, cost, provenance

TINY = {"rssm": "tiny_dreamerv3", "hrssm": "tiny_hdreamer", "hrvq": "tiny_hidreamer"}


# ---------------------------------------------------------------- fast


def median_ms(fn: Callable[[], object], device: torch.device, repeats: int = 30) -> float:
    fn()
    times = measure.interleaved({"fn": fn}, repeats, device.type == "cuda")["fn"]
    return round(1000 * float(np.median([wall for _, wall in times])), 3)


def copies(device: torch.device) -> dict[str, Any]:
    """A batch of images to the device, from pageable and from pinned memory; device memory."""
    rows = np.zeros((16, 64, 64, 64, 3), np.uint8)
    pageable = torch.from_numpy(rows)
    pinned = pageable.pin_memory() if device.type == "cuda" else pageable
    big = torch.zeros(2**30 if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    other = torch.empty_like(big)
    ms = median_ms(lambda: other.copy_(big), device)
    return {
        "pageable_ms": median_ms(lambda: pageable.to(device, non_blocking=True), device, 10),
        "pinned_ms": median_ms(lambda: pinned.to(device, non_blocking=True), device, 10),
        "device_tb_s": round(2e-9 * big.numel() / ms, 3),
    }


def speed(
    presets: list[str],
    device: torch.device,
    compiled: bool = False,
    repeats: int = 30,
    kernels: Path | None = None,
    **over: Any,
) -> dict[str, Any]:
    """One update, a dream's step from every replayed state, a policy step in one environment.

    kernels: a file that gets the update's kernels by name, with how often and how long each ran.
    """
    torch._dynamo.reset()
    cuda = device.type == "cuda"
    agent, (batch,) = make_agent(presets, device, **over)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    step = (make_compiled if compiled else captured)(agent, seeded(agent))
    for _ in range(capture.WARMUP + 2):
        metrics = step(batch)
    out: dict[str, Any] = {"first_s": round(time.perf_counter() - start, 1)}
    out |= {"update_ms": median_ms(lambda: step(batch), device, repeats)}
    out |= {"peak_mb": round(cost.peak_mb(device)), "imagine_ms": dream_ms(agent, batch, repeats)}
    out |= {"policy_ms": policy_ms(agent, batch, repeats)}
    if cuda:
        found, names = profile(lambda: step(batch))
        out |= found
        if kernels:
            with kernels.open("a") as file:
                file.write(f"== {presets} compiled {compiled} {over}\n{names}\n")
    if not metrics.isfinite().all():
        raise Wrong(json.dumps(out | {"finite": False}))
    return out


def dream_ms(agent: models.Agent, batch: models.Batch, repeats: int) -> float:
    """Of one step."""
    with torch.no_grad(), agent.autocast():
        carry, post, _ = agent.world_model.observe(networks.preprocess(batch))
        start = agent.world_model.dynamics.starts(carry, post, 0)

    def dream(inputs: models.Batch) -> Tensor:
        with torch.no_grad(), agent.autocast():
            return agent.behavior.imagine(agent.world_model, start, inputs["terminal"]).x

    device = batch["reward"].device
    run = capture.Captured(dream) if device.type == "cuda" else dream
    ends = {"terminal": torch.zeros(batch["reward"].numel(), device=device)}
    for _ in range(capture.WARMUP + 1):
        run(ends)
    return round(median_ms(lambda: run(ends), device, repeats) / agent.config.imag.horizon, 3)


def policy_ms(agent: models.Agent, batch: models.Batch, repeats: int) -> float:
    """Until the action is on the host, recorded where there are graphs, as a run acts."""
    if batch["reward"].is_cuda:
        agent.captured_act = capture.CapturedAct(agent)
    obs = {key: batch[key][:1, 0] for key in (*IMAGE, "is_first")}
    state = agent.initial(1)
    for _ in range(20):  # until the memory's window is full
        state = agent.act(state, obs)

    def act() -> None:
        nonlocal state
        state = agent.act(state, obs)
        state.action.cpu()

    return median_ms(act, batch["reward"].device, repeats)


def profile(fn: Callable[[], object], count: int = 3) -> tuple[dict[str, Any], str]:
    """-> kernels of one call and how long they took together; a table of ``count`` calls."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        for _ in range(count):
            fn()
        torch.cuda.synchronize()
    events = seen.key_averages()
    ms = sum(event.self_device_time_total for event in events) / 1000 / count
    found = {"kernel_ms": round(ms, 3), "kernels": sum(event.count for event in events) // count}
    order = {"sort_by": "self_device_time_total", "row_limit": 60, "max_name_column_width": 90}
    return found, events.table(**order)


# ---------------------------------------------------------------- whole commands


def command(words: list[str], seconds: float) -> dict[str, Any]:
    """Raises Wrong, with the end of what it printed, where the command fails."""
    start = time.time()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(words, cwd=measure.ROOT, **pipes)
    try:
        text, how = process.communicate(timeout=max(10.0, seconds))[0], ""
    except subprocess.TimeoutExpired:
        process.kill()
        text, how = process.communicate()[0], " (out of time)"
    last = text.strip().splitlines()[-1:]
    if process.returncode:
        raise Wrong(f"exit status {process.returncode}{how}: {last}\n{text[-4000:]}")
    return {"wall_s": round(time.time() - start, 1), "last": last}


def members(out: Path, dry: bool, seconds: float) -> dict[str, Any]:
    """An update of P members beside one of a single run; then a short training of four seeds."""
    found, begun = out / "population.json", time.time()
    counts, steps = (["2"], "60") if dry else (["2", "4", "8", "16", "32"], "4000")
    config = ["--configs", "minatar", *(["debug"] if dry else [])]
    words = [sys.executable, "benchmarks/members.py", *config, "--members", *counts]
    command([*words, "--device", "cpu" if dry else "cuda", "--out", str(found)], seconds)
    words = [sys.executable, "dreamer.py", *config, "--seeds", "0", "1", "2", "3", "--steps", steps]
    words += ["--device", "cpu" if dry else "cuda", "--eval_episodes", "0", "--video", "false"]
    words += ["--logdir", str(out / "members")]
    report = command(words, seconds - (time.time() - begun))
    updates = json.loads(found.read_text())["updates"]
    return {f"P={count} ms": round(1000 * x["wall_s"], 2) for count, x in updates.items()} | report


def whole_runs(out: Path, dry: bool, seconds: float) -> dict[str, Any]:
    """The loop of 1 and of 16 seeds of Breakout by the clock; minutes of 50,000 frames, which
    follow from it.
    """
    found = out / "population_clock.json"
    words = [sys.executable, "benchmarks/population_clock.py", "--out", str(found)]
    words += ["--configs", "minatar", *(["debug"] if dry else [])]
    words += ["--members", *(["2"] if dry else ["16", "1"]), "--device", "cpu" if dry else "cuda"]
    command([*words, "--seconds", "1" if dry else "40"], seconds)
    lines: dict[str, Any] = {}
    for count, line in json.loads(found.read_text())["members"].items():
        lines |= {f"P={count} {key}": x for key, x in line.items()}
    return lines


def train(out: Path, dry: bool, seconds: float) -> dict[str, Any]:
    """The whole command; ratio 1024 on Pong."""
    logdir, size = out / "run", ["--configs", "atari100k", "tiny_dreamerv3"]
    length = ["--steps", "10000", "--log_every", "2000", "--replay.prefill", "1000"]
    if dry:
        size = ["--configs", "debug", "--task", "dummy_vector"]
        length = ["--steps", "60", "--log_every", "20", "--replay.ratio", "16"]
    device = "cpu" if dry else "cuda"
    words = [sys.executable, "dreamer.py", *size, *length, "--video", "false"]
    words += ["--device", device, "--eval_episodes", "0", "--logdir", str(logdir)]
    report = command(words, seconds)
    lines = [json.loads(line) for line in (logdir / "metrics.jsonl").read_text().splitlines()]
    rates = [line for line in lines if "perf/updates_per_s" in line]
    last = {key.removeprefix("perf/"): x for key, x in rates[-1].items() if key.startswith("perf/")}
    return {"wall_s": report["wall_s"]} | {key: round(x, 2) for key, x in last.items()}


def tests(dry: bool, seconds: float) -> dict[str, Any]:
    # Only files that have any: others may need packages that a device machine has not.
    files = [
        str(file)
        for file in sorted((measure.ROOT / "tests").glob("*.py"))
        if "mark.gpu" in file.read_text()
    ]
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    if importlib.util.find_spec("xdist"):  # most of a test is work of the host
        words += ["-n", str(max(1, (os.cpu_count() or 2) // 2))]
    return command([*words, "--collect-only"] if dry else words, seconds)


# ---------------------------------------------------------------- items


class Item(NamedTuple):
    name: str
    needs: float  # seconds that must be left to begin it
    run: Callable[[], dict[str, Any]]


def items(device: torch.device, out: Path, dry: bool, left: Callable[[], float]) -> Iterator[Item]:
    """In the order of worth."""
    presets = {kind: ["debug"] if dry else [preset] for kind, preset in TINY.items()}
    shape: dict[str, Any] = {"repeats": 2} if dry else {"kernels": out / "kernels.txt"}

    def timed(
        name: str, needs: float, words: list[str], compiled: bool = False, **over: Any
    ) -> Item:
        run = functools.partial(speed, words, device, compiled, **over, **shape)
        return Item(name, needs, run)

    equal = functools.partial(functools.partial, replay_equals_eager, device)
    for kind in TINY:
        yield Item(f"replay = eager, {kind}", 10, equal(**{"dynamics.type": kind}))
    yield Item("log_ndtr", 5, lambda: log_ndtr(device))
    yield Item("attention in bfloat16", 5, lambda: attention(device))
    yield Item("attention of dreams", 5, lambda: dream_attention(device))
    yield Item("replay = eager, continuous", 10, equal(act="continuous"))
    hrvq = {"dynamics.type": "hrvq"}
    yield Item("replay = eager, hrvq bfloat16", 10, equal(precision="bfloat16", **hrvq))
    yield Item(
        "replay = eager, hrvq nearest", 10, equal(**hrvq, **{"dynamics.hrvq.posterior": "nearest"})
    )
    yield Item("replay = eager, plan2explore", 10, equal(**{"expl.behavior": "plan2explore"}))
    resume = functools.partial(resume_equals_going_on, device)
    yield Item("resumed = not interrupted", 10, resume)
    yield Item("copies", 3, lambda: copies(device))
    for precision in ("float32", "tf32", "bfloat16"):
        for kind, words in presets.items():
            over = {"precision": precision, "dynamics.type": kind}
            yield timed(f"captured {precision}, {TINY[kind]}", 15, words, **over)
    for kind in TINY:
        run = functools.partial(compiled_equals_eager, device, **{"dynamics.type": kind})
        yield Item(f"compiled = eager, {kind}", 60, run)
    for kind, words in presets.items():
        over = {"precision": "tf32", "dynamics.type": kind}
        yield timed(f"compiled tf32, {TINY[kind]}", 60, words, True, **over)
    words = ["debug"] if dry else ["hidreamer"]
    for precision in ("bfloat16", "tf32"):
        yield timed(f"captured {precision}, hidreamer", 20, words, precision=precision, **hrvq)
    yield timed("compiled tf32, hidreamer", 60, words, True, precision="tf32", **hrvq)
    yield Item("tiles", 60, lambda: tiles(device, dry))
    memories = {"": {}, " stacked": {"dynamics.hrvq.memory": "stacked"}}
    memories |= {" gru": {"dynamics.hrvq.memory": "gru"}}
    for name, over in memories.items():
        over = {"precision": "float32"} | hrvq | over
        run = functools.partial(population_equals_alone, device, **over)
        yield Item(f"population = members alone, hrvq{name}", 15, run)
    for kind in TINY:
        run = functools.partial(recorded_acting, device, **{"dynamics.type": kind})
        yield Item(f"population's acting = eager, {kind}", 10, run)
    over = hrvq | {"precision": "bfloat16"}
    run = functools.partial(population_replays_equal_eager, device, **over)
    yield Item("population's replays = eager, hrvq bfloat16", 15, run)
    run = functools.partial(without_graphs, device, **{"dynamics.type": "hrssm"})
    yield Item("population without graphs", 10, run)
    yield Item("population without a member", 15, lambda: going_on(device))
    yield Item("whole runs of a population", 200, lambda: whole_runs(out, dry, left()))
    yield Item("population", 120, lambda: members(out, dry, left()))
    yield Item("training", 60, lambda: train(out, dry, left()))
    yield Item("pytest -m gpu", 40, lambda: tests(dry, left()))


def attempt(item: Item, out: Path) -> dict[str, Any]:
    """-> its line; a failure is one as well, and written to errors.txt in full."""
    start = time.time()
    try:
        found = item.run()
    except Exception as error:  # of compilers and drivers: whatever it is, the next item begins
        what = "wrong" if isinstance(error, Wrong) else "failed"
        found = {what: f"{type(error).__name__}: {error}".splitlines()[0][:400]}
        with (out / "errors.txt").open("a") as file:
            file.write(f"== {item.name}\n{traceback.format_exc()}\n")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {"item": item.name, "s": round(time.time() - start, 1), **found}


def table(lines: list[dict[str, Any]]) -> str:
    """The lines as text to send."""
    width = max(len(line["item"]) for line in lines)
    text = []
    for line in lines:
        rest = {key: x for key, x in line.items() if key not in ("item", "s")}
        words = "  ".join(f"{key} {x}" for key, x in rest.items())
        text.append(f"{line['item']:<{width}}  {line.get('s', 0.0):6.1f} s  {words}")
    return "\n".join(text)


def main(argv: list[str]) -> int:
    """-> exit status: 0 all that ran is right, 1 something is not, 2 bad arguments or no GPU."""
    parser = measure.argument_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=900.0)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--only", nargs="+", default=[""], help="items with such a name")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        print("error: torch finds no CUDA device; --dry runs it on the CPU", file=sys.stderr)
        return 2
    end = time.time() + args.seconds
    out, device = args.out.resolve(), torch.device("cpu" if args.dry else "cuda")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("errors.txt", "lines.jsonl", "kernels.txt"):
        (out / name).unlink(missing_ok=True)
    if args.dry:
        torch.compile = functools.partial(torch.compile, backend="eager")
    lines = [{"item": "machine", **provenance.provenance(), "python": sys.version.split()[0]}]
    lines[0] |= {"numpy": np.__version__, "cuda": torch.version.cuda}
    with (out / "lines.jsonl").open("w") as file:

        def tell(line: dict[str, Any]) -> None:
            print(json.dumps(line), flush=True)
            file.write(json.dumps(line) + "\n")
            file.flush()

        tell(lines[0])
        for item in items(device, out, args.dry, lambda: end - time.time()):
            if not any(word in item.name for word in args.only):
                continue
            late = not args.dry and time.time() + item.needs > end
            lines.append({"item": item.name, "skipped": "time"} if late else attempt(item, out))
            tell(lines[-1])
    print("\n" + table(lines))
    bad = sum("failed" in line or "wrong" in line for line in lines)
    print(
        f"{bad} of {len(lines) - 1} items are wrong: {out / 'errors.txt'}" if bad else "all right"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
