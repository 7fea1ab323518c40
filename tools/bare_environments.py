"""The wheel as a user gets it: in a bare environment of each Python, with what pip downloads, the demo has to run.

`make test-wheel` builds the wheel and runs this. Each extra has an environment of its own as well, which finds the
core's libraries in the first one. An environment takes gigabytes where pip finds PyTorch's builds for CUDA; those of a
Python are removed before the next ones are made.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# What a user types first, and a part of what is printed. "" is the core; `rows` is a folder with rows of a task.
_SERVED = """logo serve --base-model demo --port 18431 & server=$!
for i in $(seq 90); do logo verify http://127.0.0.1:18431 --limit 1 && break; sleep 1; done; kill $server"""
TRIED = {
    "": (
        (("logo", "--version"), "logo {version}"),
        (("logo", "demo", "--limit", "2"), "Your turn: logo generate"),
        (("logo", "generate", "What is 7 plus 5?"), "12"),
        (("python", "-m", "pip", "check"), "No broken requirements found."),
    ),
    "serve": ((("sh", "-c", _SERVED), "16 selections, 0 of them not the library's"),),
    "train": ((("logo", "train", "--rows", "rows", "--out", "pool", "--steps", "2"), "1 adapters trained"),),
    "eval": (
        (("logo", "eval", "run", "--rows", "rows", "--train-rows", "learn", "--method", "lorahub"), "sums"),
        (("logo", "eval", "report", "results", "--save", "report.html"), "report.html"),
        (("python", "-c", "import datasets, lm_eval, sentence_transformers; print('imported')"), "imported"),
    ),
    "ray": ((("logo", "eval", "run", "--rows", "rows", "--workers", "2"), "sums"),),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Tries the wheel with each Python; returns 1 where one fails or none is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pythons", nargs="+", help="commands or paths")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the environments in this folder")
    options = parser.parse_args(arguments)
    good = []
    bad = []
    for python in options.pythons:
        version = asked(python)
        if version is None:
            print(f"{python}: there is no such Python here, and it is left out", flush=True)
            continue
        folder = options.keep / version if options.keep else Path(tempfile.mkdtemp(prefix="bare-"))
        try:
            tried(options.wheel.resolve(), python, version, folder)
            good.append(version)
        except subprocess.CalledProcessError as error:
            print(f"Python {version}: {error}\n{error.stdout}{error.stderr}", flush=True)
            bad.append(version)
        finally:
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.wheel.name} works with Python {', '.join(good) or '(none)'}")
    if bad:
        print(f"It fails with Python {', '.join(bad)}")
    return 1 if bad or not good else 0


def asked(python: str) -> str | None:
    """The version of a Python; None where the command is not there, or is a shim that leads nowhere."""
    try:
        command = (python, "-c", "import platform; print(platform.python_version())")
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def tried(wheel: Path, python: str, version: str, folder: Path) -> None:
    """Installs the wheel into new environments and runs what a user runs first; raises CalledProcessError."""
    print(f"Python {version}", flush=True)
    for extra, commands in TRIED.items():
        place = folder / (extra or "core")
        programs = place / "bin"
        step(f"venv {place.name}", python, "-m", "venv", str(place))
        pip = (str(programs / "python"), "-m", "pip", "install", "--quiet")
        if extra:
            [core] = (folder / "core").glob("lib/python3*/site-packages")
            [own] = place.glob("lib/python3*/site-packages")
            (own / "core.pth").write_text(f"{core}\n")
            step("pip install, alone", *pip, "--force-reinstall", "--no-deps", str(wheel))
        step(f"pip install {wheel.name}[{extra}]", *pip, f"{wheel}[{extra}]" if extra else str(wheel))
        for name, first in (("rows", 0), ("learn", 8)):
            rows = [
                json.dumps({"context": f"What is {i} plus 1?", "completion": f" {i + 1}"})
                for i in range(first, first + 8)
            ]
            (place / name).mkdir()
            (place / name / "sums.jsonl").write_text("\n".join(rows))
        for (program, *arguments), expected in commands:
            name = str(programs / program) if (programs / program).exists() else program
            printed = step(" ".join([program, *arguments]), name, *arguments, cwd=place)
            expected = expected.format(version=wheel.name.split("-")[1])
            if expected not in printed:
                raise subprocess.CalledProcessError(
                    1, [program, *arguments], printed, f"expected {expected!r} in what it prints\n"
                )
    size = sum(path.lstat().st_size for path in folder.rglob("*"))
    print(f"  {size / 1e9:8.2f} GB", flush=True)


def step(name: str, *command: str, cwd: Path | None = None) -> str:
    """Runs one command, prints how long it took, and returns what it printed."""
    started = time.perf_counter()
    outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    outside["PATH"] = os.pathsep.join([*([] if cwd is None else [str(cwd / "bin")]), os.environ["PATH"]])
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd, env=outside)
    print(f"  {time.perf_counter() - started:8.1f} s  {name}", flush=True)
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
