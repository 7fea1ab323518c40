"""Runs a version of vLLM that has no wheel for CPUs: its Python sources upon the compiled kernels of the installed one.

    make .venv-vllm/.installed
    .venv-vllm/bin/python tools/vllm_overlay.py .venv-vllm-wheels/0.33/vllm-0.33.0-*.whl overlay
    .venv-vllm/bin/pip install --target overlay orjson      # what 0.33 needs and 0.32 does not
    PYTHONPATH=$PWD/overlay make test-vllm

`make check-vllm-versions` downloads such wheels. Versions fit together whose kernels are called alike, such as 0.33
with those of 0.32; from 0.34 on, vLLM runs on a CPU only with a Triton that compiles for it.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import zipfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path, help="of the version to run, for GPUs")
    parser.add_argument("folder", type=Path, help="where the sources are written, for PYTHONPATH")
    args = parser.parse_args()
    sources(args.wheel, args.folder)
    kernels(args.folder / "vllm")
    named_for_cpus(args.folder)


def sources(wheel: Path, folder: Path) -> None:
    """Unpacks what is not compiled."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not name.endswith(".so")])


def kernels(package: Path) -> None:
    """Copies what is compiled of the vLLM of this environment."""
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise SystemExit("no vLLM for CPUs is installed here: run this with .venv-vllm/bin/python")
    installed = Path(found.origin).parent
    for library in installed.rglob("*.so"):
        target = package / library.relative_to(installed)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)


def named_for_cpus(folder: Path) -> None:
    """Marks the version as one for CPUs: by this, vLLM tells what it runs on."""
    [metadata] = folder.glob("vllm-*.dist-info/METADATA")
    lines = metadata.read_text(encoding="utf-8").splitlines()
    marked = [f"{line}+cpu" if line.startswith("Version: ") and "+cpu" not in line else line for line in lines]
    metadata.write_text("\n".join(marked) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
