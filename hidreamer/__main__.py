"""The command ``hidreamer``, also ``python -m hidreamer``: runs the scripts above the library."""

from __future__ import annotations

import runpy
import sys

from hidreamer import __version__, app


def help_text() -> str:
    lines = ["hidreamer COMMAND [ARGUMENTS]", ""]
    for name, (_, sentence) in app.COMMANDS.items():
        lines.append(f"  {name:<10} {sentence}")
    return "\n".join(
        [*lines, "", "hidreamer COMMAND --help: its arguments. hidreamer --version: this version."]
    )


def main(argv: list[str] | None = None) -> int:
    """-> exit status, or SystemExit with the script's own.

    argv: the arguments; by default those of the process.
    """
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help", "help", ""):
        print(help_text())
        return 0 if name else 2
    if name in ("-V", "--version"):
        print(f"hidreamer {__version__}")
        return 0
    if name not in app.COMMANDS:
        known = ", ".join(app.COMMANDS)
        print(f"error: there is no command {name!r}; there are {known}", file=sys.stderr)
        return 2
    try:
        app.enter()
    except app.ForeignModule as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sys.argv[1:], app.by_command = rest, True
    runpy.run_module(app.COMMANDS[name][0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
