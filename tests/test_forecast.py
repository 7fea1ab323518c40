"""`logo evaluate --estimate`: beside what is really fetched, loaded and written."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import make_adapters
import tiny
from hub_server import HubServer
from logo.adapters.places import parse_places
from logo.adapters.sizes import pool_sizes, weight_sizes
from logo.cli.run import run
from logo.demo import adapters_dir, heldout, model_dir
from logo.evaluation.forecast import memory_of, timed
from logo.models import load_base, model_sizes
from test_engine import tokenizer
from tolerances import PATIENCE
from warm import python

BASE, POOL = "meta-llama/Llama-3.1-8B", "archon159/LoGo-loras-collection"


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories of the official names, with a tiny model and other things that are not needed of them."""
    root = tmp_path_factory.mktemp("hub")
    tiny.model("llama").save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    (root / "base" / "original").mkdir()
    (root / "base" / "original" / "consolidated.safetensors").write_bytes(b"x" * 1_000_000)
    for folder in ("Llama-3.1-8B-loras-flanv2", "Qwen2.5-7B-loras-flanv2"):
        for seed in range(3):
            make_adapters.write_peft(root / "pool" / folder / f"flanv2.t{seed}", seed=seed)
    rows = [{"context": f"w{i} w{2 * i} w{60 - i}", "completion": "w9"} for i in range(3, 23)]
    (root / "data" / "bbh" / "navigate").mkdir(parents=True)
    (root / "data" / "bbh" / "navigate" / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def logo(home: Path, *arguments: str, env: dict[str, str]) -> Any:
    """The JSON that a command prints, in a process of its own."""
    command = [
        "evaluate",
        "--base_model",
        "Llama-3.1-8B",
        "--device",
        "cpu",
        "--max-new-tokens",
        "4",
        "--json",
        *arguments,
    ]
    code = "from logo.cli import main; main()"
    done = subprocess.run(
        [*python(), "-c", code, *command], cwd=home, env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def size(folder: Path, *names: str) -> int:
    return sum(path.stat().st_size for name in names for path in folder.rglob(name))


@pytest.mark.slow
@pytest.mark.long
def test_downloads_are_told_before_and_are_nothing_afterwards(official: Path, tmp_path: Path) -> None:
    """What is said to be missing is what is fetched; an estimate fetches a configuration at most and writes nothing."""
    arguments = ("--data-dir", str(official / "data"), "--limit", "3", "--n_selected_modules", "2")
    with HubServer({BASE: official / "base", POOL: official / "pool"}) as hub:
        env = {**os.environ, **hub.env(home=tmp_path / "home")}
        before = logo(tmp_path, *arguments, "--estimate", env=env)
        fetched = {request.file for request in hub.requests if request.kind == "content"}
        assert fetched <= {"config.json"} and not (tmp_path / "results").exists()
        logo(tmp_path, *arguments, env=env)
        after = logo(tmp_path, *arguments, "--estimate", env=env)
    held = official / "base"
    needed = size(held, "config.json", "generation_config.json", "tokenizer*.json", "model.safetensors")
    assert before["base_model"]["total"] == before["base_model"]["missing"] == needed
    pool = official / "pool" / "Llama-3.1-8B-loras-flanv2"
    weights, configs = size(pool, "adapter_model.safetensors"), size(pool, "adapter_config.json")
    assert before["adapters"]["missing"] == before["adapters"]["total"] == weights + configs
    assert before["adapters"]["source"] == f"{POOL}/Llama-3.1-8B-loras-flanv2"
    assert before["rows"] == {"bbh.navigate": 3}
    assert (
        before["hours"] is None
        and "can only be timed if base model and adapters are on this machine" in before["hours_reason"]
    )
    assert before["memory"]["adapters"] == weights and before["memory"]["mixed"] == 2 * (weights // 3)
    assert not before["memory"]["exact"] and after["memory"]["exact"]
    assert before["memory"]["weights"] == after["memory"]["weights"]
    assert after["base_model"]["missing"] == after["adapters"]["missing"] == 0
    assert after["hours"]["timed"] == 2 and after["hours"]["seconds"] > 0  # the first of three warms up
    offline = logo(tmp_path, *arguments, "--estimate", env={**env, "HF_HUB_OFFLINE": "1"})
    assert offline["base_model"] == after["base_model"] and offline["memory"] == after["memory"]


@pytest.mark.slow
def test_without_a_connection_what_is_not_known_is_said(official: Path, tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    found = logo(tmp_path, "--data-dir", str(official / "data"), "--estimate", env=env)
    for part in ("base_model", "adapters"):
        assert (found[part]["total"], found[part]["missing"]) == (None, None)
        assert "HF_HUB_OFFLINE=1 forbids" in found[part]["reason"]
    assert found["memory"] is None and "HF_HUB_OFFLINE=1 forbids" in found["memory_reason"]
    assert found["rows"] == {"bbh.navigate": 20} and not (tmp_path / "results").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_what_a_loaded_model_takes(dtype: str) -> None:
    """Weights and the cache of a batch, in bytes, beside the real ones."""
    model, _ = load_base("demo", device="cpu", dtype=dtype)
    found = memory_of(model.config, dtype, rows=3, tokens=17, exact=True, adapters=[10, 20], budget=25, k=1)
    assert found.parameters == model.num_parameters()
    assert found.weights == sum(p.nelement() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        cache = model(torch.ones(3, 17, dtype=torch.long), use_cache=True).past_key_values
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert found.keys_and_values == sum(tensor.nelement() * tensor.element_size() for tensor in held)
    assert (found.adapters, found.mixed) == (25, 30)  # three rows may want both of the two
    assert found.total == found.weights + found.keys_and_values + 55
    found = memory_of(model.config, dtype, rows=2, tokens=17, exact=True, adapters=[10, 1, 30, 2], budget=None, k=1)
    assert found.mixed == 40  # the two largest


def test_a_shard_without_rows_is_no_trouble(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "antonym.jsonl").write_text(json.dumps(heldout()["antonym"][0]))
    command = ["evaluate", "--estimate", "--base-model", "demo", "--device", "cpu", "--rows", str(tmp_path)]
    assert run([*command, "--shard", "2/2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == {"antonym": 0} and found["hours"]["timed"] == 0
    for method, mixed in ((["base"], 0), (["random", "-k", "3"], 3), (["uniform"], 16), (["seqr"], 16)):
        assert run([*command, "--method", *method, "--json"]) == 0
        memory = json.loads(capsys.readouterr().out)["memory"]
        assert memory["mixed"] == mixed * (memory["adapters"] // 16)


def test_an_adapter_in_both_formats_is_one(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name, bytes_ in (("adapter_config.json", 2), ("adapter_model.safetensors", 5), ("adapter_model.bin", 7)):
        (tmp_path / "a" / name).write_bytes(bytes(bytes_))
    assert weight_sizes(pool_sizes(parse_places(tmp_path), allow_pickle=True)) == [5]
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    assert weight_sizes(pool_sizes(parse_places(tmp_path), allow_pickle=True)) == [7]


def test_sizes_of_folders(tmp_path: Path) -> None:
    found = pool_sizes(parse_places(adapters_dir()))
    assert found.missing == 0 and len(weight_sizes(found)) == 16
    assert found.total == size(adapters_dir(), "adapter_model.safetensors", "adapter_config.json", "examples.jsonl")
    assert model_sizes(str(model_dir())).total == size(model_dir(), "*.safetensors", "*.json")


@pytest.mark.slow
@pytest.mark.parametrize("method", [[], ["--method", "uniform"], ["--method", "best-single", "--shots", "1"]])
def test_lines_on_the_demo(method: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours are counted up from rows that were answered, with what a method prepares; no folder appears."""
    for part, rows in (("rows", heldout()["antonym"][:20]), ("train", heldout()["antonym"][20:24])):
        (tmp_path / part).mkdir()
        (tmp_path / part / "antonym.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ["evaluate", "--estimate", "--base-model", "demo", "--device", "cpu", "--rows", str(tmp_path / "rows")]
    options = ["--train-rows", str(tmp_path / "train"), "--max-new-tokens", "2", "--batch-size", "4", *method]
    results = ["--result-dir", str(tmp_path / "results")]
    assert run([*command, *options, *results]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rows", "20", "in", "1", "dataset"]
    assert lines[1].startswith("base model  demo: ") and lines[1].endswith(", nothing to download")
    assert "1,890,816 parameters in float32" in lines[4] and "4 rows of " in lines[5]
    assert "from 8 rows timed" in lines[-1]
    assert run([*command, *options, *results, "--json"]) == 0
    hours = json.loads(capsys.readouterr().out)["hours"]
    assert hours["seconds"] == pytest.approx(hours["loading"] + hours["once"] + hours["learning"] + 20 * hours["row"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows", "train"]


class Clocked:
    """A session on a clock of its own: its method takes 100 s for the first dataset and 4 s for every other one, and
    each row takes 2 s."""

    method, loading, batch_size, max_new_tokens = object(), 10.0, 2, 4

    def __init__(self, learns: bool) -> None:
        self.learns, self.now = learns, 0.0
        self.prepared: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def answering(self, job: Any) -> Any:
        self.now += 4.0 if self.prepared else 100.0
        self.prepared.append(job.dataset)
        return self

    def generate(self, prompts: list[str], **_: Any) -> None:
        self.now += 2.0 * len(prompts)


@pytest.mark.parametrize(
    ("learns", "datasets", "prepared", "once", "each"),
    [
        (False, 3, ["0", "1"], 96.0, 4.0),  # such as LoRAuter, whose tables are the same for all datasets
        (True, 3, ["0"], 0.0, 100.0),  # such as LoraHub, which learns from the rows of each
        (False, 1, ["0"], 0.0, 100.0),
    ],
)
def test_what_a_method_finds_out_once_counts_once(
    learns: bool, datasets: int, prepared: list[str], once: float, each: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    session: Any = Clocked(learns)
    monkeypatch.setattr("logo.evaluation.forecast.time", session)
    row = SimpleNamespace(prompt="x")
    jobs: Any = [SimpleNamespace(dataset=str(i), rows=[row] * 5, places=range(5)) for i in range(datasets)]
    found = timed(session, jobs)
    assert (session.prepared, found.once, found.learning, found.row) == (prepared, once, each, 2.0)
    assert found.seconds == 10 + once + each * datasets + 2 * 5 * datasets


def test_a_pool_that_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "antonym.jsonl").write_text(json.dumps(heldout()["antonym"][0]))
    command = ["evaluate", "--estimate", "--base-model", "demo", "--adapters", "/nowhere/at/all"]
    assert run([*command, "--rows", str(tmp_path)]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().err
