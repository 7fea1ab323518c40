"""Base models by name, and the official command line against a Hub that holds the official names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hub_server import GOOD_TOKEN, HubServer
from logo import LoGo, ModelError, UsageError
from logo.adapters.pool import officially_named, open_pool
from logo.adapters.sources import parse_sources
from logo.models import load_base, pick_device, resolve_base
from tolerances import PATIENCE
from warm import python

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).parent / "data"
F1 = DATA / "golden" / "F1"


def test_names(tmp_path: Path) -> None:
    assert resolve_base("Llama-3.1-8B") == "meta-llama/Llama-3.1-8B"
    assert resolve_base("someone/model") == "someone/model"
    assert resolve_base(str(F1 / "model")) == str(F1 / "model")
    local = tmp_path / "Llama-3.1-8B"
    local.mkdir()
    assert resolve_base("Llama-3.1-8B", tmp_path) == "meta-llama/Llama-3.1-8B"  # an empty folder is no model
    (local / "config.json").write_text("{}")
    assert resolve_base("Llama-3.1-8B", tmp_path) == str(local)
    with pytest.raises(ModelError, match=r"did you mean 'Llama-3.1-8B'\?"):
        resolve_base("llama-3.1-8B")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        resolve_base(str(tmp_path))


def test_published_adapters_in_model_dir_come_before_the_hub(tmp_path: Path) -> None:
    (tmp_path / "Qwen2.5-7B-loras-flanv2").symlink_to(F1 / "adapters", target_is_directory=True)
    for name in ("Qwen2.5-7B", "Qwen/Qwen2.5-7B"):
        assert len(open_pool(None, name, tmp_path)) == 12
    with pytest.raises(UsageError, match="has no adapters of its own"):
        open_pool(None, str(F1 / "model"))


def test_a_published_pool_has_the_official_names_wherever_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = shutil.copytree(F1 / "adapters", tmp_path / "Llama-3.1-8B-loras-flanv2")
    monkeypatch.chdir(home)
    for place in (".", str(home)):
        pool = officially_named(open_pool(place, "Llama-3.1-8B"), "Llama-3.1-8B", parse_sources(place))
        assert pool.names[0] == "Llama-3.1-8B-loras-flanv2/ad00"


def test_device_and_dtype() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match="expected 'auto', 'cpu'"):
        pick_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="this machine has no GPU; use device 'cpu'"):
            pick_device("cuda:0")
    model, _ = load_base(str(F1 / "model"), device="cpu", dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("damage", ["weights", "config", "pickled"])
def test_a_model_that_cannot_be_loaded_is_one_line(tmp_path: Path, damage: str) -> None:
    for path in (F1 / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "model.safetensors"
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "config":
        (tmp_path / "config.json").write_text("{")
    else:
        weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_base(str(tmp_path), device="cpu")
    assert "\n" not in str(caught.value)


def test_a_wrong_base_is_refused_with_both_shapes(tmp_path: Path) -> None:
    import tiny

    tiny.model("qwen2").save_pretrained(tmp_path)
    for path in (F1 / "model").glob("*token*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"'ad00': does not fit .*adapter 64 -> 64, base 32 -> 32.*11 more bad"):
        LoGo.from_pretrained(str(tmp_path), F1 / "adapters", device="cpu")


def test_the_official_command_downloads_model_and_adapters(tmp_path: Path) -> None:
    """`python3 main.py --dataset D --base_model Llama-3.1-8B --gpu 0`, gated model and 12 of "260" adapters."""
    collection = tmp_path / "collection"
    for adapter in (F1 / "adapters").iterdir():
        shutil.copytree(adapter, collection / "Llama-3.1-8B-loras-flanv2" / f"flanv2.{adapter.name}")
    repos = {"meta-llama/Llama-3.1-8B": F1 / "model", "archon159/LoGo-loras-collection": collection}
    command = [
        *(*python(), str(ROOT / "main.py"), "--dataset", "bbh.word_sorting", "--base_model", "Llama-3.1-8B"),
        *("--gpu", "0" if not torch.cuda.is_available() else "-1", "--data_dir", str(DATA), "--limit", "1"),
    ]
    with HubServer(repos, gated=["meta-llama/Llama-3.1-8B"]) as hub:
        env = {**os.environ, **hub.env(tmp_path / "home")}
        env.pop("HF_TOKEN", None)
        refused = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE)
        assert refused.returncode == 1 and "accept the licence" in refused.stderr.splitlines()[-1]
        assert "Traceback" not in refused.stderr and not list((tmp_path / "results").rglob("*.json"))
        env["HF_TOKEN"] = GOOD_TOKEN
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0, done.stderr
    folder = "results/Llama-3.1-8B_selection_norm_n_20_seed_0/bbh.word_sorting"
    assert done.stdout.splitlines()[-1] == folder
    selected = json.loads((tmp_path / folder / "selected_loras.json").read_text())
    assert sorted(selected[0]) == [f"Llama-3.1-8B-loras-flanv2/flanv2.ad{i:02}" for i in range(12)]
    assert GOOD_TOKEN not in (tmp_path / folder / "run.json").read_text()
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    again = subprocess.run(command, cwd=tmp_path, env=offline, capture_output=True, text=True, timeout=PATIENCE)
    assert again.returncode == 0 and again.stdout == done.stdout
