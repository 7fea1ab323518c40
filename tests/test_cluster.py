"""Rows of evaluations answered by Ray actors: real Ray and whole commands."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from logo.baselines import get_method
from logo.cli.app import run
from logo.cli.cluster import anywhere
from logo.cli.options import MethodOptions
from logo.cluster.processes import ClusterError, Expected, Layout
from logo.cluster.workers import in_workers
from logo.demo import heldout
from logo.errors import ModelError
from logo.evaluation.answer import Opening
from test_evaluate import contents
from written import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plugins_forgotten")]

# A metric that ends the process at one row, once and if a file is there; and a method that refuses prompts.
PLUGIN = """
import os, signal
from pathlib import Path
from logo import Prepared, Selection, register_method, register_metric
from logo.errors import UsageError

FOLDER = Path(__file__).parent

@register_metric("deadly")
def deadly(prediction, golds):
    if golds[0] == (FOLDER / "gold").read_text() and (FOLDER / "death").exists():
        (FOLDER / "death").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return float(prediction in golds)

@register_method()
def refusing(logo, task):
    refused = set((FOLDER / "refused").read_text().splitlines())
    def choose(prompts, batch_size):
        if refused & set(prompts):
            raise UsageError("this prompt is refused")
        return [Selection.forced({logo.names[0]: 1.0}) for _ in prompts]
    return Prepared(choose)
"""


TOKEN = "of-the-tests-0123456789abcdef"
STARTED = """
import sys
from logo.cli.app import run
from logo.cluster.processes import Layout, connected

