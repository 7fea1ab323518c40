"""The structure of the package: imports point to lower layers only, without cycles, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from tolerances import PATIENCE

SRC = Path(__file__).parent.parent / "src" / "logo"

# A part may import itself and the parts of lower layers, which come first. Parts of one layer do not import each other.
LAYERS = [
    {"errors"},
    {"folders"},
    {"cache"},
    {"hub", "plugins", "extras", "drawing"},
    {"adapters", "prompts", "generation"},
    {"models", "rows", "tensors"},
    {"mixing", "selection", "pools", "decoding", "endings", "scoring", "digests"},
    {"decoder", "completions", "opening", "selecting", "facts"},
    {"calls"},
    {"engine", "protocol"},
    {"api"},
    {"backends", "baselines"},
    {"evaluation", "training", "serving"},
    {"bench", "demo"},
    {"cli"},
]
RANK = {part: i for i, layer in enumerate(LAYERS) for part in layer}


def part(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """The parts of the package that a file imports, anywhere in it."""
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
    assert len(path.read_text().splitlines()) <= 400, "find its seam"


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


def test_a_deprecation_is_an_error_where_our_code_causes_it_and_nowhere_else() -> None:
    """`filterwarnings` in pyproject.toml: what a library deprecates within itself breaks nobody's tests."""
    library: dict[str, Any] = {"__name__": "somebodys_library.part"}
    exec(
        "import warnings\n"
        "def inner(): warnings.warn('going away', DeprecationWarning)\n"
        "def outer(): warnings.warn('call another one', DeprecationWarning, stacklevel=2)\n"
        "def user(): outer()\n",
        library,
    )
    ours: dict[str, Any] = {"__name__": "logo.somewhere", "outer": library["outer"]}
    exec("def user(): outer()\n", ours)
    with warnings.catch_warnings(record=True) as seen:  # keeps the filters
        library["inner"]()
        library["user"]()
    assert [str(one.message) for one in seen] == ["going away", "call another one"]
    with pytest.raises(DeprecationWarning, match="call another one"):
        ours["user"]()
    with pytest.raises(DeprecationWarning, match="call another one"):
        library["outer"]()  # from a test
