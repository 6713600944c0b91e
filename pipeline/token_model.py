"""The online agent's world model, on frozen tokens: hrvq's sequence model, reward, continue.

Shapes: B sequences, T steps, L levels, E numbers of an embedding and of a code, A action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import models
import networks
from hidreamer.dynamics.base import KLConfig, Post
from hidreamer.dynamics.hrvq import HRVQ
from hidreamer.objectives import Continue, Reward, nll
from hidreamer.quantizer import HARD_LOGIT, Codes, Quantizer, onehots
from hidreamer.replay import Addresses, Replay, Rows
from pipeline import tokenizer
from pipeline.data import Recording
from tools import Config, ConfigError

# Settings of ``dynamics.hrvq`` that tokens decide, or that mean nothing without a decoder.
OWN = ("groups", "code_dim", "commitment", "level_dropout", "spatial")
# Keys of dreamer.py with the one value that the stages are made for. The agent that is trained
# online beside theirs would have others.
FIXED: dict[str, Any] = {"optim": "separate", "critic.replay_loss": 0.0}
FIXED |= {"replay.write_back": False}
FIXED |= {"dynamics.hrvq.memory": "interleaved", "dynamics.hrvq.posterior_sees": "frame"}
FIXED |= {"dynamics.hrvq.memory_reads": "all", "dynamics.hrvq.residual": "drawn"}
LEARNED = ("decoder", "reward", "cont")  # of ``model.losses``


def check_config(config: Config) -> None:
    """Raises ConfigError for what the pipeline has not."""
    fixed = FIXED | {f"model.losses.{x}": 0.0 for x in config.model.losses if x not in LEARNED}
    flat = config.flat()
    for key, value in fixed.items():
        if flat[key] != value:
            shown = str(value).lower()
            raise ConfigError(
                f"{key} is {flat[key]}, and the pipeline has {shown} alone: add --{key} {shown}"
            )


class TokenDynamics(HRVQ):
    """hrvq whose codes are those of a quantiser that was trained before: one group a level."""

    def __init__(self, quantizer: Quantizer, act_dim: int, config: Config, mask: str = ""):
        block, dim = config.dynamics, quantizer.book.shape[-1] if quantizer.kind != "fsq" else 0
        dim = dim or quantizer.up[0].out_features
        settings = {key: x for key, x in block.hrvq.items() if key not in OWN}
        settings |= {"mask": mask} if mask else {}
        settings |= {"levels": quantizer.levels, "codes": quantizer.codes}
        super().__init__(
            dim,
            act_dim,
            KLConfig(block.dyn, 0.0, 0.0, block.unimix),
            deter=block.deter,
            hidden=block.hidden,
            groups=1,
            code_dim=dim,
            commitment=[0.0],
            level_dropout=0.0,
            spatial=False,
            **settings,
        )
        del self.in_proj  # embeddings are quantised as they are
        self.quantizer = quantizer.requires_grad_(False)
        for layer in self.transformer.layers:
            layer.dropout = config.pipeline.world_model.dropout

    def _project(self, embed: Tensor) -> Tensor:
        return (math.sqrt(embed.shape[-1]) * embed).unflatten(-1, self.code_shape)

    def update_codebook(self, post: Post, generator: torch.Generator | None = None) -> None:
        """Codebooks are as the tokenizer left them."""

    def lookup(self, index: Tensor) -> Codes:
        """Stored tokens (..., L) as the codes that ``encode`` had found."""
        index = index.unsqueeze(-1)  # (..., L, 1)
        codes, logits = [], []
        for level in range(self.levels):
            onehot = onehots(index[..., level, :], self.quantizer.codes, self.bos_token.dtype)
            codes.append(self.quantizer.decode(level, onehot).detach())  # (..., 1, E)
            logits.append(HARD_LOGIT * onehot)
        code = torch.stack(codes, -3)
        return Codes(code, index, tuple(logits), code)

    def tokens(self, stoch: Tensor) -> Tensor:
        """The tokens (..., L) that features (..., Z) hold."""
        codes = self._codes(stoch).unflatten(-1, self.code_shape)  # (..., L, 1, E)
        return self.quantizer.index(codes).squeeze(-1)

    def embedding(self, stoch: Tensor) -> Tensor:
        """What features (..., Z) say that the embedding was, (..., E), of length about 1."""
        return stoch.unflatten(-1, (self.levels, -1)).sum(-2)


class StackCarry(NamedTuple):
    """What acting carries: the images before the next one, and the dynamics' carry."""

    images: Tensor  # (B, stack - 1, H, W, C) oldest first
    carry: Any


