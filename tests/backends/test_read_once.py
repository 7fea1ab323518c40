"""What happens to prompts that are read once inside vLLM when memory is short, steps are small, or ranks are several:
answers stay those of the local engine."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Engines
from vllm_server import ASSETS, Server, environment

from logo import LoGo
from logo.backends.vllm.requests import Running
from logo.selecting import Choosing
from make_adapters import edit_config
from tolerances import WEIGHTS, same_selection

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.usefixtures("settings_of_vllm")

BLOCK, STEP, LAST = 32, 72, 4
# Room for one prompt as long as any may be, and not for three of 180 tokens (one block is never given); of a prompt, so
# many tokens are read in a step, and four prompts at once.
SMALL = {"num_gpu_blocks_override": 17, "max_model_len": 512, "block_size": BLOCK, "max_num_seqs": 8}
SMALL |= {"long_prefill_token_threshold": STEP, "max_num_batched_tokens": 4 * STEP}
SLOTS = {"max_loras": 16, "max_lora_rank": 8}


@pytest.fixture(scope="module")
def local() -> LoGo:
    return LoGo.from_pretrained("demo", device="cpu", k=4, activation=f"last:{LAST}")


@pytest.fixture(scope="module")
def small(local: LoGo) -> Iterator[Any]:
    """An engine inside vLLM with little room for keys and values."""
    options = {"enforce_eager": True, **SMALL}
    made: Any = LoGo.from_pretrained("demo", engine="vllm", k=4, activation=f"last:{LAST}", model_kwargs=options)
    yield made
    made.close()


def texts(local: LoGo, count: int, tokens: int) -> list[list[int]]:
    """Prompts of so many tokens each, of which no two begin alike."""
    files = sorted((ASSETS / "heldout").glob("*.jsonl"))
    rows = [json.loads(line)["context"] for file in files for line in file.read_text().splitlines()[:8]]
    ids = local.tokenizer("\n".join(rows), add_special_tokens=False)["input_ids"]
    found = [ids[i * tokens : (i + 1) * tokens] for i in range(count)]
    assert len(found[-1]) == tokens
    return found


def mixtures(local: LoGo, count: int) -> list[dict[str, float]]:
    names = local.names
    return [{names[i % 16]: 0.7, names[(5 * i + 3) % 16]: 0.4} if i % 4 else {} for i in range(count)]


@pytest.fixture
def cached(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every request that ends: how many of its tokens came from the cache."""
    found: list[int] = []
    take = Running.take

    def takes(self: Running, output: Any) -> None:
        take(self, output)
        if self.done:
            found.append(output.num_cached_tokens)

    monkeypatch.setattr(Running, "take", takes)
    return found


