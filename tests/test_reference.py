"""Pages that list everything: presets, and the metrics that updates record."""

import json
import re

import pytest
from test_agent import EVERYTHING, VECTOR, make

import tools
from conftest import ROOT

OBS = VECTOR | {key: EVERYTHING[key] for key in ("image", "grid")}
NEW = {f"model.losses.{name}": 1.0 for name in tools.load_config([], {}).model.losses}
NEW |= {f"{block}.agc": 0.3 for block in ("model", "actor", "critic")}
NEW |= {"critic.replay_loss": 0.3, "model.ac_cpc.units": 16, "model.next_embed.units": 16}
NEW |= {"expl.behavior": "plan2explore", "expl.models": 2, "expl.layers": 1, "expl.units": 16}
EXPERTS = {"dynamics.type": "hrvq", "dynamics.hrvq.posterior": "nearest"}
CASES = {
    "every objective": NEW,
    "no decoder": NEW | {"model.losses.decoder": 0, "decoder.probe": True},
    "one optimiser, two levels": NEW | {"optim": "joint", "dynamics.type": "hrssm"},
    "experts": EXPERTS | {"dynamics.hrvq.ffn": "moe"},
}
STAND_FOR = {
    "OPTIMISER": "(probe|joint|(expl_)?(model|actor|critic))",
    "PART": "[a-z_]+",
    "KEY": f"({'|'.join(OBS)})",
    "i": r"\d+",
    "L": r"\d+",
    "E": r"\d+",
}


def listed(page):
    """Patterns of the names in the first column of the page's tables."""
    found = []
    for line in page.splitlines():
        if line.startswith("| "):
            found += re.findall(r"`([^`]+)`", line.split("|")[1])
    patterns = []
    for name in found:
        patterns.append("_".join(STAND_FOR.get(word, word) for word in name.split("_")))
    return patterns


def missing(names, page):
    """Which names of metrics the page lacks."""
    pattern = re.compile("|".join(listed(page)))
    lacks = []
    for name in names:
        if not pattern.fullmatch(name) and not pattern.fullmatch(name.removeprefix("expl_")):
            lacks.append(name)
    return lacks


@pytest.mark.parametrize("case", CASES)
def test_every_metric_of_an_update_is_on_the_page(case):
    agent, batch = make(OBS, **CASES[case])
    agent.update(batch)
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert missing(agent.metric_names, page) == []


def test_every_metric_of_a_run_is_on_the_page(trained):
    lines = (trained("rssm", "vector") / "metrics.jsonl").read_text().splitlines()
    names = set().union(*map(json.loads, lines)) - {"step"}
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert missing(names, page) == [] and any(name.startswith("eval_") for name in names)


def test_a_metric_that_the_page_lacks_is_found():
    page = "| `kl_i`, `OPTIMISER_clipped` | | and `other` |\n`text`"
    names = ["kl_0", "expl_kl_1", "expl_actor_clipped", "kl_x", "kl", "other", "text", "clipped"]
    assert missing(names, page) == ["kl_x", "kl", "other", "text", "clipped"]


def test_every_preset_is_on_the_page():
    page = (ROOT / "docs" / "presets.md").read_text()
    presets = [name for name in tools.sentences() if "." not in name and name != "defaults"]
    assert len(presets) > 25
    assert [name for name in presets if f"`{name}`" not in page] == []


def test_both_tables_of_speed_are_of_one_file():
    """Kernels, host reads and GFLOP, as the file that both pages name has them."""
    updates = json.loads((ROOT / "results/speed/sapphire_rapids.json").read_text())["updates"]
    for name, known in (("results", updates), ("presets", list(updates)[:3])):
        page = (ROOT / "docs" / f"{name}.md").read_text()
        assert "(../results/speed/sapphire_rapids.json)" in page
        for model in known:
            found = updates[model]
            assert f"| {found['kernels']:,} / {found['host_reads']:,} |" in page, (name, model)
            assert re.search(rf"\| {found['flops'] / 1e9:.0f}( \(|  *\|)", page), (name, model)
