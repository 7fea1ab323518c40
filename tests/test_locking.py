"""Manifests of pools in folders: what `logo pool lock` records and keeps, and what is checked when one is opened."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from logo import AdapterPool, PoolError
from logo.adapters.digests import adapter_key
from logo.adapters.examples import examples_sha256, write_examples
from logo.adapters.locking import changes
from logo.adapters.manifest import Manifest, read_manifest
from logo.cli.opening import open_pool
from logo.cli.options import EngineOptions
from logo.cli.run import run
from logo.selection.settings import ExamplesUse
from logo.serving.replicas import digest
from make_adapters import write_peft

NAMES = ("a", "b", "c")


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pool in the current folder, of which `b` has two examples in a file and `c` one on its card."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES):
        write_peft(Path("mine", name), seed=seed)
    write_examples(Path("mine/b"), ["one", "two"])
    Path("mine/c/README.md").write_text("---\nwidget: [{text: three}]\n---\n")
    return Path("mine")


def locked(*places: str) -> Manifest:
    """The manifest of these places, written over an earlier one."""
    assert run(["pool", "lock", *(places or ["mine"]), "--out", "pool.yaml", "--replace"]) == 0
    return read_manifest(Path("pool.yaml"))


def refusal() -> str:
    with pytest.raises(PoolError) as caught:
        AdapterPool.open("pool.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_examples_that_changed_are_refused(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They decide the selection as weights do."""
    recorded = [entry.examples_sha256 for entry in locked().entries]
    assert recorded == ["none", examples_sha256(["one", "two"]), examples_sha256(["three"])]
    assert AdapterPool.open("pool.yaml").names == NAMES
    file = pool / "b" / "examples.jsonl"
    file.write_text(file.read_text() + "\n")  # the same prompts
    assert AdapterPool.open("pool.yaml").names == NAMES
    capsys.readouterr()

    write_examples(pool / "b", ["one", "three"])
    said = refusal()
    assert f"'b': its example prompts are not those in the manifest: expected those of sha256 {recorded[1]:.12}" in said
    assert "in ./mine/b; if the change is intended, write the manifest again (`logo pool lock`)" in said
    assert AdapterPool.open("pool.yaml", on_bad_adapter="skip").names == ("a", "c")
    locked()
    assert capsys.readouterr().err == "~ b: other examples\n"
    write_examples(pool / "a", ["one"], [0.9])  # as `logo pool learn` does
    assert "adapter 'a': its example prompts are not those in the manifest: expected none, found those of" in refusal()
    (pool / "a" / "examples.jsonl").unlink()
    (pool / "c" / "README.md").unlink()
    assert "adapter 'c'" in refusal() and "found none in ./mine/c" in refusal()


def test_examples_that_are_ignored_are_not_compared(pool: Path) -> None:
    locked()
    write_examples(pool / "b", ["three"])
    assert "adapter 'b': its example prompts are not those" in refusal()
    opened = open_pool(EngineOptions(adapters="pool.yaml", examples="ignore"), "demo")
    assert [(adapter.name, adapter.examples) for adapter in opened] == [(name, ()) for name in NAMES]
    (pool / "b" / "adapter_config.json").write_bytes((pool / "b" / "adapter_config.json").read_bytes() + b" ")
    with pytest.raises(PoolError, match=r"adapter_config\.json is not the one in the manifest"):
        AdapterPool.open("pool.yaml", examples="ignore")


