"""`logo bench serve`: that it counts and compares what it says. The measured numbers are not tested."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from logo.bench.figures import Percentiles, Summary, metric, second_half, slope
from logo.bench.in_process import differences
from logo.bench.local_server import LocalServer
from logo.bench.serving import Plan, Results, problems, run_bench
from logo.bench.traffic import make_asks, mixed_prompts, read_asked
from logo.bench.watch import Sample, Watched
from logo.bench.wire import Answer, Ask
from logo.cli.bench_serve import as_arguments
from logo.cli.expanded import expanded
from logo.cli.options import EngineOptions
from logo.cli.run import run
from logo.demo import adapters_dir
from logo.errors import DataError, LoGoError, StorageError
from tolerances import PATIENCE
from warm import logo

SECONDS = st.floats(1e-4, 1e3)


# -- figures ----------------------------------------------------------------------------------------------------


@given(values=st.lists(st.floats(-1e6, 1e6), min_size=1), seed=st.integers())
def test_percentiles(values: list[float], seed: int) -> None:
    found = Percentiles.of(values)
    assert found is not None
    expected = np.percentile(values, (50, 90, 99))
    assert (found.p50, found.p90, found.p99) == pytest.approx(tuple(expected), rel=1e-9, abs=1e-9)
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)
    random.Random(seed).shuffle(values)
    assert Percentiles.of(values) == found
    assert Percentiles.of([]) is None


ANSWER = st.builds(
    Answer,
    ask=st.integers(0, 9),
    outcome=st.sampled_from(["ok", "hung up", "error"]),
    seconds=SECONDS,
    kind=st.sampled_from(["429", "timeout"]),
    output_tokens=st.integers(0, 99),
    prompt_tokens=st.integers(1, 99),
    first=st.none() | SECONDS,
    gaps=st.lists(SECONDS, max_size=4).map(tuple),
)


@given(answers=st.lists(ANSWER, max_size=20), seconds=st.floats(0.1, 1e3))
def test_a_summary_counts_every_answer_once(answers: list[Answer], seconds: float) -> None:
    found = Summary.of(answers, seconds)
    assert found.requests == len(answers) == found.ok + found.hung_up + sum(found.errors.values())
    assert list(found.errors.values()) == sorted(found.errors.values(), reverse=True)
    whole = [answer for answer in answers if answer.outcome == "ok"]
    assert found.output_tokens_per_second * seconds == pytest.approx(sum(a.output_tokens for a in whole))
    assert found.prompt_tokens_per_second * seconds == pytest.approx(sum(a.prompt_tokens for a in whole))
    assert found.requests_per_second * seconds == pytest.approx(len(whole))
    assert found.end_to_end == Percentiles.of(answer.seconds for answer in whole)
    assert (found.first_token is None) == all(answer.first is None for answer in answers)
    assert (found.inter_token is None) == (not any(answer.gaps for answer in answers))
    json.dumps(found.as_dict(), allow_nan=False)


@given(
    at=st.lists(st.integers(-1000, 1000), min_size=2, max_size=50, unique=True),
    rise=st.floats(-1e3, 1e3),
    start=st.floats(-1e3, 1e3),
)
def test_the_slope_of_a_line_is_the_line_s(at: list[int], rise: float, start: float) -> None:
    assert slope([(x, start + rise * x) for x in at]) == pytest.approx(rise, rel=1e-6, abs=1e-6)


def test_the_slope_is_that_of_least_squares() -> None:
    points = [(0.0, 1.0), (1.0, 5.0), (2.0, 3.0), (4.0, 8.0)]
    assert slope(points) == pytest.approx(np.polyfit(*zip(*points, strict=True), 1)[0])
    assert slope(points[:1]) is None and slope([(1.0, 2.0), (1.0, 3.0)]) is None
    assert second_half(points) == points[2:] and second_half([]) == []


def test_memory_drifts_per_minute_over_the_second_half() -> None:
    """The first half grows by 100 MB a second, the second by 1 MB."""
    grown = [(float(s), 1e6 * (100 * min(s, 10) + max(0, s - 10))) for s in range(21)]
    seen = [Sample(seconds, resident, 1.0, 0.0) for seconds, resident in grown]
    found = Watched((), 20.0, seen[0], seen[-1], seen).server()
    assert found is not None and found["resident_mb_per_minute"] == pytest.approx(60.0)
    assert (found["resident_before"], found["resident_max"], found["resident_after"]) == (0.0, 1010e6, 1010e6)
    assert Watched((), 1.0).server() is None


def test_a_metric_is_summed_over_its_labels() -> None:
    text = (
        "# HELP logo:steps_total Steps.\n# TYPE logo:steps_total counter\n"
        'logo:steps_total{form="gate"} 3.0\nlogo:steps_total{form="base"} 4.0\nlogo:steps 9.0\n'
        "process_resident_memory_bytes 1.5e+08\n"
    )
    assert metric(text, "logo:steps_total") == 7 and metric(text, "logo:steps") == 9
    assert metric(text, "process_resident_memory_bytes") == 1.5e8
    assert metric(text, "process") is None and metric(text, "logo:none") is None


def test_ratios_are_medians_of_rounds() -> None:
    def load(tokens: int, seconds: float) -> Watched:
        return Watched([Answer(0, "ok", seconds, output_tokens=tokens)], seconds)

    results = Results({"logo": [load(8, 1), load(40, 1), load(8, 2)], "base": [load(10, 1), load(10, 1), load(10, 1)]})
    assert results.ratios == {"logo_vs_base": 0.8, "logo_vs_base_requests": 1.0}
    assert results.summary("logo").output_tokens_per_second == 56 / 4
    assert "logo_vs_base" not in Results({"logo": [load(8, 1)], "base": [Watched((), 1.0)]}).ratios


def test_what_is_wrong_is_said() -> None:
    def load(*answers: Answer, kept: float = 0.0, failed: tuple[str, ...] = ()) -> Watched:
        before, after = (Sample(0.0, 1.0, blocks, 0.0) for blocks in (3.0, 3.0 + kept))
        return Watched(answers, 1.0, before, after, failed_changes=failed)

    fine = Answer(0, "ok", 1.0)
    bad = [Answer(1, "error", 1.0, "429", "full"), Answer(2, "error", 1.0, "429", "fuller")]
    good = Results({"logo": [load(fine, Answer(3, "hung up", 1.0))], "one-by-one": [Watched([fine], 1)]})
    assert problems(good, True) == []
    assert problems(Results({"logo": [load(fine, *bad), load(bad[1])]}), True) == ["logo: 3 × 429: full"]
    leaking = Results({"base": [load(fine, kept=2.0)]})
    assert problems(leaking, True) == ["base: 2 blocks of the KV cache more in use than before the load"]
    assert problems(leaking, False) == []  # somebody else's requests may be there
    assert problems(Results({"logo": [load(failed=("load x: 400: no",) * 2)]}), True) == [
        "logo: 2 × pool change: load x: 400: no"
    ]


# -- what is asked ----------------------------------------------------------------------------------------------


@given(
    count=st.integers(1, 60),
    low=st.integers(1, 20),
    more=st.integers(0, 20),
    shares=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(),
)
def test_traffic(count: int, low: int, more: int, shares: tuple[float, float], seed: int) -> None:
    prompts = [f"p{i}" for i in range(7)]
    streamed, left = shares
    wanted: dict[str, Any] = {"max_tokens": (low, low + more), "stream_share": streamed, "hang_up_share": left}
    asks = make_asks(prompts, count, seed=seed, **wanted)
    assert asks == make_asks(prompts, count, seed=seed, **wanted)
    assert len(asks) == count
    assert sum(ask.stream for ask in asks) == round(streamed * count)
    assert sum(ask.hang_up is not None for ask in asks) == round(left * count)
    assert all(low <= ask.max_tokens <= low + more for ask in asks)
    assert all(ask.hang_up is None or 0 <= ask.hang_up < 1 for ask in asks)
    times = [sum(ask.prompt == prompt for ask in asks) for prompt in prompts]
    assert max(times) - min(times) <= 1  # none is over again before all were asked


def test_prompts_are_of_many_tasks_and_lengths() -> None:
    mixed = mixed_prompts(1)
    assert mixed == mixed_prompts(1) != mixed_prompts(2)
    assert len(mixed) > 50 and max(map(len, mixed)) > 8 * min(map(len, mixed))


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts"
    file.write_text('plain text\n\n{"prompt": "one\\ntwo"}\n{"context": "asked", "completion": "gold"}\n')
    assert read_asked(file) == ["plain text", "one\ntwo", "asked"]
    for content, expected in [
        ("good\n{bad\n", r"prompts:2: begins with '\{' but is not valid JSON"),
        ('{"text": "x"}\n', r"prompts:1: expected some text as 'prompt' or 'context', found the fields \['text'\]"),
        ('{"prompt": 7}\n', "prompts:1: expected some text"),
        ("\n \n", "expected one prompt per line, found none"),
    ]:
        file.write_text(content)
        with pytest.raises(DataError, match=expected):
            read_asked(file)
    with pytest.raises(StorageError, match="cannot be read"):
        read_asked(tmp_path / "none")


# -- comparing --------------------------------------------------------------------------------------------------


def test_differences_name_the_first_token() -> None:
    asks = [Ask("a", 4), Ask("b", 4), Ask("c", 4), Ask("d", 4)]
    expected = {i: Answer(i, "ok", 1.0, token_ids=(1, 2, 3), adapters=("x",)) for i in range(4)}
    answers = [
        Answer(0, "ok", 1.0, token_ids=(1, 2, 3), adapters=("x",)),
        Answer(1, "ok", 1.0, token_ids=(1, 9, 3), adapters=("y",)),
        Answer(2, "ok", 1.0, token_ids=(1, 2), adapters=("x",)),
        Answer(3, "ok", 1.0, token_ids=None),
    ]
    found = differences("logo", asks, answers, expected)
    assert [(one.ask, one.position, one.found, one.expected) for one in found] == [
        (1, 1, (9, 3), (2, 3)),
        (2, 2, (), (3,)),
        (3, 0, (), (1, 2, 3)),
    ]
    assert str(found[0]) == "logo, request 1 ('b', y instead of x): from token 1 on [9, 3] instead of [2, 3]"


# -- the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        EngineOptions(),
        EngineOptions(
            base_model="some/model",
            adapters="pool",
            on_bad_adapter="skip",
            allow_pickle=True,
            fold=False,
            n_selected_modules=7,
            calibration_prompts=Path("some file"),
            cache="",
            when_unsure="base",
            device="cpu",
            dtype="float32",
        ),
    ],
)
def test_the_server_gets_the_same_engine_options(options: EngineOptions) -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @expanded
    def command(engine: EngineOptions, more: Annotated[str, typer.Option()] = "") -> None:
        seen.append(engine)

    app(as_arguments(options), standalone_mode=False)
    assert seen == [options]


READY = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Handler.asked += 1
        self.send_response(200 if Handler.asked > 2 else 503)
        self.end_headers()
    def log_message(self, *_):
        pass
signal.signal(signal.SIGTERM, {handler})
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
print(sys.argv[1:], "\\nServing on http://127.0.0.1:%d" % server.server_port, file=sys.stderr, flush=True)
server.serve_forever()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("handler", "code"), [("lambda *_: sys.exit(0)", 0), ("lambda *_: sys.exit(7)", 7), ("signal.SIG_IGN", -9)]
)
def test_how_a_server_ends(handler: str, code: int) -> None:
    program = (sys.executable, "-c", READY.format(handler=handler))
    stop = 1 if code == -9 else PATIENCE
    with LocalServer(["--base-model", "demo"], start=PATIENCE, stop=stop, program=program) as server:
        assert server.url.startswith("http://127.0.0.1:") and server.exit_code is None
    assert server.exit_code == code
    assert "['serve', '--port', '0', '--base-model', 'demo']" in server.said


@pytest.mark.parametrize(
    ("code", "start", "message"),
    [
        ("import sys; sys.exit('no room\\n')", PATIENCE, "logo serve ended with code 1 .* its last output: no room"),
        ("import time; time.sleep(600)", 0.5, r"said no address \(waited up to 0.5 s\)"),
    ],
)
def test_a_server_that_does_not_start(code: str, start: float, message: str) -> None:
    with (
        pytest.raises(LoGoError, match=message),
        LocalServer([], start=start, program=(sys.executable, "-c", code)),
    ):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--churn", "1"], "--churn and --churn-adapter go together"),
        (["--verify", "some"], "--verify 'some': expected a number or 'all'"),
        (["--verify", "all", "--dtype", "bfloat16"], "leave out --dtype bfloat16"),
        (["--max-new-tokens", "9..8"], "--max-new-tokens '9..8': expected a number, or a range such as 8..64"),
        (["--max-new-tokens", "0"], "--max-new-tokens '0'"),
        (["--arms", "logo,vllm"], "--arms 'logo,vllm': expected some of logo, base, one-by-one"),
        (["--url", "http://127.0.0.1:1", "--verify", "1"], "--verify: name the server's base model (--base-model)"),
        (["--url", "http://127.0.0.1:1", "--", "--max-queue", "1"], "only for a server that this command starts"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_server_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "--url", "http://127.0.0.1:1", "--requests", "1"]) == 1
    assert "server http://127.0.0.1:1: no answer (ConnectError" in capsys.readouterr().err


# -- on the real server -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_by_one_repeats_its_requests_for_a_duration(tmp_path: Path) -> None:
    found = tmp_path / "bench.json"
    load = ["--requests", "1", "--duration", "3", "--max-new-tokens", "1..2", "--arms", "one-by-one"]
    assert run(["bench", "serve", *load, "--save", str(found)]) == 0
    assert json.loads(found.read_text())["arms"]["one-by-one"]["ok"] > 1


@pytest.mark.slow
@pytest.mark.long
def test_the_whole_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A server of its own; a third of the clients leave; an adapter like one of the pool's comes and goes."""
    shutil.copytree(adapters_dir() / "antonym", tmp_path / "changes" / "extra")
    found = tmp_path / "bench.json"
    load = ["--requests", "30", "--concurrency", "8", "--hang-up", "0.3", "--max-new-tokens", "4..12"]
    changes = ["--churn", "1000", "--churn-adapter", str(tmp_path / "changes" / "extra")]
    assert run(["bench", "serve", *load, *changes, "--verify", "all", "--save", str(found)]) == 0
    shown = capsys.readouterr()
    report = json.loads(found.read_text())
    assert report["problems"] == [] and report["differences"] == []
    assert set(report["ratios"]) == {
        "logo_vs_base", "logo_vs_base_requests", "logo_vs_one_by_one", "logo_vs_one_by_one_requests"
    }  # fmt: skip
    arms = report["arms"]
    assert list(arms) == ["logo", "base", "one-by-one"]
    for name, arm in arms.items():
        assert arm["requests"] == 30 == arm["ok"] + arm["hung_up"] and arm["errors"] == {}
        assert arm["output_tokens"] >= arm["ok"] and arm["prompt_tokens"] > 4 * arm["ok"]
        [server] = arm["server"]
        if name == "one-by-one":
            assert arm["hung_up"] == 0 and server is None and arm["first_token"] is None
            continue
        assert 0 < arm["hung_up"] <= 9
        assert arm["first_token"]["p99"] <= arm["seconds"] and arm["inter_token"]["p50"] > 0
        assert server["kv_blocks_after"] == server["kv_blocks_before"] and server["resident_max"] > 5e7
        assert server["adapter_changes"] == 2  # there from the first requests to the last
    assert report["verified"] == arms["logo"]["ok"] + arms["base"]["ok"]
    assert report["verified_with_passing"] > 0
    assert f"{report['verified']} of {report['verified']} answers equal" in shown.err
    assert "output tokens/s" in shown.out and "KV blocks" in shown.out


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_server_that_dies(at_once: bool) -> None:
    """Before it is asked anything, the error says why. Later its requests are errors; another arm has its own."""
    started: list[LocalServer] = []

    def kill() -> None:
        if len(started) == 1 and not started[0].gone:
            os.kill(started[0].pid, signal.SIGKILL)
            while not started[0].gone:
                time.sleep(0.01)

    def begin(what: str, steps: int | None) -> Callable[[], None]:
        if at_once and what == "logo":
            kill()
        return kill  # at the first answer

    def place() -> LocalServer:
        started.append(LocalServer(["--base-model=demo"], program=logo()))
        return started[-1]

    asks = tuple(Ask("What is 7 plus 5?", 8, stream) for stream in (True, False) * 8)
    plan = Plan(asks, ("logo", "base"), concurrency=4)
    if at_once:
        with pytest.raises(LoGoError, match=r"no answer .* `logo serve` has exited"):
            run_bench(plan, place, lambda: pytest.fail("not needed"), begin=begin)
    else:
        results = run_bench(plan, place, lambda: pytest.fail("not needed"), begin=begin)
        assert results.summary("logo").errors and not results.summary("base").errors
        assert any("the server ended with code -9" in problem for problem in results.problems)
    assert started[0].exit_code == -signal.SIGKILL


