"""What prompts begin with is probed once: the same scores, fewer tokens read, within a budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import tiny
from logo import AdapterPool, LoGo, SelectionSettings
from logo.selection.prefixes import BLOCK, Block, Prefixes
from test_engine import tokenizer, write_adapter
from tolerances import same_selection

LONG = {"max_position_embeddings": 512}


def words(count: int, seed: int) -> str:
    ids = torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def engines(model: nn.Module, folder: Path, **chosen: Any) -> tuple[LoGo, LoGo]:
    """One that reuses prefixes and one that does not."""
    pool = AdapterPool.open(folder)
    return tuple(  # type: ignore[return-value]
        LoGo(
            model,
            tokenizer(),
            pool,
            settings=SelectionSettings.of(**{"signal": "norm", "k": 3, "prefix_cache_gb": budget, **chosen}),
        )
        for budget in (0.25, 0)
    )


@contextmanager
def read_tokens(model: nn.Module) -> Iterator[list[int]]:
    """How many tokens each forward pass in the block is given, over all rows."""
    seen: list[int] = []
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    yield seen
    handle.remove()


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[nn.Module, Path]]:
    made = {}
    for name in ("llama", "gemma3", "gpt2", "opt", "falcon", "phi3", "gpt_neox", "qwen3", "gemma2"):
        # In three layers, the probe of `calibrated` ends before anything is cached.
        deep = {"num_hidden_layers": 6} if name == "llama" else {}
        model = tiny.model(name, **deep, **({"n_positions": 512} if name == "gpt2" else LONG))
        folder = tmp_path_factory.mktemp(name)
        query = ("q_proj", "qkv_proj", "query_key_value", "c_attn")
        for i in range(4):
            write_adapter(folder / f"t{i}", model, query, rank=2, seed=i)
        made[name] = model, folder
    return made


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("llama", "calibrated"),
        *((name, "norm") for name in ("gemma3", "gpt2", "opt", "falcon", "phi3", "gpt_neox", "qwen3", "gemma2")),
    ],
)
def test_scores_do_not_depend_on_what_is_known(name: str, signal: str, pools: Any) -> None:
    model, folder = pools[name]
    reusing, plain = engines(model, folder, signal=signal)
    prefix = words(150, 0)
    prompts = [f"{prefix} {words(n, n)}" for n in (5, 40, 90)] + [words(30, 7), prefix]
    for prompt in prompts:
        found, expected = reusing.select(prompt), plain.select(prompt)
        assert list(found.scores.values()) == pytest.approx(list(expected.scores.values()), rel=1e-3, abs=1e-4)
    together = engines(model, folder, signal=signal)[0].select(prompts[:3], batch_size=3)
    for one, prompt in zip(together, prompts, strict=False):
        assert list(one.scores.values()) == pytest.approx(
            list(plain.select(prompt).scores.values()), rel=1e-3, abs=1e-4
        )


def test_known_tokens_count_as_read(pools: Any) -> None:
    model, folder = pools["llama"]
    reusing, plain = engines(model, folder, signal="calibrated")
    prefix, found = words(2 * BLOCK, 3), []
    for ids in reusing.prompts.texts([f"{prefix} {words(n, n)}" for n in (9, 2)]):
        row = torch.tensor([ids])
        with read_tokens(model) as seen:
            found = [logo.scorer._reader(row, torch.ones_like(row)).tokens.tolist() for logo in (reusing, plain)]
        assert found == [[len(ids) - 1]] * 2  # all but the first one
    assert seen == [len(ids) - 2 * BLOCK, len(ids)]


def test_only_what_is_new_is_read(pools: Any) -> None:
    model, folder = pools["llama"]
    reusing, _ = engines(model, folder, signal="norm")
    prefix = words(3 * BLOCK - 1, 1)  # with the bos token, three blocks
    with read_tokens(model) as seen:
        reusing.select(f"{prefix} {words(9, 2)}")
        reusing.select(f"{prefix} {words(20, 3)}")
        reusing.select(f"{prefix} {words(20, 3)}")
        reusing.select(words(10, 4))
    assert seen == [3 * BLOCK + 9, 20, 20, 11]
    other = words(2 * BLOCK - 1, 5)
    with read_tokens(model) as seen:
        reusing.select([f"{other} {words(5, n)}" for n in range(4)], batch_size=4)
    assert seen == [2 * BLOCK, 4 * 5]  # once for all rows, then what is each row's own


def test_off_with_no_budget_or_with_adapters_active(pools: Any) -> None:
    model, folder = pools["llama"]
    prefix = words(150, 1)
    for chosen in ({"prefix_cache_gb": 0}, {"probe_context": "pool"}):
        settings_ = SelectionSettings.of(k=3, signal="norm", **chosen)
        logo = LoGo(model, tokenizer(), AdapterPool.open(folder), settings=settings_)
        logo.select(prefix)
        with read_tokens(model) as seen:
            logo.select(prefix)
            logo.select([f"{prefix} w5", f"{prefix} w6"], batch_size=2)
        assert seen == [151, 2 * 152], chosen


@pytest.mark.parametrize("name", list(tiny.STATEFUL))
def test_a_model_with_a_state_reads_every_prompt_whole(name: str, tmp_path: Path) -> None:
    """Also those that transformers does not mark as stateful, which keep it in layers or a cache class of their own."""
    model = tiny.model(name, **LONG)
    for i in range(3):
        write_adapter(tmp_path / f"t{i}", model, ("q_proj", "in_proj", "qkv_proj"), rank=2, seed=i)
    # The layers of one of them are of several kinds, of which the probe of `calibrated` reaches the first alone.
    reusing, plain = engines(model, tmp_path, signal="norm" if name == "minimax" else "calibrated")
    prompt = words(150, 0)
    for _ in range(2):
        same_selection(reusing.select(prompt), plain.select(prompt))
    assert reusing.beginnings is None


def block(size: int) -> Block:
    return Block([(torch.zeros(1, 1, BLOCK, size), torch.zeros(1, 1, BLOCK, size))], [], 0)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(0, 3)), max_size=12),
    st.integers(0, 12),
)
def test_blocks_stay_within_the_budget_and_are_found_from_the_start(rows: Any, most: int) -> None:
    """Rows of a few beginnings and ends: what is found is what was kept of the same tokens, without gaps."""
    one = block(4)
    prefixes = Prefixes(most * one.bytes)
    for start, blocks, end in rows:
        row = [start] * (BLOCK * blocks) + [7 + end]
        known = len(prefixes.find(row, blocks))
        made: list[Block] = []

        def make(row: int, number: int, made: list[Block] = made) -> Block:
            made.append(block(4))
            return made[-1]

        prefixes.keep([row], known, one.bytes, make)
        assert all(any(one is held for held in prefixes._blocks.values()) for one in made)  # nothing is made in vain
        assert prefixes.bytes <= prefixes.budget
        assert prefixes.bytes == sum(held.bytes for held in prefixes._blocks.values())
        assert len(prefixes.find(row, blocks)) >= min(blocks, most)
    assert prefixes.find([9] * BLOCK * 2, 2) == []
