"""A server's shadow: what it writes, that it slows no answer, and what `logo eval shadow` says of it."""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from http_server import eventually
from local_server import LocalServer
from logo import LoGo
from logo.api.shadow import SHARE, Shadow
from logo.cli.app import run
from logo.core import Prompt, Selection
from logo.demo import heldout
from tolerances import PATIENCE


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Watched:
    """A shadow whose selections take no time, and what it has told."""

    def __init__(self, file: Path, busy: bool) -> None:
        self.busy = busy
        self.selected = 0
        self.outcomes: Counter[str] = Counter()
        self.file = file
        self.shadow = Shadow(file, lambda: self.busy, None, lambda outcome: self.outcomes.update([outcome]))

    async def select(self, prompt: Prompt) -> Selection:
        self.selected += 1
        return Selection(("a",), (1.0,), {"a": math.log(8), "b": 0.0}, 0.9, None, (), 1.0)

    def offer(self, count: int, length: int = 64) -> None:
        self.shadow.offer([Prompt.of_ids(list(range(length)))] * count, {"b": 1.0}, self.select)


def test_a_quiet_server_selects_for_all_that_wait(tmp_path: Path) -> None:
    async def main() -> Watched:
        watched = Watched(tmp_path / "log", busy=False)
        watched.offer(100)
        while sum(watched.outcomes.values()) < 100:
            await asyncio.sleep(0.01)
        return watched

    watched = asyncio.run(main())
    assert watched.outcomes == {"selected": 100}
    lines = lines_of(watched.file)
    assert len(lines) == 100
    assert lines[0]["adapter"] == "b" and lines[0]["named"] == {"b": 1.0} and lines[0]["confidence"] == 0.9
    assert lines[0]["first"][0] == {"adapter": "a", "score": 2.0794, "probability": 0.8} and "prompt" not in lines[0]


