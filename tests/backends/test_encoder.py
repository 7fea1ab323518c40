"""A text encoder beside vLLM: scores are the local engine's, whatever waits, changes or cannot be loaded."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from encoders import HeldEncoder, write_encoder
from logo import LoGo
from logo.adapters.examples import write_examples
from logo.adapters.peft import EXAMPLES, RECORD
from logo.core import Prompt
from logo.errors import ModelError
from logo.models import DEMO_FOLDER
from tolerances import PATIENCE, same_scores, same_selection

pytest.importorskip("vllm.lora", reason="needs vLLM: make test-vllm")
pytest.importorskip("sentence_transformers")

pytestmark = pytest.mark.usefixtures("settings_of_vllm")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's, of which every second adapter has no examples, and every fourth a description instead."""
    folder = tmp_path_factory.mktemp("pool")
    shutil.copytree(DEMO_FOLDER / "adapters", folder, dirs_exist_ok=True)
    without = sorted(folder.rglob(EXAMPLES))[::2]
    for file in without:
        file.unlink()
    for file in without[::2]:
        description = f"description: Does what {file.parent.name} says.\n"
        (file.parent / RECORD).write_text(description, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def local(pool: Path, encoder: str) -> LoGo:
    return LoGo.from_pretrained("demo", pool, device="cpu", dtype="float32", encoder=encoder, k=4)


@pytest.fixture(scope="module")
def inside(pool: Path, encoder: str) -> Iterator[Any]:
    options: dict[str, Any] = {"enforce_eager": True, "max_model_len": 512, "max_loras": 8}
    made: Any = LoGo.from_pretrained("demo", pool, engine="vllm", encoder=encoder, k=4, model_kwargs=options)
    yield made
    made.close()


def test_selections_are_those_of_the_local_engine(inside: Any, local: LoGo, rows: list[str], pool: Path) -> None:
    """Also of long prompts, of which the window is read, among candidates, and by a signal that uses no examples."""
    asked = [*rows[::8], " ".join(rows[2:10])]
    some = [*local.names[:3], local.names[-1]]
    options: list[dict[str, Any]] = [{}, {"candidates": some}, {"candidates": some[:1]}, {"signal": "norm"}]
    for option in options:
        found, expected = (engine.select(asked, **option) for engine in (inside, local))
        for one, other in zip(found, expected, strict=True):
            same_selection(one, other)
    without = LoGo.from_pretrained("demo", pool, device="cpu", dtype="float32", k=4)
    for one, other in zip(inside.select(asked), without.select(asked), strict=True):
        assert one.scores != same_scores(other.scores)


def test_prompts_that_wait_are_encoded_together_beside_the_event_loop(
    inside: Any, local: LoGo, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not for clients that have left."""
    engine = inside.engine
    unread = [f"{row} once" for row in rows[:7]]  # prompts that were read a moment ago would not be read again
    prompts = [Prompt.of_ids(local.tokenizer(row)["input_ids"]) for row in unread]
    call = engine.options.settings.options(engine.served.pool, {})
    held = HeldEncoder(monkeypatch, PATIENCE)

    async def whole() -> list[Any]:
        async def select(prompt: Prompt) -> Any:
            return await engine.select(engine.served, prompt, call)

        selecting = [asyncio.create_task(select(prompts[0]))]
        try:
            await asyncio.to_thread(held.began.wait, PATIENCE)
            selecting += [asyncio.create_task(select(prompt)) for prompt in prompts[1:]]
            for _ in range(20):  # the loop goes on while the encoder does not
                await asyncio.sleep(0)
            left = selecting.pop()
            left.cancel()
            await asyncio.wait([left])
            assert held.calls == [1] and left.cancelled()
        finally:
            held.go.set()
        return list(await asyncio.gather(*selecting))

    found = asyncio.run(whole())
    assert held.calls == [1, 5]
    for one, other in zip(found, local.select([list(prompt.ids) for prompt in prompts[:6]]), strict=True):
        same_selection(one, other)


def test_an_encoder_that_fails_fails_those_that_wait(
    inside: Any, rows: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers import SentenceTransformer

    expected = inside.select(rows[0])
    with monkeypatch.context() as patch:
        patch.setattr(SentenceTransformer, "encode", lambda *_, **__: torch.empty(0).view(-1, 3)[0, 5])
        with pytest.raises(IndexError):
            inside.select(f"{rows[0]} again")
    same_selection(inside.select(rows[0]), expected)


def test_examples_of_a_pool_that_changes(
    inside: Any, pool: Path, encoder: str, rows: list[str], tmp_path: Path
) -> None:
    """An adapter joins with its examples, is replaced by one that differs in these alone, and leaves."""
    engine = inside.engine
    asked = [Prompt.of_ids(inside.tokenizer(row)["input_ids"]) for row in rows[:4]]
    changed = LoGo.from_pretrained("demo", pool, device="cpu", dtype="float32", encoder=encoder, k=4)
    for version, examples in (("first", rows[8:10]), ("second", rows[40:43])):
        shutil.copytree(DEMO_FOLDER / "adapters" / "plural", tmp_path / version)
        (tmp_path / version / EXAMPLES).unlink(missing_ok=True)
        write_examples(tmp_path / version, examples)

    async def scores(*change: str) -> list[list[float]]:
        await engine.change(*change)
        found: list[list[float]] = await engine.scores(
            engine.served, "calibrated", [prompt.probed for prompt in asked], [None] * len(asked)
        )
        return found

    def expected() -> list[Any]:
        return [same_scores(list(one.scores.values())) for one in changed.select([list(one.ids) for one in asked])]

    changed.pool.add(tmp_path / "first", "joined")
    assert asyncio.run(scores("add", "joined", str(tmp_path / "first"))) == expected()
    changed.pool.remove("joined")
    changed.pool.add(tmp_path / "second", "joined")
    assert asyncio.run(scores("replace", "joined", str(tmp_path / "second"))) == expected()
    changed.pool.remove("joined")
    assert asyncio.run(scores("remove", "joined", "")) == expected()


def test_an_encoder_that_cannot_be_loaded_starts_nothing(pool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logo.vllm.offline._started", None)
    with pytest.raises(ModelError, match="text encoder 'no such': no such folder, and not a Hub id"):
        LoGo.from_pretrained("demo", pool, engine="vllm", encoder="no such")
