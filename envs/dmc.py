"""The DeepMind Control Suite."""

from __future__ import annotations

import os

import numpy as np
from gymnasium.spaces import Box, Dict

from envs.base import EnvError, Suite, one_line, unknown

os.environ.setdefault("MUJOCO_GL", "egl")
try:
    from dm_control import suite
except ModuleNotFoundError:
    raise
except Exception:  # no OpenGL answered; what it raises depends on what is missing
    os.environ["MUJOCO_GL"] = "disabled"  # physics needs no pictures
    from dm_control import suite

TASKS = {f"{domain}_{task}": (domain, task) for domain, task in suite.ALL_TASKS}
TASKS["cup_catch"] = ("ball_in_cup", "catch")
CAMERAS = {"quadruped": 2}  # the camera that shows the whole body, where it is not camera 0


class DMC(Suite):
    """One task, `DOMAIN_TASK`. Observations: `image` if `image`,
    each sensor as a vector if `proprio`.

    camera: index of the model's camera; -1 for the one that is usual in the domain.
    The suite's own 1,000 control steps end an episode by truncation; a discount of zero is a real
    end.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        repeat: int,
        camera: int = -1,
        image: bool = True,
        proprio: bool = False,
    ):
        if name not in TASKS:
            raise unknown("DMC task", name, TASKS)
        if not (image or proprio):
            raise EnvError("dmc.image and dmc.proprio are both false: the agent would see nothing")
        domain, task = TASKS[name]
        self._size, self._repeat = size, repeat
        self._camera = CAMERAS.get(domain, 0) if camera == -1 else camera
        # `reset` seeds; lqr draws its masses here
        self._seeded = False
        self._env = suite.load(domain, task, task_kwargs={"random": 0})
        bounds = self._env.action_spec()
        self.action_space = Box(
            bounds.minimum.astype(np.float32), bounds.maximum.astype(np.float32)
        )
        sensors = self._env.observation_spec() if proprio else {}
        spaces = {
            key: Box(-np.inf, np.inf, (int(np.prod(spec.shape)),)) for key, spec in sensors.items()
        }
        if image:
            self._draw(*size)  # fail now, not at the first step
            spaces["image"] = Box(0, 255, (*size, 3), np.uint8)
        self.observation_space = Dict(spaces)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[dict, dict]:
        super().reset(seed=seed)
        if seed is not None or not self._seeded:
            self._env.task.random.seed(int(self.np_random.integers(2**31)))
            self._seeded = True
        return self._observe(self._env.reset()), {}

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        total = 0.0
        for _ in range(self._repeat):
            moment = self._env.step(action)
            total += moment.reward
            if moment.last():
                break
        ended = moment.last() and moment.discount == 0
        return self._observe(moment), total, ended, moment.last() and not ended, {}

    def render(self) -> np.ndarray:
        """uint8 (240, 320, 3)"""
        return self._draw(240, 320)

    def variables(self) -> dict[str, float]:
        """Positions and velocities of the joints by name: what MuJoCo continues from."""
        physics, out = self._env.physics, {}
        for key, what in (("qpos", "position"), ("qvel", "velocity")):
            rows = getattr(physics.named.data, key)
            for joint in physics.named.model.jnt_type.axes.row.names:
                values = np.atleast_1d(rows[joint])
                for i, x in enumerate(values):
                    name = f"{joint} {what}" + (f" {i}" if len(values) > 1 else "")
                    out[name] = float(x)
        return out

    def close(self) -> None:
        self._env.close()  # which frees nothing
        self._env.physics.free()  # here: at its exit Python would do it in the main thread

    def _observe(self, moment) -> dict[str, np.ndarray]:
        spaces = self.observation_space.spaces
        with np.errstate(over="ignore"):  # of what no float32 holds `Env` says so
            obs = {
                key: np.ravel(value).astype(np.float32)
                for key, value in moment.observation.items()
                if key in spaces
            }
        return {**obs, "image": self._draw(*self._size)} if "image" in spaces else obs

    def _draw(self, height: int, width: int) -> np.ndarray:
        try:
            return self._env.physics.render(height, width, camera_id=self._camera)
        except RuntimeError as error:
            remedy = (
                "apt install libegl1 libgl1-mesa-dri, unset MUJOCO_GL, or set dmc.image false, "
                "dmc.proprio true"
            )
            cause = f"dm_control finds no OpenGL to draw with ({one_line(error)})"
            raise EnvError(f"{cause}: {remedy}") from error
