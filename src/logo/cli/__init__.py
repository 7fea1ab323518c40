"""The command line: one thin file per command, each of which parses, calls the library and prints."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `logo` with these arguments (default: the process's) and exits.

    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Errors are one line on stderr; `--debug`, anywhere on
    the line, adds the traceback.
    """
    from logo.cli.app import run

    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))