@pytest.fixture(scope="module")
def norm_server() -> Iterator[LocalServer]:
    """Selects one adapter by its norm, and wants a key."""
    options = ["--base-model=demo", "--signal=norm", "-k", "1"]
    with LocalServer(options, {"LOGO_API_KEY": "k"}, program=logo()) as server:
        yield server
    assert server.exit_code == 0


@pytest.mark.slow
def test_a_server_that_is_there(norm_server: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "bench.json"
    there = ["--url", norm_server.url + "/", "--api-key", "k", "--rounds", "2"]
    same = ["--base-model", "demo", "--signal", "norm", "-k", "1"]
    same += ["--requests", "6", "--verify", "4", "--save", str(found)]
    assert run(["bench", "serve", *there, *same]) == 0
    assert "one-by-one: through the server, one request at a time" in capsys.readouterr().err
    report = json.loads(found.read_text())
    assert [arm["requests"] for arm in report["arms"].values()] == [12, 12, 12]  # six in each round
    assert [len(arm["server"]) for arm in report["arms"].values()] == [2, 2, 2]
    assert report["verified"] == 3 * 2 * 4


@pytest.mark.slow
def test_the_same_as_json(norm_server: LocalServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["--url", norm_server.url, "--api-key", "k", "--arms", "base", "--requests", "2"]
    assert run(["bench", "serve", *there, "--save", str(tmp_path / "bench.json"), "--json"]) == 0
    shown, report = capsys.readouterr(), json.loads((tmp_path / "bench.json").read_text())
    assert json.loads(shown.out) == report
    assert report["about"]["base_model"] is None and "demo" not in shown.err  # the server has a base model of its own


@pytest.mark.slow
def test_other_answers_are_found(norm_server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    there = ["--url", norm_server.url, "--api-key", "k", "--arms", "logo", "--base-model", "demo"]
    assert run(["bench", "serve", *there, "--requests", "8", "--verify", "all"]) == 1
    shown = capsys.readouterr().err
    assert "of 8 answers differ from LoGo.generate" in shown and "logo, request 0 (" in shown and "instead of" in shown


@pytest.mark.slow
def test_a_wrong_key(norm_server: LocalServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "serve", "--url", norm_server.url, "--api-key", "x", "--requests", "1"]) == 1
    assert "401" in capsys.readouterr().err
