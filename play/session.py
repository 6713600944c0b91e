"""What the page shows and does, without the page: an agent, its real environment and its dream.

Shapes: A action, B = N = 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs import EnvError
from envs.base import one_line
from hidreamer import distributions as dists
from hidreamer.dynamics.base import Feat, Post
from library.agent import LoadedAgent
from library.pictures import picture, raw_picture
from models import ActState
from play.controls import Controls

BACK = 200  # moments that can be stepped back
AHEAD = 15  # steps that the imagined frame runs ahead of the real one, and of a "what if"

Picture = np.ndarray  # (H,W,3) uint8


class Moment(NamedTuple):
    """All that a step changes; nothing in it is ever mutated."""

    dreaming: bool
    obs: dict[str, Any]  # of the real environment
    acting: ActState  # the policy's memory after ``obs``, and the action that led to it
    post: Post  # what it found there, (1,1,...)
    env_state: dict[str, Any] | None  # None where the environment cannot be put back
    imagined: Any  # carry: of the dream; in the real environment, of what was foreseen
    ahead: int  # imagined steps since the last real one that it knew
    reward: float  # of the last step; predicted in a dream
    total: float  # rewards of this episode, or since the dream began
    step: int  # of the episode, or of the dream
    over: bool  # whether the next step begins anew
    action: str  # the name of the last one


class Level(NamedTuple):
    """One level's uncertainty, in nats."""

    name: str
    prior: float
    post: float | None  # a dream has none
    most: float  # of a uniform distribution


class View(NamedTuple):
    """What a moment looks like."""

    pictures: dict[str, tuple[str, Picture]]  # {id: (title, picture)}
    numbers: dict[str, float]  # reward, predicted_reward, value, cont, total, step
    levels: list[Level]


