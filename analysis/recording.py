"""One episode of each agent as a file of Rerun (rerun.io), to step through: ``--rerun``.

Per step: what was seen, what every prefix of levels decodes to, nats between posterior and prior by
level, reward, and the named factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis import latents, pictures
from analysis.latents import Latents
from analysis.loading import Episode, Subject
from hidreamer import app


def needed() -> None:
    """Raises UsageError where the extra is missing."""
    try:
        import rerun  # noqa: F401
    except ImportError as error:
        raise app.UsageError(
            f"--rerun needs its extra: {app.install_line('rerun')} ({error})"
        ) from None


def write(
    path: Path,
    episode: Episode,
    index: int,
    read: Sequence[tuple[Subject, Sequence[Latents]]],
) -> None:
    """``episode``, the one with number ``index``, as each subject reads it. Replaces ``path``."""
    import rerun

    stream = rerun.RecordingStream("hidreamer")
    stream.save(path)
    for subject, found in read:
        name, scene, drawn = subject.name.split("/"), pictures.follow(subject, episode, index), {}
        if pictures.drawable(subject):
            feat = scene.post.feat
            coarse = subject.agent.world_model.dynamics.coarse_features(feat)
            frames = pictures.decoded(subject, feat, coarse=True)
            drawn = {"seen": pictures.truth(scene, slice(None))}
            drawn |= dict(zip(["all", *coarse], frames, strict=True))
        levels = latents.names(subject.agent.world_model.dynamics)
        for t in range(len(episode)):  # paths by their parts: names hold spaces
            stream.set_time("step", sequence=t)
            for key, frames in drawn.items():
                stream.log([*name, "pictures", key], rerun.Image(frames[t]))
            for level, nats in zip(levels, found[index].kl[t], strict=True):
                stream.log([*name, "kl", level], rerun.Scalars(float(nats)))
            stream.log("reward", rerun.Scalars(float(episode.rows["reward"][t])))
            for factor, values in episode.factors.items():
                stream.log(["factors", factor], rerun.Scalars(float(values[t])))
    stream.flush()
    stream.disconnect()