def test_prompts_may_hold_any_separator_of_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def main() -> Watched:
        watched = Watched(tmp_path / "log", busy=False)
        watched.shadow = Shadow(
            watched.file,
            is_busy=lambda: False,
            text_of=lambda prompt: "one\u2028two\x85three",
            count=lambda outcome: watched.outcomes.update([outcome]),
        )
        watched.offer(3)
        while sum(watched.outcomes.values()) < 3:
            await asyncio.sleep(0.01)
        return watched

    watched = asyncio.run(main())
    assert run(["eval", "shadow", str(watched.file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3


def test_under_load_it_reads_a_small_share_of_what_is_answered_and_drops_the_rest(tmp_path: Path) -> None:
    async def main() -> Watched:
        watched = Watched(tmp_path / "log", busy=True)
        for _ in range(1000):
            watched.offer(1, length=200)
            await asyncio.sleep(0)
        for _ in range(20):  # what may be selected for, is
            await asyncio.sleep(0.1)
        return watched

    watched = asyncio.run(main())
    assert 0 < watched.selected <= SHARE * 1000 * 200 / 64
    assert watched.outcomes["dropped"] >= 1000 - 256 - watched.selected


def test_a_selection_that_fails_is_counted_and_the_next_one_is_made(tmp_path: Path) -> None:
    async def main() -> Watched:
        watched = Watched(tmp_path / "log", busy=False)

        async def fails(prompt: Prompt) -> Selection:
            raise RuntimeError("no")

        watched.shadow.offer([Prompt.of_ids([1])], {}, fails)
        watched.offer(1)
        while sum(watched.outcomes.values()) < 2:
            await asyncio.sleep(0.01)
        return watched

    assert asyncio.run(main()).outcomes == {"failed": 1, "selected": 1}


def written(tmp_path: Path, rows: list[tuple[str, str, float]]) -> Path:
    """A log of rows: the named adapter (empty: the base model), the first one, and its probability."""
    log = tmp_path / "log.jsonl"
    with log.open("w") as file:
        for named, first, probability in rows:
            mixture = {named: 1.0} if named else {}
            best = [{"adapter": first, "score": 1.0, "probability": probability}]
            fields = {"time": "2026-01-01T00:00:00+00:00", "adapter": named or None, "named": mixture, "first": best}
            file.write(json.dumps({**fields, "confidence": probability}) + "\n")
    return log


def test_what_a_server_has_not_written_when_it_ends_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> Watched:
        watched = Watched(tmp_path / "log", busy=True)
        watched.offer(30)
        await watched.shadow.close()
        return watched

    assert asyncio.run(main()).outcomes["dropped"] == 30
    assert "30 prompts have no line" in caplog.text


def test_an_adapter_that_cannot_act_on_a_prompt_is_not_first(tmp_path: Path) -> None:
    async def main() -> Watched:
        watched = Watched(tmp_path / "log", busy=False)

        async def select(prompt: Prompt) -> Selection:
            return Selection(("a",), (1.0,), {"a": -1.0, "b": 0.0}, 0.9, None, ("b",), 1.0)

        watched.shadow.offer([Prompt.of_ids([1])], {"a": 1.0}, select)
        while not watched.outcomes:
            await asyncio.sleep(0.01)
        return watched

    [line] = lines_of(asyncio.run(main()).file)
    assert [one["adapter"] for one in line["first"]] == ["a", "b"]


def test_half_of_a_line_costs_no_other_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a machine leaves it that is switched off, here in the middle of a character."""
    log = written(tmp_path, [("a", "a", 0.9)] * 3)
    log.write_bytes(log.read_bytes()[:-20] + "ü".encode()[:1])

    async def main() -> Watched:
        watched = Watched(log, busy=False)
        watched.offer(2)
        while watched.outcomes["selected"] < 2:
            await asyncio.sleep(0.01)
        return watched

    asyncio.run(main())
    assert run(["eval", "shadow", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["unreadable"]) == (4, 1)
    assert run(["eval", "shadow", str(log)]) == 0
    assert "left out: 1" in capsys.readouterr().out


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """`RLIMIT_FSIZE` stands for the disk."""
    log = tmp_path / "log"
    script = f"""
import asyncio, resource, signal
from pathlib import Path
from test_shadow import Watched
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
async def main():
    watched = Watched(Path({str(log)!r}), busy=False)
    watched.offer(20)
    while sum(watched.outcomes.values()) < 20:
        await asyncio.sleep(0.01)
    assert watched.outcomes["failed"] > 0 and watched.outcomes["selected"] > 0, watched.outcomes
asyncio.run(main())
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parent)
    assert lines_of(log) and log.read_bytes().endswith(b"\n")


@pytest.mark.slow
def test_a_server_says_what_it_would_select(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1,000 requests, of which one in ten names the wrong adapter on purpose."""
    library = LoGo.from_pretrained("demo")
    rng = random.Random(0)
    rows = [(name, row["context"]) for name in library.names for row in heldout()[name]]
    asked = []
    for number in range(1000):
        name, prompt = rng.choice(rows)
        wrong = rng.choice([other for other in library.names if other != name])
        asked.append((wrong if number % 10 == 0 else name, prompt))
    log = tmp_path / "shadow.jsonl"
    with LocalServer(["--base-model", "demo", "--shadow", str(log), "--log", "prompts"], {}) as server:
        key: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "none", "timeout": PATIENCE}
        with openai.OpenAI(**key) as client, ThreadPoolExecutor(8) as threads:

            def ask(pair: tuple[str, str]) -> str:
                name, prompt = pair
                body: dict[str, Any] = {"model": name, "prompt": prompt, "max_tokens": 4, "temperature": 0}
                return str(client.completions.create(**body).logo["adapters"][0])

            assert list(threads.map(ask, asked)) == [name for name, _ in asked]  # answered by what they name

        def told() -> dict[str, float]:
            metrics = httpx.get(f"{server.url}/metrics").text
            found = [line.split() for line in metrics.splitlines() if line.startswith("logo:shadow_total")]
            return {name.split('"')[1]: float(count) for name, count in found}

        eventually(lambda: sum(told().values()) == 1000)
        assert told().get("failed", 0) == 0
        lines = lines_of(log)
        assert len(lines) == told()["selected"] >= 200
    for line in lines[:20]:
        want = library.select(line["prompt"])
        assert line["first"][0]["adapter"] == want.adapters[0]
        assert line["confidence"] == pytest.approx(want.confidence, abs=1e-3)
    assert run(["eval", "shadow", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == found["named_one_adapter"] == len(lines) and found["threshold"] is None
    assert found["agreement"] > 0.8 and found["interval"][0] < found["agreement"] < found["interval"][1]
    clear = {(row["named"], row["prompt"]) for row in found["clear"]}
    wrong = {(line["adapter"], line["prompt"]) for line in lines}.intersection(asked[::10])
    assert len(wrong & clear) >= 0.75 * len(wrong) > 0
    assert len(clear - wrong) <= 0.05 * len(lines)  # false alarms
    assert run(["eval", "shadow", str(log)]) == 0
    assert "the named adapter comes first for" in capsys.readouterr().out


def test_what_a_log_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a", "a", 0.95)] * 6 + [("b", "a", 0.97)] * 3 + [("", "a", 0.3)] * 4 + [("", "b", 0.99), ("a", "b", 0.5)]
    log = written(tmp_path, rows)
    assert run(["eval", "shadow", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["named_one_adapter"], found["named_the_base_model"]) == (15, 10, 5)
    assert found["agreement"] == 0.6
    assert found["confusions"][0] == {"named": "b", "first": "a", "rows": 3}
    assert [row["named"] for row in found["clear"]] == ["b", "b", "b", ""]
    adapter = found["adapters"]["b"]
    assert (adapter["rows"], adapter["agreement"], adapter["needs_examples"]) == (3, 0.0, True)
    assert adapter["confidence"] == pytest.approx(0.97)
    assert not found["adapters"]["a"]["needs_examples"]
    threshold = found["threshold"]
    assert 0.3 < threshold["unsure_below"] <= 0.5 and (threshold["right"], threshold["right_without"]) == (10, 6)
    assert (threshold["base"], threshold["base_named"], threshold["rows"]) == (4, 4, 15)
    assert run(["eval", "shadow", str(log)]) == 0
    said = capsys.readouterr().out
    assert "needs example prompts" in said and "unsure_below" in said and "(base model)" in said


@pytest.mark.parametrize("content", ["", "{}\n", '{"message": "hi"}\n', "no JSON\n"])
def test_a_file_of_something_else_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log").write_text(content)
    assert run(["eval", "shadow", str(tmp_path / "log")]) == 1
    assert "expected a line" in capsys.readouterr().err
    assert run(["eval", "shadow", str(tmp_path / "none")]) == 1
    assert "cannot be read" in capsys.readouterr().err
