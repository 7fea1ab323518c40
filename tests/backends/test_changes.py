"""What must hold while a pool changes, clients leave and workers disagree, in an engine of this process."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines import mixtures

from logo import LoGo
from logo.core import Prompt, Selection
from logo.models import DEMO_FOLDER, load_base
from test_engine import write_adapter
from tolerances import same_selection

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")

pytestmark = pytest.mark.usefixtures("settings_of_vllm")
PROMPT = list(range(5, 40))


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that acts where those of the demo do not."""
    model, _ = load_base("demo", device="cpu", dtype="float32")
    folder = tmp_path_factory.mktemp("adapters") / "late"
    write_adapter(folder, model, ("k_proj",), rank=2, seed=1, scale=2.0)
    return folder


@pytest.fixture(scope="module")
def inside() -> Iterator[Any]:
    """Prompts of more tokens than fit into a step are read in chunks."""
    options: dict[str, Any] = {"enforce_eager": True, "block_size": 32, "max_loras": 4, "max_num_seqs": 8}
    options["max_num_batched_tokens"] = 48
    options["num_gpu_blocks_override"] = 96  # so few that they are soon used again
    options["lora_target_modules"] = ["q_proj", "k_proj", "v_proj"]
    made: Any = LoGo.from_pretrained("demo", engine="vllm", model_kwargs=options)
    yield made
    made.close()


def test_128_prompts_with_128_mixtures_among_base_rows(inside: Any, logo: LoGo, rows: list[str]) -> None:
    """With fewer slots than the pool has adapters."""
    wanted = mixtures(logo.names, 128)
    found, expected = (one.generate(rows, adapters=wanted, max_new_tokens=12, batch_size=16) for one in (inside, logo))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_scores_of_prompts_that_are_read_in_chunks_are_the_librarys(inside: Any, logo: LoGo, rows: list[str]) -> None:
    """Also where they begin alike, and where they come a second time."""
    shared = " ".join(rows[:12])
    asked = [*rows[::4], *(f"{shared} {row}" for row in rows[:6]), rows[0]]
    for signal in ("calibrated", "norm", "calibrated"):
        for found, expected in zip(inside.select(asked, signal=signal), logo.select(asked, signal=signal), strict=True):
            same_selection(found, expected)


