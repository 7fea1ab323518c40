"""Rows of evaluations answered by Ray actors: real Ray and whole commands, beside one process."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from logo import AdapterPool
from logo.baselines import get_method
from logo.cli.app import run
from logo.cli.cluster import anywhere
from logo.cluster.processes import ClusterError, Expected, Layout
from logo.cluster.workers import in_workers
from logo.demo import adapters_dir, heldout
from logo.errors import ModelError
from logo.evaluation.answer import Opening
from logo.evaluation.results import lines
from tolerances import PATIENCE

ray = pytest.importorskip("ray")
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # actors do not find this file by its name

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("plugins_forgotten")]

# A metric that ends the process as often as a file says, at one row; and a method that refuses prompts.
PLUGIN = """
import os, signal
from pathlib import Path
from logo import Prepared, Selection, register_method, register_metric
from logo.errors import UsageError

FOLDER = Path(__file__).parent

@register_metric("deadly")
def deadly(prediction, golds):
    left = int((FOLDER / "deaths").read_text())
    if left and golds[0] == (FOLDER / "gold").read_text():
        (FOLDER / "deaths").write_text(str(left - 1))
        os.kill(os.getpid(), signal.SIGKILL)
    return float(prediction in golds)

@register_method()
def refusing(logo, task):
    refused = set((FOLDER / "refused").read_text().splitlines())
    def choose(prompts, batch_size):
        if refused & {"all", *prompts}:
            raise UsageError("this prompt is refused")
        return [Selection.forced({logo.names[0]: 1.0}) for _ in prompts]
    return Prepared(choose)
