"""The structure of the package (imports point to lower layers only, without cycles, and light modules stay light), and
the files for servers that users copy."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml

from logo.cli.app import app
from logo.cli.serve_options import ServerOptions
from logo.serve.routes import AppSettings
from order import FIRST
from serving import served
from tolerances import PATIENCE
from vllm_needs import KNOWN

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SRC = ROOT / "src" / "logo"
DEPLOY = ROOT / "deploy"


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, **environment})


# -- structure ---------------------------------------------------------------------------------------------------------

# A part may import itself and the parts of lower layers, which come first. Parts of one layer do not import each other.
LAYERS = [
    {"version"},
    {"errors", "recorded"},
    {"core"},
    {"files", "hub", "plugins"},
    {"models"},
    {"identity"},
    {"adapters", "prompts"},
    {"rows", "prefix_cache", "endings"},
    {"mixing", "selection", "text"},
    {"streams", "state"},
    {"decoding", "opening"},
    {"scoring"},
    {"answering"},
    {"engine"},
    {"api"},
    {"serve", "vllm", "baselines"},
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


def imported_when_loaded(path: Path) -> set[str]:
    """The modules of the package that a file imports outside of functions, those for type checkers included."""
    modules: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.ImportFrom):
            modules |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            waiting += ast.iter_child_nodes(node)
    return modules


def test_no_files_import_each_other_in_a_circle() -> None:
    """Nor do those of one part. `logo` itself is left out: it imports what it names when that is asked for."""
    files = {".".join(path.relative_to(SRC.parent).with_suffix("").parts): path for path in SRC.rglob("*.py")}
    files = {name.removesuffix(".__init__"): path for name, path in files.items() if name != "logo.__init__"}
    graph = {name: imported_when_loaded(path) & (files.keys() - {name}) for name, path in files.items()}
    assert graph["logo.selection.scorer"] >= {"logo.selection.index", "logo.adapters.pool"}
    TopologicalSorter(graph).prepare()  # raises an error that names the circle


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import logo; logo.UsageError; logo.__version__", "torch transformers huggingface_hub"),
        ("from logo.cli.app import run; run(['--help'])", "torch transformers huggingface_hub nltk safetensors"),
        # vLLM's workers have none of our server's libraries, and our server has none of vLLM's.
        ("import logo.api.names", "starlette fastapi uvicorn prometheus_client vllm logo.api.guards"),
    ],
)
def test_light_modules_import_nothing_heavy(code: str, heavy: str) -> None:
    code += f"; import sys; assert not {set(heavy.split())} & set(sys.modules)"
    assert run(sys.executable, "-c", code).returncode == 0


def test_the_public_api_is_what_it_says() -> None:
    import logo

    for name in logo.__all__:
        assert getattr(logo, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Logo'"):
        _ = logo.Logo


# -- what is committed -------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="this is no checkout")
def test_only_assets_are_large() -> None:
    """The limit and the folders of assets are those of the hook."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    [hook] = [hook for repo in hooks for hook in repo["hooks"] if hook["id"] == "check-added-large-files"]
    [limit] = [int(argument.removeprefix("--maxkb=")) for argument in hook["args"]]
    committed = run("git", "-c", "safe.directory=*", "-C", ROOT, "ls-files", "-z").stdout.split("\0")
    sizes = {name: (ROOT / name).stat().st_size for name in committed if (ROOT / name).is_file()}
    large = {name for name, size in sizes.items() if size > limit * 1024}
    assert limit == 200 and len(sizes) > 300
    assert {name for name in large if not re.search(hook["exclude"], name)} == set()
    assert "src/logo/demo/assets/model/model.safetensors" in large


# -- which tests run, and when ---------------------------------------------------------------------------------------


def test_the_files_that_come_first_are_there() -> None:
    assert set(FIRST) <= {path.name for path in TESTS.rglob("test_*.py")}


# -- files for servers -------------------------------------------------------------------------------------------------


def parsed(arguments: list[str]) -> ServerOptions:
    """The options of a server; raises if these are no arguments of `logo`."""
    _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    found: ServerOptions = bound.arguments.get("server", ServerOptions())
    return found


@pytest.mark.slow
def test_the_examples_run() -> None:
    with served("--base-model", "demo", key="secret") as server:
        said = run("sh", ROOT / "examples" / "serve_curl.sh", LOGO_URL=server.url, LOGO_API_KEY="secret").stdout
        assert said.count('"add_numbers"') >= 2
        assert '"text":" 12"' in said and "data: [DONE]" in said and '"completion_tokens"' in said
        openai = run(sys.executable, ROOT / "examples" / "serve_openai.py", server.url, LOGO_API_KEY="secret")
        lines = openai.stdout.splitlines()
        assert [line.split(":")[0] for line in lines] == ["logo", "base", "forced"]
        assert "12 ['add_numbers'" in lines[0]


def test_the_unit_starts_the_server_and_gives_it_time_to_end() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "logo.service")
    service = unit["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[0].endswith("/bin/logo")
    options = parsed(command[1:])
    assert options.host == "127.0.0.1"  # what is not asked for is not open to the network
    assert float(service["TimeoutStopSec"]) > AppSettings("demo").request_timeout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "logo.service").read_text().replace("/opt/logo/.venv/bin/logo", "/bin/true")
    (tmp_path / "logo.service").write_text(text)
    found = run("systemd-analyze", "verify", "--man=no", "--recursive-errors=no", tmp_path / "logo.service")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.vllm"])
def test_the_dockerfile_passes_its_linter_and_starts_the_server_on_the_port_that_it_opens(name: str) -> None:
    found = run(Path(sys.executable).parent / "hadolint", DEPLOY / name)
    assert found.returncode == 0, found.stdout
    text = (DEPLOY / name).read_text()
    said = {word: json.loads(arguments) for word, arguments in re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.M)}
    command = [*said["ENTRYPOINT"], *said["CMD"]]
    assert command[0] == "logo"
    options = parsed(command[1:])
    assert (options.host, f"EXPOSE {options.port}") == ("0.0.0.0", re.findall(r"^EXPOSE.*$", text, re.M)[0])
    assert f"127.0.0.1:{options.port}/health" in text
    [version] = re.findall(r"^FROM vllm/vllm-openai:v(\d+\.\d+)", text, re.M) or [""]
    assert (options.server, version in KNOWN) == (("vllm", True) if "vllm" in name else ("local", False))
