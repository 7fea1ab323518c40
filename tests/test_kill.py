"""kill -9 at any moment: of learning, of answering, in the middle of a line, between two files, between two renames.

A process counts what it does to its results and what it asks of the engine, and kills itself before the step that it
was told; so a moment is the same one on every machine. The same command then ends with the files of a run that nobody
stopped.
"""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dying import dying as commands_dying
from logo.cli.run import run
from logo.demo import heldout
from logo.evaluation.results import RESULT_FILES
from test_resume import SAME

pytestmark = pytest.mark.slow

RUN = "demo_method_lorahub_n_6_seed_0"
DATASETS = ("antonym", "plural")

IMPORTS = """
import transformers.models.llama.modeling_llama
import logo.cli.app, logo.evaluation.journal, logo.evaluation.session
from logo import LoGo
"""
STEPS = '''
    class Halving(io.FileIO):
        """A disk that takes a part of a line at a time."""
        def write(self, data):
            taken = super().write(bytes(data)[: 1 + len(data) // 2])
            step()
            return taken

    logo.evaluation.journal.open = lambda path, mode, buffering: Halving(path, mode)
    LoGo.score_pairs, LoGo.generate = counted(LoGo.score_pairs), counted(LoGo.generate)
'''


def command(rows: Path, results: Path) -> list[str]:
    engine = ["--base-model", "demo", "-k", "6", "--device", "cpu", "--no-merge", "--max-new-tokens", "4"]
    method = ["--method", "lorahub", "--lorahub-budget", "12", "--shots", "2", "--batch-size", "2"]
    where = ["--rows", str(rows / "rows"), "--train-rows", str(rows / "train"), "--result-dir", str(results)]
    return ["evaluate", *engine, *method, *where]


def contents(root: Path) -> dict[str, bytes]:
    return {f"{name}/{file}": (root / RUN / name / file).read_bytes() for name in DATASETS for file in SAME}


def learnt(root: Path) -> list[dict[str, Any]]:
    runs = [json.loads((root / RUN / name / "run.json").read_text()) for name in DATASETS]
    return [{key: one[key] for key in ("found_out", "fingerprint")} for one in runs]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    for folder, some in (("rows", slice(0, 6)), ("train", slice(8, 16))):
        (root / folder).mkdir()
        for name in DATASETS:
            (root / folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, heldout()[name][some])))
    return root


Dying = Callable[[int, Path], int]


@pytest.fixture(scope="module")
def dying(rows: Path) -> Iterator[Dying]:
    """Runs the evaluation in a process of its own up to a step; returns how it ended."""
    with commands_dying("--result-dir", IMPORTS, STEPS) as run_until:
        yield lambda step, results: run_until(step, command(rows, results), results / "steps")


@pytest.fixture(scope="module")
def whole(dying: Dying, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """Results that nobody stopped, and how many steps they took."""
    root = tmp_path_factory.mktemp("whole")
    assert dying(-1, root) == 0
    return root, int((root / "steps").read_text())


@pytest.mark.parametrize("moment", [2, 7])
def test_kill_9_at_any_moment(moment: int, rows: Path, whole: tuple[Path, int], dying: Dying, tmp_path: Path) -> None:
    root, steps = whole
    # At random within a tenth of the run; and, since it is another process then, once more while it goes on.
    at = random.Random(moment)
    first = at.randrange(moment * steps // 10, (moment + 1) * steps // 10)
    assert dying(first, tmp_path) == -signal.SIGKILL
    assert dying(at.randrange(1, 2 + (steps - first) // 2), tmp_path) in (-signal.SIGKILL, 0)
    assert run(command(rows, tmp_path)) == 0
    assert contents(tmp_path) == contents(root) and learnt(tmp_path) == learnt(root)
    assert sorted(path.name for path in (tmp_path / RUN).iterdir()) == [*DATASETS]  # nothing is left over
    for name in DATASETS:
        assert sorted(path.name for path in (tmp_path / RUN / name).iterdir()) == sorted(RESULT_FILES)