"""


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of three tasks, in the folder of the plugin."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "of_test_cluster.py").write_text(PLUGIN)
    (tmp_path / "rows").mkdir()
    for name in ("antonym", "capital", "plural"):
        (tmp_path / "rows" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, heldout()[name][:5])))
    (tmp_path / "gold").write_text(heldout()["plural"][1]["completion"])
    return tmp_path / "rows"


def evaluate(out: Path | str, *more: str) -> int:
    asked = ["eval", "run", "--base-model", "demo", "--rows", "rows", "--batch-size", "2", "--max-new-tokens", "6"]
    return run([*asked, "--result-dir", str(out), "--plugin", "of_test_cluster:deadly", *more])


def files(out: Path | str) -> dict[str, object]:
    """What has to be the same, whoever answered."""
    found = {str(path.relative_to(out)): path for path in Path(out).rglob("*.json*") if ".partial" not in str(path)}
    timed = ("run.json", "time_dict.json", "rows.jsonl")
    made: dict[str, object] = {name: path.read_bytes() for name, path in found.items() if path.name not in timed}
    rows = {name: path for name, path in found.items() if path.name == "rows.jsonl"}
    return made | {name: [{**one, "seconds": 0} for one in lines(path.parent)] for name, path in rows.items()}


def test_two_workers_write_the_files_of_one_process_though_one_is_killed(
    rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deaths = rows.parent / "deaths"
    deaths.write_text("0")
    assert evaluate("one", "--metric", "deadly") == 0
    deaths.write_text("3")  # once, and at both of Ray's repetitions
    assert evaluate("two", "--metric", "deadly", "--workers", "2") == 1
    said = capsys.readouterr().err
    assert said.count("logo: error:") == 1 and "a worker died 3 times over the same work" in said
    assert deaths.read_text() == "0" and files("two") != files("one")
    deaths.write_text("1")
    assert evaluate("two", "--metric", "deadly", "--workers", "2") == 0
    assert deaths.read_text() == "0" and files("two") == files("one")
    assert evaluate("two", "--metric", "deadly") == 0
    assert "plural is done already" in capsys.readouterr().err


def test_refused_rows_are_those_of_one_process(rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Some rows of a dataset; and all of them, with which nothing is written."""
    plural = [json.loads(line)["context"] for line in (rows / "plural.jsonl").read_text().splitlines()]
    refused = rows.parent / "refused"
    for some in (plural[1:4], ["all"]):
        refused.write_text("\n".join(some))
        said = []
        for name, more in (("one", ()), ("two", ("--workers", "2"))):
            code = evaluate(name, "--method", "refusing", "--overwrite", "--batch-size", "1", *more)
            said.append((code > 0, [line for line in capsys.readouterr().err.splitlines() if "refused" in line]))
        assert said[0] == said[1] and files("one") == files("two")
    [line] = said[0][1]
    assert line.startswith("logo: error: dataset ") and line.endswith(": this prompt is refused")


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--workers", "1", "--device", "cuda:1"], "--device: workers get their devices from Ray"),
        (["--workers", "1", "--ray", "nowhere"], "'nowhere' (--ray or RAY_ADDRESS): expected auto, local or HOST:PORT"),
        (["--workers", "1", "--ray", "http://127.0.0.1:8265"], "'http://127.0.0.1:8265' (--ray or RAY_ADDRESS)"),
    ],
)
def test_what_workers_cannot_do(more: list[str], expected: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate("out", *more) == 2
    assert expected in capsys.readouterr().err


# -- actors -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    number: int
    device: str = "cpu"


@dataclass(frozen=True)
class Held:
    """What a worker has opened."""

    facts: Facts


def alike() -> Held:
    warnings.warn("said while opening", UserWarning, stacklevel=2)
    return Held(Facts(1, device=str(os.getpid())))  # equal engines may be on different devices


def unlike() -> Held:
    return Held(Facts(os.getpid()))


def refused() -> Held:
    raise ModelError("no model here")


@dataclass(frozen=True)
class Named:
    name: str


def tripled(held: Held, dataset: Named, rows: range) -> int:
    return 3 * rows.start


EXPECTED = functools.partial(Expected.of, functools.partial(AdapterPool.open, adapters_dir()))


TWO = Layout(2)


def workers(open_: object, expected: Expected | None = None, layout: Layout = TWO) -> Iterator[tuple[int, int]]:
    """Numbers without end, and their triples."""
    blocks = ((Named("x"), range(number, number + 1)) for number in itertools.count())
    with in_workers(layout, expected or EXPECTED(), open_, tripled) as (facts, work):  # type: ignore[arg-type]
        assert isinstance(facts, Facts)
        for (_, rows), found in work(blocks):
            yield rows.start, found


def test_every_worker_has_to_find_what_the_command_found() -> None:
    with pytest.warns(UserWarning, match="said while opening") as warned:
        found = dict(itertools.islice(workers(alike), 40))
    assert len(found) == 40 and all(found[number] == 3 * number for number in found)
    assert len([one for one in warned if "said while opening" in str(one.message)]) == 1
    with pytest.raises(ClusterError, match=r"finds something else than the command: pool is .*, not .another"):
        next(workers(alike, replace(EXPECTED(), found={**EXPECTED().found, "pool": "another"})))
    with pytest.raises(ModelError, match=r"^no model here$"):
        next(workers(refused))


def test_workers_have_to_open_the_same() -> None:
    with pytest.raises(ClusterError, match="a worker differs from the first one: number is"):
        list(workers(unlike))


def test_a_cluster_that_cannot_be_used_is_told_in_one_line() -> None:
    with pytest.raises(ClusterError, match="no room for 2 processes with 1 GPUs each: there are 0 GPUs"):
        next(workers(alike, layout=Layout(2, gpus=1)))
    with pytest.raises(ClusterError, match=r"127.0.0.1:1 does not answer \(.*Connection refused\)"):
        next(workers(alike, layout=Layout(2, address="127.0.0.1:1")))


ALONE = """
import sys
from logo.cli.app import run
from logo.cluster.processes import Layout, connected

run(["--help"])
assert "ray" not in sys.modules
with connected(Layout(1)):
    import ray

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
"""


def test_ray_is_imported_where_it_is_used_and_listens_on_the_loopback_interface() -> None:
    subprocess.run([sys.executable, "-c", ALONE], check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL)


def test_paths_mean_the_same_in_another_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("base", "encoder"):
        Path(name).mkdir()
    retriever = get_method("loraretriever", embedding_model="encoder")
    found = anywhere(Opening("base", "org/pool", {"model_dir": "hf_models"}, retriever))
    assert (found.base_model, found.pool) == (str(tmp_path / "base"), "org/pool")
    assert found.options["model_dir"] == str(tmp_path / "hf_models")  # not there yet
    assert found.method == get_method("loraretriever", embedding_model=str(tmp_path / "encoder"))
    elsewhere = get_method("loraretriever", embedding_model="org/encoder")
    assert anywhere(Opening("org/base", "org/pool", {}, elsewhere)).method == elsewhere
