"""What happens to prompts that are read once inside vLLM when memory is short, steps are small, or ranks are several:
answers stay those of the local engine."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import pytest
from vllm_server import ASSETS

from logo import LoGo
from logo.models import load_base
from tolerances import same_selection

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")
pytestmark = pytest.mark.usefixtures("settings_of_vllm")

BLOCK, STEP, LAST = 32, 72, 4
# Room for one prompt as long as any may be, and not for three of 180 tokens (one block is never given); of a prompt, so
# many tokens are read in a step, and four prompts at once.
SMALL = {"num_gpu_blocks_override": 17, "max_model_len": 512, "block_size": BLOCK, "max_num_seqs": 8}
SMALL |= {"long_prefill_token_threshold": STEP, "max_num_batched_tokens": 4 * STEP}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The bundled model with the tokens of blank and line break exchanged, so that answers begin with the latter."""
    folder = shutil.copytree(ASSETS / "model", tmp_path_factory.mktemp("base") / "model")
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(re.sub('"([ĠĊ])"(?=:)', lambda m: '"Ċ"' if m[1] == "Ġ" else '"Ġ"', text))
    return str(folder)


@pytest.fixture(scope="module")
def local(base: str) -> LoGo:
    return LoGo.from_pretrained(base, ASSETS / "adapters", device="cpu", k=4, activation=f"last:{LAST}")


@pytest.fixture(scope="module")
def small(base: str) -> Iterator[Any]:
    """An engine inside vLLM with little room for keys and values."""
    how: dict[str, Any] = {"engine": "vllm", "model_kwargs": {"enforce_eager": True, **SMALL}}
    made: Any = LoGo.from_pretrained(base, ASSETS / "adapters", k=4, activation=f"last:{LAST}", **how)
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
def cached(small: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every request that ends: how many of its tokens came from the cache."""
    found: list[int] = []
    run = small.engine.run

    async def counted(rows: Any) -> Any:
        outputs = await run(rows)
        found.extend(output.num_cached_tokens for output in outputs)
        return outputs

    monkeypatch.setattr(small.engine, "run", counted)
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
    promised = (180 - LAST) // BLOCK * BLOCK
    for prompt, one in zip(prompts, expected, strict=True):
        cached.clear()
        same_answers(small.generate([prompt], max_new_tokens=6), [one])
        assert cached[-1] == promised
    cached.clear()
    # All are probed before the first is answered, and there is no room for what so many probes have read.
    same_answers(small.generate(prompts, max_new_tokens=6), expected)
    assert len(cached) == 2 * len(prompts) and min(cached[-6:]) == 0


def test_what_goes_on_behind_a_line_break_keeps_its_place_and_has_other_noise(
    small: Any, local: LoGo, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seeds = small.engine.run, list[int]()
    monkeypatch.setattr(small.engine, "run", lambda rows: [seeds.append(row[1].seed) for row in rows] and run(rows))
    lands, whole = ("France", "Italy", "Peru"), load_base("demo", device="cpu")[1]
    prompts = [whole(f"What is the capital of {land}?")["input_ids"] for land in lands]
    options: dict[str, Any] = {"adapters": {"capital": 1.0}, "max_new_tokens": 12, "stop_at_newline": True}
    expected = local.generate(prompts, **options)
    assert all(one.text.startswith("\n") and one.text.strip() for one in expected)
    same_answers(small.generate(prompts, **options, do_sample=True, top_k=1), expected)
    assert len(seeds) == len({*seeds}) > len(prompts)


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


def test_steps_that_end_among_the_tokens_on_which_adapters_act(small: Any, local: LoGo) -> None:
    """Prompts are read in steps of so many tokens, one prompt at a time."""
    lengths = [STEP - 1, STEP, *(STEP + some for some in range(1, LAST + 2)), 2 * STEP + 5]
    long = texts(local, 2, 2 * STEP + 5)[1]
    for length, mixture in zip(lengths, cycle(mixtures(local, 8)[1:4])):
        options: dict[str, Any] = {"adapters": mixture, "max_new_tokens": 4}
        same_answers(small.generate([long[-length:]], **options), local.generate([long[-length:]], **options))
