"""Processes through Ray: items that kill, hang or leave their process, processes that come late, and that are unlike.

Real Ray, several processes. Nothing here loads a model but the last tests, which compare whole commands.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from logo.backends.cluster import Layout, WorkersError
from logo.backends.items import Elsewhere, Item, Lost, Unlike
from logo.backends.ray import Workers
from logo.baselines.fixed import Uniform
from logo.baselines.retrieval import LoraRetriever
from logo.cli.options import EngineOptions
from logo.cli.places import anywhere, everywhere
from logo.cli.run import run
from logo.digests import library_versions
from logo.errors import LoGoError, ModelError, UsageError
from logo.evaluation.journal import written
from logo.evaluation.runner import AnsweredBatch, Instance
from logo.evaluation.session import Facts
from logo.evaluation.workers import Answerer, Trial, differs
from logo.rows import Row
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
    trouble = {3: "kill", 5: "hang", 7: "elsewhere"}.get(number)
    if trouble == "kill" and first_time(marks, number):
        os.kill(os.getpid(), signal.SIGKILL)
    if trouble == "hang" and first_time(marks, number):
        (marks / "hangs").write_text(str(os.getpid()))
        time.sleep(1000)
    if trouble == "elsewhere" and first_time(marks, number):
        return Elsewhere((-1, held.process))  # type: ignore[return-value]
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


@pytest.mark.long
def test_a_map_that_ends_early_leaves_all_processes_to_the_next(marks: Path) -> None:
    with opened() as workers:
        for _ in range(2):
            with pytest.raises(ModelError, match="thirteen is refused"):
                list(workers.map(iter([Item((marks, 13), 1), Item((marks, 20), 1)]), work))
        left = workers.map((Item((marks, 30 + number), 1) for number in range(9)), work)
        next(left)
        left.close()
        found = list(workers.map((Item((marks, 40 + number), 1) for number in range(30)), work))
        assert [result[0] for _, result in sorted(found, key=lambda one: one[0].args[1])] == list(range(80, 140, 2))
        assert len({result[1] for _, result in found}) == 2


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_process_may_die_over_what_is_asked_for_an_item(count: int, marks: Path) -> None:
    """As one that learns a dataset before its rows are answered."""
    with opened(Layout(count, cpus=1, deadline=90.0)) as workers:

        def items() -> Iterator[Item]:
            for number in (3, 4):
                yield Item((marks, workers.ask(work, marks, number)[0]), 1)

        began = time.monotonic()
        assert {result[0] for _, result in workers.map(items(), work)} == {12, 16}
        assert time.monotonic() - began < 80  # nothing waits for the deadline of a process that has gone


def outlives(held: Held, marks: Path) -> bool:
    """Whether the process that hangs is ended while this one is busy."""
    hangs, end = marks / "hangs", time.monotonic() + 60
    while not hangs.exists() or not hangs.read_text():
        time.sleep(0.05)
    process = Path("/proc") / hangs.read_text() / "cmdline"
    while time.monotonic() < end:
        try:
            if not process.read_bytes():
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.long
def test_deadlines_are_kept_while_one_process_does_something_for_all(marks: Path) -> None:
    with opened(Layout(2, cpus=1, deadline=2.0)) as workers:

        def items() -> Iterator[Item]:
            yield Item((marks, 5), 1)
            yield Item((marks, 4 if workers.ask(outlives, marks) else 13), 1)

        assert {result[0] for _, result in workers.map(items(), work)} == {10, 8}


def unlike_once(held: Held, marks: Path, number: int) -> Any:
    """Work of which one process says that it must not do it."""
    return Unlike("its base differs") if first_time(marks, "unlike") else work(held, marks, number)


@pytest.mark.long
def test_a_process_that_turns_out_to_be_another_gets_no_more_work(marks: Path) -> None:
    with (
        opened() as workers,
        pytest.warns(UserWarning, match=r"^worker \d gets no work: its base differs$"),
    ):
        found = list(workers.map((Item((marks, number), 1) for number in (4, 6, 8, 9)), unlike_once))
        assert sorted(result[0] for _, result in found) == [8, 12, 16, 18]
        assert len({result[1] for _, result in found}) == 1
        (marks / "unlike").unlink()
        with pytest.raises(WorkersError, match="no worker is left"):
            workers.ask(unlike_once, marks, 4)


def but_the_first_dies(marks: Path) -> Held:
    if not first_time(marks, "first"):
        os.kill(os.getpid(), signal.SIGKILL)
    return Held()


@pytest.mark.long
def test_processes_that_keep_ending_are_given_up_and_the_others_go_on(marks: Path) -> None:
    given_up = "3 workers ended before they were ready; .*; no more are started"
    end = time.monotonic() + PATIENCE
    with (
        pytest.warns(UserWarning, match=given_up) as warned,
        opened(open_=functools.partial(but_the_first_dies, marks)) as workers,
    ):

        def items() -> Iterator[Item]:
            """As many as it takes: the first process may be quick, and the others slow to end."""
            number = 20
            while number < 23 or (not warned and time.monotonic() < end):
                yield Item((marks, number), 1)
                number += 1

        found = list(workers.map(items(), work))
    assert all(result[0] == 2 * item.args[1] for item, result in found) and len(found) >= 3
    assert len({result[1] for _, result in found}) == 1


def refuses() -> Any:
    raise UsageError("the pool cannot be read here")


def dies() -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


def opens_once(marks: Path) -> Held:
    if not first_time(marks, "opened"):
        raise OSError("the disk is full")
    return Held()


def by_turns(marks: Path) -> Held:
    held = Held()
    held.process = int(first_time(marks, "first"))
    return held


def whose(held: Held) -> str:
    return f"number {held.process}"


@pytest.mark.long
def test_processes_that_cannot_be_used_are_told_in_one_line(marks: Path) -> None:
    with pytest.raises(UsageError, match="the pool cannot be read here"):
        opened(open_=refuses)
    with pytest.raises(WorkersError, match="workers ended before they were ready"):
        opened(open_=dies)
    with pytest.raises(WorkersError, match=r"differs from the driver: number \d is not number"):
        opened(open_=functools.partial(by_turns, marks), describe_=whose)
    with pytest.raises(WorkersError, match="no room for 2 workers of 1 CPUs and 1 GPUs each: this machine has"):
        opened(Layout(2, cpus=1, gpus=1))
    with pytest.raises(WorkersError, match=r"127.0.0.1:1 does not answer \(Connection refused\)"):
        opened(Layout(2, address="127.0.0.1:1"))
    with pytest.raises(UsageError, match="expected auto, local or HOST:PORT"):
        opened(Layout(2, address="nowhere"))


def never(seconds: float = 1000.0) -> Held:
    time.sleep(seconds)
    return Held()


@pytest.mark.long
def test_processes_that_do_not_open_in_time_are_waited_for_no_longer() -> None:
    with pytest.raises(WorkersError, match=r"^no worker could start within 0\.5 s: .* or opening takes longer; give"):
        opened(Layout(1, cpus=1, start=0.5), open_=never)


@pytest.mark.long
def test_a_process_that_fails_to_open_is_told_apart_from_one_that_has_gone(marks: Path) -> None:
    with pytest.raises(OSError, match=r"^the disk is full$"):
        opened(open_=functools.partial(opens_once, marks))
    (marks / "opened").unlink()
    with (
        opened(Layout(1, cpus=1), open_=functools.partial(opens_once, marks)) as workers,
        pytest.warns(UserWarning, match=r"^worker 2 gets no work: OSError: the disk is full$"),
        pytest.raises(WorkersError, match="no worker is left"),
    ):
        list(workers.map(iter([Item((marks, 3), 1)]), work))


def test_a_pool_that_lacks_an_adapter_is_not_the_drivers() -> None:
    own = Facts({}, library_versions(), {"a": "1"}, None, "cpu", {}, "norm", {}, 0.0)
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
    job: Any = SimpleNamespace(folder="folder", rows=rows, places=range(4), metric="em")
    answerer = Answerer(lambda key: Session())  # type: ignore[arg-type,return-value]
    with pytest.raises(UsageError, match="too long"):
        answerer.answer(None, job, None, None, range(2), False)
    [batch], _ = answerer.answer(None, job, None, None, range(2, 4), True)
    assert batch.first == 2 and [one.error for one in batch.instances] == ["the prompt is too long"] * 2


def test_every_session_is_compared_and_not_the_first_alone() -> None:
    """A sweep opens one for each cell; what is another version or another pool there is nobody else's."""

    class Missing:
        def check(self) -> None:
            raise ModelError("embedding model 'mine': no such folder")

    own = Facts({"base": "1"}, library_versions(), {"a": "1"}, None, "cpu", {}, "norm", {}, 0.0)
    sessions: dict[str, Any] = {
        "first": SimpleNamespace(facts=own, method=None),
        "second": SimpleNamespace(facts=replace(own, identity={"base": "2"}), method=None),
        "third": SimpleNamespace(facts=own, method=Missing()),
    }
    answerer = Answerer(sessions.__getitem__)
    expected = {"base": "1", "pool": own.pool, "environment": own.environment}
    assert answerer.unlike("first", expected) is None
    assert answerer.unlike("second", expected) == Unlike("base differ from the first worker's")
    with pytest.raises(ModelError, match="no such folder"):
        answerer.unlike("third", expected)


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


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
    yield made
    ray.shutdown()
    made.shutdown()


