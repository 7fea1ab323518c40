"""Every library that the package imports comes with its core or with an extra, and what names an extra is true."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from logo import __version__
from logo.cli.app import run
from logo.errors import EXTRAS, LoGoError, MissingLibrary, need
from project import PROJECT, ROOT

SRC = ROOT / "src" / "logo"
# What libraries of ours bring of their own accord and are made of: transformers, its tokenizers.
BROUGHT = {"tokenizers": "transformers", "pydantic_core": "pydantic", "tqdm": "transformers"}
BROUGHT |= {"cma": "nevergrad", "fastapi": "vllm", "typing_extensions": "torch", "markupsafe": "jinja2"}


def extra(name: str) -> set[str]:
    """Distributions of an extra and of the extras in it, or of the core (`""`)."""
    listed = PROJECT["optional-dependencies"][name] if name else PROJECT["dependencies"]
    found = set()
    for requirement in map(Requirement, listed):
        if requirement.name == PROJECT["name"]:
            found |= {one for part in requirement.extras for one in extra(part)}
        else:
            found.add(requirement.name.replace("_", "-").lower())
    return found


def imported() -> dict[str, Path]:
    """Top-level modules of other people's that are imported anywhere in the package, each with a file that does."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            found |= {name.partition(".")[0]: path for name in names}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names and name != "logo"}


def test_what_is_imported_is_declared() -> None:
    distributions = packages_distributions()
    for module, path in imported().items():
        owner = BROUGHT.get(module, module)
        names = {one.replace("_", "-").lower() for one in distributions.get(owner, [owner])}
        assert names & (extra("") | extra(EXTRAS.get(owner, ""))) or EXTRAS.get(owner) == "vllm", path


def test_the_extra_that_is_named_brings_the_library() -> None:
    for module, name in EXTRAS.items():
        named = {"vl_convert": "vl-convert-python"}  # where the distribution is called otherwise
        owner = BROUGHT.get(module, named.get(module, module)).replace("_", "-")
        assert owner in extra(name) and owner not in extra(""), module


def test_everything_is_in_all_but_what_excludes_the_server() -> None:
    parts = set(PROJECT["optional-dependencies"]) - {"all", "dev", "dev-vllm", "docs", "vllm", "vllm-cpu"}
    assert extra("all") == set().union(*map(extra, parts))


def test_every_extra_that_is_named_exists() -> None:
    for file in [*SRC.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        for names in re.findall(r"lora-on-the-go\[([a-z,-]+)\]", file.read_text()):
            assert set(names.split(",")) <= set(PROJECT["optional-dependencies"]), file


def test_a_library_that_is_missing_is_one_line_with_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    need("the test", "pytest", "ast")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "vlmm").mkdir()  # a folder of the name is no library
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("lm_eval", "no_such_library", "vlmm"):
        with pytest.raises(MissingLibrary):
            need("a picture", name, extra="eval")
    with pytest.raises(MissingLibrary) as error:
        need("a picture", "pytest", "lm_eval")
    assert str(error.value) == 'a picture needs lm-eval, which is not installed: pip install "lora-on-the-go[eval]"'
    assert isinstance(error.value, (LoGoError, ImportError))
    with pytest.raises(MissingLibrary, match=re.escape("lora-on-the-go[serve]")):
        need("a picture", "lm_eval", extra="serve")


def test_an_import_that_nobody_foresaw_is_explained_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands look for what they need before they begin; where one did not, the import itself is what fails."""

    def late(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr("logo.cli.demo.open_engine", late)
    assert run(["demo"]) == 1
    line = 'logo: error: this command needs peft, which is not installed: pip install "lora-on-the-go[train]"\n'
    assert capsys.readouterr().err == line


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"logo {__version__}\n"
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
