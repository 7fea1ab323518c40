"""Manifests of pools in folders: what `logo pool lock` records, and what is checked when one is opened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from logo import AdapterPool, PoolError
from logo.adapters.examples import write_examples
from logo.adapters.manifest import Manifest, read_manifest
from logo.adapters.sources import default_k, parse_sources
from logo.cli.app import run
from logo.errors import HubError, UsageError
from make_adapters import edit_config, write_peft

NAMES = ("a", "b", "c")
SKIP = ["--on-bad-adapter", "skip"]


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool in the current folder, of which `b` has two examples."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        write_peft(Path("mine", name), seed=seed)
    write_examples(Path("mine/b"), ["one", "two"])
    return Path("mine")


def locked(*places: str) -> Manifest:
    """The manifest of these places, written over an earlier one."""
    assert run(["pool", "lock", *(places or ["mine"]), "--save", "pool.yaml", "--overwrite"]) == 0
    return read_manifest(Path("pool.yaml"))


def refusal() -> str:
    with pytest.raises(PoolError) as caught:
        AdapterPool.open("pool.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_manifest_describes_adapters(pool: Path) -> None:
    """A description of the adapter's folder gives way to the manifest's, which stays when it is written again."""
    (pool / "a" / "logo.yaml").write_text("description: Its own.\n")
    assert [entry.description for entry in locked().entries] == ["Its own.", None, None]
    keys = [adapter.key for adapter in AdapterPool.open("pool.yaml")]
    file = Path("pool.yaml")
    file.write_text(
        file.read_text().replace("description: Its own.", "description: Said here.") + "  description: C.\n"
    )
    opened = AdapterPool.open("pool.yaml")
    assert [adapter.description for adapter in opened] == ["Said here.", None, "C."]
    assert [adapter.key == key for adapter, key in zip(opened, keys, strict=True)] == [False, True, False]
    ignored = AdapterPool.open("pool.yaml", examples="ignore")
    assert all(adapter.description is None for adapter in ignored)
    assert [entry.description for entry in locked("pool.yaml").entries] == ["Said here.", None, "C."]
    assert [entry.description for entry in locked("mine").entries] == ["Said here.", None, "C."]
    file.write_text("adapters:\n- {source: mine/a, description: [word]}\n")
    with pytest.raises(UsageError, match=r"entry 1: description: expected a text, found \['word'\]"):
        AdapterPool.open("pool.yaml")


def test_a_manifest_gives_the_same_weights_or_says_what_changed(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [(entry.name, entry.source) for entry in locked().entries] == [(name, f"./mine/{name}") for name in NAMES]
    assert "pool.yaml: 3 adapters" in capsys.readouterr().out
    opened, same = AdapterPool.open("pool.yaml"), AdapterPool.open("mine")
    assert opened.sha256() == same.sha256() and opened["b"].examples == ("one", "two")
    # As after `rsync --inplace --times` or `cp -p` onto the file.
    file = pool / "a" / "adapter_model.safetensors"
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write((pool / "b" / file.name).read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert "adapter_model.safetensors is not the one in the manifest: expected sha256" in refusal()
    assert refusal().startswith("adapter 'a': ") and "write the manifest again (`logo pool lock`)" in refusal()
    assert AdapterPool.open("pool.yaml", on_bad_adapter="skip").names == ("b", "c")
    locked()
    assert AdapterPool.open("pool.yaml").names == NAMES
    assert run(["pool", "lock", "mine", "--save", "pool.yaml"]) == 2
    assert "exists already; choose another name, or add --overwrite" in capsys.readouterr().err


def test_a_manifest_notices_other_example_prompts(pool: Path) -> None:
    locked()
    write_examples(pool / "b", ["one", "three"])
    assert refusal().startswith("adapter 'b': examples.jsonl is not the one in the manifest: expected examples_sha256 ")


@pytest.mark.parametrize("change", ["lora_alpha", "pool.json"])
def test_a_manifest_notices_what_changes_the_effect_of_the_same_weights(pool: Path, change: str) -> None:
    locked()
    if change == "pool.json":
        (pool / change).write_text('{"activation": "last:4"}')
    else:
        edit_config(pool / "a", lora_alpha=99)
    what = "adapter_config.json, or a pool.json in or above its folder, is not the one in the manifest: expected digest"
    assert refusal().startswith(f"adapter 'a': {what} ") and "write the manifest again (`logo pool lock`)" in refusal()
    write_examples(pool / "a", ["another"])  # which are no part of it
    locked()
    assert AdapterPool.open("pool.yaml").digest == AdapterPool.open("mine").digest


def test_an_entry_that_is_no_folder_beside_the_manifest_is_on_the_hub(pool: Path) -> None:
    """Whatever folders the working directory has."""
    write_peft(Path("org/a"))
    Path("sub").mkdir()
    Path("sub/pool.yaml").write_text("adapters: [org/a]")
    with pytest.raises(HubError, match="Hub repo org/a"):
        AdapterPool.open("sub/pool.yaml", local_files_only=True, cache_dir="hub")
    Path("sub/pool.yaml").write_text("adapters: [mine]")
    with pytest.raises(PoolError, match=r"adapter 'mine': no adapters in .*sub/mine: No such file"):
        AdapterPool.open("sub/pool.yaml")


def test_an_entry_without_a_name_is_opened_as_its_folder_is(pool: Path) -> None:
    write_peft(pool / "a" / "checkpoint-100", seed=9)
    Path("plain.yaml").write_text("adapters:\n- ./mine\n")
    for place in ("mine", "plain.yaml"):
        opened = AdapterPool.open(place)
        assert opened.names == NAMES and [error.name for error in opened.refused] == ["a/checkpoint-100"]


def test_example_prompts_of_a_manifest(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are stored in it, count instead of those beside the adapter, and stay when it is written again."""
    locked()
    Path("x.jsonl").write_text('{"prompt": "hello"}\n')
    assert run(["pool", "examples", "pool.yaml", "a", "x.jsonl"]) == 0
    assert AdapterPool.open("pool.yaml")["a"].examples == ("hello",)
    for place in ("mine", "pool.yaml"):
        assert [entry.examples for entry in locked(place).entries] == [("hello",), None, None]
    Path("hand.yaml").write_text("adapters: [./mine/a, {source: ./mine/b, name: b, examples: []}]")
    assert AdapterPool.open("hand.yaml")["b"].examples == ()
    capsys.readouterr()
    assert run(["pool", "examples", "hand.yaml", "a", "x.jsonl"]) == 2
    assert "no entry has the name 'a', so it has no place for examples" in capsys.readouterr().err


