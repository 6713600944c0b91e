"""What does a trained world model predict and hold? Judged on episodes that it was not trained on.

An application: it may use ``comparison`` (runs, statistics, parts of pages), never the other way
round.

    offline.py     trains a world model on recorded episodes (``run_comparison.py
                   --paired-offline``)
    heldout.py     its predictions of other episodes, beside a baseline without a model
    probes.py      what its features hold of an Atari console's memory
"""
