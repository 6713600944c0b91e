"""Training in stages, each alone or all in one command: ``python -m pipeline STAGE`` (see
docs/pipeline.md).

An application. Quantiser, sequence model, masks, heads, actor-critic, replay, optimisers, logs and
checkpoints are the online agent's; only what trains them in stages is here.

    __main__.py    the command line
    stage.py       what a stage is, and the loop that runs one: progress, checkpoints, resuming
    manifest.py    what a finished stage was made from; whether the next one can be built on it
    gate.py        a stage's metrics beside their baselines
    data.py        a game's recorded episodes, held-out ones apart
    nets.py        the lineage's encoder, its mirror, a frozen DINOv2
    probing.py     linear probes of the console's memory, and the lineage's metrics
    training.py    learning rates, AdamW, files of parameters

    collect.py (minari.py, speed.py)          frames, actions, rewards, the console's memory
    encoder.py, encoder_gate.py               frames to vectors
    tokenizer.py, tokenizer_gate.py           vectors to codes
    token_model.py, world_model.py, world_model_gate.py   codes and actions to the next codes
    token_agent.py, policy.py                 actor and critic in dreams
    report.py, pictures.py                    report.html of all of it
"""

from hidreamer import app

if __name__ == "pipeline":  # not hidreamer.root.pipeline
    app.enter()  # before the current folder, which may have a tools.py of its own
