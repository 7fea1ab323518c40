"""The cache folder: whole files or none, and what was computed from files that have changed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.errors import AdapterError
from logo.files import Store, write_cached
from logo.identity import content_stamp
from logo.selection.calibration import Reading
from logo.selection.signals import get_signal
from logo.selection.texts import Texts
from logo.vllm.skeleton import skeleton
from test_engine import tokenizer, write_adapter
from tolerances import same_selection


def test_a_file_that_cannot_be_written_leaves_no_part_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.warns(UserWarning, match="nothing can be kept in .*: full; it is computed anew each time"):
            assert not write_cached(tmp_path, "folder/one.json", b"[1]")
    assert not list((tmp_path / "folder").iterdir())
    assert write_cached(tmp_path, "folder/one.json", b"[1]")
    assert {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()} == {"one.json": b"[1]"}


# -- weights that are rewritten in place ---------------------------------------------------------------------------


def opened(model: nn.Module, folder: Path, signal: str, cache: Path) -> LoGo:
    settings = SelectionSettings(signal=signal, k=1, cache=str(cache))
    return LoGo(model, tokenizer(), AdapterPool.open(folder), settings=settings)


def touched(file: Path, content: bytes | None) -> None:
    """Writes to a file in place (None: only changes its mode) until its change time is another one, and sets its
    modification time back."""
    before = file.stat()
    while file.stat().st_ctime_ns == before.st_ctime_ns:
        if content is None:
            file.chmod(0o600)
        else:
            with file.open("r+b") as open_file:
                open_file.write(content)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_stamp(file)[:3] == (before.st_size, before.st_mtime_ns, before.st_ino)


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
def test_weights_rewritten_in_place_with_size_and_time_kept_are_noticed(signal: str, tmp_path: Path) -> None:
    model = tiny.model("llama", num_hidden_layers=6)
    for i in range(3):
        write_adapter(tmp_path / "pool" / f"t{i}", model, ("q_proj", "v_proj"), rank=2, seed=i)
    write_adapter(tmp_path / "other", model, ("q_proj", "v_proj"), rank=2, seed=9, scale=30)
    file = tmp_path / "pool" / "t1" / "adapter_model.safetensors"
    logo = opened(model, tmp_path / "pool", signal, tmp_path / "cache")
    before = logo.select("w3 w4 w5")
    touched(file, (tmp_path / "other" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=r"'t1'.*it has changed since it was opened; open the pool again"):
        logo.generate("w3", adapters={"t1": 1.0}, max_new_tokens=1)
    again = opened(model, tmp_path / "pool", signal, tmp_path / "cache").select("w3 w4 w5")
    same_selection(again, opened(model, tmp_path / "pool", signal, tmp_path / "none").select("w3 w4 w5"))
    assert abs(again.scores["t1"] - before.scores["t1"]) > 1e-3


def test_a_new_mode_is_no_change_of_weights_whose_digest_is_known(tmp_path: Path) -> None:
    model = tiny.model("llama", num_hidden_layers=6)
    for i in range(2):
        write_adapter(tmp_path / f"t{i}", model, ("q_proj",), rank=2, seed=i)
    logo = opened(model, tmp_path, "calibrated", tmp_path / "cache")
    logo.calibrate()
    for i in range(2):
        touched(tmp_path / f"t{i}" / "adapter_model.safetensors", None)
    assert logo.generate("w3", adapters={"t1": 1.0}, max_new_tokens=1).token_ids


ASKED = """
import sys
from logo.identity import of_content

def find():
    print("asked", end=" ")
    return open(sys.argv[1]).read().strip()

print(*(of_content(sys.argv[1], "says", find) for _ in range(2)))
"""


def asked(file: Path, cache: Path) -> str:
    """What a new process says of a file's content, and whether it had to read it."""
    env = {**os.environ, "LOGO_CACHE": str(cache)}
    found = subprocess.run([sys.executable, "-c", ASKED, file], env=env, capture_output=True, text=True, check=True)
    return found.stdout.strip() + (" (warned)" if "is damaged and computed anew" in found.stderr else "")


def test_what_a_file_holds_is_found_out_once_by_all_processes(tmp_path: Path) -> None:
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_text("one")
    assert [asked(file, cache) for _ in range(2)] == ["asked asked one one"] * 2  # it may change without another stamp
    while time.time_ns() - file.stat().st_ctime_ns < 2.1e9:
        time.sleep(0.1)
    assert [asked(file, cache) for _ in range(2)] == ["asked one one", "one one"]
    [kept] = (cache / "files").iterdir()
    kept.write_bytes(b"\0" * 8)  # as a power cut leaves it
    assert [asked(file, cache) for _ in range(2)] == ["asked one one (warned)", "one one"]
    touched(file, b"two")
    assert asked(file, cache) == "asked asked two two"


# -- the base model in the key of a calibration -----------------------------------------------------------------


def key_of(model: nn.Module) -> str:
    return Reading.of(model, get_signal("calibrated"), Texts([[3, 4, 5]], [[8, 9]]), Store(None)).key


def packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of layers under the names and in the integers of a quantised checkpoint."""
    return {
        name.replace("proj.weight", "proj.weight_packed"): (100 * tensor).to(torch.int32) if "proj" in name else tensor
        for name, tensor in tensors.items()
    }


def without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}


def checkpoint(folder: Path, model: Any, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> str:
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(("name", "change"), [("llama", dict), ("llama", packed), ("gpt2", without_prefix)])
def test_each_checkpoint_has_its_own_key(
    name: str, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], tmp_path: Path
) -> None:
    """Also where the checkpoint has other names for its tensors than transformers, as quantised ones do."""
    model, other = tiny.model(name), tiny.model(name)
    layers = other.model.layers if name == "llama" else other.transformer.h  # type: ignore[union-attr]
    next(module for module in layers[1].modules() if hasattr(module, "weight") and module.weight.dim() > 1).weight += 1
    folders = [checkpoint(tmp_path / str(i), m, change) for i, m in enumerate((model, other, model))]
    one, changed, again = (key_of(skeleton(folder, torch.float32)) for folder in folders)
    assert one == again != changed
    assert (one == key_of(model)) == (change is dict)


def test_weights_in_buffers_are_in_the_key() -> None:
    """Layers of GPTQ and AWQ have no parameters. Buffers that are not saved follow from the configuration."""
    keys = []
    for kept, value in ((True, 0.0), (True, 1.0), (False, 0.0), (False, 1.0)):
        model = tiny.model("llama")
        linear = model.get_submodule("model.layers.1.self_attn.q_proj")
        linear.register_buffer("scales", torch.full((4,), value), persistent=kept)
        keys.append(key_of(model))
    assert keys[0] != keys[1]
    assert keys[2] == keys[3] == key_of(tiny.model("llama"))


@pytest.mark.parametrize("buffers", [False, True])
def test_an_offloaded_model_has_the_key_that_it_has_in_memory(buffers: bool) -> None:
    model, other = tiny.model("llama"), tiny.model("llama")
    for one in (model, other):
        one.register_buffer("scales", torch.ones(4))
    with torch.no_grad():
        other.get_submodule("model.layers.1.self_attn.q_proj").weight += 1  # type: ignore[operator]
    before = key_of(model), key_of(other)
    assert before[0] != before[1]
    for one in (model, other):
        accelerate.cpu_offload(one, execution_device=torch.device("cpu"), offload_buffers=buffers)
        assert one.get_parameter("model.layers.1.self_attn.q_proj.weight").is_meta
    assert (key_of(model), key_of(other)) == before
