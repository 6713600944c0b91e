"""What does a trained world model predict and hold? Judged on episodes that it was not trained on.

An application: it may use ``comparison`` (runs, statistics, parts of pages), never the other way
round.

    offline.py     a world model trained on recorded episodes: a job of ``run_comparison.py
    --paired-offline`` heldout.py     its predictions of other episodes, beside what can be said
    without a model probes.py      what its features hold of an Atari console's memory
"""
