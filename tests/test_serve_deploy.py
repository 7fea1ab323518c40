"""Files that users copy: the examples run, the unit starts what it says, the Dockerfile passes its linter."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from logo.cli.app import app
from logo.cli.serve_options import ServerOptions
from logo.serve.app import AppSettings
from serving import served
from tolerances import PATIENCE

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from vllm_needs import KNOWN

ROOT = Path(__file__).parent.parent


def run(*command: str, **environment: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=True, env={**os.environ, **environment}
    ).stdout


def parsed(arguments: list[str]) -> ServerOptions:
    """The options of a server; raises if these are no arguments of `logo`."""
    _, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    found: ServerOptions = bound.arguments.get("server", ServerOptions())
    return found


@pytest.mark.slow
def test_the_examples_run() -> None:
    with served("--base-model", "demo", key="secret") as server:
        said = run("sh", str(ROOT / "examples" / "serve_curl.sh"), LOGO_URL=server.url, LOGO_API_KEY="secret")
        assert said.count('"add_numbers"') >= 2
        assert '"text":" 12"' in said and "data: [DONE]" in said and '"completion_tokens"' in said
        said = run(sys.executable, str(ROOT / "examples" / "serve_openai.py"), server.url, LOGO_API_KEY="secret")
        lines = said.splitlines()
        assert [line.split(":")[0] for line in lines] == ["logo", "base", "forced"]
        assert "12 ['add_numbers'" in lines[0]


def test_the_unit_starts_the_server_and_gives_it_time_to_end() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy" / "logo.service")
    service = unit["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[0].endswith("/bin/logo")
    options = parsed(command[1:])
    assert options.host == "127.0.0.1"  # what is not asked for is not open to the network
    assert float(service["TimeoutStopSec"]) > AppSettings("demo").request_timeout


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed here")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "logo.service").read_text().replace("/opt/logo/.venv/bin/logo", "/bin/true")
    (tmp_path / "logo.service").write_text(text)
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(tmp_path / "logo.service")],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.vllm"])
def test_the_dockerfile_passes_its_linter(name: str) -> None:
    linter = Path(sys.executable).parent / "hadolint"
    found = subprocess.run([linter, str(ROOT / "deploy" / name)], capture_output=True, text=True, timeout=PATIENCE)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.vllm"])
def test_the_dockerfile_starts_the_server_on_the_port_that_it_opens(name: str) -> None:
    text = (ROOT / "deploy" / name).read_text()
    said = {word: json.loads(arguments) for word, arguments in re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", text, re.M)}
    command = [*said["ENTRYPOINT"], *said["CMD"]]
    assert command[0] == "logo"
    options = parsed(command[1:])
    assert (options.host, f"EXPOSE {options.port}") == ("0.0.0.0", re.findall(r"^EXPOSE.*$", text, re.M)[0])
    assert f"127.0.0.1:{options.port}/health" in text
    [version] = re.findall(r"^FROM vllm/vllm-openai:v(\d+\.\d+)", text, re.M) or [""]
    assert (options.server, version in KNOWN) == (("vllm", True) if "vllm" in name else ("local", False))
