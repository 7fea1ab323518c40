"""What a method learns about a dataset: once for every run, whatever ends it and however many shards it has.

Learning that never finds the same thing twice shows who has learnt: other hardware, another version of an optimiser.
"""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path
from typing import Any

import pytest

from logo import LoGo
from logo.baselines import Learned, Task
from logo.baselines.learned import BestSingle, LoraHub
from logo.baselines.registry import METHODS
from logo.cli.run import run
from logo.demo import heldout
from logo.digests import fingerprint
from logo.evaluation.journal import written
from logo.evaluation.resume import Plan, journal_of, learn_once
from test_resume import count_prompts, interrupt

RUN = "demo_method_lorahub_n_20_seed_0"
LEARNT = ".antonym.learnt.jsonl"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    for folder, some in (("rows", slice(0, 6)), ("train", slice(8, 16))):
        (root / folder).mkdir()
        (root / folder / "antonym.jsonl").write_text("\n".join(map(json.dumps, heldout()["antonym"][some])))
    return root


def command(rows: Path, results: Path, *more: str) -> list[str]:
    where = ["--rows", str(rows / "rows"), "--train-rows", str(rows / "train"), "--result-dir", str(results)]
    engine = ["--base-model", "demo", "--device", "cpu", "--no-fold", "--max-new-tokens", "3", "--method", "lorahub"]
    return ["evaluate", *engine, *where, *more]


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every time something else is learnt; holds the numbers of what was."""
    learnt: list[int] = []
    numbers = itertools.count()

    def learn(self: LoraHub, logo: LoGo, task: Task) -> dict[str, Any]:
        learnt.append(next(numbers))
        weights = {name: 0.1 + 0.01 * learnt[-1] + at / 7 for at, name in enumerate(logo.names[:3])}
        return {"number": learnt[-1], "weights": weights}

    monkeypatch.setattr(LoraHub, "learn", learn)
    return learnt


def test_a_run_that_goes_on_does_not_learn_again(
    rows: Path, tmp_path: Path, learning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(rows, tmp_path)
    interrupt(monkeypatch, arguments, after=2)
    kept = written(tmp_path / RUN / LEARNT)
    begun = written(journal_of(tmp_path / RUN / "antonym"))
    assert kept is not None and begun is not None and begun.run is not None
    assert begun.run["learnt_sha256"] == fingerprint(kept.records[0])
    interrupt(monkeypatch, arguments, after=1)
    assert run(arguments) == 0 and learning == [0]
    found = record(tmp_path / RUN / "antonym")
    assert found["found_out"]["number"] == 0 and found["learnt_sha256"] == fingerprint(kept.records[0])
    weights = json.loads((tmp_path / RUN / "antonym" / "weights.json").read_text())
    assert {tuple(row) for row in weights} == {tuple(sorted(kept.records[0]["weights"].values(), reverse=True))}
    assert [path.name for path in (tmp_path / RUN).iterdir()] == ["antonym"]  # the result has it all
    assert run([*arguments, "--overwrite"]) == 0 and learning == [0, 1]


def test_learning_that_was_interrupted_is_done_again(
    rows: Path, tmp_path: Path, learning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(LoraHub, "learn", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(command(rows, tmp_path)) == 130
    # It stands in nobody's way: other options may learn now.
    assert run(command(rows, tmp_path, "--lorahub-budget", "3")) == 0 and learning == [0]


def test_shards_share_what_one_of_them_learnt(
    rows: Path, tmp_path: Path, learning: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    for shard in ("2/3", "1/3", "3/3"):
        assert run(command(rows, tmp_path, "--shard", shard)) == 0
    assert learning == [0] and (tmp_path / RUN / LEARNT).exists()
    assert run(["eval", "merge", str(tmp_path)]) == 0
    digests = {record(folder)["learnt_sha256"] for folder in (tmp_path / RUN).glob("antonym*")}
    whole = record(tmp_path / RUN / "antonym")
    assert digests == {whole["learnt_sha256"]} and whole["found_out"]["number"] == 0
    assert run(command(rows, tmp_path)) == 0 and "is done already" in capsys.readouterr().err
    # A shard that begins again takes what the others have.
    assert run(command(rows, tmp_path, "--shard", "2/3", "--overwrite")) == 0 and learning == [0]
    assert run(["eval", "merge", str(tmp_path)]) == 0


def test_shards_that_disagree_are_not_merged(
    rows: Path, tmp_path: Path, learning: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two machines without a common disk, on which each learns for itself; then with the learnt file brought along."""
    one, two = tmp_path / "one" / RUN, tmp_path / "two" / RUN
    for index, machine in enumerate((one, two), start=1):
        assert run(command(rows, machine.parent, "--shard", f"{index}/2")) == 0
    assert learning == [0, 1]
    capsys.readouterr()
    assert run(["eval", "merge", str(one.parent), str(two.parent)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    named = [f"{folder}/antonym.shard-{i}-of-2'" for i, folder in ((1, one), (2, two))]
    assert all(name in line for name in named) and "learnt_sha256 is " in line and not (one / "antonym").exists()
    shutil.rmtree(two)
    two.mkdir()
    shutil.copy(one / LEARNT, two / LEARNT)
    assert run(command(rows, two.parent, "--shard", "2/2")) == 0 and learning == [0, 1]
    assert run(["eval", "merge", str(one.parent), str(two.parent)]) == 0
    assert record(one / "antonym")["found_out"]["number"] == 0


def test_what_another_run_learnt_is_not_used(
    rows: Path, tmp_path: Path, learning: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(rows, tmp_path, "--shard", "1/2")) == 0
    shutil.rmtree(tmp_path / RUN / "antonym.shard-1-of-2")
    other = command(rows, tmp_path, "--shard", "1/2", "--lorahub-budget", "9")
    before = (tmp_path / RUN / LEARNT).read_bytes()
    capsys.readouterr()
    assert run(other) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert (
        f"{LEARNT} holds what another run learnt (method.budget is 40, not 9); begin again with --overwrite; --run-name"
        in line
    )
    assert (tmp_path / RUN / LEARNT).read_bytes() == before and learning == [0]
    for shard in ("1/2", "2/2"):
        assert run([*other[:-4], "--shard", shard, "--lorahub-budget", "9", "--overwrite"]) == 0
    assert learning == [0, 1]  # by the first; the second finds what is of its own run


def test_answers_are_not_gone_on_with_under_other_weights(
    rows: Path,
    tmp_path: Path,
    learning: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = command(rows, tmp_path)
    kept = tmp_path / RUN / LEARNT
    interrupt(monkeypatch, arguments, after=2)
    content = kept.read_bytes()
    kept.unlink()
    capsys.readouterr()
    assert run(arguments) == 2
    assert "antonym.learnt.jsonl is missing; put it back" in capsys.readouterr().err
    assert run(command(rows, tmp_path / "elsewhere", "--shard", "1/2")) == 0  # learnt anew, of the same run
    shutil.copy(tmp_path / "elsewhere" / RUN / LEARNT, kept)
    capsys.readouterr()
    asked = count_prompts(monkeypatch)
    assert run(arguments) == 2 and not asked
    assert "learnt_sha256 is " in capsys.readouterr().err
    kept.write_bytes(content)
    assert run(arguments) == 0 and len(asked) == 4 and learning == [0, 1]


def test_a_damaged_learnt_file_is_not_believed(
    rows: Path, tmp_path: Path, learning: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(rows, tmp_path, "--shard", "1/2")) == 0
    kept = tmp_path / RUN / LEARNT
    kept.write_bytes(kept.read_bytes().replace(b'"number": 0', b'"number": 7'))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run(command(rows, tmp_path, "--shard", "2/2")) == 0 and learning == [0, 1]
    assert f"{LEARNT}: line 2 is damaged: it and all lines after it are dropped (1 record)" in capsys.readouterr().err
    assert run(["eval", "merge", str(tmp_path)]) == 1 and "learnt_sha256 is " in capsys.readouterr().err


def test_where_rows_depend_on_each_other_it_is_kept_too(
    rows: Path, tmp_path: Path, learning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = command(rows, tmp_path, "--preset", "official")
    interrupt(monkeypatch, arguments, after=2)
    asked = count_prompts(monkeypatch)
    assert run(arguments) == 0 and len(asked) == 6 and learning == [0]


def test_learnt_on_another_device(
    rows: Path,
    tmp_path: Path,
    learning: list[int],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def on(device: str) -> None:
        monkeypatch.setattr("logo.evaluation.session.environment", lambda logo: {"torch": "2", "device": device})

    on("NVIDIA H100")
    assert run(command(rows, tmp_path, "--shard", "1/2")) == 0
    on("cpu")
    other = command(rows, tmp_path, "--shard", "2/2")
    capsys.readouterr()
    assert run(other) == 2
    line = capsys.readouterr().err
    assert f"{LEARNT} was learnt under other versions or on another kind of device: device is " in line
    assert run([*other, "--mix-environments"]) == 0 and learning == [0]
    devices = [one["device"] for one in record(tmp_path / RUN / "antonym.shard-2-of-2")["environments"]]
    assert devices == ["NVIDIA H100", "cpu"]


def test_learnt_on_another_device_meanwhile(
    rows: Path, tmp_path: Path, learning: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After this shard was planned, another one has learnt: the policy holds for that, too."""
    for mixed in (True, False):
        place = tmp_path / str(mixed)
        monkeypatch.setattr("logo.evaluation.session.environment", lambda logo: {"device": "NVIDIA H100"})
        assert run(command(rows, place / "other", "--shard", "1/2")) == 0
        monkeypatch.setattr("logo.evaluation.session.environment", lambda logo: {"device": "cpu"})

        def meanwhile(plan: Plan, learn: Any, place: Path = place) -> Any:
            (place / "own" / RUN).mkdir(parents=True, exist_ok=True)
            shutil.copy(place / "other" / RUN / LEARNT, place / "own" / RUN / LEARNT)
            return learn_once(plan, learn)

        with monkeypatch.context() as patch:
            patch.setattr("logo.evaluation.session.learn_once", meanwhile)
            more = ["--mix-environments"] if mixed else []
            assert run(command(rows, place / "own", "--shard", "2/2", *more)) == (0 if mixed else 2)
    devices = [
        one["device"] for one in record(tmp_path / "True" / "own" / RUN / "antonym.shard-2-of-2")["environments"]
    ]
    assert devices == ["NVIDIA H100", "cpu"] and learning == [0, 1]


def test_a_whole_run_leaves_to_shards_what_they_have_learnt(rows: Path, tmp_path: Path, learning: list[int]) -> None:
    assert run(command(rows, tmp_path, "--shard", "1/2")) == 0
    assert run(command(rows, tmp_path)) == 0 and (tmp_path / RUN / LEARNT).exists()
    assert run(command(rows, tmp_path, "--shard", "2/2")) == 0 and learning == [0]


def test_every_method_that_learns_can_be_kept() -> None:
    for name, kind in METHODS.items():
        assert issubclass(kind, Learned) == ("train" in kind.needs), name


@pytest.mark.parametrize("method", [LoraHub(k=3, budget=6, rows=2), BestSingle(rows=2)], ids=lambda method: method.name)
def test_what_was_learnt_selects_as_before(method: Any) -> None:
    """After it has been through a file, too."""
    logo = LoGo.from_pretrained("demo", signal="norm", k=3)
    train = [_Row(**row) for row in heldout()["antonym"][:4]]
    logo.merge = method.merging
    learnt = method.learn(logo, Task("demo.antonym", train=train))
    again = method.recall(json.loads(json.dumps(learnt)))
    assert again.select(["x"], 1) == method.recall(learnt).select(["x"], 1) and again.record == learnt
    logo.merge = "mixture"


class _Row:
    def __init__(self, context: str, completion: str, **_: Any) -> None:
        self.context, self.completion = context, completion


@pytest.mark.slow
@pytest.mark.long
def test_shards_that_begin_together_agree(rows: Path, tmp_path: Path) -> None:
    """Two processes: the one that finds the other learning says so, waits, and takes what that one has found."""
    go, learns = tmp_path / "go", tmp_path / "learns"
    code = textwrap.dedent(
        f"""
        import os, time
        from pathlib import Path
        from logo.baselines.learned import LoraHub
        from logo.cli import main

        def learn(self, logo, task):
            Path({str(learns)!r}).touch(exist_ok=False)  # by one of them
            while not Path({str(go)!r}).exists():
                time.sleep(0.01)
            return {{"process": os.getpid(), "weights": {{"antonym": 1.0}}}}

        LoraHub.learn = learn
        main()
        """
    )

    def started(shard: str) -> subprocess.Popen[str]:
        arguments = command(rows, tmp_path / "r", "--shard", shard)
        process = [sys.executable, "-c", code, *arguments]
        return subprocess.Popen(process, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    with started("1/2") as one:
        while not learns.exists():
            assert one.poll() is None and not time.sleep(0.01)
        with started("2/2") as two:
            assert two.stderr is not None
            assert "'antonym': another shard is learning; this one waits for what it finds" in two.stderr.readline()
            go.touch()
            assert (one.wait(), two.wait()) == (0, 0)
    found = [record(folder) for folder in sorted((tmp_path / "r" / RUN).glob("antonym.shard-*"))]
    assert [shard["found_out"]["process"] for shard in found] == [one.pid, one.pid]
    assert len({shard["learnt_sha256"] for shard in found}) == 1
