"""The wheel as users get it: built, installed beside the core's libraries alone, and run.

Nothing is downloaded. The libraries of the core and whatever they need are linked from the environment of the tests
into a new one, and pip, which may use no index, checks there that the wheel's requirements are met. `make test-wheel`
does the same with other versions of Python and with what pip downloads.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from logo import __version__
from project import PROJECT, ROOT
from tolerances import PATIENCE

pytestmark = pytest.mark.slow
NAME = f"lora_on_the_go-{__version__}"
USER = ROOT / "tests" / "data" / "typed_user.py"


def done(*command: str | Path, cwd: Path = ROOT) -> str:
    """What a command prints; none of our environment's paths and of pip's settings reach it."""
    outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("PIP_")}
    environment = {**outside, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    found = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=PATIENCE, env=environment, cwd=cwd
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


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


@dataclass(frozen=True)
class Bare:
    """An environment that has the wheel and the core's libraries."""

    python: Path

    @property
    def logo(self) -> Path:
        return self.python.with_name("logo")


@pytest.fixture(scope="module")
def bare(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Bare:
    root = tmp_path_factory.mktemp("bare")
    venv.create(root, with_pip=False, symlinks=True)
    [packages] = root.glob("lib/python3*/site-packages")
    for name in core():
        there = distribution(name)
        for top in {file.parts[0] for file in there.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            link = packages / top
            if not link.exists():
                link.symlink_to(Path(str(there.locate_file(top))))
    made = Bare(root / "bin" / "python")
    wheel = built / f"{NAME}-py3-none-any.whl"
    done(sys.executable, "-m", "pip", "--python", made.python, "install", "--no-index", "--quiet", wheel)
    return made


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
    assert {name.partition("/")[0] for name in names} <= {
        *("src", "pyproject.toml", "PKG-INFO", ".gitignore"),
        *("README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"),
    }
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation")
    done(*pip, "-w", tmp_path, sdist, cwd=tmp_path)
    assert (tmp_path / wheel).read_bytes() == (built / wheel).read_bytes()


def test_the_demo_runs_with_the_core_alone(bare: Bare, tmp_path: Path) -> None:
    assert done(bare.logo, "--version", cwd=tmp_path) == f"logo {__version__}\n"
    said = done(bare.logo, "demo", "--limit", "1", cwd=tmp_path)
    assert "add_numbers" in said and "Your turn: logo generate" in said
    assert not list(tmp_path.iterdir())


def test_the_authors_command_runs_with_the_core_alone(bare: Bare, tmp_path: Path) -> None:
    """On a data set of every metric of theirs, without a word about what is missing."""
    scored = {"bbh.navigate": "Accuracy", "nq.test": "Accuracy", "wmt16.de-en": "BLEU", "gem.e2e_nlg": "ROUGE-1"}
    for dataset in scored:
        rows = tmp_path / "data" / dataset.replace(".", "/") / "test.jsonl"
        rows.parent.mkdir(parents=True)
        gold = ["one", "two"] if dataset.startswith("nq") else "a cat sat on the mat"
        rows.write_text(json.dumps({"context": "What is 7 plus 5?", "completion": gold}) + "\n")
    asked = ["--dataset", ",".join(scored), "--base_model", "demo", "--data_dir", "data", "--gpu", "-1"]
    said = done(bare.python, ROOT / "main.py", *asked, "--max_new_tokens", "2", cwd=tmp_path)
    assert all(label in said for label in scored.values())
    for dataset in scored:
        [record] = tmp_path.glob(f"results/*/{dataset}/run.json")
        assert json.loads(record.read_text())["scores"]["extra"]


# What commands need beyond the core, with the library that is named first and the extra that brings it.
BEYOND = {
    "eval lm-eval --tasks x": ("lm-eval", "eval"),
    "serve --base-model demo": ("starlette", "serve"),
    "serve --base-model demo --engine vllm": ("vllm", "vllm"),
    "train --rows tasks --base-model demo --out made": ("peft", "train"),
}
RUN = """
import contextlib, io, json, sys
from logo.cli.app import run
said = {}
for line in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        said[line] = run(line.split()), err.getvalue()
print(json.dumps(said))
"""


def test_what_is_missing_is_one_line_with_what_to_install(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one.jsonl").write_text('{"context": "a", "completion": "b"}\n' * 8)
    found = json.loads(done(bare.python, "-c", RUN, json.dumps(list(BEYOND)), cwd=tmp_path))
    for line, (library, extra) in BEYOND.items():
        code, said = found[line]
        last = said.splitlines()[-1]
        assert code == 1 and last.startswith("logo: error: "), (line, said)
        assert f'needs {library}, which is not installed: pip install "lora-on-the-go[{extra}]"' in last, (line, said)


def test_a_users_file_runs(bare: Bare, tmp_path: Path) -> None:
    """The type checker reads it with the package (`make lint`), whose wheel says that it has types."""
    said = done(bare.python, USER, cwd=tmp_path)
    assert said.startswith(f"{__version__} {{'add_numbers': ") and "k" in said.splitlines()[-1]
