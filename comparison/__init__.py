"""Which latent structure is better? A matrix of runs, what they logged, and what it supports.

An application: it stands above ``models.py``; ``analysis`` and ``run_comparison.py`` stand above
it.

    matrix.py, backends.py    run the jobs: one state machine, three ways to start a process
    runs.py, fairness.py      read what is there; may it be compared?
    stats.py, summary.py      numbers, each with its interval and method -> summary.json
    words.py, figures.py, page.py    summary.json -> report.md, report.html, curves.png
"""