def test_a_file_whose_time_was_set_back_is_read_again(pool: Path) -> None:
    """As after `rsync --inplace --times` or `cp -p` onto the file."""
    locked()
    assert AdapterPool.open("pool.yaml").names == NAMES
    file = pool / "a" / "adapter_model.safetensors"
    before = file.stat()
    with file.open("r+b") as stream:
        stream.write((pool / "b" / file.name).read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert "adapter 'a': adapter_model.safetensors is not the one in the manifest" in refusal()


def test_what_a_user_writes_into_a_manifest_is_kept(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """If it is locked again from its places, or from itself after a file has changed."""
    locked()
    text = Path("pool.yaml").read_text().replace("version: 1\n", "version: 1\nnotes: of team X\nbase_model: M\n")
    own = "- name: a\n  notes: easy\n  tags: [en]\n  activation: last:4\n"
    Path("pool.yaml").write_text(text.replace("- name: a\n", own))
    before = read_manifest(Path("pool.yaml"))
    assert (before.base_model, before.notes) == ("M", "of team X")
    assert locked("mine") == before
    assert locked("pool.yaml") == before
    capsys.readouterr()

    for file in ("adapter_model.safetensors", "examples.jsonl"):
        (pool / "c" / file).write_bytes((pool / "b" / file).read_bytes())
    assert "adapter 'c': adapter_model.safetensors is not the one in the manifest" in refusal()
    for place in ("pool.yaml", "mine"):
        now = locked(place)
        assert [now.entries[:2], now.notes, now.places] == [before.entries[:2], before.notes, before.places]
        assert now.entries[2] == replace(before.entries[1], name="c", source="./mine/c")
    assert capsys.readouterr().err == "~ c: other weights, other examples\n"
    assert [str(one.activation) for one in AdapterPool.open("pool.yaml")] == ["last:4", "everywhere", "everywhere"]
    (pool / "pool.json").write_text('{"activation": "last:2"}')  # what the place says replaces it
    assert [entry.activation for entry in locked("mine").entries] == 3 * ["last:2"]
    assert run(["pool", "lock", "pool.yaml", "--out", "copy.yaml"]) == 0
    assert read_manifest(Path("copy.yaml")).notes == "of team X"


def test_what_a_locked_copy_holds_is_kept(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside what the manifest that it was made of says, field by field."""
    Path("mine.yaml").write_text("adapters: [{source: ./mine/a, name: a, tags: [en], examples: [first]}, ./mine/b]")
    locked("mine.yaml")
    Path("x.jsonl").write_text('{"prompt": "hello"}\n')
    for name in ("a", "b"):
        assert run(["pool", "examples", "pool.yaml", name, "x.jsonl"]) == 0
    text = Path("pool.yaml").read_text()
    Path("pool.yaml").write_text(text.replace("- name: a\n", "- name: a\n  notes: easy\n"))
    before = read_manifest(Path("pool.yaml"))
    assert locked("mine.yaml") == before
    assert [(entry.examples, entry.notes, entry.tags) for entry in before.entries] == [
        (("hello",), "easy", ("en",)),
        (("hello",), None, ()),
    ]
    capsys.readouterr()

    Path("pool.yaml").write_text(text.replace("hello", "another"))
    assert changes(before, read_manifest(Path("pool.yaml"))) == ["~ a: other examples", "~ b: other examples"]


def test_a_manifest_locked_from_itself_loses_nothing(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if an adapter is gone for the moment; and the file is no place of its own adapters."""
    text = "adapters: [{source: ./mine/a, name: a, notes: easy}, ./mine/b, {source: ./mine/c, name: c, examples: [x]}]"
    Path("pool.yaml").write_text(text)
    assert locked("pool.yaml").places == ()
    locked("mine")
    assert locked(str(Path("pool.yaml").absolute())).places == ("mine",)
    for name in ("a", "c"):
        whole = Path("pool.yaml").read_bytes()
        (pool / name).rename(f"gone-{name}")
        capsys.readouterr()
        assert name not in {entry.name for entry in locked("pool.yaml", "--on-bad-adapter", "skip").entries}
        copy = Path("pool.yaml.bak" if name == "a" else "pool.yaml.bak1")
        assert f"pool.yaml: the notes, tags or examples of {name} are kept in {copy}\n" in capsys.readouterr().err
        assert copy.read_bytes() == whole
    locked("pool.yaml")
    assert len(list(Path().glob("pool.yaml*"))) == 3


def test_manifests_that_do_not_name_examples_still_open(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    locked()
    lines = Path("pool.yaml").read_text().splitlines(keepends=True)
    Path("pool.yaml").write_text("".join(line for line in lines if "examples_sha256" not in line))
    write_examples(pool / "a", ["one"])
    assert AdapterPool.open("pool.yaml").names == NAMES
    capsys.readouterr()
    locked()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("entry", ["./gone", "{source: ./gone, name: ./gone}"])
def test_an_entry_whose_folder_is_gone_is_a_bad_adapter(pool: Path, entry: str) -> None:
    """With and without a name of its own."""
    Path("pool.yaml").write_text(f"adapters: [./mine/a, {entry}]")
    assert "adapter './gone': " in refusal()
    found = AdapterPool.open("pool.yaml", on_bad_adapter="skip")
    assert found.names == ("a",) and [error.name for error in found.refused] == ["./gone"]


def test_replicas_with_other_examples_have_other_pools(pool: Path) -> None:
    """Where examples count; the names of cached calibrations do not depend on them."""

    def found(use: ExamplesUse) -> str:
        return digest(open_pool(EngineOptions(adapters="mine", examples=use), "demo"))

    used, ignored = found("use"), found("ignore")
    key = adapter_key(AdapterPool.open("mine")["b"])
    write_examples(pool / "b", ["three"])
    assert found("use") != used != ignored == found("ignore")
    assert adapter_key(AdapterPool.open("mine")["b"]) == key
