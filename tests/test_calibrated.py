"""The calibrated signal end to end on tiny models: what it computes, what it keeps, and pools that try to break it."""

from __future__ import annotations

import functools
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

import tiny
from logo import AdapterPool, LoGo, SelectionSettings, UsageError
from logo.adapters.adapter import Adapter
from logo.errors import Unsure
from logo.selection import calibration
from logo.selection.reference import UNIT, USUAL
from logo.selection.texts import NEUTRAL, REQUESTS
from logo.selection.whitening import Whitening
from logo.serve.batching import Memory
from logo.serve.service import Service
from make_adapters import everyones_folder, lock
from test_engine import write_adapter
from tolerances import same_scores, same_selection

PROMPTS = ["Where is it?", "a", "The cat sat on the mat and slept.", "3 + 4 =", "def f(x):"]
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens, so that every text is another one."""
    vocab = {"<s>": 0, "</s>": 1, "<pad>": 2} | {chr(c): c - 29 for c in range(32, 125)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="|"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """Of six layers, the first three of which are probed, and two of them read."""
    return tiny.model("llama", num_hidden_layers=6)


def engine(model: nn.Module, folder: Path, **settings: Any) -> LoGo:
    chosen = SelectionSettings.of(**{"signal": "calibrated", "k": 1, **settings})
    logo = LoGo(model, tokenizer(), AdapterPool.open(folder), settings=chosen)
    logo.calibrate()
    return logo


def pool(model: nn.Module, folder: Path, count: int = 4, names: tuple[str, ...] = ("q_proj", "v_proj")) -> Path:
    for i in range(count):
        write_adapter(folder / f"t{i}", model, names, rank=2 + i, seed=i)
    return folder


@pytest.mark.slow
def test_scores_are_the_formula(llama: nn.Module, tmp_path: Path) -> None:
    """Computed the long way: every text alone through the whole model, ΔW whole, whitening as a matrix."""
    logo = engine(llama, pool(llama, tmp_path), window="whole")
    texts = logo.prompts.texts([*NEUTRAL, *REQUESTS, PROMPTS[2]])
    neutral = slice(len(NEUTRAL))
    expected = []
    for adapter in logo.pool.fit(logo._layout):
        even, late = [], []
        for path in (point.module for point in logo.scorer.points):
            hidden = [inputs(llama, path, row)[1:] for row in texts]  # without the first token
            whitening = Whitening.of(torch.cat(hidden[neutral]))
            matrix = whitening.fold(torch.eye(32))
            weights = adapter.read([path])[path]
            delta = weights.scaled_b() @ weights.A
            relative = []
            for h in hidden:
                response = ((h - whitening.mean) @ matrix @ delta.T).norm(dim=1)
                relative.append(response / ((h - whitening.mean) @ whitening.sketch().T).norm(dim=1).sqrt())
            weights_of = [0.75 ** torch.arange(len(h)).flip(0) for h in hidden]
            for found, means in (
                (even, [one.mean() for one in relative]),
                (late, [(w * one).sum() / w.sum() for w, one in zip(weights_of, relative, strict=True)]),
            ):
                responses = torch.stack(means).log()
                found.append((responses - responses[neutral].mean()) / responses[neutral].std())
        expected.append((torch.stack(even).mean(dim=0) + 0.5 * torch.stack(late).mean(dim=0)) / 1.5)
    assert len(logo.scorer.points) > 1
    scores = logo.select(PROMPTS[2]).scores
    mean_z = torch.stack(expected)  # (adapters, texts)
    swing = mean_z[:, :-1].std(dim=1)
    typical = mean_z[:, len(NEUTRAL) : -1].median(dim=1).values
    excess = (typical - typical.median()).clamp(-1, 1)
    assert len(texts[-1]) > USUAL
    every = (mean_z - excess[:, None]) * (swing.median() / swing).clamp(max=1)[:, None]
    apart = every[:, neutral].var(dim=0).mean().sqrt()
    wanted = UNIT * every[:, -1] / apart
    assert torch.tensor(list(scores.values())).tolist() == pytest.approx(wanted.tolist(), abs=2e-3)


def inputs(model: nn.Module, path: str, row: list[int]) -> torch.Tensor:
    """(tokens, d): what a module receives."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    model(input_ids=torch.tensor([row]))
    handle.remove()
    return seen[0]