class TokenWorldModel(models.WorldModel):
    """``models.WorldModel`` without a decoder, whose encoder is frozen and sees stacks of images.

    Observations are images (B,T,H,W,C), or, where they are known already, tokens ("index",
    (B,T,L)).
    """

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: Quantizer,
        act_dim: int,
        config: Config,
        mask: str = "",
    ):
        nn.Module.__init__(self)
        self.encoder, self.stack = encoder.requires_grad_(False), config.pipeline.stack
        try:
            self.dynamics = TokenDynamics(quantizer, act_dim, config, mask)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self.feat_dim = self.dynamics.feat_dim
        self.reward = networks.make_head("twohot", self.feat_dim, **config.reward)
        self.cont = networks.make_continue_head(self.feat_dim, config)
        self.objectives = {"reward": Reward(self.reward, nll), "cont": Continue(self.cont, nll)}
        self.scales = {name: config.model.losses[name] for name in self.objectives}
        self.harmony, self.probed = None, False

    def observe(
        self,
        obs: Mapping[str, Tensor],
        carry: Any = None,
        sample: bool = True,
        generator: torch.Generator | None = None,
    ) -> tuple[Any, Post, Tensor]:
        """As of ``models.WorldModel``; what it returns as embed is the codes' sum (B,T,E)."""
        is_first = obs["is_first"].bool()
        dynamics = self.dynamics
        if "index" in obs:
            codes = dynamics.lookup(obs["index"].long())
            carry = dynamics.initial(len(is_first)) if carry is None else carry
            carry, post = dynamics.follow(carry, codes, obs["prev_action"], is_first)
        else:
            images = obs["image"] + 0.5  # (B, T, H, W, C) in [0, 1]
            inner = carry.carry if isinstance(carry, StackCarry) else carry
            inner = dynamics.initial(len(is_first)) if inner is None else inner
            before = images[:, :1].expand(-1, self.stack - 1, *images.shape[2:])
            before = carry.images if isinstance(carry, StackCarry) else before
            stacks, before = stacked(before, images, is_first)
            # Without autocast, as in the tokenizer stage: rounded to 7 bits, many frames would get
            # other codes than those that the dynamics learned from.
            with torch.autocast(images.device.type, enabled=False):
                embed = self.encoder(stacks.flatten(0, 1)).unflatten(0, is_first.shape)  # (B, T, E)
                index = dynamics.encode(embed, sample=False).index[..., 0]  # (B, T, L)
            codes = dynamics.lookup(index)
            inner, post = dynamics.follow(inner, codes, obs["prev_action"], is_first)
            carry = StackCarry(before, inner)
        return carry, post, dynamics.embedding(post.feat.stoch)


def stacked(before: Tensor, images: Tensor, is_first: Tensor) -> tuple[Tensor, Tensor]:
    """Stacks (B, T, stack * C, H, W) of images (B,T,H,W,C), as ``Recording.stacks`` has them, and
    the images (B, stack - 1, H, W, C) that the next ones need.

    before: the images that came before. An episode's start replaces them by itself.
    """
    history, length = before.shape[1], images.shape[1]
    every = torch.cat([before, images], 1)  # (B, history + T, ...)
    time = torch.arange(length, device=images.device)
    start = torch.where(is_first, time, -history).cummax(1).values  # (B, T) of each step's episode
    ago = torch.arange(-history, 1, device=images.device)  # oldest first
    index = torch.maximum(time[:, None] + ago, start.unsqueeze(-1)) + history  # (B, T, stack)
    rows = torch.arange(len(images), device=images.device)[:, None, None]
    found = every[rows, index]  # (B, T, stack, H, W, C)
    stacks = found.permute(0, 1, 2, 5, 3, 4).flatten(2, 3)
    return stacks, found[:, -1, 1:]


# ---------------------------------------------------------------- batches of tokens


class Actions:
    """Action vectors of all games together.

    token: every game has columns of its own, so that an action says which game it is of;
    otherwise games share them, and action 2 of Pong is action 2 of Breakout.
    """

    def __init__(self, widths: list[int], token: bool):
        offsets = np.cumsum([0, *widths[:-1]]) if token else np.zeros(len(widths), int)
        self.columns = [slice(int(a), int(a) + n) for a, n in zip(offsets, widths, strict=True)]
        self.width = max(columns.stop for columns in self.columns)

    def widen(self, action: np.ndarray, game: int) -> np.ndarray:
        """A game's own (N, n) -> (N, A)."""
        out = np.zeros((len(action), self.width), np.float32)
        out[:, self.columns[game]] = action
        return out