@pytest.fixture
def put_back(small: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every request that is put back, for others to have its blocks: how many of its tokens had been run."""
    scheduler, found = small.llm.llm_engine.engine_core.engine_core.scheduler, list[int]()
    preempt = scheduler._preempt_request

    def counted(request: Any, *args: Any, **kwargs: Any) -> None:
        found.append(request.num_computed_tokens)
        preempt(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    return found


def same_answers(found: Any, expected: Any) -> None:
    for one, other in zip(found, expected, strict=True):
        same_selection(one.selection, other.selection)
        assert one.token_ids == other.token_ids


def test_what_the_probe_has_read_is_found_or_read_again(small: Any, local: LoGo, cached: list[int]) -> None:
    prompts = texts(local, 6, 180)
    expected = local.generate(prompts, max_new_tokens=6)
    everywhere = local.generate(prompts, max_new_tokens=6, activation="everywhere")
    assert [one.token_ids for one in everywhere] != [one.token_ids for one in expected]
    promised = (180 - LAST) // BLOCK * BLOCK
    for prompt, one in zip(prompts, expected, strict=True):
        cached.clear()
        same_answers(small.generate([prompt], max_new_tokens=6), [one])
        assert cached[-1] == promised
    cached.clear()
    # All are probed before the first is answered, and there is no room for what so many probes have read.
    same_answers(small.generate(prompts, max_new_tokens=6), expected)
    assert len(cached) == 2 * len(prompts) and min(cached[-6:]) == 0


def test_answers_that_are_put_back_go_on_as_they_began(small: Any, local: LoGo, put_back: list[int]) -> None:
    prompts = texts(local, 8, 40)
    options: dict[str, Any] = {"adapters": mixtures(local, 8), "max_new_tokens": 64, "min_new_tokens": 64}
    expected = local.generate(prompts, **options)
    same_answers(small.generate(prompts, **options), expected)
    assert max(put_back) > 40  # in the middle of an answer


def test_probes_that_are_put_back_begin_anew(small: Any, local: LoGo, put_back: list[int]) -> None:
    prompts = texts(local, 6, 230)
    for signal in ("calibrated", "norm"):
        for found, expected in zip(
            small.select(prompts, signal=signal), local.select(prompts, signal=signal), strict=True
        ):
            same_selection(found, expected)
    assert any(0 < tokens < 230 for tokens in put_back)  # in the middle of a prompt


@pytest.mark.parametrize("last", [1, 9])
def test_steps_that_end_among_the_tokens_on_which_adapters_act(small: Any, local: LoGo, last: int) -> None:
    """Prompts are read in steps of so many tokens, one prompt at a time."""
    lengths = [STEP - 1, STEP, STEP + 1, STEP + 4, STEP + 8, STEP + 9, STEP + 10, 2 * STEP + 5]
    long = texts(local, 2, 2 * STEP + 5)[1]
    for length, mixture in zip(lengths, cycle(mixtures(local, 8)[1:4])):
        options: dict[str, Any] = {"adapters": mixture, "max_new_tokens": 4, "activation": f"last:{last}"}
        same_answers(small.generate([long[-length:]], **options), local.generate([long[-length:]], **options))


def test_selections_from_the_cache_are_those_without(small: Any, local: LoGo, cached: list[int]) -> None:
    for prompt in (row[::-1] for row in texts(local, 6, 150)):  # nobody else's
        cached.clear()
        first, again = small.select([prompt]), small.select([prompt])
        assert cached == [0, (150 - 1) // BLOCK * BLOCK]
        same_selection(again[0], first[0])
        assert again[0].weights == pytest.approx(first[0].weights, abs=WEIGHTS)


@pytest.mark.long
def test_runner_v2_does_the_same(engines: Engines, tmp_path: Path, local: LoGo) -> None:
    long, short = texts(local, 5, 180), texts(local, 8, 58)
    wanted = mixtures(local, 8)[::-1]
    asked, briefly = ([{"prompt_token_ids": prompt} for prompt in prompts] for prompts in (long, short))
    probe = {"do": "probe_counted", "prompts": asked[:1], "signal": "calibrated"}
    first_row = {"do": "generate", "rows": [[asked[0], wanted[0]]], "max_tokens": 4}
    rows = [list(row) for row in zip(briefly, wanted, strict=True)]
    first, again, found, others, gone, put_back = engines.run(
        tmp_path,
        {**SLOTS, **SMALL},
        {"k": 4, "activation": f"last:{LAST}"},
        probe,
        probe,
        first_row,
        {"do": "generate", "rows": rows, "max_tokens": 12, "min_tokens": 12},
        first_row,
        {"do": "put_back"},
        PRETEND_V2="1",
    )
    assert first["cached"] == [0] and again["cached"] == [(180 - 1) // BLOCK * BLOCK]
    assert found["cached"] == [(180 - LAST) // BLOCK * BLOCK] and gone["cached"] == [0] and put_back > 0
    [answer] = local.generate(long[:1], adapters=wanted[0], max_new_tokens=4)
    for one in (found, gone):
        assert one["tokens"] == [list(answer.token_ids)] and not one["failed"]
    expected = local.generate(short, adapters=wanted, max_new_tokens=12, min_new_tokens=12)
    assert others["tokens"] == [list(one.token_ids) for one in expected] and not others["failed"]
    # The demo's adapters have examples.
    choosing = Choosing(local.fitted, local.settings, ["calibrated"], {"calibrated": local.scorer.sizes})
    both = [
        choosing.choose(torch.tensor(one["scores"][0]), local.names, choosing.call_settings({}))
        for one in (first, again)
    ]
    assert both[0].adapters == both[1].adapters == local.select(long[:1])[0].adapters
    assert both[1].weights == pytest.approx(both[0].weights, abs=WEIGHTS)


# -- the server --------------------------------------------------------------------------------------------------------


def count(server: Server, metric: str) -> float:
    """A metric of a server, whatever its labels are."""
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    return sum(map(float, re.findall(rf"^logo:{re.escape(metric)} (\S+)", text, re.M)))


@pytest.mark.long
def test_the_server_counts_what_is_not_invoked_and_what_is_gone(
    serve: Callable[..., Server], tmp_path: Path, local: LoGo
) -> None:
    invoking = local.tokenizer(" is", add_special_tokens=False)["input_ids"]
    shutil.copytree(ASSETS / "adapters", tmp_path / "pool")
    for number, config in enumerate(sorted((tmp_path / "pool").glob("*/adapter_config.json"))):
        if number % 4:
            edit_config(config.parent, alora_invocation_tokens=invoking)
    (tmp_path / "pool" / "pool.json").write_text(json.dumps({"activation": "last:4"}))
    library = LoGo.from_pretrained("demo", tmp_path / "pool", device="cpu", k=4)
    plain = [[token for token in row if token not in invoking] for row in texts(local, 8, 190)]
    prompts = [[*row[:-2], *invoking, *row[-2:]] if i % 2 else row for i, row in enumerate(plain)]
    with pytest.warns(UserWarning, match="a prompt lacks .* invocation tokens"):
        expected = library.generate(prompts, max_new_tokens=6)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in {**SMALL, **SLOTS}.items()]
    server = serve(*flags, "--middleware", "logo.backends.vllm.Router", env=environment(tmp_path / "pool", k=4))

    def ask(prompt: list[int], **more: Any) -> Any:
        asked = {"model": "logo", "prompt": prompt, "max_tokens": 6, "temperature": 0, **more}
        status, found = server.ask("/v1/completions", asked)
        assert status == 200, found
        return found

    def begin(number: int) -> int:
        """Where the first adapter of a prompt's mixture begins to act, in whole blocks."""
        names = expected[number].selection.adapters
        begins = [library.pool[name].activation.begin(prompts[number]) for name in names]
        return min([len(prompts[number]) - 1, *(one for one in begins if one is not None)]) // BLOCK * BLOCK

    for number, prompt in enumerate(prompts):
        found = ask(prompt)
        assert found["logo"]["adapters"] == list(expected[number].selection.adapters)
        assert found["choices"][0]["text"].rstrip() == expected[number].text.rstrip()
    promised = sum(map(begin, range(len(prompts))))
    silent = sum(library.not_invoked.values())
    assert count(server, "not_invoked_total") == silent > 0
    assert count(server, 'prefix_tokens_total{state="found"}') == promised > 0
    assert count(server, 'prefix_tokens_total{state="missed"}') == 0
    warned = [line for line in server.log.read_text().splitlines() if "so its answer is not adapted" in line]
    for name in set(library.not_invoked):
        assert sum(repr(name) in line for line in warned) == 1
    # At the same time there is no room for all of them.
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, prompts))
    assert [found["choices"][0]["text"].rstrip() for found in answers] == [one.text.rstrip() for one in expected]
    assert count(server, "not_invoked_total") == 2 * silent
    missed = count(server, 'prefix_tokens_total{state="missed"}')
    assert missed > 0 and count(server, 'prefix_tokens_total{state="found"}') + missed == 2 * promised
    # A mixture that is forced was promised nothing; several answers to a prompt are one prompt.
    name = next(name for name in library.names if library.pool[name].activation.tokens)
    ask(prompts[0], logo={"adapters": {name: 1.0}}, n=3, temperature=1.0)
    assert count(server, "not_invoked_total") == 2 * silent + 1
    assert count(server, 'prefix_tokens_total{state="missed"}') == missed


@pytest.mark.long
def test_two_ranks_read_once(serve: Callable[..., Server], local: LoGo) -> None:
    prompts = texts(local, 6, 150)
    env = environment(k=4, activation=f"last:{LAST}") | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    flags = ("--max-model-len", "256", "--block-size", str(BLOCK), "--max-num-batched-tokens", str(STEP))
    server = serve(
        *("--max-loras", "16", "--max-lora-rank", "8", "--max-num-seqs", "8", *flags),
        *("--tensor-parallel-size", "2", "--middleware", "logo.backends.vllm.Router"),
        "--enable-prompt-tokens-details",
        env=env,
    )

    def ask(prompt: list[int]) -> tuple[list[str], str, int]:
        asked = {"model": "logo", "prompt": prompt, "max_tokens": 8, "temperature": 0}
        status, found = server.ask("/v1/completions", asked)
        assert status == 200, found
        cached = (found["usage"]["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"]
        return found["logo"]["adapters"], found["choices"][0]["text"].rstrip(), cached

    expected = local.generate(prompts, max_new_tokens=8)
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, prompts))
    begin = (150 - LAST) // BLOCK * BLOCK
    assert found == [(list(one.selection.adapters), one.text.rstrip(), begin) for one in expected]