@pytest.mark.long
def test_a_node_that_joins_later_gets_work_and_one_that_leaves_loses_none(cluster: Any, marks: Path) -> None:
    with opened(Layout(2, address=cluster.address, cpus=1, deadline=60.0)) as workers:
        # There is room for one process, and nobody else who might do it better.
        assert [result[0] for _, result in workers.map(iter([Item((marks, 7), 1)]), work)] == [14]
        nodes: list[Any] = []
        where = []
        for _, result in workers.map((Item((marks, 20 + number), 1) for number in range(1000)), work):
            where.append(result[1])
            if len(where) == 5:
                nodes.append(cluster.add_node(num_cpus=1, object_store_memory=80_000_000))
            if nodes and len(set(where)) == 2:
                cluster.remove_node(nodes.pop(), allow_graceful=False)
        assert len(where) == 1000 and len(set(where)) == 2


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


@pytest.mark.long
def test_two_workers_write_the_files_of_one_process(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also after the driver and a worker were killed in the middle."""
    assert run(command(rows, tmp_path / "one")) == 0
    asked = command(rows, tmp_path / "two", "--workers", "2", "--cpus-per-worker", "1")
    driver = subprocess.Popen([sys.executable, "-m", "logo.cli", *asked], stderr=subprocess.DEVNULL)
    journals: list[Path] = []
    deadline = time.monotonic() + PATIENCE
    while not any((found := written(path)) and found.records for path in journals):
        assert time.monotonic() < deadline and driver.poll() is None
        journals = list((tmp_path / "two").rglob("*.journal.jsonl"))
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    assert run(asked) == 0
    assert files(tmp_path / "two") == files(tmp_path / "one")


class Rows:
    """As much of a dataset as a trial looks at."""

    def __init__(self, count: int, proven: bool = False) -> None:
        self.rows, self.proven, self.answered = range(count), proven, self

    def __len__(self) -> int:
        return 0


def batch(first: int, *errors: str | None) -> AnsweredBatch:
    return AnsweredBatch(first, tuple(Instance(0, "", (), (), {}, {}, error) for error in errors), 0.1, 1)


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


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*training rows are test rows too:UserWarning")
def test_what_is_learnt_is_learnt_once(rows: Path, tmp_path: Path) -> None:
    more = ["--method", "best-single", "--train-rows", str(rows), "--dataset", "antonym,plural"]
    assert run(command(rows, tmp_path / "one", *more)) == 0
    assert run(command(rows, tmp_path / "two", *more, "--workers", "2", "--cpus-per-worker", "1")) == 0
    assert files(tmp_path / "two") == files(tmp_path / "one")


@pytest.mark.long
def test_studies_and_sweeps_have_workers_too(rows: Path, tmp_path: Path) -> None:
    asked = ["--base-model", "demo", "--rows", str(rows), "--limit", "2"]
    reports = []
    for name, more in (("one", []), ("two", ["--workers", "2", "--cpus-per-worker", "1"])):
        out = tmp_path / f"{name}.json"
        methods = ["--method", "best-single,arrow", "--shots", "2", "--hold-out", "2", "--generate", "3"]
        assert run(["eval", "study", *asked, "--signals", "norm,calibrated", *methods, "--save", str(out), *more]) == 0
        report = json.loads(out.read_text())
        reports.append({key: value for key, value in report.items() if key not in ("seconds", "command")})
        grid = ["--grid", "k=1,2", "--max-new-tokens", "4", "-o", str(tmp_path / f"sweep-{name}")]
        assert run(["eval", "sweep", *asked, *grid, *more]) == 0
    assert reports[0] == reports[1]
    runs = [files(tmp_path / f"sweep-{name}" / "runs") for name in ("one", "two")]
    assert runs[0] == runs[1] and len(runs[0]) > 6


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--probe-context", "carry"], "with --probe-context carry each row depends on the one before"),
        (["--reference", "running", "--signal", "calibrated"], "(--reference) is for servers"),
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
