"""`logo data` as its users call it: the table, folders and a Hub to prepare from, verifying, the examples shown."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from answering import load_rows
from hub_server import GOOD_TOKEN, Commit, HubServer, Repo
from hub_sources import write_hub
from logo.cli.app import run
from logo.evaluation.datasets import OFFICIAL, dataset_file
from logo.evaluation.sources.loading import packaged
from logo.evaluation.sources.manifest import NAME, read_manifest
from tolerances import PATIENCE
from warm import python

ROOT = Path(__file__).parent.parent
BBH = [name for name in OFFICIAL if name.startswith("bbh.")]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def logo(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(["data", *arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    root = tmp_path / "raw"
    for name in ("bbh.navigate", "bbh.word_sorting", "anli.r1"):
        write_hub(root, name)
    return root


# --- list


def test_it_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = logo(capsys, "list")
    lines = out.splitlines()
    assert code == 0 and len(lines) == 1 + 39 and "39 datasets, 0 with rows in data" in err
    assert lines[0].split() == ["dataset", "group", "metric", "test", "train", "source", "licence"]
    assert [line.split()[0] for line in lines[1:27]] == list(OFFICIAL)
    assert lines[1].split() == ["bbh.boolean_expressions", "bbh", "em", "-", "-", "lukaemon/bbh", "MIT"]


def test_the_list_knows_what_is_prepared_and_what_is_there_besides(
    capsys: pytest.CaptureFixture[str], raw: Path
) -> None:
    own = dataset_file("data", "mine.rows")
    own.parent.mkdir(parents=True)
    own.write_text('{"context": "a", "completion": "b"}\n')
    assert logo(capsys, "prepare", "anli.r1", "--from", str(raw), "--limit", "3", "--train-limit", "2")[0] == 0
    code, out, _ = logo(capsys, "list", "anli.r1", "mine.*", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0 and list(rows) == ["anli.r1", "mine.rows"]
    assert (rows["anli.r1"]["rows"], rows["anli.r1"]["train_rows"], rows["anli.r1"]["prepared"]) == (3, 2, True)
    assert (rows["mine.rows"]["rows"], rows["mine.rows"]["train_rows"], rows["mine.rows"]["prepared"]) == (
        1,
        None,
        False,
    )
    assert rows["anli.r1"]["licence"] == "CC BY-NC 4.0" and rows["mine.rows"]["licence"] is None


def test_listing_imports_no_library_of_models_or_data() -> None:
    code = (
        "import sys; from logo.cli.app import run; assert run(['data', 'list']) == 0; "
        "assert not {'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE, capture_output=True)


# --- prepare


def test_prepare_keeps_what_is_there_until_forced(capsys: pytest.CaptureFixture[str], raw: Path) -> None:
    command = ["prepare", "bbh.navigate", "--from", str(raw), "--limit", "5", "--train-limit", "4"]
    assert logo(capsys, *command) == (0, "bbh.navigate: 5 test + 4 train rows\n", "")
    file = dataset_file("data", "bbh.navigate")
    first, manifest = file.read_bytes(), Path("data", NAME).read_bytes()
    assert logo(capsys, *command)[1] == "bbh.navigate: kept, 5 test + 4 train rows\n"
    kept = logo(capsys, *command, "--seed", "1")
    assert kept[1].startswith(
        "bbh.navigate: kept, 5 test + 4 train rows of --limit 5, --train-limit 4, --seed 0 (--force"
    )
    assert (file.read_bytes(), Path("data", NAME).read_bytes()) == (first, manifest)
    assert logo(capsys, *command, "--seed", "1", "--force")[0] == 0
    assert file.read_bytes() != first and read_manifest(Path("data"))["bbh.navigate"]["asked"]["seed"] == 1
    file.write_bytes(first)
    assert "kept; its files are not as the manifest says (--force" in logo(capsys, *command)[1]
    Path("data", NAME).unlink()
    assert "kept; its files are not in the manifest (--force" in logo(capsys, *command)[1]
    assert logo(capsys, *command, "--force")[0] == 0
    file.with_suffix(".yaml").write_text("metric: rouge\n")
    assert "kept; its files are not as the manifest says (--force" in logo(capsys, *command)[1]


def test_one_that_fails_does_not_lose_the_others(capsys: pytest.CaptureFixture[str], raw: Path) -> None:
    file = raw / "lukaemon/bbh/navigate/test-00000-of-00001.parquet"
    file.rename(file.with_name("test-00000-of-00002.parquet"))
    code, out, err = logo(capsys, "prepare", "bbh", "--from", str(raw), "--limit", "5")
    assert code == 1
    assert out.splitlines() == ["bbh.word_sorting: 5 test + 7 train rows (all that the source has)"]
    lines = err.splitlines()
    assert len(lines) == len(BBH) and all(line.startswith("logo: error: ") for line in lines[:-1])
    assert any("navigate/test-*-of-00002.parquet: expected 2 files, found 1" in line for line in lines)
    assert lines[-1] == "logo: 7 of 8 datasets could not be prepared"
    assert list(read_manifest(Path("data"))) == ["bbh.word_sorting"]
    assert not dataset_file("data", "bbh.navigate").parent.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["prepare", "bbh.navigat"], 2, "dataset 'bbh.navigat': not declared (did you mean 'bbh.navigate'?)"),
        (["prepare", "--from", "nowhere"], 2, "--from nowhere: expected a folder, found nothing"),
        (["prepare", "--limit", "0"], 2, "Invalid value for '--limit': "),
        (["prepare", "--source", "no.yaml"], 1, "no.yaml: expected a dataset's YAML file, found none"),
        (["prepare", "--source", "."], 1, "cannot be read"),
        (["list", "nothing"], 2, "dataset 'nothing': not declared"),
    ],
)
def test_a_wrong_call_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    found, out, err = logo(capsys, *arguments)
    assert (found, out) == (code, "")
    assert len(err.splitlines()) == 1 and err.startswith("logo: error: ") and message in err


def test_a_data_folder_that_cannot_be_is_said_first(capsys: pytest.CaptureFixture[str], raw: Path) -> None:
    Path("taken").write_text("")
    code, _, err = logo(capsys, "prepare", "anli.r1", "--from", str(raw), "--data-dir", "taken")
    assert code == 1 and len(err.splitlines()) == 1 and "cannot be written" in err


# --- the Hub


def serve(hub: HubServer, name: str, folder: Path) -> str:
    """Let the repository have the folder as the commit that the declaration names, which is returned."""
    source = packaged()[name].hub
    assert source is not None and re.fullmatch("[0-9a-f]{40}", source.revision)
    repo = hub.repos.setdefault(f"datasets/{source.repo}", Repo())
    repo.commits[source.revision] = replace(Commit.of(folder), sha=source.revision)
    return source.revision


def client(hub: HubServer, home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "http"))}
    return subprocess.run(
        [*python(), "-c", "from logo.cli import main; main()", "data", *arguments],
        env=inherited | hub.env(home) | environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


@pytest.mark.slow
def test_from_the_hub_through_its_own_client(tmp_path: Path) -> None:
    folders = {name: write_hub(tmp_path / "hub", name) for name in ("anli.r1", "gem.e2e_nlg", "bbh.navigate")}
    (folders["anli.r1"] / "anli.py").write_text("raise SystemExit('a loading script was run')")
    (folders["anli.r1"] / "plain_text/train_r2-00000-of-00001.parquet").write_bytes(b"not asked for")
    command = ("prepare", "anli.r1", "gem.e2e_nlg", "bbh.navigate", "--limit", "5", "--train-limit", "4")
    with HubServer({}) as hub:
        serve(hub, "anli.r1", folders["anli.r1"])
        commit = hub.add("datasets/GEM/e2e_nlg", folders["gem.e2e_nlg"], "refs/convert/parquet")
        serve(hub, "bbh.navigate", folders["bbh.navigate"])
        hub.repos["datasets/lukaemon/bbh"].gated = True
        refused = client(hub, tmp_path / "home", *command)
        assert refused.returncode == 1
        lines = refused.stdout.splitlines()
        assert lines[0].startswith("anli.r1: 5 test + 4 train rows (") and len(lines) == 2
        [error, last] = refused.stderr.splitlines()
        assert error.startswith("logo: error: bbh.navigate: Hub repo datasets/lukaemon/bbh: access is gated; accept")
        assert f"{hub.url}/datasets/lukaemon/bbh" in error and "--from DIR" in error
        assert last == "logo: 1 of 3 datasets could not be prepared"
        # The files of the splits and nothing else of the repository.
        wanted = [f"plain_text/{split}_r1-00000-of-00001.parquet" for split in ("test", "train")]
        assert sorted(hub.fetched()) == sorted(
            [*wanted, "default/test/0000.parquet", "default/validation/0000.parquet"]
        )

        allowed = client(hub, tmp_path / "home", *command, HF_TOKEN=GOOD_TOKEN)
        assert allowed.returncode == 0, allowed.stderr
        assert [line.partition(" (")[0] for line in allowed.stdout.splitlines()] == [
            "anli.r1: kept, 5 test + 4 train rows",
            "gem.e2e_nlg: kept, 5 test + 4 train rows",
            "bbh.navigate: 5 test + 4 train rows",
        ]
        hub.clear()
        again = ("prepare", "gem.e2e_nlg", "wmt14.fr-en", "--limit", "5", "--train-limit", "4", "--data-dir", "again")
        offline = client(hub, tmp_path / "home", *again, HF_HUB_OFFLINE="1")
        assert offline.returncode == 1 and hub.requests == []
        [error, _] = offline.stderr.splitlines()
        assert "wmt14.fr-en: Hub repo datasets/wmt/wmt14: not in the cache, and offline" in error
    for split in ("test", "train"):
        made = dataset_file("again", "gem.e2e_nlg", split).read_bytes()
        assert made == dataset_file("data", "gem.e2e_nlg", split).read_bytes()
    source = read_manifest(Path("data"))["gem.e2e_nlg"]["source"]
    assert (source["repo"], source["revision"], source["commit"]) == ("GEM/e2e_nlg", "refs/convert/parquet", commit)


def test_a_hub_without_the_files_or_without_the_repository(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "old.csv").write_text("a\n")
    with HubServer({}) as hub:
        commit = serve(hub, "anli.r1", tmp_path / "empty")
        found = client(hub, tmp_path / "home", "prepare", "anli.r1", "tqa")
    none, absent, _ = found.stderr.splitlines()
    expected = f"revision {commit!r} has no file plain_text/test_r1-*.parquet or "
    assert expected in none and "it has old.csv; fix" in none
    assert "tqa.rc: Hub repo datasets/mandarjoshi/trivia_qa: not found at" in absent
    assert found.returncode == 1


# --- the documented example


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs/datasets.md").read_text(), flags=re.DOTALL)


def documented(start: str) -> list[str]:
    [line] = re.findall(rf"^    logo data ({start}.*)$", (ROOT / "docs/datasets.md").read_text(), flags=re.MULTILINE)
    return str(line).split()


def test_the_example_of_the_page_works(capsys: pytest.CaptureFixture[str]) -> None:
    Path("capitals.yaml").write_text(blocks("yaml")[0])
    Path("capitals.csv").write_text(blocks("csv")[0])
    code, out, err = logo(capsys, *documented("prepare --source capitals"))
    assert (code, out) == (0, "mine.capitals: 3 test + 1 train rows (all that the source has)\n"), err
    rows = load_rows("data", "mine.capitals") + load_rows("data", "mine.capitals", split="train")
    assert {(row.context, row.completion) for row in rows} == {
        (f"Question: What is the capital of {country}?\nAnswer:", city)
        for country, city in [("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
    }
    listed: list[dict[str, Any]] = json.loads(logo(capsys, "list", "mine", "--json")[1])
    assert [(row["name"], row["rows"], row["licence"]) for row in listed] == [("mine.capitals", 3, "CC0")]


def test_other_gold_texts_of_a_prompt_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("capitals.yaml").write_text(blocks("yaml")[0])
    Path("capitals.csv").write_text(blocks("csv")[0] + "France,Lyon\nFrance,Paris\n")
    code, out, err = logo(capsys, *documented("prepare --source capitals"))
    assert code == 0 and "; 1 row with an earlier prompt and another gold text left out)" in out, err
    assert read_manifest(Path("data"))["mine.capitals"]["other_golds"] == 1


def test_the_other_example_of_the_page_reads_a_repository(capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow
    import pyarrow.parquet

    Path("reviews.yaml").write_text(blocks("yaml")[1])
    folder = Path("mirror/org/reviews/data")
    folder.mkdir(parents=True)
    for split in ("validation", "train"):
        table = {"text": [f"{split} {i}" for i in range(4)], "label": [0, 1, 0, 1]}
        pyarrow.parquet.write_table(pyarrow.table(table), folder / f"{split}-00000-of-00001.parquet")
    code, out, err = logo(capsys, "prepare", "--source", "reviews.yaml", "--from", "mirror", "--limit", "4")
    assert (code, out) == (0, "mine.reviews: 4 test + 4 train rows (all that the source has)\n"), err
    assert {row.completion for row in load_rows("data", "mine.reviews")} == {"good", "bad"}


def test_an_own_declaration_takes_the_place_of_ours(capsys: pytest.CaptureFixture[str], raw: Path) -> None:
    ours = (ROOT / "src/logo/evaluation/sources/files/anli.r1.yaml").read_text()
    Path("mended.yaml").write_text(ours.replace("Does this paragraph let us", "Can we"))
    command = ["prepare", "--source", "mended.yaml", "--from", str(raw), "--limit", "2", "--train-limit", "0"]
    assert logo(capsys, *command) == (0, "anli.r1: 2 test rows\n", "")
    assert all("Can we conclude" in row.context for row in load_rows("data", "anli.r1"))