def test_example_prompts_that_were_written_by_hand_stay(pool: Path) -> None:
    """Also of entries without a name; those of a source count more than those of the manifest that is replaced."""
    by_hand, save = Path("hand.yaml"), Path("pool.yaml")
    by_hand.write_text("adapters: [{source: ./mine/a, examples: [x, y]}, {source: ./mine/b, examples: []}, ./mine/c]")
    for place, file in (("hand.yaml", save), ("mine", by_hand), ("hand.yaml", by_hand)):
        assert run(["pool", "lock", place, "--save", str(file), "--overwrite"]) == 0
        assert [entry.examples for entry in read_manifest(file).entries] == [("x", "y"), (), None]
    Path("other.yaml").write_text("adapters: [{source: ./mine/a, examples: [z]}, ./mine/b]")
    assert [entry.examples for entry in locked("other.yaml").entries] == [("z",), ()]


def test_the_same_pool_has_one_k_however_it_is_named(pool: Path) -> None:
    (pool / "pool.json").write_text('{"k": 2}')
    locked()
    for place in ("mine", "pool.yaml", ["mine"]):
        assert AdapterPool.open(place).default_k == 2
        assert default_k(parse_sources(place), 20) == 2  # known before the pool is opened
    assert AdapterPool.open(["mine/a", "mine/b"]).default_k == 20  # another pool
    (pool / "pool.json").unlink()
    assert locked().k == 2  # as it was written before
    (pool / "pool.json").write_text('{"k": "many"}')
    assert run(["pool", "lock", "mine", "--save", "other.yaml"]) == 1


@pytest.mark.parametrize("entry", ["./gone", "{source: ./gone, name: gone}"])
def test_an_entry_whose_folder_is_gone_is_a_bad_adapter(pool: Path, entry: str) -> None:
    """With and without a name of its own."""
    Path("pool.yaml").write_text(f"adapters: [./mine/a, {entry}]")
    assert "adapter 'gone': " in refusal()
    found = AdapterPool.open("pool.yaml", on_bad_adapter="skip")
    assert found.names == ("a",) and [error.name for error in found.refused] == ["gone"]


def test_a_manifest_names_the_place_of_the_adapter_that_was_opened(tmp_path: Path) -> None:
    """Where two places have an adapter of one name, and the first is left out."""
    for place in ("pa", "pb"):
        write_peft(tmp_path / place / "x", seed=ord(place[1]))
    (tmp_path / "pa" / "x" / "adapter_config.json").write_text("{")
    places = [str(tmp_path / "pa"), str(tmp_path / "pb")]
    assert run(["pool", "lock", *places, "--save", str(tmp_path / "pool.yaml"), *SKIP]) == 0
    [adapter] = AdapterPool.open(tmp_path / "pool.yaml")
    assert (adapter.name, adapter.folder) == ("x", tmp_path / "pb" / "x")


def test_names_that_a_manifest_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("plain", "two\nlines"):
        write_peft(tmp_path / "pool" / name)
    manifest = tmp_path / "pool.yaml"
    line = ["pool", "lock", str(tmp_path / "pool"), "--save", str(manifest)]
    assert run(line) == 1 and not manifest.exists()
    assert r"adapter 'two\nlines': a manifest cannot hold 'two\nlines'" in capsys.readouterr().err
    assert run([*line, *SKIP, "--json"]) == 0
    assert [one["name"] for one in json.loads(capsys.readouterr().out)["adapters"]] == ["plain"]
    assert AdapterPool.open(manifest).names == ("plain",)


def test_a_manifest_that_is_none_is_refused_in_a_line(tmp_path: Path) -> None:
    for text, message in (
        ("adapters: []", "expected `adapters:`"),
        ("adapters: [org/a]\nkk: 3", "expected `adapters:`"),
        ("adapters: [{name: a}]", "entry 1: source: expected a text of one line"),
        ("adapters: [{source: org/a, shar256: x}]", "entry 1: expected a source or an object of source, name"),
        ("adapters: [{source: org/a, sha256: x}]", "sha256: expected 64 hexadecimal digits"),
        ("adapters: [{source: org/a, examples: x}]", "examples: expected a list of texts"),
        ("adapters: ['org/a-*']", "`logo pool lock 'org/a-*'` lists"),
        ("adapters: [{source: ./a, revision: main}]", "expected a folder, which has no revision, or a source"),
        ("adapters: [org/a/../b]", "is not a folder inside it"),
        ("adapters: [{source: org/a, revision: ../b}]", "is not a branch"),
        ("k: 0\nadapters: [org/a]", "k: expected a number of adapters, found 0"),
        ("adapters: [!!python/object/apply:os.system ['true']]", "is not valid YAML"),
    ):
        file = tmp_path / "pool.yaml"
        file.write_text(text)
        with pytest.raises(UsageError) as caught:
            AdapterPool.open(file)
        assert message in str(caught.value) and "\n" not in str(caught.value)
