"""Adapters that act from a position of the prompt on, inside vLLM: tokens, scores and likelihoods of the local engine,
which answers as PEFT's aLoRA does (`tests/test_activation.py`), and one cache for the probe and every mixture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import run
from vllm_server import ASSETS, Server, environment

from logo import LoGo
from logo.models import DEMO_FOLDER, load_base
from make_adapters import edit_config
from test_engine import ids_of, write_adapter
from tolerances import WEIGHTS, same_scores, same_selection

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

BLOCK = 32
# Prompts of more tokens than fit into a step are read in chunks, which end anywhere.
VLLM = {"enforce_eager": True, "max_model_len": 512, "block_size": BLOCK, "max_num_batched_tokens": 72}
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHAT = [
    {"role": "system", "content": "Be brief. " * 20},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris"},
    {"role": "user", "content": "And of Italy?"},
]
MIXTURES: list[dict[str, float]] = [{"a": 0.7, "b": 0.5}, {"b": 0.4, "c": 0.9}, {"c": 1.0}, {}]

pytestmark = pytest.mark.usefixtures("settings_of_vllm")


@pytest.fixture(scope="module")
def invoking() -> list[int]:
    """Tokens of which every second prompt has some near its end."""
    _, tokenizer = load_base("demo", device="cpu")
    ids: list[int] = tokenizer(" is", add_special_tokens=False)["input_ids"]
    return ids


@pytest.fixture(scope="module")
def prompts(invoking: list[int]) -> list[list[int]]:
    """Of 20 to 200 tokens."""
    _, tokenizer = load_base("demo", device="cpu")
    files = sorted((DEMO_FOLDER / "heldout").glob("*.jsonl"))
    rows = [json.loads(line)["context"] for file in files for line in file.read_text().splitlines()[:3]]
    ids = [tokenizer("\n".join(rows[i : i + 1 + i % 12]))["input_ids"][: 150 + 4 * i] for i in range(8)]
    return [row[:-2] + (invoking if i % 2 == 0 else []) + row[-2:] for i, row in enumerate(ids)]


@pytest.fixture(scope="module")
def pool(invoking: list[int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of different ranks on different modules, one with an invocation. Pools of one kind: below, and
    test_read_once.py."""
    folder = tmp_path_factory.mktemp("pool")
    model, _ = load_base("demo", device="cpu")
    for number, (name, modules) in enumerate((("a", ("q_proj", "v_proj")), ("b", EVERY), ("c", ("q_proj", "v_proj")))):
        write_adapter(folder / name, model, modules, rank=2 + number, seed=number, scale=0.06)
    edit_config(folder / "a", alora_invocation_tokens=invoking)
    (folder / "pool.json").write_text('{"activation": "last:4"}')
    return folder


@pytest.fixture(scope="module")
def local(pool: Path) -> LoGo:
    return LoGo.from_pretrained("demo", pool, device="cpu", k=2)


@pytest.fixture(scope="module")
def inside(pool: Path) -> Iterator[Any]:
    """The engine inside vLLM."""
    made: Any = LoGo.from_pretrained("demo", pool, engine="vllm", k=2, model_kwargs=VLLM)
    yield made
    made.close()


def tokens(answers: Any) -> list[tuple[int, ...]]:
    return [answer.token_ids for answer in answers]


@pytest.mark.filterwarnings("ignore:a prompt lacks")
def test_mixtures_are_those_of_the_local_engine(inside: Any, local: LoGo, prompts: list[list[int]]) -> None:
    mixtures = [MIXTURES[i % len(MIXTURES)] for i in range(len(prompts))]
    options: dict[str, Any] = {"adapters": mixtures, "max_new_tokens": 8}
    expected = tokens(local.generate(prompts, **options))
    assert tokens(inside.generate(prompts, **options)) == expected  # nothing is cached
    assert tokens(inside.generate(prompts, **options)) == expected  # everything is


@pytest.mark.filterwarnings("ignore:a prompt lacks")
@pytest.mark.parametrize("signal", ["calibrated", "norm", "entropy"])
def test_selections_are_the_local_engines(inside: Any, local: LoGo, prompts: list[list[int]], signal: str) -> None:
    asked = [*prompts, CHAT, CHAT[1:]]
    for _ in range(2):  # the second time from the cache
        for found, expected in zip(
            inside.select(asked, signal=signal), local.select(asked, signal=signal), strict=True
        ):
            same_selection(found, expected)
    assert inside.points == local.points
    answers = inside.generate(prompts, max_new_tokens=4, signal=signal)
    expected_answers = local.generate(prompts, max_new_tokens=4, signal=signal)
    for one, other in zip(answers, expected_answers, strict=True):
        same_selection(one.selection, other.selection)
        assert one.token_ids == other.token_ids


