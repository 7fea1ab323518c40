"""Training by several processes, through a Ray of this machine: the adapters of one process, whoever is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from learning import command, contents, rows, write_base, write_rows
from logo import AdapterPool
from logo.cli.run import run
from tolerances import PATIENCE

pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.slow


def weights(pool: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(pool).items() if name.endswith("adapter_model.safetensors")}


def workers(driver: int) -> list[int]:
    """Processes below a driver in which Ray runs ours."""
    found = psutil.Process(driver).children(recursive=True)
    return [one.pid for one in found if any(part.startswith("ray::Host") for part in one.cmdline())]


ACTING = {"everywhere": [], "last": ["--last", "3", "--calibrate"]}


@pytest.mark.long
@pytest.mark.parametrize("acting", ["everywhere", "last"])
def test_two_processes_make_the_adapters_of_one_also_when_one_is_killed(acting: str, tmp_path: Path) -> None:
    """With the same tasks learned together; whoever goes on with a group goes on at its checkpoint."""
    write_base(tmp_path / "base")
    for number, name in enumerate("abcd"):
        some = [{**row, "context": f"{row['context']} w88 w89"} for row in rows(12, number)]
        write_rows(tmp_path / "tasks" / f"{name}.jsonl", some)
    more = ["--at-once", "2", "--checkpoint-every", "0", "--steps", "60", *ACTING[acting]]
    assert run(command(tmp_path / "base", tmp_path / "tasks", tmp_path / "one", *more)) == 0
    pool = tmp_path / "two"
    asked = command(tmp_path / "base", tmp_path / "tasks", pool, *more, "--jobs", "2", "--cpus-per-worker", "1")
    asked = [part for part in asked if part not in ("--device", "cpu")]  # a matter of the workers
    with subprocess.Popen(
        [sys.executable, "-m", "logo.cli", *asked], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as driver:
        deadline = time.monotonic() + PATIENCE
        killed = None
        while killed is None and driver.poll() is None and time.monotonic() < deadline:
            if len(list((pool / ".training").glob("*/state.json"))) >= 1:
                [killed, *_] = workers(driver.pid)
                psutil.Process(killed).kill()
            time.sleep(0.02)
        _, errors = driver.communicate(timeout=PATIENCE)
    assert driver.returncode == 0 and killed is not None, errors
    assert weights(pool) == weights(tmp_path / "one") and len(weights(pool)) == 4
    assert not (pool / ".training").exists()
    assert contents(pool).keys() == contents(tmp_path / "one").keys()
    one, two = (AdapterPool.from_directory(folder) for folder in (tmp_path / "one", pool))
    assert [adapter.activation for adapter in two] == [adapter.activation for adapter in one]
    assert {str(adapter.activation) for adapter in two} == {"last:3" if acting == "last" else acting}
