# %% [markdown]
# # Inside a trained agent
#
# Cells of a notebook (VS Code, Jupytext), and a program: `python examples/look_inside.py LOGDIR`.
# LOGDIR is the folder of a run; an exported agent or `hf:ORG/NAME` will do as well.
# docs/library.md explains every call.

# %%
import sys

import gymnasium
import imageio.v3 as iio
import numpy as np
import torch

import hidreamer

try:
    agent = hidreamer.load(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
except (hidreamer.ConfigError, hidreamer.EnvError, hidreamer.FolderError) as error:
    sys.exit(f"error: {error}")
print(agent.facts["task"], "after", agent.facts["step"], "frames:", agent.facts["scores"])

# %% [markdown]
# ## One episode, played and encoded

# %%
episode = agent.collect(seed=1, steps=100)
latents = agent.encode(episode)
print("return", episode["reward"].sum(), "in", len(latents.value) - 1, "steps")
for i, level in enumerate(latents.levels):
    used = len(level.index.unique(dim=0))
    print(f"L{i}: {tuple(level.index.shape)} codes, {used} different states in this episode")

# %% [markdown]
# How sure was the prior of what then came? The KL of each level, in nats.

# %%
for i, level in enumerate(latents.levels):
    post, prior = (torch.log_softmax(logit, -1) for logit in (level.post, level.prior))
    kl = (post.exp() * (post - prior)).sum((-2, -1))  # (T,)
    print(f"L{i}: {kl.mean():.2f} nats a step, most at step {int(kl.argmax())}")

# %% [markdown]
# ## Two dreams from one moment: the agent's own, and one of the first action only

# %%
middle = len(latents.value) // 2
own = agent.dream(latents, None, horizon=15, start=middle)
first = np.zeros((15, agent.act_dim), np.float32)
first[:, 0] = 1.0
other = agent.dream(latents, first, horizon=15, start=middle)
for name, dream in (("own", own), ("first action", other)):
    print(f"{name}: reward {dream.reward[0, 1:].sum():.2f}, value {dream.value[0, -1]:.2f}")

# %% [markdown]
# ## What each level says: coarse to fine, below each other, along the dream

# %%
rows = []
for name, obs in agent.decode(own, levels=True).items():
    pictures = [x[0] for x in obs.values() if x.ndim == 5]  # (H+1, height, width, channels)
    if pictures:
        strip = torch.cat(list(pictures[0][::3]), 1).mean(-1)  # every third step, in grey
        rows.append((255 * strip).byte().cpu().numpy())
        print("row", len(rows), "shows", name)
if rows:
    iio.imwrite("levels.png", np.concatenate(rows))

# %% [markdown]
# ## The policy in a Gymnasium loop

# %%
env = agent.make_env()
obs, info = env.reset(seed=2)
agent.policy.reset()
total, over = 0.0, False
while not over:
    obs, reward, terminated, truncated, info = env.step(agent.policy(obs))
    total, over = total + reward, terminated or truncated
env.close()
print("return of the policy", total)

# %% [markdown]
# ## The dream as an environment, for any other agent

# %%
dream = gymnasium.make("hidreamer/Dream-v0", logdir=agent, horizon=10, start="real")
obs, info = dream.reset(seed=0)
total, over = 0.0, False
while not over:
    obs, reward, terminated, truncated, info = dream.step(dream.action_space.sample())
    total, over = total + reward, terminated or truncated
dream.close()
print("return of chance in the dream", round(total, 2))
