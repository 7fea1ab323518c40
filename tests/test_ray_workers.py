"""Processes through Ray: items that kill, hang or leave their process, processes that come late, and that are unlike.

Real Ray, several processes. Nothing here loads a model but the last tests, which compare whole commands.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tiny
from logo.backends.cluster import Layout, WorkersError
from logo.backends.items import Item, Lost
from logo.backends.ray import Workers
from logo.baselines import get_method
from logo.baselines.fixed import Uniform
from logo.baselines.retrieval import LoraRetriever
from logo.cli.options import EngineOptions
from logo.cli.places import anywhere, everywhere
from logo.cli.run import run
from logo.errors import LoGoError, ModelError, UsageError
from logo.evaluation.jobs import find_jobs
from logo.evaluation.results import RESULT_FILES
from logo.evaluation.runner import AnsweredBatch, Instance
from logo.evaluation.session import Facts, Session
from logo.evaluation.workers import Answerer, InWorkers, Trial, differs, facts_of
from logo.identity import library_versions
from logo.rows import Row
from test_engine import engine, write_adapter
from tolerances import PATIENCE

ray = pytest.importorskip("ray")
# Processes do not find this file by its name.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

# Many tests here end processes; the first one looks at what is said then.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:worker .* another one takes its place")]


class Held:
    """What a process opens: a number that says which process it is."""

    def __init__(self) -> None:
        self.process = os.getpid()


def describe(held: Held) -> str:
    return "all alike"


def alike(own: str, first: str) -> str | None:
    return None if own == first else f"{own} is not {first}"


def first_time(marks: Path, name: object) -> bool:
    """Whether nobody has been here before."""
    try:
        (marks / str(name)).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def work(held: Held, marks: Path, number: int) -> tuple[int, int]:
    """Its double, and where it was computed; some numbers are trouble."""
    trouble = {3: "kill", 5: "hang"}.get(number)
    if trouble == "kill" and first_time(marks, number):
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "hang" and first_time(marks, number):
        (marks / "hangs").write_text(str(os.getpid()))
        time.sleep(1000)
    if number in (1, 2):
        warnings.warn("one and two are small", UserWarning, stacklevel=2)
    if number == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 13:
        raise ModelError("thirteen is refused")
    if number == 17:
        raise ZeroDivisionError("a fault of ours")
    time.sleep(0.02)
    return 2 * number, held.process


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


def opened(
    layout: Layout | None = None,
    open_: Callable[[], Any] = Held,
    describe_: Callable[[Any], Any] = describe,
) -> Workers[Any]:
    return Workers(layout or Layout(2, cpus=1, deadline=PATIENCE, grace=60.0), open_, describe_, alike)


def test_every_item_is_done_whatever_happens_to_its_process(marks: Path) -> None:
    numbers = [number for number in range(16) if number not in (11, 13)]
    with opened(Layout(2, cpus=1, deadline=8.0)) as workers:
        assert workers.description == "all alike"
        with pytest.warns(UserWarning, match="one and two are small") as warned:
            found = list(workers.map((Item((marks, number), 1) for number in numbers), work))
        said = [str(one.message) for one in warned]
        assert sum("one and two are small" in text for text in said) == 1  # of all processes together
        assert any("SIGKILL" in text or "ActorDied" in text for text in said if "takes its place" in text)
        assert any("gave no answer within 8 s: another one takes its place" in text for text in said)
        assert {item.args[1]: result[0] for item, result in found} == {number: 2 * number for number in numbers}
        assert len({result[1] for _, result in found}) >= 3  # two processes, and one in place of each that has gone
        assert sum(workers.speeds.values()) > 0

        [(item, lost)] = [
            (item, result)
            for item, result in workers.map((Item((marks, number), 1) for number in (1, 11, 2)), work)
            if isinstance(result, Lost)
        ]
        assert item.args[1] == 11 and "3 workers in a row did not finish it" in lost.reason

        with pytest.raises(ModelError, match="thirteen is refused"):
            list(workers.map(iter([Item((marks, 13), 1)]), work))
        with pytest.raises(ZeroDivisionError):
            list(workers.map(iter([Item((marks, 17), 1)]), work))
        assert workers.ask(work, marks, 4)[0] == 8
        with pytest.raises(ModelError):
            workers.ask(work, marks, 13)


def test_a_process_may_die_over_what_is_asked_for_an_item(marks: Path) -> None:
    """As one that learns a dataset before its rows are answered."""
    with opened(Layout(1, cpus=1, deadline=PATIENCE)) as workers:

        def items() -> Iterator[Item]:
            for number in (3, 4):
                yield Item((marks, workers.ask(work, marks, number)[0]), 1)

        assert {result[0] for _, result in workers.map(items(), work)} == {12, 16}


def refuses() -> Any:
    raise UsageError("the pool cannot be read here")


def test_processes_that_cannot_be_used_are_told_in_one_line() -> None:
    with pytest.raises(UsageError, match="the pool cannot be read here"):
        opened(open_=refuses)
    with pytest.raises(WorkersError, match="no room for 2 workers of 1 CPUs and 1 GPUs each: this machine has"):
        opened(Layout(2, cpus=1, gpus=1))
    with pytest.raises(WorkersError, match=r"127.0.0.1:1 does not answer \(Connection refused\)"):
        opened(Layout(2, address="127.0.0.1:1"))
    with pytest.raises(UsageError, match="expected auto, local or HOST:PORT"):
        opened(Layout(2, address="nowhere"))


def test_a_pool_that_lacks_an_adapter_is_not_the_drivers() -> None:
    own = Facts({}, library_versions(), {"a": "1"}, None, "cpu", "norm", {}, 0.0)
    assert differs({"a": "1"}, whole=True)(own, own) is None
    assert differs({"a": "1", "b": "2"}, whole=False)(own, own) is None  # it may leave out what it cannot use
    assert str(differs({"a": "1", "b": "2"}, whole=True)(own, own)).startswith("its pool lacks adapter 'b'")
    assert str(differs({"a": "3"}, whole=False)(own, own)).startswith(
        "adapter 'a' of its pool differs from the driver's"
    )


def test_a_cluster_that_refuses_a_token_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ray.exceptions.AuthenticationError("the token\nis another one")

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(WorkersError, match=r"^Ray: no cluster was found \(the token is another one"):
        opened(Layout(2, address="auto"))


def test_rows_that_fail_are_no_reason_to_stop_once_another_process_has_answered_some() -> None:
    class Session:
        batch_size, max_new_tokens, method = 2, 4, None

        def answering(self, job: Any, learnt: Any) -> Any:
            return self

        def generate(self, prompts: list[str], **_: Any) -> Any:
            raise UsageError("the prompt is too long")

    rows = (Row("a", "b"),) * 4
    job: Any = SimpleNamespace(folder="folder", rows=rows, metric="em")
    answerer = Answerer(Session())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="too long"):
        answerer.answer(job, None, range(2), False)
    [batch], _ = answerer.answer(job, None, range(2, 4), True)
    assert batch.first == 2 and [one.error for one in batch.instances] == ["the prompt is too long"] * 2


def test_paths_mean_the_same_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "encoder"):
        Path(name).mkdir()
    Path("prompts.txt").write_text("a prompt\n")
    found = everywhere(
        EngineOptions(base_model="base", adapters="org/pool", calibration_prompts=Path("prompts.txt"), cache="kept")
    )
    assert (found.base_model, found.adapters) == (str(tmp_path / "base"), "org/pool")
    assert found.calibration_prompts == tmp_path / "prompts.txt"
    assert (found.model_dir, found.cache) == (str(tmp_path / "hf_models"), str(tmp_path / "kept"))  # not there yet
    assert everywhere(EngineOptions(cache="")).cache == ""  # keeps nothing
    assert anywhere(LoraRetriever(embedding_model="encoder")) == LoraRetriever(
        embedding_model=str(tmp_path / "encoder")
    )
    for same in (LoraRetriever(embedding_model="org/encoder"), Uniform(), None):
        assert anywhere(same) == same


# -- whole commands ---------------------------------------------------------------------------------------------------


def command(rows: Path, out: Path, *more: str) -> list[str]:
    asked = ["evaluate", "--base-model", "demo", "--rows", str(rows), "--limit", "9", "--batch-size", "2"]
    return [*asked, "--max-new-tokens", "6", "--result-dir", str(out), *more]


def files(out: Path) -> dict[str, bytes]:
    """What has to be the same, whoever answered."""
    left_out = ("run.json", "time_dict.json")
    found = {str(path.relative_to(out)): path for path in out.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if path.name not in left_out}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    folder = tmp_path / "rows"
    folder.mkdir()
    assets = Path(sys.modules["logo"].__file__ or "").parent / "demo" / "assets" / "heldout"
    for name in ("antonym", "capital", "plural"):
        (folder / f"{name}.jsonl").write_bytes((assets / f"{name}.jsonl").read_bytes())
    return folder


class Rows:
    """As much of a dataset as a trial looks at."""

    def __init__(self, count: int, proven: bool = False) -> None:
        self.proven, self.answered = proven, self
        self.plan = SimpleNamespace(job=SimpleNamespace(rows=range(count)))

    def __len__(self) -> int:
        return 0


def batch(first: int, *errors: str | None) -> AnsweredBatch:
    return AnsweredBatch(first, tuple(Instance(0, "", (), (), {}, {}, error) for error in errors), 0.1)


def test_a_run_that_cannot_work_ends_before_it_is_written_down() -> None:
    def trial(count: int, batch_size: int, proven: bool = False) -> Trial:
        return Trial(Rows(count, proven), batch_size)  # type: ignore[arg-type]

    made = trial(9, 1)
    assert made.passed([batch(3, "no")]) == [] and made.held
    with pytest.raises(LoGoError, match=r"^no$"):
        made.passed([batch(0, "no")])
    made = trial(9, 1)
    assert made.passed([batch(3, "no")]) == []
    assert [one.first for one in made.passed([batch(0, None)])] == [3, 0]  # a row has an answer: it was that row
    assert [one.first for one in made.passed([batch(1, "no"), batch(2, "no")])] == [1, 2]
    made = trial(9, 1)
    assert made.passed([batch(3, "no")]) == []
    assert len(made.passed([batch(0, "never")])) == 2  # two reasons are none of the run's
    assert len(made.passed([batch(1, "no"), batch(2, "no")])) == 2
    assert len(trial(1, 4).passed([batch(0, "no")])) == 1  # there are no more rows
    assert len(trial(9, 1, proven=True).passed([batch(0, "no"), batch(1, "no")])) == 2
    assert trial(0, 1).passed([]) == []


class Inline:
    """Two workers that are this process; `sizes`: of the blocks that they got."""

    count = 2

    def __init__(self, answerer: Answerer) -> None:
        self._answerer, self.description, self.sizes = answerer, facts_of(answerer), list[int]()

    def shared(self, value: object) -> Any:
        return SimpleNamespace(get=lambda: value)

    def ask(self, what: Callable[..., Any], *args: Any) -> Any:
        return what(self._answerer, *args)

    def map(self, items: Any, what: Callable[..., Any]) -> Iterator[tuple[Any, Any]]:
        for item in items:
            self.sizes.append(item.size)
            yield item, what(self._answerer, *item.args)


@pytest.mark.parametrize(("shared", "sizes"), [(False, [8, 2]), (True, [5, 5])])
def test_blocks_are_batches_unless_the_engine_makes_its_own(shared: bool, sizes: list[int], tmp_path: Path) -> None:
    """vLLM gets many rows at once; all workers get some, and not the first one all of them."""
    lines = (json.dumps({"context": f"w{i} w{i + 1}", "completion": "w9"}) for i in range(3, 13))
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    method = get_method("best-single", rows=2)
    how: dict[str, Any] = {"seed": 0, "batch_size": 8, "max_new_tokens": 3, "method": method}
    model = tiny.model("llama")
    write_adapter(tmp_path / "pool" / "a", model, ("q_proj",), rank=2, seed=0, scale=0.4)
    session = Session(engine(model, tmp_path / "pool", k=1), "M", {"a": "00"}, **how)
    found = []
    for name in ("one", "two"):
        workers: Any = Inline(Answerer(session))
        asked = session if name == "one" else InWorkers(workers, **how, shared=shared)
        jobs, _ = find_jobs(tmp_path / name, rows=tmp_path, train_rows=tmp_path)
        with pytest.warns(UserWarning, match="training rows are test rows too"):
            found.append(asked.run(asked.plans(jobs)[0]))
    assert workers.sizes == sizes
    assert all(found[0][name] == found[1][name] for name in RESULT_FILES if name not in ("run.json", "time_dict.json"))


def test_two_workers_write_the_files_of_one_process(rows: Path, tmp_path: Path) -> None:
    """Of a run, and of a study."""
    several = ["--workers", "2", "--cpus-per-worker", "1"]
    asked = ["eval", "study", "--base-model", "demo", "--rows", str(rows), "--limit", "1", "--signals", "norm"]
    reports = []
    for name, more in (("one", []), ("two", several)):
        assert run(command(rows, tmp_path / name, "--limit", "3", *more)) == 0
        assert run([*asked, "--save", str(tmp_path / f"{name}.json"), *more]) == 0
        report = json.loads((tmp_path / f"{name}.json").read_text())
        reports.append({key: value for key, value in report.items() if key not in ("seconds", "command")})
    assert files(tmp_path / "two") == files(tmp_path / "one")
    assert reports[0] == reports[1]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--probe-context", "carry"], "with --probe-context carry each row depends on the one before"),
        (["--device", "cuda:1"], "--device: workers get their devices from Ray"),
    ],
)
def test_what_workers_cannot_do(
    more: list[str], expected: str, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command(rows, tmp_path / "out", *more, "--workers", "1", "--cpus-per-worker", "1")) == 2
    assert expected in capsys.readouterr().err


def test_options_that_belong_to_workers(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command(rows, tmp_path / "out", "--cpus-per-worker", "1")) == 2
    assert "--cpus-per-worker needs --workers or --ray" in capsys.readouterr().err
