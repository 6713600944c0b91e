"""The animation at the top of the README: a real game, and beside it a dream of it, level by level.

    python benchmarks/dream_picture.py LOGDIR [--out docs/dream.gif] [--seed S]

The agent sees CONTEXT steps of a new episode (frames with a white edge); from then on the model
imagines under the actions that were really taken, and never sees the game again until the next
part begins. The columns are the game, and the same state decoded from more and more of its levels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import imageio.v3 as iio
import numpy as np
import torch
from measure import argument_parser

import hidreamer
from hidreamer.dynamics.base import Feat
from library.pictures import picture, raw_picture

CONTEXT, HORIZON, PARTS = 5, 15, 3
TRIES = 50  # episodes, until one is long enough
HEAD, GAP = 22, 6  # pixels
BACK, EDGE = 24, 235


def caption(frame: np.ndarray, text: str, edge: bool) -> np.ndarray:
    """(H,W,3) with ``text`` above it, and a light edge around it if the model sees the game."""
    out = np.full((frame.shape[0] + HEAD, frame.shape[1], 3), BACK, np.uint8)
    out[HEAD:] = frame
    if edge:
        cv2.rectangle(out, (0, HEAD), (out.shape[1] - 1, out.shape[0] - 1), (EDGE,) * 3, 1)
    cv2.putText(out, text, (3, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.36, (EDGE,) * 3, 1, cv2.LINE_AA)
    return out


def beside(frames: list[np.ndarray]) -> np.ndarray:
    gap = np.full((frames[0].shape[0], GAP, 3), BACK, np.uint8)
    parts = [part for frame in frames for part in (frame, gap)]
    return np.concatenate(parts[:-1], axis=1)


@torch.no_grad()
def part(agent, episode: dict[str, np.ndarray], first: int) -> list[np.ndarray]:
    """Frames of the steps from ``first`` on: CONTEXT of them seen, HORIZON dreamt."""
    seen = {key: x[: first + CONTEXT] for key, x in episode.items()}
    latents = agent.encode(seen)
    actions = episode["prev_action"][first + CONTEXT : first + CONTEXT + HORIZON]
    dream = agent.dream(latents, actions, HORIZON, sample=False)
    # (CONTEXT + HORIZON, .): what was seen, then the dream without the state that it began at
    parts = zip(latents.feat, dream.feat, strict=True)
    states = Feat(*(torch.cat([a[-CONTEXT:], b[0, 1:]]) for a, b in parts))
    decoded = agent.decode(states, levels=True)
    names = {name: "all levels" if name == "all" else f"{name} alone" for name in decoded}
    found = []
    for i in range(CONTEXT + HORIZON):
        raw = {key: episode[key][first + i] for key in agent.obs_space}
        what = "the model sees" if i < CONTEXT else f"dreams, step {i - CONTEXT + 1}"
        columns = [caption(raw_picture(raw, agent.obs_space), "real game", i < CONTEXT)]
        for name, obs in decoded.items():
            text = f"{names[name]}" if name != "all" else what
            frame = picture({key: x[i] for key, x in obs.items()})
            columns.append(caption(frame, text, i < CONTEXT))
        found.append(beside(columns))
    return found


def main() -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("logdir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/dream.gif"))
    parser.add_argument("--seed", type=int, default=0, help="of the episode, which is not chosen")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    agent = hidreamer.load(args.logdir, device="cpu")
    steps, seed, movie = PARTS * (CONTEXT + HORIZON), args.seed, []
    episode = agent.collect(seed=seed, steps=steps)
    while len(episode["is_first"]) < steps and seed < args.seed + TRIES:  # it ended too early
        seed += 1
        episode = agent.collect(seed=seed, steps=steps)
    for i in range(PARTS):
        movie += part(agent, episode, i * (CONTEXT + HORIZON))
    iio.imwrite(args.out, np.stack(movie), extension=".gif", duration=350, loop=0)
    facts = agent.facts
    print(
        f"{args.out}: {facts['task']} after {facts['step']:,} frames, episode {seed}, "
        f"{args.out.stat().st_size / 1e3:.0f} kB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