def token_rows(
    recording: Recording, tokens: np.ndarray, actions: Actions | None, game: int = 0
) -> Rows:
    """A game's rows for a replay of tokens (N, L); actions None: its own action vectors."""
    action = recording.action if actions is None else actions.widen(recording.action, game)
    rows = {"index": tokens.astype(np.int32), "prev_action": action, "reward": recording.reward}
    flags = ("is_first", "is_last", "is_terminal")
    return rows | {key: getattr(recording, key) for key in flags}


def window_starts(recording: Recording, length: int, held: bool) -> np.ndarray:
    """``Recording.windows``. Raises ConfigError where there is none."""
    starts = recording.windows(length, held)
    if not len(starts):
        raise too_short(recording, length, held)
    return starts


def too_short(recording: Recording, length: int, held: bool) -> ConfigError:
    return ConfigError(
        f"no {'held-out ' if held else ''}episode of {recording.game} has {length}"
        " steps: collect longer ones (env.time_limit), or lower the length"
    )


class Windows:
    """Windows of ``length`` rows of one side of the split, of several games.

    To train on: of a game's episodes one after another, across their ends, as the online agent's
    replay has them; within episodes an end would be in one of all windows and any other row in
    ``length``. ``held``, to judge: within one episode each. The rows lie in the online agent's
    replay, a stream a game; ``balance`` draws as many of each game. generator: on the CPU, torch's
    global one without it. Raises ConfigError where a game has none.
    """

    def __init__(
        self,
        recordings: list[Recording],
        rows: list[Rows],
        batch: int,
        length: int,
        balance: bool,
        held: bool = False,
        generator: torch.Generator | None = None,
    ):
        spec = {key: (x.shape[1:], x.dtype) for key, x in rows[0].items()}
        total = max(len(part["reward"]) for part in rows) * len(rows)
        sizes = {"capacity": total, "batch": batch, "length": length, "streams": len(rows)}
        self.replay = Replay(spec, **sizes, rng=np.random.default_rng(0))
        self.starts, self.balance, self.generator = [], balance, generator
        for recording, part, stream in zip(recordings, rows, self.replay.streams, strict=True):
            if held:
                stream.extend(part)
                self.starts.append(window_starts(recording, length, held))
                continue
            kept = recording.rows(held=False)
            if len(kept) < length:
                raise too_short(recording, length, held)
            stream.extend({key: x[kept] for key, x in part.items()})
            self.starts.append(np.arange(len(kept) - length + 1))
        self.counts = np.array([len(starts) for starts in self.starts])

    def draw(self) -> Addresses:
        """B windows."""
        batch, games, generator = self.replay.batch, len(self.starts), self.generator
        if self.balance:  # by turns, beginning anywhere, so that remainders are nobody's
            game = (torch.arange(batch) + torch.randint(games, (), generator=generator)).numpy()
            game %= games
        else:
            share = torch.from_numpy(self.counts / self.counts.sum())
            game = torch.multinomial(share, batch, replacement=True, generator=generator).numpy()
        uniform = torch.rand(batch, dtype=torch.float64, generator=generator).numpy()
        picks = (uniform * self.counts[game]).astype(int)
        row = np.array([self.starts[g][i] for g, i in zip(game, picks, strict=True)])
        return Addresses(game, row)

    def sample(self) -> Rows:
        """{key: (B, T, ...)}, each window's first step marked ``is_first``."""
        return self.read(self.draw())

    def read(self, where: Addresses) -> Rows:
        rows = self.replay.read(where)
        del rows["is_last"]
        return rows

    def tails(self, game: int) -> Addresses:
        """Of ``held`` ones the last of each episode."""
        starts = self.starts[game]
        last = starts[np.append(np.diff(starts) > 1, True)]
        return Addresses(np.full(len(last), game), last)

    def apart(self, game: int) -> Addresses:
        """Windows of a game that share no row."""
        starts, length, chosen, after = self.starts[game], self.replay.length, [], -1
        for start in starts:
            if start > after:
                chosen.append(int(start))
                after = start + length - 1
        return Addresses(np.full(len(chosen), game), np.array(chosen))


def tensors(rows: Rows, device: torch.device) -> dict[str, Tensor]:
    """As the networks take them: floats, on the device."""
    moved = {key: torch.from_numpy(np.ascontiguousarray(x)).to(device) for key, x in rows.items()}
    return networks.preprocess(moved)


def load_all_tokens(root: Any, recordings: list[Recording]) -> list[np.ndarray]:
    """(N, L) of every game. Raises InputError."""
    return [tokenizer.load_tokens(root, recording) for recording in recordings]
