"""The official command line, verbatim: `python3 main.py --dataset ... --base_model ... --gpu 0`.

Means `logo evaluate --preset official`, so that numbers can be compared with the published ones. Run by a Python
without the package, it hands over to `.venv` where `make` has set it up. Evaluating needs the libraries of the extra
`eval`, which answering a prompt does not.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

VENV_PYTHON = Path(__file__).parent / ".venv" / "bin" / "python"

if __name__ == "__main__":
    if find_spec("logo") is None:
        if not VENV_PYTHON.exists():
            sys.exit("main.py: the package is not installed; run `pip install -e '.[eval]'` first")
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])
    if find_spec("rouge_score") is None:
        sys.exit(f"main.py: evaluating needs more libraries; run `{sys.executable} -m pip install -e '.[eval]'` first")
    from logo.cli import main

    main(["evaluate", "--preset", "official", *sys.argv[1:]])