def test_batches_and_order_do_not_matter(llama: nn.Module, tmp_path: Path) -> None:
    logo = engine(llama, pool(llama, tmp_path))
    alone = [logo.select(prompt).scores for prompt in PROMPTS]
    batched = logo.select(PROMPTS[::-1], batch_size=5)[::-1]
    for one, many in zip(alone, batched, strict=True):
        assert list(many.scores.values()) == pytest.approx(list(one.values()), abs=1e-3)


def test_an_adapters_size_does_not_matter(llama: nn.Module, tmp_path: Path) -> None:
    plain = engine(llama, pool(llama, tmp_path / "plain"))
    large = shutil.copytree(tmp_path / "plain", tmp_path / "large")
    file = large / "t1" / "adapter_model.safetensors"
    save_file({key: 30 * value for key, value in load_file(file).items()}, file)
    for a, b in zip(plain.select(PROMPTS), engine(llama, large).select(PROMPTS), strict=True):
        assert list(a.scores.values()) == pytest.approx(list(b.scores.values()), abs=2e-3)


def change(folder: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({key: how(value) if "lora_B" in key else value for key, value in load_file(file).items()}, file)


def zeros(model: nn.Module, folder: Path) -> None:
    change(folder / "t1", torch.zeros_like)


def only_zeros(model: nn.Module, folder: Path) -> None:
    for i in range(4):
        change(folder / f"t{i}", torch.zeros_like)


def twins(model: nn.Module, folder: Path) -> None:
    shutil.copytree(folder / "t1", folder / "t1-copy")


def one(model: nn.Module, folder: Path) -> None:
    for i in range(1, 4):
        shutil.rmtree(folder / f"t{i}")


def giant(model: nn.Module, folder: Path) -> None:
    write_adapter(folder / "giant", model, ALL, rank=64, seed=9, scale=100)


def dwarf(model: nn.Module, folder: Path) -> None:
    write_adapter(folder / "dwarf", model, ("q_proj",), rank=1, seed=9, scale=1e-6)


def other_modules(model: nn.Module, folder: Path) -> None:
    write_adapter(folder / "other", model, ("down_proj",), rank=3, seed=9)


def zero_layer(model: nn.Module, folder: Path) -> None:
    file = folder / "t2" / "adapter_model.safetensors"
    save_file({k: v * ("layers.1." not in k) for k, v in load_file(file).items()}, file)


POOLS = [zeros, only_zeros, twins, one, giant, dwarf, other_modules, zero_layer]
STRANGE = ["w", "日本語の文", "w5 " * 100, "aaaaaaaa", "."]


@pytest.mark.parametrize("make", POOLS, ids=lambda f: f.__name__)
def test_strange_pools_and_prompts(make: Any, llama: nn.Module, tmp_path: Path) -> None:
    make(llama, pool(llama, tmp_path))
    logo = engine(llama, tmp_path, unscorable="skip")
    prompts = [*STRANGE, *(f"{chr(i) * (i % 7)} and {chr(i + 9)}{i}" for i in range(40, 100))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the longest is cut
        selections = logo.select(prompts)
    for selection in selections:
        assert all(abs(score) < 1e9 for score in selection.scores.values())  # NaN compares false
        assert selection.confidence is not None
        assert selection.confidence - 1e-5 <= sum(selection.weights) <= 1 + 1e-5
    winners = [selection.adapters[0] for selection in selections]
    if make not in (only_zeros, one):
        assert max(winners.count(name) for name in set(winners)) < 0.8 * len(prompts), "one adapter wins everything"
    if make is zeros:
        assert "t1" not in winners
    if make is twins:
        for selection in selections:
            assert selection.scores["t1"] == same_scores(selection.scores["t1-copy"])


def test_every_architecture_is_calibrated(tmp_path: Path) -> None:
    names = ("q_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "fc2", "dense_4h_to_h", "c_proj")
    for name in ("gpt2", "opt", "falcon", "phi3", "gpt_neox", "gemma3"):
        model = tiny.model(name)
        for i in range(3):
            write_adapter(tmp_path / name / f"t{i}", model, names, rank=2, seed=i)
        selection = engine(model, tmp_path / name).select(PROMPTS[0])
        assert all(abs(score) < 100 for score in selection.scores.values())


def test_only_new_adapters_are_calibrated(llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across engines through the disk, and when the pool of a running engine grows."""
    measured: list[list[str]] = []
    original = calibration._measure

    def measure(reading: Any, wanted: Any, run: Any) -> Any:
        measured.append(sorted({adapter.name for adapters in wanted.values() for adapter in adapters}))
        return original(reading, wanted, run)

    monkeypatch.setattr(calibration, "_measure", measure)
    settings = {"cache": str(tmp_path / "cache")}
    first = engine(llama, pool(llama, tmp_path / "pool"), **settings)
    assert measured[0] == ["t0", "t1", "t2", "t3"]
    measured.clear()
    again = engine(llama, tmp_path / "pool", **settings)
    assert not any(measured)
    same_selection(again.select(PROMPTS[0]), first.select(PROMPTS[0]))
    write_adapter(tmp_path / "new", llama, ("q_proj", "v_proj"), rank=3, seed=8)
    again.pool.add(tmp_path / "new")
    grown = again.select(PROMPTS[0])
    assert [names for names in measured if names] == [["new"]]
    assert set(grown.scores) == {"new", "t0", "t1", "t2", "t3"}
    fresh = LoGo(llama, tokenizer(), again.pool, settings=again.settings)
    same_selection(fresh.select(PROMPTS[0]), grown)  # the way there does not matter
    again.pool.remove("new")
    same_selection(again.select(PROMPTS[0]), first.select(PROMPTS[0]))


def test_nothing_runs_and_no_weight_is_read_until_it_is_needed(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making an engine checks the pool; `calibrate` runs the model, and the first call would."""
    happened: list[str] = []
    for owner, name in ((type(llama), "forward"), (Adapter, "read")):
        whole = getattr(owner, name)

        def noted(*args: Any, name: str = name, whole: Any = whole, **kwargs: Any) -> Any:
            happened.append(name)
            return whole(*args, **kwargs)

        monkeypatch.setattr(owner, name, functools.wraps(whole)(noted))
    made = AdapterPool.open(pool(llama, tmp_path), verify=False)
    settings = SelectionSettings("calibrated", k=1, cache="")
    logo = LoGo(llama, tokenizer(), made, settings=settings)
    assert logo.k == 1 and happened == []
    logo.generate(PROMPTS[0], adapters={}, max_new_tokens=1)
    assert set(happened) == {"forward"}
    happened.clear()
    assert logo.calibrate() is logo.scorer.calibration is not None
    assert set(happened) == {"forward", "read"}
    happened.clear()
    logo.calibrate()
    assert happened == []
    other = LoGo(llama, tokenizer(), made, settings=settings)
    same_selection(other.select(PROMPTS[0]), logo.select(PROMPTS[0]))


def test_a_damaged_cache_is_made_anew(llama: nn.Module, tmp_path: Path) -> None:
    settings = {"cache": str(tmp_path / "cache")}
    first = engine(llama, pool(llama, tmp_path / "pool"), **settings)
    for file in (tmp_path / "cache" / "calibration").rglob("*.safetensors"):
        file.write_bytes(b"no tensors")
    with pytest.warns(UserWarning, match="damaged and computed anew"):
        again = engine(llama, tmp_path / "pool", **settings)
    same_selection(again.select(PROMPTS[0]), first.select(PROMPTS[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine(llama, tmp_path / "pool", **settings)


def test_a_cache_that_cannot_be_written_is_one_warning(llama: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="can be kept in .*LOGO_CACHE") as warned:
        engine(llama, pool(llama, tmp_path / "pool"), cache=str(tmp_path / "file"))
    assert len(warned) == 1


@pytest.mark.parametrize("readable", [True, False])
def test_a_cache_that_may_only_be_read_or_not_even_that(readable: bool, llama: nn.Module) -> None:
    """It is read, and nothing is said; or it is not called damaged."""
    with everyones_folder() as root:
        settings = {"k": 3, "cache": str(root / "cache")}
        first = engine(llama, pool(llama, root / "pool"), **settings)
        if readable:
            for path in (root / "cache", *(root / "cache").rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
            for path in (root / "pool").rglob("*.safetensors"):
                path.chmod(0o644)
            os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())
        else:
            lock(root / "cache" / "calibration", root)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            again = engine(llama, root / "pool", **settings)
        said = [message for one in warned if str(root) in (message := str(one.message))]
        if readable:
            assert said == []
            assert again.scorer.calibration is not None and again.scorer.calibration.measured == 0
        else:
            assert any("cannot be read and is computed anew: Permission denied" in message for message in said)
            assert not any("damaged" in message for message in said)
        same_selection(again.select(PROMPTS[0]), first.select(PROMPTS[0]))


def test_the_points_of_highest_contrast_are_chosen(llama: nn.Module, tmp_path: Path) -> None:
    found = engine(llama, pool(llama, tmp_path, names=ALL)).scorer.calibration
    assert found is not None and {point.layer for point in found.points} <= {1, 2}
    assert len(found.ranking) == 7 * 2  # of the three layers that are probed, the first one is passed over
    values = [value for _, value in found.ranking]
    assert values == sorted(values, reverse=True) and found.ranking[0][0] in found.points


def test_own_prompts_may_rank_the_points(llama: nn.Module, tmp_path: Path) -> None:
    own = [f"{i} x {i + 3} y {i + 9}" for i in range(3, 40)]
    ours = engine(llama, pool(llama, tmp_path, names=ALL)).scorer.calibration
    theirs = engine(llama, tmp_path, calibration_prompts=own).scorer.calibration
    assert ours is not None and theirs is not None
    assert ours.ranking != theirs.ranking


def test_a_refused_prompt_is_probed_once(llama: nn.Module, tmp_path: Path) -> None:
    """It fails alone: those beside it in a batch of the server have the selections that it does not change."""
    mixed = engine(llama, pool(llama, tmp_path))
    want = mixed.select(PROMPTS, batch_size=len(PROMPTS))
    below = sorted(one.confidence or 0.0 for one in want)[2]
    refusing = engine(llama, tmp_path, when_unsure="refuse", unsure_below=below)
    rows, passes = refusing.prompts.read(PROMPTS, room=None), []
    handle = llama.get_submodule("model.embed_tokens").register_forward_hook(lambda *_: passes.append(1))
    found = Service(refusing, Memory(concurrent=4))._probed([*rows], [refusing.options()] * len(rows))
    handle.remove()
    assert [isinstance(one, Unsure) for one in found] == [(one.confidence or 0.0) < below for one in want]
    for one, other in zip(found, want, strict=True):
        assert one.scores == same_scores(other.scores)  # type: ignore[union-attr]
    assert len(passes) == 1


def test_texts_are_many_and_short() -> None:
    assert len(set(NEUTRAL)) == len(NEUTRAL) >= 64
    assert len(set(REQUESTS)) == len(REQUESTS) >= 64
    assert max(map(len, NEUTRAL + REQUESTS)) < 200


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weighting": "sharp"}, "weighting: expected one of linear, adaptive"),
        ({"weighting": "adaptive", "signal": "norm"}, "has no scale of its own; use 'linear'"),
        ({"when_unsure": "best"}, "when_unsure: expected one of mix, base, refuse"),
        ({"when_unsure": "base", "signal": "norm"}, "does not say how sure it is"),
        ({"signal": ["norm"]}, r"signal: expected the name of a signal, found \['norm'\]"),
        ({"signal": None}, "signal: expected the name of a signal, found None"),
        ({"calibration_prompts": ["one"]}, "expected 8 or more, found 1"),
        ({"calibration_prompts": 5}, "calibration_prompts: expected a list of texts, found 5"),
        ({"calibration_prompts": "a long text"}, "calibration_prompts: expected a list of texts"),
        ({"calibration_prompts": [5] * 8}, "calibration_prompts: expected texts, found 5"),
        ({"cache": 5}, "cache: expected a folder, found 5"),
        ({"activation": 5}, "activation: expected everywhere, invocation or last:N, found 5"),
        ({"k": "3"}, "k: expected a whole number, found '3'"),
        ({"unsure_below": None}, "unsure_below: expected a number, found None"),
        ({"prior": "0.5"}, "prior: expected a number, found '0.5'"),
        ({"prior": 1}, "prior: expected a probability between 0 and 1, found 1"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_settings_that_cannot_be_used_are_one_clear_error(settings: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SelectionSettings(**settings)
