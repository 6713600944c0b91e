"""What does a trained world model predict and hold? Judged on episodes that it was not trained on.

An application: it may use ``comparison`` (runs, statistics, parts of pages), never the other way
round.

    offline.py      trains a world model on recorded episodes (``run_comparison.py
                    --paired-offline``)
    heldout.py      its predictions of other episodes, beside a baseline without a model
    probes.py       what its features hold of an Atari console's memory

    __main__.py     the command that looks inside trained agents (docs/analysis.md)
    inspection.py   what it does: measure, draw, write
    evaluate.py     the scores of a checkpoint
    loading.py      agents of runs, and new episodes that all are judged on
    factors.py      numbers that are true of a moment, by name
    latents.py      what a world model holds at each step: memory, levels, codes, predictions
    readout.py      probes, split by episode
    information.py  mutual information of codes and factors, and what chance gives
    levels.py       which level holds which factors: contrast, MIG, DCI
    study.py        all of these but MIG and DCI of one agent, as plain numbers
    attention.py    where a transformer looks
    pictures.py     strips of frames
    summary.py      several runs together, and what they support, in sentences
    drawings.py, report.py      the page
    recording.py    an episode as a file of Rerun
"""

from hidreamer import app

if __name__ == "analysis":  # not hidreamer.root.analysis
    app.enter()  # before the current folder, which may have a tools.py of its own
