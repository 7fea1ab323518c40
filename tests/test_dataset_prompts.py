"""Example prompts from the datasets that model cards name, and examples in manifests."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hub_server import HubServer
from logo import AdapterPool, UsageError
from logo.adapters.manifest import Entry, Manifest, give_examples, manifest_text, read_manifest
from logo.adapters.upkeep.dataset_prompts import COUNT, datasets_of, on_hub, prompt_of, shared
from logo.cli.run import run
from test_hub import SOURCE, write_adapter
from tolerances import PATIENCE
from warm import python

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi?"}]


@pytest.mark.parametrize(
    ("row", "column", "prompt"),
    [
        ({"prompt": "p", "question": "q"}, None, "p"),
        ({"prompt": " ", "question": "q"}, None, "q"),
        ({"text": "Human: q Assistant: a"}, None, None),
        ({"text": "t"}, "text", "t"),
        ({"instruction": "Translate.", "input": "one", "output": "eins"}, None, "Translate.\n\none"),
        ({"instruction": "Sing.", "input": ""}, None, "Sing."),
        ({"input": "one", "output": ["eins"]}, None, "one"),
        ({"messages": CHAT}, None, "Hi?"),
        ({"conversations": [{"from": "human", "value": "Yes?"}, {"from": "gpt", "value": "No."}]}, None, "Yes?"),
        ({"messages": CHAT[:1], "question": "Who?"}, None, "Who?"),
        ({"prompt": "p", "body": "b"}, "body", "b"),
        ({"prompt": "p"}, "body", None),
        ({"prompt": 3, "label": 1}, None, None),
        ({"instruction": "i", "input": "x"}, "instruction", "i"),
    ],
)
def test_the_prompt_of_a_row(row: dict[str, Any], column: str | None, prompt: str | None) -> None:
    assert prompt_of(row, column) == prompt


@pytest.mark.parametrize(
    ("metadata", "repos"),
    [
        ("datasets: org/data", ("org/data",)),
        ("datasets: [org/a, org/b, org/a]", ("org/a", "org/b")),
        ("datasets: [generator, 3, '../up/x']", ("generator", "../up/x")),
        ("license: mit", ()),
    ],
)
def test_the_datasets_of_a_card(tmp_path: Path, metadata: str, repos: tuple[str, ...]) -> None:
    (tmp_path / "README.md").write_text(f"---\n{metadata}\n---\n# Card\n")
    assert datasets_of(tmp_path) == repos
    assert on_hub(repos) == tuple(repo for repo in repos if repo.startswith("org/"))


def test_prompts_of_several_datasets_are_taken_in_turn() -> None:
    assert shared([["a", "b", "c"], ["a", "x"]]) == ["a", "b", "x", "c"]
    assert shared([[f"a{i}" for i in range(9)], ["x"]]) == ["a0", "x", *(f"a{i}" for i in range(1, 7))]


# -- in manifests ----------------------------------------------------------------------------------------------------

prompts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=30).filter(str.strip)


@given(st.lists(prompts, min_size=1, max_size=4))
def test_a_manifest_gives_back_the_examples_that_were_written(tmp_path_factory: Any, texts: list[str]) -> None:
    file = tmp_path_factory.mktemp("manifest") / "pool.yaml"
    file.write_text(manifest_text(Manifest([Entry("org/a", "a", tags=("t",)), Entry("org/b", "b", notes="n")])))
    before = file.read_bytes()
    assert give_examples(file, {}) == [] and file.read_bytes() == before
    assert give_examples(file, {"b": texts}) == ["b"]
    assert give_examples(file, {"b": ["other"]}, keep=True) == []
    first, second = read_manifest(file).entries
    assert second == Entry("org/b", "b", notes="n", examples=tuple(texts)) and first == Entry("org/a", "a", tags=("t",))


def test_examples_of_a_manifest_are_those_of_its_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_adapter(tmp_path / "pool" / name)
    (tmp_path / "pool" / "a" / "examples.jsonl").write_text('{"prompt": "beside it"}\n')
    (tmp_path / "new.jsonl").write_text("".join(f'{{"prompt": "new {i}"}}\n' for i in range(20)))
    manifest = tmp_path / "pool.yaml"
    manifest.write_text("adapters:\n- {source: ./pool/a, name: a, notes: mine}\n- {source: ./pool/b, name: b}\n")

    assert run(["pool", "examples", str(manifest), "a"]) == 0
    assert capsys.readouterr().out == "beside it\n"
    assert run(["pool", "examples", str(manifest), "a", str(tmp_path / "new.jsonl")]) == 0
    assert "a: 16 examples (the first of 20)" in capsys.readouterr().out
    first, second = AdapterPool.open(manifest)
    assert first.examples == tuple(f"new {i}" for i in range(16)) and second.examples == ()
    assert (tmp_path / "pool" / "a" / "examples.jsonl").read_text() == '{"prompt": "beside it"}\n'
    assert run(["pool", "examples", str(manifest)]) == 0
    assert capsys.readouterr().out == "  16 a\n   0 b\n"

    assert run(["pool", "lock", str(manifest), "--out", str(manifest), "--replace"]) == 0
    [entry, _] = read_manifest(manifest).entries
    assert entry.notes == "mine" and entry.examples == first.examples


def test_an_entry_may_say_that_its_adapter_has_no_examples(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a")
    (tmp_path / "a" / "examples.jsonl").write_text('{"prompt": "beside it"}\n')
    manifest = tmp_path / "pool.yaml"
    for said, examples in (("", ("beside it",)), (", examples: []", ()), (", examples: [x]", ("x",))):
        manifest.write_text(f"adapters:\n- {{source: ./a, name: a{said}}}\n")
        assert AdapterPool.open(manifest)["a"].examples == examples
        manifest.write_text(manifest_text(read_manifest(manifest)))
        assert AdapterPool.open(manifest)["a"].examples == examples


def test_examples_need_a_name_in_the_manifest(tmp_path: Path) -> None:
    write_adapter(tmp_path / "pool" / "a")
    manifest = tmp_path / "pool.yaml"
    manifest.write_text("adapters:\n- ./pool/a\n")
    assert (
        run(["pool", "examples", str(manifest), "--from-datasets"])
        == 2
        == run(["pool", "examples", str(manifest), "a", "--from-datasets"])
    )
    assert run(["pool", "examples", str(manifest), "a"]) == 0
    with pytest.raises(UsageError, match=r"no entry has the name 'a'.*logo pool lock"):
        give_examples(manifest, {"a": ["x"]})
    manifest.write_text("adapters:\n- {source: ./pool/a, name: a, examples: [1]}\n")
    with pytest.raises(UsageError, match=r"entry 1, 'a': examples: expected a list of texts, found \[1\]"):
        AdapterPool.open(manifest)


def test_places_without_room_for_examples_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pool", "examples", "org/prefix-*"]) == 2
    assert "logo pool lock org/prefix-* --out pool.yaml" in " ".join(capsys.readouterr().err.split())
    write_adapter(tmp_path / "a")
    (tmp_path / "x.jsonl").write_text('{"prompt": "x"}\n')
    assert run(["pool", "examples", str(tmp_path), "a", str(tmp_path / "x.jsonl"), "--from-datasets"]) == 2
    assert run(["pool", "examples", str(tmp_path), "a", "--column", "input"]) == 2
    assert run(["pool", "examples", "pol/typo"]) == 2
    assert "there is no such folder here" in " ".join(capsys.readouterr().err.split())


# -- from a Hub --------------------------------------------------------------------------------------------------------


def command(hub: HubServer, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "http"))}
    env = inherited | {"PYTHONPATH": str(SOURCE), "LOGO_CACHE": str(home / "logo"), "COLUMNS": "200"}
    return subprocess.run(
        [*python(), "-m", "logo.cli", "pool", *arguments],
        env=env | hub.env(home),
        cwd=home,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.fixture
def hub(tmp_path: Path) -> Any:
    import datasets

    made = tmp_path / "made"
    for name, card in {"one": "datasets: org/rows", "two": "datasets: [org/chats, org/rows]", "odd": ""}.items():
        write_adapter(made / name)
        (made / name / "README.md").write_text(f"---\nlicense: mit\n{card}\n---\n# Card\n")
    write_adapter(made / "lost")
    (made / "lost" / "README.md").write_text("---\ndatasets: org/gone\n---\n")
    rows, chats = tmp_path / "rows", tmp_path / "chats"
    rows.mkdir()
    chats.mkdir()
    datasets.Dataset.from_list([{"input": f"Plural of {i}?", "output": ["x"]} for i in range(50)]).to_parquet(
        rows / "train-00000-of-00001.parquet"
    )
    (chats / "train.jsonl").write_text("".join(json.dumps({"messages": CHAT, "n": i}) + "\n" for i in range(3)))
    repos = {f"org/x-{name}": made / name for name in ("one", "two", "odd", "lost")}
    with HubServer({**repos, "datasets/org/rows": rows, "datasets/org/chats": chats}) as server:
        yield server


@pytest.mark.slow
def test_datasets_of_cards_give_examples(hub: HubServer, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    locked = command(hub, home, "lock", "org/x-*", "--out", "pool.yaml")
    assert locked.returncode == 0, locked.stderr
    said = command(hub, home, "examples", "pool.yaml", "--from-datasets")
    assert said.returncode == 0, said.stderr
    assert "8 one, from org/rows" in said.stdout and "none odd: its model card names no dataset" in said.stdout
    assert "none lost: dataset org/gone: " in said.stdout
    assert "examples for 2 adapters; 0 had some already; none for 2" in said.stdout
    found = {entry.name: entry.examples for entry in read_manifest(home / "pool.yaml").entries}
    assert len(set(found["one"])) == COUNT and all(text.startswith("Plural of ") for text in found["one"])
    assert found["two"] == ("Hi?", *found["one"][:-1])
    assert hub.fetched("train-00000-of-00001.parquet")  # streamed
    assert found["odd"] is None and found["lost"] is None

    again = command(hub, home, "examples", "pool.yaml", "--from-datasets", "--json")
    assert again.returncode != 0 and json.loads(again.stdout)["examples"] == {}  # the same two have none
    assert {entry.name: entry.examples for entry in read_manifest(home / "pool.yaml").entries} == found

    wrong = command(hub, home, "examples", str(tmp_path / "made"), "one", "--from-datasets", "--column", "prompt")
    assert (
        wrong.returncode != 0 and "expected texts in a column 'prompt'; its columns are input, output" in wrong.stdout
    )
    right = command(hub, home, "examples", str(tmp_path / "made"), "one", "--from-datasets", "--column", "input")
    assert right.returncode == 0 and (tmp_path / "made" / "one" / "examples.jsonl").read_text().count("\n") == COUNT
