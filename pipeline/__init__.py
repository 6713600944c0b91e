"""Training in stages, each alone or all in one command: ``python -m pipeline STAGE``.

An application. Every module is the online agent's; only what trains them in stages is here.

    __main__.py    the command line
    stage.py       what a stage is, and the loop that runs one: progress, checkpoints, resuming
    manifest.py    what a finished stage was made from; whether the next one can be built on it
    gate.py        a stage's metrics beside their baselines
    data.py        a game's recorded episodes, held-out ones apart

    collect.py     frames, actions, rewards and the console's memory
"""
