"""The shape of the house: no import points up or in a circle, and light things stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tolerances import PATIENCE

SRC = Path(__file__).parent.parent / "src" / "logo"

# What a part may import: itself and everything below. Parts on one line stand side by side.
LAYERS = [
    {"errors", "cache"},
    {"adapters"},
    {"mixing", "selection", "models", "decoding", "endings", "scoring"},
    {"decoder"},
    {"engine"},
    {"backends", "baselines"},
    {"evaluation", "training", "serving", "bench"},
    {"demo"},
    {"cli"},
]
RANK = {part: i for i, layer in enumerate(LAYERS) for part in layer}


def part(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Parts of the house that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "logo":
            names = [node.module] if "." in (node.module or "") else [f"logo.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("logo.")]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name}
    return {name for name in found if name in RANK}


FILES = sorted(path for path in SRC.rglob("*.py") if path.name != "__init__.py" or path.parent != SRC)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    own = part(path)
    for other in imports(path):
        assert other == own or RANK[other] < RANK[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 450, "find its seam"


def test_importing_the_package_imports_no_model_library() -> None:
    code = (
        "import logo, sys; logo.UsageError; logo.__version__; "
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_the_public_api_is_what_it_says() -> None:
    import logo

    for name in logo.__all__:
        assert getattr(logo, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Logo'"):
        _ = logo.Logo
