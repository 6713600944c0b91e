"""Updates as they were before an option was added: no number of a run without it may change.

``golden/updates.json`` holds the metrics of updates 1, 10 and 20, as commit a24eaa5 gave them (of
the cases with a fast critic and other memories as f01d445 did):

    python tests/test_same_as_before.py > tests/golden/updates.json
"""

import json
from pathlib import Path

import pytest
import torch
from test_agent import EVERYTHING, make

STORED = Path(__file__).parent / "golden" / "updates.json"
AT = (1, 10, 20)
CASES = {
    "rssm": ("discrete", {}),
    "hrssm": ("discrete", {}),
    "hrvq": ("discrete", {}),
    "rssm, continuous, joint": ("continuous", {"optim": "joint"}),
    # whose slow copy is far enough behind to count
    "rssm, fast critic": ("discrete", {"critic.lr": 3e-2, "critic.slow_rate": 0.5}),
    "hrvq, stacked": ("discrete", {"dynamics.hrvq.memory": "stacked"}),
    "hrvq, gru": (
        "discrete",
        {"dynamics.hrvq.memory": "gru", "dynamics.hrvq.posterior_sees": "memory"},
    ),
    "rssm, explorer": ("multi", {"expl.behavior": "plan2explore", "imag.starts": 3}),
}


def updates(case):
    """{metric: its values at ``AT``} of a new agent on one batch of images, a board, a vector."""
    act, settings = CASES[case]
    torch.manual_seed(0)
    settings = settings | {"dynamics.type": case.split(",")[0], "model.lr": 1e-3}
    agent, batch = make(EVERYTHING, act, **settings)
    generator = torch.Generator().manual_seed(1)
    values = [agent.update(batch, generator).tolist() for _ in range(max(AT))]
    columns = zip(*(values[t - 1] for t in AT), strict=True)
    return dict(zip(agent.metric_names, map(list, columns), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_20_updates_are_those_of_before(case):
    stored, found = json.loads(STORED.read_text())[case], updates(case)
    assert found.keys() == stored.keys()
    for name, values in stored.items():
        # other processors round otherwise, which 20 updates hardly multiply
        assert found[name] == pytest.approx(values, rel=2e-4, abs=2e-6), name


if __name__ == "__main__":
    print(json.dumps({case: updates(case) for case in CASES}, indent=1))
