"""The structure of the package: imports point to lower layers only, without cycles, and light modules stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tolerances import PATIENCE

SRC = Path(__file__).parent.parent / "src" / "logo"

# A part may import itself and the parts of lower layers, which come first. Parts of one layer do not import each other.
LAYERS = [
    {"errors", "recorded"},
    {"core"},
    {"files", "hub", "plugins"},
    {"models"},
    {"identity"},
    {"adapters", "prompts"},
    {"rows", "prefix_cache", "endings"},
    {"mixing", "selection"},
    {"decoding", "opening"},
    {"scoring"},
    {"engine"},
    {"serve"},
    {"baselines", "vllm"},
    {"evaluation", "training"},
    {"cluster"},
    {"demo"},
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


def test_imports_point_down() -> None:
    files = [path for path in SRC.rglob("*.py") if path.name != "__init__.py" or path.parent != SRC]
    wrong = [
        f"{path.relative_to(SRC)} imports {other}"
        for path in files
        for other in imports(path)
        if other != part(path) and RANK[other] >= RANK[part(path)]
    ]
    assert len(files) > 100 and not wrong


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