run(["--help"])
assert "ray" not in sys.modules  # which is imported where it is used
with connected(Layout(2, address="local")):
    import ray

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}  # listens on the loopback interface
    print("at", ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module", autouse=True)  # Ray reads these variables once
def cluster() -> Iterator[str]:
    """The address of one Ray for all tests, since starting it takes seconds."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        # The second lets Ray, when it is imported, take the loopback interface for this machine's address.
        for name, value in {"AUTH_MODE": "token", "ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "AUTH_TOKEN": TOKEN}.items():
            patch.setenv(f"RAY_{name}", value)
        ray = pytest.importorskip("ray")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not find this file by its name
        command, pipe = [sys.executable, "-c", STARTED], subprocess.PIPE
        started = stack.enter_context(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True))
        assert started.stdout is not None
        yield next(line.split()[1] for line in started.stdout if line.startswith("at "))
        started.communicate()
    assert started.returncode == 0


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of three tasks, in the folder of the plugin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_test_cluster.py").write_text(PLUGIN)
    for name in ("antonym", "capital", "plural"):
        write_rows(tmp_path / "rows" / f"{name}.jsonl", heldout()[name][:5])
    (tmp_path / "gold").write_text(heldout()["plural"][1]["completion"])
    return tmp_path / "rows"


def evaluate(out: str, *more: str) -> int:
    asked = ["eval", "run", "--base-model", "demo", "--rows", "rows", "--batch-size", "2", "--max-new-tokens", "6"]
    return run([*asked, "--result-dir", str(out), "--plugin", "of_test_cluster:deadly", *more])


def files(out: str) -> dict[str, object]:
    """What has to be the same, whoever answered."""
    return {file.parent.name: contents(file.parent) for file in Path(out).rglob("eval_results.json")}


def test_two_write_what_one_does_though_one_dies(rows: Path, cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    death = rows.parent / "death"
    assert evaluate("one", "--metric", "deadly") == 0
    death.touch()
    assert evaluate("two", "--metric", "deadly", "--workers", "2", "--ray", cluster) == 0
    assert not death.exists() and files("two") == files("one")
    assert evaluate("two", "--metric", "deadly") == 0
    assert "plural is done already" in capsys.readouterr().err


def test_refused_rows_are_those_of_one_process(rows: Path, cluster: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Some rows of a dataset; and all of another one, with which nothing is written."""
    some, every = ([row["context"] for row in heldout()[name]] for name in ("antonym", "plural"))
    (rows.parent / "refused").write_text("\n".join([*some[1:4], *every]))
    said = []
    for name, more in (("one", ()), ("two", ("--workers", "1", "--ray", cluster))):
        code = evaluate(name, "--method", "refusing", "--batch-size", "1", *more)
        said.append((code, [line for line in capsys.readouterr().err.splitlines() if "refused" in line]))
    assert said == [(1, ["logo: error: dataset 'plural': this prompt is refused"])] * 2
    assert files("one") == files("two") and set(files("two")) == {"antonym", "capital"}


def test_what_workers_cannot_do(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more, message in (
        (["--device", "cuda:1"], "--device: workers get their devices from Ray"),
        (["--ray", "nowhere"], "'nowhere' (--ray or RAY_ADDRESS): expected auto, local or HOST:PORT"),
        (["--ray", "http://127.0.0.1:8265"], "'http://127.0.0.1:8265' (--ray or RAY_ADDRESS)"),
    ):
        assert evaluate("out", "--workers", "1", *more) == 2
        assert message in capsys.readouterr().err


# -- actors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    number: int
    device: str = "cpu"


def alike() -> SimpleNamespace:
    warnings.warn("said while opening", UserWarning, stacklevel=2)
    return SimpleNamespace(facts=Facts(1, device=str(os.getpid())))  # equal engines may be on different devices


def unlike() -> SimpleNamespace:
    return SimpleNamespace(facts=Facts(os.getpid()))


def refused() -> SimpleNamespace:
    raise ModelError("no model here")


def deadly(held: SimpleNamespace, dataset: SimpleNamespace, rows: range) -> None:
    os._exit(9)


def tripled(held: SimpleNamespace, dataset: SimpleNamespace, rows: range) -> int:
    return 3 * rows.start


LIGHT = Expected.of(lambda: cast(Any, SimpleNamespace(digest="light")))  # so that actors need not import PyTorch


def workers(
    open_: object, layout: Layout, expected: Expected | None = None, answer: Any = tripled
) -> Iterator[tuple[int, int]]:
    """Numbers without end, and their triples."""
    blocks = ((SimpleNamespace(name="x"), range(number, number + 1)) for number in itertools.count())
    with in_workers(layout, expected or LIGHT, open_, answer) as (facts, work):  # type: ignore[arg-type]
        assert isinstance(facts, Facts)
        for (_, rows), found in work(blocks):
            yield rows.start, found


def test_every_worker_has_to_find_what_the_command_found(cluster: str) -> None:
    """And all of them have to open the same."""
    one, two = Layout(1, cluster), Layout(2, cluster)
    with pytest.warns(UserWarning, match="said while opening") as warned:
        found = dict(itertools.islice(workers(alike, two), 40))
    assert len(found) == 40 and all(found[number] == 3 * number for number in found)
    assert len([each for each in warned if "said while opening" in str(each.message)]) == 1
    with pytest.raises(ClusterError, match=r"finds something else than the command: pool is .*, not .another"):
        next(workers(alike, one, replace(LIGHT, found={**LIGHT.found, "pool": "another"})))
    with pytest.raises(ModelError, match=r"^no model here$"):
        next(workers(refused, one))
    with pytest.raises(ClusterError, match="a worker differs from the first one: number is"):
        list(workers(unlike, two))
    with pytest.raises(ClusterError, match=r"a worker died 3 times over the same work .*What is done is kept"):
        next(workers(unlike, one, answer=deadly))


def test_a_cluster_that_cannot_be_used_is_told_in_one_line(cluster: str) -> None:
    with pytest.raises(ClusterError, match="no room for 1 processes with 1 GPUs each: there are 0 GPUs"):
        next(workers(alike, Layout(2, cluster, gpus=1)))
    with pytest.raises(ClusterError, match=r"127.0.0.1:1 does not answer \(.*Connection refused\)"):
        next(workers(alike, Layout(2, "127.0.0.1:1")))


def test_paths_mean_the_same_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "encoder", "query", "demo"):
        Path(name).mkdir()
    Path("base/config.json").write_text("{}")
    for encoder, expected in (("encoder", str(tmp_path / "encoder")), ("org/encoder", "org/encoder")):
        options = MethodOptions(method="loraretriever", method_args=f"embedding_model={encoder},instruction=query")
        found = anywhere(Opening("base", "org/pool", {"model_dir": "hf_models"}, options.make(None, 0)))
        assert (found.base_model, found.pool) == (str(tmp_path / "base"), "org/pool")
        assert found.options["model_dir"] == str(tmp_path / "hf_models")  # not there yet
        assert found.method == get_method("loraretriever", embedding_model=expected, instruction="query")
    assert anywhere(Opening("demo", None, {})).base_model == "demo"
