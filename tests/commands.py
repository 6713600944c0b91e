"""Commands and code of the documentation, shortened to seconds and run in this process."""

import re
import shlex
import tomllib
from pathlib import Path

from conftest import ROOT

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
SHORT = ["--log_every", "40", "--eval_every", "1000", "--eval_episodes", "1"]
SHORT += ["--checkpoint_every", "1000", "--video", "false", "--env.time_limit", "40"]
LENGTH, LONGER = 80, 160  # frames of a new run, and of one that goes on
RECORDED = 400  # of random play, which trains nothing


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page, in order."""
    found = BLOCK.findall(path.read_text(encoding="utf-8"))
    return [(kind, text) for kind, text in found if kind in languages]


def commands(text: str) -> list[list[str]]:
    """The words of each line of a shell block, without comments."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in re.split(r"\s&&\s", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def known(words: list[str]) -> bool:
    """Whether a command that is not run, such as an installation, can be right: its target of the
    Makefile or its extra exists.
    """
    if words[0] == "make":
        target = next(word for word in words[1:] if "=" not in word)
        return f"\n{target}:" in (ROOT / "Makefile").read_text()
    if "pip" in words:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        extras = set(re.findall(r"[\w]+", "".join(re.findall(r"\[(.*?)\]", " ".join(words)))))
        return extras <= set(project["optional-dependencies"])
    return words[0] in ("python3", ".", "tensorboard", "pytest", "apt", "cd", "ray", "git")


def recipe(words: list[str]) -> list[list[str]]:
    """The scripts that a make command starts, with its ARGS."""
    target = next(word for word in words[1:] if "=" not in word)
    given = next((word[5:] for word in words if word.startswith("ARGS=")), "")
    text = (ROOT / "Makefile").read_text()
    found = []
    for line in re.search(rf"^{target}:.*\n((?:\t.*\n)*)", text, re.M)[1].splitlines():
        line = line.strip().replace("$(RUN)", "python").replace("$(ARGS)", given)
        if line.startswith("python ") and (words := shlex.split(line))[1] in (
            "demo.py",
            "doctor.py",
        ):
            found.append(words)
    return found


def shortened(words: list[str]) -> list[str]:
    """Arguments of dreamer.py for seconds: the preset ``debug`` last, and few steps."""
    words, resumed = list(words), "--resume" in words
    if "--configs" in words:
        at = words.index("--configs") + 1
        while at < len(words) and not words[at].startswith("--"):
            at += 1
        words.insert(at, "debug")
    elif not resumed:
        words += ["--configs", "debug"]
    goes_on = resumed and "--logdir" not in words
    steps = str(LONGER if goes_on else RECORDED if "random" in words else LENGTH)
    if "--steps" in words:
        words[words.index("--steps") + 1] = steps
    elif not goes_on:
        words += ["--steps", steps]
    own = {"--replay.ratio", "--eval_episodes"} & set(words)
    for key, value in zip(SHORT[::2], SHORT[1::2], strict=True):
        if key not in own and not (goes_on and key == "--env.time_limit"):
            words += [key, value]
    return words


def run(words: list[str]) -> int | None:
    """Run one command in the present folder. -> its exit status; None if it was only looked at."""
    if words[0] == "make":
        assert known(words), f"the Makefile has no such target: {shlex.join(words)}"
        return max([run(line) or 0 for line in recipe(words)], default=0)
    if words[0] == "hidreamer":
        from hidreamer import app

        module = app.COMMANDS[words[1]][0]
        words = ["python", "-m", module, *words[2:]]
    script = words[2] if words[1:2] == ["-m"] else words[1] if len(words) > 1 else ""
    rest = words[3:] if words[1:2] == ["-m"] else words[2:]
    runner = RUNNERS.get(script.removesuffix(".py"))
    if words[0] != "python" or runner is None:
        assert known(words), f"nobody knows {shlex.join(words)}"
        return None
    return runner(rest)


def train(words: list[str]) -> int:
    import dreamer

    if "--help" in words:
        return dreamer.main(words)
    if "--capacity" in words:
        return dreamer.main([*words, "--task", "dummy_vector"])
    return dreamer.main(shortened(words))


def show(words: list[str]) -> int:
    import demo

    return demo.main(
        shortened([*words, "--configs", "demo"] if "--configs" not in words else words)
    )


def compare(words: list[str]) -> int:
    import run_comparison

    words = list(words)
    for key, value in (("--steps", "60"), ("--seeds", "1"), ("--updates", "4"), ("--jobs", "1")):
        if key in words:
            words[words.index(key) + 1] = value
    if "--from" in words or "--backend" in words:
        return 0 if run_comparison.main([*words[:0], "--help"]) == 0 else 1
    if not {"--seeds", "--seed-list"} & set(words):
        words += ["--seeds", "1"]  # instead of five
    return run_comparison.main([*words, "--configs", "debug", "--models", "tiny_dreamerv3"])


def analyse(words: list[str]) -> int:
    from analysis import __main__ as page

    return page.main([*words, "--pictures", "--episodes", "10"])


def evaluate(words: list[str]) -> int:
    from analysis import evaluate as scores

    words = list(words)
    words[words.index("--episodes") + 1] = "2"
    return scores.main(words)


def play(words: list[str]) -> int:
    from play import __main__ as page

    if "--record" in words:
        words = words[: words.index("--record")]
    return page.main([*words, "--record", "out.mp4", "--steps", "3"])


def smoke(words: list[str]) -> int:
    import simple_test

    return simple_test.main(words)


def check(words: list[str]) -> int:
    import doctor

    assert words == []
    doctor.main(["--help"])
    return 0  # whether this machine is ready is tested elsewhere


def learn(words: list[str]) -> None:
    """benchmarks: minutes to hours; the script is there."""


RUNNERS = {
    "dreamer": train,
    "demo": show,
    "run_comparison": compare,
    "analysis": analyse,
    "analysis.evaluate": evaluate,
    "play": play,
    "simple_test": smoke,
    "doctor": check,
    "benchmarks/learning": learn,
}
