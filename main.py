"""The official command line, verbatim: `python3 main.py --dataset ... --base_model ... --gpu 0`.

It is `logo evaluate --preset official`, which has the options of the authors' script with their names and defaults, and
computes and writes what the script does. Run by a Python without the package, it hands over to `.venv` where `make`
has set it up.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

VENV_PYTHON = Path(__file__).parent / ".venv" / "bin" / "python"


def main() -> int:
    """Evaluates, and returns the exit code."""
    from logo.cli.app import run

    return run(["evaluate", "--preset", "official", *sys.argv[1:]])


if __name__ == "__main__":
    if find_spec("logo") is None:
        if not VENV_PYTHON.exists():
            sys.exit("main.py: the package is not installed; run `make demo` or `pip install -e .` first")
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])
    sys.exit(main())