class Session:
    """One agent in its environment, or in its dream.

    seed: of the environment and of all random numbers here, so that it fixes what is shown;
    without one the environment has the run's. hand: whether keys act instead of the agent. held:
    those that are down. message: the last thing to tell the user. note: what is true all the time.
    Raises EnvError where the environment cannot be built.
    """

    def __init__(self, agent: LoadedAgent, seed: int | None = None):
        self.agent, self.hand, self.held, self.message, self.note = agent, False, set(), "", ""
        self.failures = 0  # of the environment
        if not any(agent.world_model.decoder.kinds.values()):
            self._remark("it has no decoder to draw its states: train with --decoder.probe true")
        self.env = agent.real_env(seed)
        self.controls = Controls(self.env)
        # Of what happens, and of what is only looked at, which changes nothing of that.
        self.generator, self.drawing = (torch.Generator(agent.device) for _ in range(2))
        for generator in (self.generator, self.drawing):
            generator.seed() if seed is None else generator.manual_seed(seed)
        self.policy = agent.make_policy(generator=self.generator)
        self.past: deque[Moment] = deque(maxlen=BACK)
        self.drawable = True
        self.now = self._begin()

    def _remark(self, text: str) -> None:
        self.message, self.note = text, f"{self.note}. {text}" if self.note else text

    # ------------------------------------------------------------ moving

    def step(self) -> None:
        """One step of whatever is going on. What breaks becomes the message."""
        self._try(self._next)

    def reset(self) -> None:
        """A new episode, or the dream again from where the real environment stands."""
        self._try(self._start_dream if self.now.dreaming else self._begin)

    def _next(self) -> Moment:
        if self.now.over:
            return self._start_dream() if self.now.dreaming else self._begin()
        vector = self.controls.vector(self.held) if self.hand else self._choose()
        return self._dream_step(vector) if self.now.dreaming else self._act(vector)

    def _try(self, move: Callable[[], Moment]) -> None:
        try:
            self._go(move())
        except Exception as error:  # an environment may raise anything
            self.message = f"the environment failed: {one_line(error)}"
            self.failures += 1
            self._go(self.now._replace(over=True))

    def switch(self) -> None:
        """From the real environment into a dream that begins there, or back."""
        self._go(self._leave_dream() if self.now.dreaming else self._start_dream())

    def back(self) -> None:
        """One step back; not where an environment cannot be put back."""
        if not self.past:
            self.message = "there is no earlier step"
            return
        before = self.past[-1]
        same = before.acting is self.now.acting  # only the dream moved
        if not same and before.env_state is None:
            self.message = "this environment cannot be put back: only dreams can"
            return
        if not same:
            self.env.set_state(before.env_state)
            self.policy.state, self.policy.post = before.acting, before.post
        self.now = self.past.pop()

    def _go(self, moment: Moment) -> None:
        self.past.append(self.now)
        self.now = moment

    def _choose(self) -> np.ndarray:
        """The policy's action (A,) in the state that is shown."""
        mode = "greedy" if self.policy.greedy else "train"
        return self.agent.model.choose(self.feat(), mode, self.generator)[0].cpu().numpy()

    def _begin(self) -> Moment:
        """An episode of the real environment."""
        obs = self.env.reset()
        self.policy.reset()
        self.policy.see(obs)
        return self._real(obs, None, 0, 0.0, 0, "")

    def _act(self, vector: np.ndarray) -> Moment:
        """An action in the real environment, and in what was imagined beside it."""
        self.policy.act(vector)
        obs = self.env.step(vector)
        now = self.now
        carry = now.imagined if now.ahead < AHEAD else now.acting.carry
        ahead = now.ahead if now.ahead < AHEAD else 0
        imagined = self._imagine(carry, vector)
        self.policy.see(obs)
        total = now.total + float(obs["reward"])
        name = self.controls.name(vector)
        return self._real(obs, imagined, ahead + 1, total, now.step + 1, name)

    def _real(
        self, obs: dict, imagined: Any, ahead: int, total: float, step: int, action: str
    ) -> Moment:
        acting, post = self.policy.state, self.policy.post
        carry = acting.carry if imagined is None else imagined
        numbers = (float(obs["reward"]), total, step, bool(obs["is_last"]), action)
        return Moment(False, obs, acting, post, self.env.get_state(), carry, ahead, *numbers)

    def _start_dream(self) -> Moment:
        now = self.now
        fresh = {"imagined": now.acting.carry, "ahead": 0, "reward": 0.0, "total": 0.0}
        return now._replace(dreaming=True, **fresh, step=0, over=False, action="")

    def _leave_dream(self) -> Moment:
        """Where the real environment stood."""
        for before in reversed(self.past):
            if not before.dreaming and before.acting is self.now.acting:
                return before
        obs, acting = self.now.obs, self.now.acting  # it was too long ago to know the total
        fresh = {"imagined": acting.carry, "ahead": 0, "reward": float(obs["reward"])}
        return self.now._replace(
            dreaming=False, **fresh, total=0.0, step=0, over=bool(obs["is_last"]), action=""
        )

    def _dream_step(self, vector: np.ndarray) -> Moment:
        now = self.now
        carry = self._imagine(now.imagined, vector)
        reward, cont, _ = self.agent.heads(self.agent.dynamics.feat(carry))
        ahead, reward = now.ahead + 1, float(reward[0])
        moved = {"imagined": carry, "ahead": ahead, "reward": reward, "step": now.step + 1}
        over, name = float(cont[0]) < 0.5, self.controls.name(vector)
        return now._replace(**moved, total=now.total + reward, over=over, action=name)

    @torch.no_grad()
    def _imagine(self, carry: Any, vector: np.ndarray) -> Any:
        action = torch.from_numpy(vector).to(self.agent.device).view(1, 1, -1)
        with self.agent.model.autocast():
            return self.agent.dynamics.imagine(carry, action, 1, generator=self.generator)[0]

    # ------------------------------------------------------------ looking

    def feat(self) -> Feat:
        """The state that is shown, (1,.)."""
        carry = self.now.imagined if self.now.dreaming else self.now.acting.carry
        return self.agent.dynamics.feat(carry).map(Tensor.float)

    def view(self) -> View:
        """What the page shows now: pictures, numbers, and each level's distributions."""
        now, feat = self.now, self.feat()
        decoded = self.agent.decode(feat, levels=True, generator=self.drawing)
        pictures = {"real": ("real, paused" if now.dreaming else "real", self._real_picture())}
        keys = self.agent.world_model.encoder.observed
        pictures["seen"] = ("what the agent sees", raw_picture(now.obs, keys))
        if now.dreaming:
            imagined, title = decoded["all"], f"dream, step {now.step}"
        else:
            carry = self.agent.dynamics.feat(now.imagined).map(Tensor.float)
            imagined = self.agent.decode(carry)["all"]
            ago = f"{now.ahead} step{'s' * (now.ahead != 1)} ago"
            title = f"imagined from {ago}" if now.ahead else "imagined"
        pictures["imagined"] = (title, self._draw(imagined))
        for name, obs in decoded.items():
            title = name if "+" in name else f"{name} alone"
            title = "all levels" if name == "all" else title
            pictures[f"level {name}"] = (title, self._draw(obs))
        reward, cont, value = (float(x[0]) for x in self.agent.heads(feat))
        numbers = {"reward": now.reward, "predicted_reward": reward, "value": value, "cont": cont}
        return View(pictures, numbers | {"total": now.total, "step": now.step}, self._levels())

    def _draw(self, obs: dict[str, Tensor]) -> Picture:
        return picture({key: x[0] for key, x in obs.items()})

    def _real_picture(self) -> Picture:
        """What the environment draws; the observation where it cannot."""
        if self.drawable:
            try:
                return self.env.render()
            except EnvError as error:
                self.drawable = False
                self._remark(str(error).split(";")[0])
        return raw_picture(self.now.obs, self.agent.obs_space)

    @torch.no_grad()
    def _levels(self) -> list[Level]:
        now, dynamics = self.now, self.agent.dynamics
        unimix = dynamics.kl_config.unimix
        nats = lambda logit: float(dists.entropy(dists.unimix_probs(logit, unimix)).flatten()[0])
        if not now.dreaming:
            pairs = [(level.prior, level.post) for level in now.post.levels]
        elif now.ahead:
            pairs = [(prior, None) for prior in dynamics.prior_logits(now.imagined)]
        else:
            pairs = [(level.prior, None) for level in now.post.levels]
        found = []
        for i, ((prior, post), (variables, classes)) in enumerate(
            zip(pairs, dynamics.shapes, strict=True)
        ):
            most = variables * float(np.log(classes))
            after = None if post is None else nats(post)
            found.append(Level(f"L{i}", nats(prior), after, most))
        return found

    def what_if(self, horizon: int = AHEAD) -> list[dict[str, Any]]:
        """Dreams from here, in each of which another action is taken all the time.

        -> {"name", "frames": pictures (H+1), "reward": the predicted sum of those that the episode
        goes on to, "value": at the end, "cont": the probability that it goes on until then}.
        """
        options, dynamics = self.controls.options(), self.agent.dynamics
        carry = self.now.imagined if self.now.dreaming else self.now.acting.carry
        index = torch.zeros(len(options), dtype=torch.long, device=self.agent.device)
        vectors = torch.from_numpy(np.stack([vector for _, vector in options]))
        actions = vectors.to(self.agent.device).unsqueeze(1).expand(-1, horizon, -1)
        with torch.no_grad(), self.agent.model.autocast():
            start = dynamics.select(carry, index)
            _, feat, _ = dynamics.imagine(start, actions, horizon, generator=self.drawing)
        feat = feat.map(Tensor.float)
        reward, cont, value = self.agent.heads(feat)
        lasting = cont[:, 1:].cumprod(1)  # (N, H): that the episode goes on after each step
        # a state is entered, and its reward given, where the one before was no end
        rewards = reward[:, 1] + (reward[:, 2:] * lasting[:, :-1]).sum(1)
        decoded, found = self.agent.decode(feat)["all"], []
        for n, (name, _) in enumerate(options):
            frames = []
            for t in range(horizon + 1):
                frames.append(picture({key: x[n, t] for key, x in decoded.items()}))
            numbers = {"reward": float(rewards[n]), "value": float(value[n, -1])}
            numbers["cont"] = float(lasting[n, -1])
            found.append({"name": name, "frames": frames} | numbers)
        return found

    def close(self) -> None:
        self.env.close()