def test_a_mixture_answers_as_chosen_whatever_becomes_of_its_pool(
    inside: Any, late: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its adapter leaves the pool, whose other adapters stay; and those are not forgotten for newer ones."""
    from vllm import SamplingParams

    from logo.vllm import worker

    monkeypatch.setattr(worker, "_REMEMBERED", 2)
    engine, once = inside.engine, SamplingParams(max_tokens=1, temperature=0.0, logprobs=3)

    async def answers(mix: Any) -> dict[int, float]:
        async with engine.held([mix]) as [lora]:
            [output] = await engine.run([([*PROMPT, *PROMPT], once, lora)])
        return {token: one.logprob for token, one in output.outputs[0].logprobs[0].items()}

    async def whole() -> None:
        base = await answers(engine.mix(engine.served, Selection.forced({})))
        await engine.change("add", "late", str(late))
        chosen = engine.mix(engine.served, Selection.forced({"late": 1.0}))
        expected = await answers(chosen)
        assert expected != base
        await engine.change("remove", "late")
        await engine.change("add", "again", str(DEMO_FOLDER / "adapters" / "plural"))
        inside.llm.reset_prefix_cache()
        assert await answers(chosen) == expected
        await engine.change("remove", "again")
        for name in engine.served.pool.names:
            await answers(engine.mix(engine.served, Selection.forced({name: 1.0})))

    asyncio.run(whole())


def test_what_a_client_reads_alone_is_found_by_nobody(inside: Any) -> None:
    """As where a request has a salt for vLLM's cache."""
    from vllm import SamplingParams

    engine, once = inside.engine, SamplingParams(max_tokens=1, temperature=0.0)

    async def cached(row: list[int], alone: bool) -> int:
        call = engine.options.settings.options(engine.served.pool, {})
        await engine.select(engine.served, Prompt.of_ids(row), call, alone)
        [output] = await engine.run([(row, once, None)])
        return int(output.num_cached_tokens)

    assert asyncio.run(cached([7, *PROMPT], alone=True)) == 0
    assert asyncio.run(cached([8, *PROMPT], alone=False)) == 32


class Two:
    """vLLM as an engine calls it, with a second worker that has nothing in its cache."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.run, self.asked = engine, engine.run, list[bool]()

    async def call(self, name: str, *args: Any) -> list[dict[str, Any]]:
        first = {"value": (await self._engine.call(name, *args))[0]}
        if name != "signal":
            return [first, first]
        self.asked.append(args[-1])
        return [first, first if len(self.asked) > 1 else {"value": {"texts": [[1, 2, 3]], "points": ["0.q_proj"]}}]


def test_workers_with_different_caches_read_the_same_texts(inside: Any) -> None:
    from logo.vllm.engine import Engine

    two = Two(inside.engine)
    opened = Engine(two.call, two.run, inside.llm.llm_engine.vllm_config)
    expected = asyncio.run(scores(inside.engine))
    asyncio.run(opened.open(["calibrated"]))
    assert two.asked[:2] == [False, True] and len(two.asked) > 2  # texts were run, although the first had all of them
    assert asyncio.run(scores(opened)) == [pytest.approx(expected[0], rel=1e-4)]


async def scores(engine: Any) -> list[list[float]]:
    found: list[list[float]] = await engine.scores(engine.served, "calibrated", [PROMPT], [None])
    return found


def test_an_answer_that_overflows_spoils_no_later_one(inside: Any, logo: LoGo, rows: list[str], tmp_path: Path) -> None:
    """In the blocks of keys and values that it had, many of which are used again."""
    from vllm import SamplingParams

    write_adapter(tmp_path / "overflows", logo.model, ("q_proj", "v_proj"), rank=2, seed=3, scale=1e20)
    engine, once = inside.engine, SamplingParams(max_tokens=4, temperature=0.0, logprobs=0, ignore_eos=True)

    async def overflow() -> list[Any]:
        await engine.change("add", "overflows", str(tmp_path / "overflows"))
        mix = engine.mix(engine.served, Selection.forced({"overflows": 1.0}))
        async with engine.held([mix]) as [lora]:
            outputs: list[Any] = await engine.run([([i, *PROMPT], once, lora) for i in range(100)])
        await engine.change("remove", "overflows")
        return outputs

    places = [place for output in asyncio.run(overflow()) for place in output.outputs[0].logprobs]
    assert all(math.isnan(token.logprob) for place in places for token in place.values())
    found, expected = (one.generate(rows[::3], adapters={}, max_new_tokens=12) for one in (inside, logo))
    assert [one.token_ids for one in found] == [one.token_ids for one in expected]


def test_a_text_is_tokenized_beside_the_event_loop(inside: Any) -> None:
    """Which goes on meanwhile; and one that is too long for the model is not tokenized at all."""
    from vllm.exceptions import VLLMValidationError

    from logo.vllm.reading import text_prompt

    renderer, going = inside.llm.llm_engine.renderer, threading.Event()

    class Waiting:
        """The tokenizer, which waits until the event loop goes on."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert going.wait(30)
            return renderer.tokenizer(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(renderer.tokenizer, name)

    waiting = SimpleNamespace(tokenizer=Waiting(), default_cmpl_tok_params=renderer.default_cmpl_tok_params)
    state = SimpleNamespace(engine_client=SimpleNamespace(renderer=waiting))

    async def whole() -> Prompt:
        with pytest.raises(VLLMValidationError, match="maximum context length"):
            await text_prompt(state, "word " * 1_000_000)
        reading = asyncio.create_task(text_prompt(state, "What is 7 plus 5?"))
        await asyncio.sleep(0)
        going.set()
        return await reading

    [expected] = inside.prompts.read(["What is 7 plus 5?"])
    assert asyncio.run(whole()).ids == expected.ids


def test_infinite_logits_are_marked_as_others_that_are_not_finite() -> None:
    """Of an adapter of the output head: vLLM marks answers by NaN alone."""
    from logo.vllm.gates import StepGates
    from logo.vllm.layers import GatedWrapper

    cpu = torch.device("cpu")
    gates = StepGates(8, 8, 1, cpu, torch.float32, eager=True)
    gates.write((), [(1, torch.ones(1, 1))])
    logits = torch.zeros(2, 4)
    a = torch.full((1, 1, 2, 3), 1e4)
    b = torch.full((1, 1, 4, 2), 1e10)
    GatedWrapper(8, 8, cpu, gates).add_lora_logits(logits, torch.full((2, 3), 1e30), a, b, 1.0)
    assert (logits[0] == 0).all() and logits[1].isnan().all()


@pytest.mark.parametrize("leaves", [True, False])
def test_slots_are_free_once_vllm_has_ended(leaves: bool) -> None:
    """Also where it ends because the client has left, and where the client stays but does not read."""
    from vllm import SamplingParams

    from logo.vllm.requests import Mix
    from logo.vllm.serving import Mixing

    heard: list[str] = []

    class Client:
        vllm_config = SimpleNamespace(speculative_config=None)

        async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            try:
                for _ in range(1_000_000 if leaves else 3):
                    await asyncio.sleep(0)
                    yield SimpleNamespace(outputs=[], metrics=None, finished=False)
            finally:
                await asyncio.sleep(0)
                heard.append("vLLM")

    @asynccontextmanager
    async def held(mixes: Sequence[Mix]) -> AsyncIterator[list[Any]]:
        try:
            yield [None]
        finally:
            heard.append("slots")

    async def ask() -> None:
        engine: Any = SimpleNamespace(held=held)
        outputs = Mixing(Client(), engine, [Mix(())]).generate({"prompt_token_ids": [1]}, SamplingParams(), "r")
        await anext(outputs)
        if leaves:
            await outputs.aclose()
        else:
            while len(heard) < 2:  # it does not read
                await asyncio.sleep(0.01)
            assert len([output async for output in outputs]) == 2

    asyncio.run(ask())
    assert heard == ["vLLM", "slots"]


def test_where_tokens_are_guessed_log_probabilities_say_that_an_answer_overflows() -> None:
    """Since vLLM does not know whose logits its marks are of; what the client has asked for stays as it is."""
    from vllm import SamplingParams

    from logo.api.errors import ApiError
    from logo.vllm.requests import Mix
    from logo.vllm.serving import Mixing

    computed: list[int | None] = []

    class Client:
        def __init__(self, guesses: bool) -> None:
            self.vllm_config = SimpleNamespace(speculative_config=object() if guesses else None)

        async def generate(self, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            computed.append(params.logprobs)
            for logprob in (-1.0, math.nan):
                places = None if params.logprobs is None else [{5: SimpleNamespace(logprob=logprob)}]
                yield SimpleNamespace(outputs=[SimpleNamespace(logprobs=places, token_ids=[5])], metrics=None)

    @asynccontextmanager
    async def held(mixes: Sequence[Mix]) -> AsyncIterator[list[Any]]:
        yield [None]

    async def outputs(guesses: bool) -> list[Any]:
        mixing = Mixing(Client(guesses), SimpleNamespace(held=held), [Mix(())])  # type: ignore[arg-type]
        return [output async for output in mixing.generate({"prompt_token_ids": [1]}, asked, "r")]

    asked = SamplingParams()
    assert len(asyncio.run(outputs(False))) == 2
    with pytest.raises(ApiError, match="logits are NaN"):
        asyncio.run(outputs(True))
    assert computed == [None, 0] and asked.logprobs is None
