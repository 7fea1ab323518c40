"""Shards: merged again, they are the whole result for any division; those that do not belong together are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from answering import evaluate
from logo.cli.run import run
from logo.errors import DataError, StorageError, UsageError
from logo.evaluation.jobs import Job
from logo.evaluation.merging import find_shards, merge
from logo.evaluation.metrics import metric_kind
from logo.evaluation.results import RESULT_FILES, result_files, run_record, write_results
from logo.evaluation.resume import part_of
from logo.evaluation.runner import collect
from logo.evaluation.shards import Shard, positions, shard_folder
from logo.evaluation.standing import standing
from logo.rows import Row
from test_evaluation_runner import FakeEngine, Generation, Selection

SAME = [name for name in RESULT_FILES if name not in ("run.json", "time_dict.json")]
ENVIRONMENT = {"torch": "2.8.0", "device": "cpu"}


class Sensitive(FakeEngine):
    """Refuses some rows; its scores depend on the whole batch, as rounding does."""

    def __init__(self, bad: frozenset[int]) -> None:
        super().__init__(str)
        self.bad = bad

    def generate(
        self, prompts: list[str], *, max_new_tokens: int, batch_size: int, **options: object
    ) -> list[Generation]:
        rows = [int(prompt[1:]) for prompt in prompts]
        for row in rows:
            if row in self.bad:
                raise UsageError(f"row {row} is refused")
        scores = {"a": sum(rows) / 7, "b": 1 / (1 + len(rows))}
        return [Generation(f" {row % 3}", Selection(("b", "a"), (0.75, 0.25), scores)) for row in rows]


def job_of(root: Path, rows: int, dataset: str = "gem.x") -> Job:
    data = tuple(Row(f"q{i}", str(i % 2), (str(i % 2), "two"), "a" if i % 2 else None) for i in range(rows))
    return Job(
        dataset, data, metric_kind(dataset), root / "data.jsonl", "00", root / "M_selection_norm_n_2_seed_0" / dataset
    )


def answer(
    job: Job,
    batch_size: int,
    bad: frozenset[int] = frozenset(),
    identity: dict[str, Any] | None = None,
    environment: dict[str, str] | None = None,
    learnt: str | None = None,
) -> None:
    """As a session does it, with the engine above."""
    rows = [job.rows[place] for place in job.places]
    result = (
        evaluate(Sensitive(bad), rows, dataset=job.dataset, batch_size=batch_size)
        if rows
        else collect(job.dataset, [], inference=0.0)
    )
    record = run_record(
        options={"seed": 3, "shard": None if job.shard is None else str(job.shard)},
        pool={"a": "aa", "b": "bb"},
        dataset=job.dataset,
        data_file=job.file,
        data_sha256=job.sha256,
        rows=len(rows),
        device="cpu",
        started=datetime(2026, 1, 2, tzinfo=timezone.utc),
        seconds=1.0,
        identity={"base_model": "M", "seed": 3, "settings": {"k": 2}, **(identity or {})},
        environments=[ENVIRONMENT | (environment or {})],
        learnt=learnt,
        shard=part_of(job),
    )
    write_results(job.folder, result_files(result, rows, strategy="norm", loading_seconds=2.0, run=record, seed=3))


@given(rows=st.integers(0, 30), block=st.integers(1, 8), count=st.integers(1, 9))
def test_shards_are_a_partition_in_whole_blocks(rows: int, block: int, count: int) -> None:
    parts = [positions(rows, block, Shard(index, count)) for index in range(1, count + 1)]
    assert sorted(place for part in parts for place in part) == list(positions(rows, block)) == list(range(rows))
    whole = [tuple(range(start, min(start + block, rows))) for start in range(0, rows, block)]
    batches = [part[start : start + block] for part in parts for start in range(0, len(part), block)]
    assert sorted(batches) == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= block


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(data=st.data(), rows=st.integers(1, 14), batch_size=st.integers(1, 5), count=st.integers(1, 6))
def test_any_cut_put_together_is_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, rows: int, batch_size: int, count: int
) -> None:
    root = tmp_path_factory.mktemp("run")
    bad = data.draw(st.frozensets(st.integers(0, rows - 1), max_size=3))
    dataset = data.draw(st.sampled_from(["gem.x", "bbh.x", "deep/x"]))
    job = job_of(root, rows, dataset)
    answer(job, batch_size, bad)
    whole = {name: (job.folder / name).read_bytes() for name in RESULT_FILES}
    shutil.rmtree(job.folder)
    order = data.draw(st.permutations(range(1, count + 1)))
    for index in order:
        answer(job.cut(Shard(index, count), batch_size), batch_size, bad)
    [merged] = merge(find_shards([root]))
    assert merged.folder.resolve() == job.folder.resolve()
    assert {name: (job.folder / name).read_bytes() for name in SAME} == {name: whole[name] for name in SAME}
    record, expected = json.loads((job.folder / "run.json").read_text()), json.loads(whole["run.json"])
    assert [entry["shard"] for entry in record.pop("shards")] == [f"{i}/{count}" for i in range(1, count + 1)]
    assert record | {"duration": 1.0} == expected and record["duration"] == count
    there = standing(job.folder)  # the whole run need not be run any more
    assert there is not None and not there.missing
    assert there.other({**expected["identity"], "pool": expected["pool"], "shard": None}) is None
    time = json.loads((job.folder / "time_dict.json").read_text())
    assert time.keys() == json.loads(whole["time_dict.json"]).keys() and time["loading"] == 2.0 * count


def test_shards_of_several_machines(tmp_path: Path) -> None:
    for index, machine in enumerate(("one", "two", "two"), start=1):
        answer(job_of(tmp_path / machine, 7).cut(Shard(index, 3), 1), 1)
    answer(job_of(tmp_path / "two", 4, "bbh.y").cut(Shard(1, 1), 1), 1)
    done = merge(find_shards([tmp_path / "one", tmp_path / "two"]))
    assert [whole.files["run.json"]["dataset"]["name"] for whole in done] == ["gem.x", "bbh.y"]
    assert done[0].folder == job_of(tmp_path / "one", 7).folder  # beside the first shard


@pytest.fixture
def cut(tmp_path: Path) -> Job:
    """Seven rows in three shards, all of them there."""
    job = job_of(tmp_path, 7)
    for index in (1, 2, 3):
        answer(job.cut(Shard(index, 3), 2), 2)
    return job


def gone(job: Job) -> None:
    shutil.rmtree(shard_folder(job.folder, Shard(2, 3)))


def twice(job: Job) -> None:
    elsewhere = job_of(job.folder.parents[1] / "copy", 7).folder
    shutil.copytree(shard_folder(job.folder, Shard(2, 3)), shard_folder(elsewhere, Shard(2, 3)))


def other_settings(job: Job) -> None:
    answer(job.cut(Shard(2, 3), 2), 2, identity={"settings": {"k": 5}})


def other_rows(job: Job) -> None:
    answer(job.cut(Shard(2, 3), 2), 2, identity={"rows_sha256": "f" * 64})


def other_batches(job: Job) -> None:
    answer(job.cut(Shard(2, 3), 1), 1)


def other_pool(job: Job) -> None:
    file = shard_folder(job.folder, Shard(3, 3)) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pool": {"a": "aa", "b": "cc"}}))


def other_count(job: Job) -> None:
    answer(job.cut(Shard(1, 2), 2), 2)


def shorter(job: Job) -> None:
    (shard_folder(job.folder, Shard(2, 3)) / "predictions.json").write_text('["a"]')


def no_shard(job: Job) -> None:
    file = shard_folder(job.folder, Shard(2, 3)) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shard": None}))


def half(job: Job) -> None:
    (shard_folder(job.folder, Shard(2, 3)) / "weights.json").unlink()


def of_an_earlier_version(job: Job) -> None:
    file = shard_folder(job.folder, Shard(2, 3)) / "run.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps({key: record[key] for key in record.keys() - {"forms", "environments"}}))


def fewer_selected(job: Job) -> None:
    (shard_folder(job.folder, Shard(2, 3)) / "selected_loras.json").write_text("[[]]")


def fewer_scores(job: Job) -> None:
    (shard_folder(job.folder, Shard(2, 3)) / "metric_dict.json").write_text('{"norm": [[]]}')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            of_an_earlier_version,
            "its run.json, of an earlier version, lacks forms, environments; run",
        ),
        (fewer_selected, "gem.x.shard-2-of-3': expected 2 rows, found 1 and 2; run that shard again"),
        (fewer_scores, "gem.x.shard-2-of-3': expected 2 rows, found 1 and 2; run that shard again"),
        (gone, "dataset 'gem.x': missing of 3 shards in '{run}': 2/3; run them with --shard"),
        (twice, "dataset 'gem.x': shard 2/3 was found twice, in "),
        (other_settings, "gem.x.shard-1-of-3': settings.k is 5, not 2"),
        (other_rows, 'rows_sha256 is "fffffffffffffffffff... instead of not given'),
        (other_batches, "--batch_size is 1, not 2"),
        (other_pool, 'pool.b is "cc", not "bb"'),
        (other_count, "the number of shards is 3, not 2"),
        (shorter, "gem.x.shard-2-of-3': expected 2 rows, found 1 and 2; run that shard again"),
        (no_shard, "gem.x.shard-2-of-3': its run.json names no shard"),
        (half, "gem.x.shard-2-of-3': expected the file weights.json, found none"),
    ],
)
def test_what_does_not_belong_together_is_named(cut: Job, change: Callable[[Job], None], message: str) -> None:
    change(cut)
    with pytest.raises((DataError, StorageError)) as caught:
        merge(find_shards([cut.folder.parents[1]]))
    assert message.format(run=cut.folder.parent) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and not cut.folder.exists()


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "-1/2", "a/b", "1/2/3", "1.5/2"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="expected i/n with i from 1 to n, such as 1/4"):
        Shard.parse(text)


def test_the_command(cut: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "merge", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("ROUGE-1: ") and captured.out.splitlines()[1:] == [str(cut.folder)]
    assert "95 % interval: ROUGE-1 " in captured.err and "7 rows" in captured.err
    assert run(["eval", "merge", *(str(shard_folder(cut.folder, Shard(i, 3))) for i in (2, 3, 1)), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert (found["dataset"], found["rows"], found["folder"]) == ("gem.x", 7, str(cut.folder))
    assert found["rouge-1"] == json.loads((cut.folder / "metrics.json").read_text())["official"]["rouge-1"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere"], 2, "results 'nowhere': expected a folder, found nothing"),
        (["."], 2, "results '.': no shards there; expected folders DATASET.shard-1-of-N"),
        ([], 2, "Missing argument"),
    ],
)
def test_the_command_refuses(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["eval", "merge", *arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("logo: error: ") and message in lines[0]


@pytest.mark.parametrize("command", [["merge", "{}"], ["compare", "{}", "{}"], ["report", "{}"]], ids=" ".join)
@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_a_path_without_results_is_a_usage_error_of_every_command(
    command: list[str], folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["eval", *(part.format(tmp_path / folder) for part in command)]) == 2
    assert f"results {str(tmp_path / folder)!r}: " in capsys.readouterr().err


def test_bad_rows_are_told_by_their_number_in_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = job_of(tmp_path, 7)
    for index in (1, 2):
        answer(job.cut(Shard(index, 2), 1), 1, frozenset({5, 2}))
    assert run(["eval", "merge", str(tmp_path), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)[0]["errors"] == [
        {"row": 3, "message": "row 2 is refused"},
        {"row": 6, "message": "row 5 is refused"},
    ]
    assert captured.err.splitlines() == [
        "logo: error: gem.x row 3 has no answer: row 2 is refused",
        "logo: error: gem.x row 6 has no answer: row 5 is refused",
    ]