@pytest.mark.filterwarnings("ignore:a prompt lacks")
def test_likelihoods_are_those_of_the_local_engine(inside: Any, local: LoGo, prompts: list[list[int]]) -> None:
    pairs = [(prompt, [7, 8, 9]) for prompt in prompts]
    for mixture in MIXTURES:
        found, expected = (engine.score_pairs(pairs, [mixture] * len(pairs)) for engine in (inside, local))
        assert [one.nll for one in found] == same_scores([one.nll for one in expected])


# -- the other runner, and the server ----------------------------------------------------------------------------------


def test_runner_v2_does_the_same(tmp_path: Path, prompts: list[list[int]]) -> None:
    local = LoGo.from_pretrained("demo", device="cpu", k=4, activation="last:4")
    texts = [local.tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts[2:6]]
    mixtures = [{local.names[i]: 0.7, local.names[-1 - i]: 0.4} if i % 4 else {} for i in range(len(texts))]
    job = {"prompts": texts, "signals": ["calibrated"], "rows": [*zip(texts, mixtures, strict=True)], "max_tokens": 6}
    flags = {**VLLM, "max_num_batched_tokens": 160, "max_num_seqs": 16}
    found = run(tmp_path, {**job, "flags": flags, "logo": {"activation": "last:4"}}, PRETEND_V2="1")
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
    for own, expected in zip(found["scores"]["calibrated"], local.select(texts), strict=True):
        assert own == pytest.approx(list(expected.scores.values()), rel=1e-3, abs=1e-3)
    answers = local.generate(texts, adapters=mixtures, max_new_tokens=6)
    assert found["tokens"] == [list(answer.token_ids) for answer in answers]
    lengths = [len(local.tokenizer(text)["input_ids"]) for text in texts]
    assert all(count >= (n - 4) // BLOCK * BLOCK for count, n in zip(found["cached"], lengths, strict=True))
    assert sum(found["cached"]) > 0


def test_the_server_answers_what_the_local_engine_does(
    serve: Callable[..., Server], tmp_path: Path, invoking: list[int], prompts: list[list[int]]
) -> None:
    """Its chat template ends prompts with the invocation. Nothing says that its pool may change."""
    shutil.copytree(ASSETS / "model", tmp_path / "base")
    template = "{% for m in messages %}{{ m.content }}\n{% endfor %}This is"
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    shutil.copytree(ASSETS / "adapters", tmp_path / "pool")
    for config in (tmp_path / "pool").glob("*/adapter_config.json"):
        edit_config(config.parent, alora_invocation_tokens=invoking)
    write_adapter(tmp_path / "pool" / "late", load_base("demo", device="cpu")[0], EVERY, rank=2, seed=7, scale=0.06)
    (tmp_path / "pool" / "late" / "pool.json").write_text('{"activation": "last:3"}')
    base, chosen = str(tmp_path / "base"), {"k": 4}
    local = LoGo.from_pretrained(base, tmp_path / "pool", device="cpu", **chosen)
    server = serve(
        *("--model", base),
        *("--max-loras", "17", "--max-lora-rank", "8", "--max-model-len", "512", "--block-size", str(BLOCK)),
        "--enable-prompt-tokens-details",
        env=environment(tmp_path / "pool", **chosen),
    )
    new = {"lora_name": "new", "lora_path": str(ASSETS / "adapters" / "capital")}
    assert server.ask("/v1/load_lora_adapter", new)[0] == 404
    for prompt, one in zip(prompts, local.generate(prompts, max_new_tokens=6), strict=True):
        asked = {"model": "logo", "prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
        status, found = server.ask("/v1/completions", asked)
        assert status == 200 and found["logo"]["adapters"] == list(one.selection.adapters)
        assert found["choices"][0]["text"].rstrip() == one.text.rstrip()
        begin = local.pool[local.names[0]].activation.begin(prompt)
        if begin is None:
            continue
        cached = (found["usage"]["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"]
        assert cached == begin // BLOCK * BLOCK  # what the probe has read
        name = local.names[3]
        status, found = server.ask("/v1/completions", {**asked, "model": name})
        assert (
            found["choices"][0]["text"].rstrip()
            == local.generate(prompt, adapters={name: 1.0}, max_new_tokens=6).text.rstrip()
        )
        status, found = server.ask("/v1/completions", {**asked, "model": "late", "use_beam_search": True, "n": 1})
        late = local.generate(prompt, adapters={"late": 1.0}, max_new_tokens=6)
        assert found["choices"][0]["text"].rstrip() == late.text.rstrip()
    for chat in (CHAT, CHAT[1:]):
        [want], [ids] = local.generate([chat], max_new_tokens=6), ids_of(local, [chat])
        asked = {"model": "logo", "messages": chat, "max_tokens": 6, "temperature": 0}
        status, found = server.ask("/v1/chat/completions", asked)
        assert status == 200 and found["logo"]["adapters"] == list(want.selection.adapters)
        assert found["logo"]["weights"] == pytest.approx(want.selection.weights, abs=WEIGHTS)
        assert found["choices"][0]["message"]["content"].rstrip() == want.text.rstrip()
        cached = (found["usage"]["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"]
        assert cached == (len(ids) - len(invoking)) // BLOCK * BLOCK
