"""Episodes and pictures of an agent as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Frames = list[np.ndarray]  # (H,W,3) uint8 each
LONGEST = 1000  # frames of a video


def play(
    agent: Any, envs: Any, episodes: int, mode: str, video: bool, levels: bool, pause: Callable[[], None]
) -> tuple[list[float], list[int], dict[str, Frames]]:
    """-> returns, lengths, videos of the first episode. ``pause`` is called before every step and may raise.

    Each environment plays its share: taking whoever finishes first would favour short episodes.
    """
    count = envs.count
    quota = np.array([episodes // count + (i < episodes % count) for i in range(count)])
    returns, lengths, action = [], [], None
    videos: dict[str, Frames] = {"agent": [], "levels": []}
    state, score, length = agent.initial(count), np.zeros(count), np.zeros(count, int)
    while quota.any():
        pause()
        obs = envs.step(action)
        score, length = score * ~obs["is_first"] + obs["reward"], (length + 1) * ~obs["is_first"]
        inputs = agent.tensors({key: obs[key] for key in (*envs.obs_space, "is_first")})
        state = agent.act(state, inputs, mode)
        action = state.action.cpu().numpy()
        if video and len(videos["agent"]) < LONGEST and not returns:
            videos["agent"].append(envs.render(0))
            if levels:
                videos["levels"] += list(board(agent.levels(inputs, state)))
        for i in np.flatnonzero(obs["is_last"] & (quota > 0)):
            returns.append(float(score[i])), lengths.append(int(length[i]))
            quota[i] -= 1
    return returns, lengths, videos


def open_loop(agent: Any, batch: Mapping[str, np.ndarray], levels: bool, context: int = 5) -> np.ndarray:
    """(T,H,W,3) truth, model and error above each other for six sequences, open loop after ``context`` steps."""
    batch = {key: x[:6] for key, x in batch.items() if key != "is_last"}
    if batch["reward"].shape[1] <= context:
        return np.zeros(0)
    return board(agent.world_model.open_loop(agent.tensors(batch), context, levels), error=True)


def board(rows: list[dict[str, torch.Tensor]], error: bool = False) -> np.ndarray:
    """Frames (T,H,W,3) of every image or grid among ``rows`` of (B,T,...) tensors; (0,) if there is none."""
    boards = [picture([row[key] for row in rows], error) for key in rows[0] if rows[0][key].ndim == 5]
    return np.concatenate(boards, 2) if boards else np.zeros(0)


def picture(rows: list[torch.Tensor], error: bool) -> np.ndarray:
    """Images or grids (B,T,H,W,C) in [0, 1], truth first -> frames (T, H rows, B W, 3) uint8, one above the other.

    With ``error`` the difference of the second and the first comes third.
    """
    if error:
        rows = [*rows[:2], (rows[1] - rows[0] + 1.0) / 2.0, *rows[2:]]
    x = torch.cat(rows, 2).cpu()  # (B, T, H rows, W, C)
    channels = x.shape[-1]
    if channels == 1:
        x = x.expand(*x.shape[:-1], 3)
    elif channels != 3:  # planes of a board, each in a colour of its own
        hue = torch.arange(channels).unsqueeze(1) * (2.0 * torch.pi / channels) + torch.tensor([0.0, 2.1, 4.2])
        x = x @ (0.5 + 0.5 * torch.cos(hue))
    scale = max(1, 128 // x.shape[3])
    frames = x.permute(1, 2, 0, 3, 4).flatten(2, 3).clamp(0.0, 1.0)  # (T, H rows, B W, 3)
    frames = frames.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return (255.0 * frames).round().byte().numpy()
