"""The official command line, verbatim: `python3 main.py --dataset ... --base_model ... --gpu 0`.

Its options, their names and defaults are those of the authors' script, and so is what it computes and writes. Beside
them it knows `--adapters`, `--limit`, `--max_new_tokens`, `--batch_size` and `--probe_context`. Run by a Python without
the package, it hands over to `.venv` where `make` has set it up.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

VENV_PYTHON = Path(__file__).parent / ".venv" / "bin" / "python"


def positive(text: str) -> int:
    """A whole number of 1 or more; argparse says what was expected."""
    return at_least(1, text)


def not_negative(text: str) -> int:
    """A whole number of 0 or more."""
    return at_least(0, text)


def at_least(least: int, text: str) -> int:
    """The number in a text, unless it is none or too small."""
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected {least} or more, found {text}")


def options() -> argparse.ArgumentParser:
    """The options of the script, and ours."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--dataset", default="", help="a dataset such as bbh.navigate; empty: all in the data folder")
    parser.add_argument("--base_model", default="Llama-3.1-8B", help="Hub id, folder or short name")
    parser.add_argument("--gpu", default="0", help="GPU number, if there is one; -1 is the CPU")
    parser.add_argument("--selection_strategy", default="norm", help="norm or entropy")
    parser.add_argument("--n_selected_modules", type=positive, default=20, help="adapters selected per prompt")
    parser.add_argument("--seed", type=not_negative, default=0, help="random seed")
    parser.add_argument("--generation_early_stop", action="store_true", help="stop at the first newline")
    parser.add_argument("--data_dir", default="./data", help="folder of {main}/{sub}/test.jsonl")
    parser.add_argument("--model_dir", default="./hf_models", help="folder of base models and adapters")
    parser.add_argument("--result_dir", default="results", help="folder for result folders")
    parser.add_argument("--save_dir", default="", help="accepted, and not used")
    parser.add_argument("--adapters", help="folder, Hub repo or manifest instead of the base model's own adapters")
    parser.add_argument("--limit", type=positive, help="only the first rows of each dataset")
    parser.add_argument("--max_new_tokens", type=positive, default=256, help="longest answer, in tokens")
    parser.add_argument("--batch_size", type=positive, default=1, help="prompts per forward pass")
    parser.add_argument(
        "--probe_context", choices=("base", "pool", "carry"), default="carry", help="adapters in probes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a result of another run")
    return parser


def main() -> int:
    """Evaluates, and returns the exit code."""
    arguments = vars(options().parse_args())
    from logo.cli.output import warn_in_one_line

    warn_in_one_line("main.py")
    from logo.cli.evaluate import OfficialOptions, evaluate
    from logo.errors import LoGoError

    try:
        return evaluate(options=OfficialOptions(**arguments, preset="official"))
    except Exception as error:
        kind = "" if isinstance(error, LoGoError) else f"unexpected {type(error).__name__}: "
        print(f"main.py: error: {kind}{' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("main.py: error: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    if find_spec("logo") is None:
        if not VENV_PYTHON.exists():
            sys.exit("main.py: the package is not installed; run `make demo` or `pip install -e .` first")
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), *sys.argv])
    sys.exit(main())
