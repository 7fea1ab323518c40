"""The calibrated signal end to end on tiny models: what it computes, what it keeps and under what, the window of tokens
that count, and pools that try to break it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedTokenizerFast

import tiny
import warm
from logo import AdapterPool, LoGo, SelectionSettings, UsageError
from logo.adapters.adapter import Adapter
from logo.adapters.examples import write_examples
from logo.cli.app import run
from logo.errors import NotFinite, Unsure
from logo.selection import calibration
from logo.selection.reference import USUAL
from logo.selection.scorer import USUAL_MARGIN
from logo.selection.signals import get_signal
from logo.selection.texts import NEUTRAL, REQUESTS
from logo.selection.whitening import Whitening
from make_adapters import everyones_folder, lock
from test_engine import write_adapter
from tolerances import PATIENCE, same_scores, same_selection

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
    return tiny.model("llama", num_hidden_layers=6, **tiny.LONG)


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
    paths = [point.module for point in logo.scorer.points]
    read = {path: [inputs(llama, path, row)[1:] for row in texts] for path in paths}  # without the first token
    for adapter in logo.pool.fit(logo._layout):
        even, late = [], []
        for path, hidden in read.items():
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
    apart = every[:, :-1] - every[:, :-1].mean(dim=0)  # of each other, on one text
    unit = USUAL_MARGIN * (apart.square().sum() / (apart.shape[1] * (len(apart) - 1))).sqrt()
    wanted = every[:, -1] / unit
    assert torch.tensor(list(scores.values())).tolist() == pytest.approx(wanted.tolist(), abs=2e-3)


def inputs(model: nn.Module, path: str, row: list[int]) -> torch.Tensor:
    """(tokens, d): what a module receives."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    model(input_ids=torch.tensor([row]))
    handle.remove()
    return seen[0]


def change(folder: Path, how: Callable[[torch.Tensor], torch.Tensor], part: str = "lora_B") -> None:
    """Changes the tensors of an adapter whose names hold `part`."""
    file = folder / "adapter_model.safetensors"
    save_file({key: how(value) if part in key else value for key, value in load_file(file).items()}, file)


POOLS: dict[str, Callable[[nn.Module, Path], object]] = {
    "zeros": lambda model, folder: change(folder / "t1", torch.zeros_like),
    "only_zeros": lambda model, folder: [change(folder / f"t{i}", torch.zeros_like) for i in range(4)],
    "twins": lambda model, folder: shutil.copytree(folder / "t1", folder / "t1-copy"),
    "one": lambda model, folder: [shutil.rmtree(folder / f"t{i}") for i in range(1, 4)],
    "giant": lambda model, folder: write_adapter(folder / "giant", model, ALL, rank=64, seed=9, scale=100),
    "dwarf": lambda model, folder: write_adapter(folder / "dwarf", model, ("q_proj",), rank=1, seed=9, scale=1e-6),
    "other_modules": lambda model, folder: write_adapter(folder / "other", model, ("down_proj",), rank=3, seed=9),
    "zero_layer": lambda model, folder: change(folder / "t2", torch.zeros_like, "layers.1."),
}
STRANGE = ["w", "日本語の文", "w5 " * 100, "aaaaaaaa", "."]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:prompt .* tokens, more than the:UserWarning")
@pytest.mark.parametrize("kind", POOLS)
def test_strange_pools_and_prompts(kind: str, llama: nn.Module, tmp_path: Path) -> None:
    POOLS[kind](llama, pool(llama, tmp_path))
    logo = engine(llama, tmp_path, unscorable="skip")
    prompts = [*STRANGE, *(f"{chr(i) * (i % 7)} and {chr(i + 9)}{i}" for i in range(40, 100))]
    selections = logo.select(prompts)
    for selection in selections:
        assert all(abs(score) < 1e9 for score in selection.scores.values())  # NaN compares false
        assert selection.confidence is not None
        assert selection.confidence - 1e-5 <= sum(selection.weights) <= 1 + 1e-5
    winners = [selection.adapters[0] for selection in selections]
    if kind not in ("only_zeros", "one"):
        assert max(winners.count(name) for name in set(winners)) < 0.8 * len(prompts), "one adapter wins everything"
    if kind == "zeros":
        assert "t1" not in winners
    if kind == "twins":
        for selection in selections:
            assert selection.scores["t1"] == same_scores(selection.scores["t1-copy"])


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


def test_nothing_is_run_or_read_until_needed(llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_points_of_highest_contrast_are_chosen_and_own_prompts_may_rank_them(llama: nn.Module, tmp_path: Path) -> None:
    found = engine(llama, pool(llama, tmp_path, names=ALL)).scorer.calibration
    assert found is not None and {point.layer for point in found.points} <= {1, 2}
    assert len(found.ranking) == 7 * 2  # of the three layers that are probed, the first one is passed over
    values = [value for _, value in found.ranking]
    assert values == sorted(values, reverse=True) and found.ranking[0][0] in found.points
    own = [f"{i} x {i + 3} y {i + 9}" for i in range(3, 40)]
    other = engine(llama, tmp_path, calibration_prompts=own).scorer.calibration
    assert other is not None and other.ranking != found.ranking


def test_a_base_model_that_overflows_is_refused(tmp_path: Path) -> None:
    model: Any = tiny.model("llama")
    model.model.embed_tokens.weight.data[72] = torch.nan  # "e"
    with pytest.raises(NotFinite, match=r"overflow at \d.* on a calibration text or example prompt; load"):
        engine(model, pool(model, tmp_path))


def test_a_refused_prompt_is_probed_once(llama: nn.Module, tmp_path: Path) -> None:
    """It fails alone: those beside it in a batch have the selections that it does not change."""
    mixed = engine(llama, pool(llama, tmp_path))
    want = mixed.select(PROMPTS, batch_size=len(PROMPTS))
    below = sorted(one.confidence or 0.0 for one in want)[2]
    refusing = engine(llama, tmp_path, when_unsure="refuse", unsure_below=below)
    rows, passes = refusing.prompts.read(PROMPTS, room=None), []
    handle = llama.get_submodule("model.embed_tokens").register_forward_hook(lambda *_: passes.append(1))
    found = refusing.outcomes(rows, [refusing.options()] * len(rows))
    with pytest.raises(Unsure, match=r"^prompt \d: no adapter"):
        refusing.generate(PROMPTS, batch_size=len(PROMPTS))
    handle.remove()
    assert [isinstance(one, Unsure) for one in found] == [(one.confidence or 0.0) < below for one in want]
    for one, other in zip(found, want, strict=True):
        assert one.scores == same_scores(other.scores)  # type: ignore[union-attr]
    assert len(passes) == 2  # nothing is answered


def test_settings_that_cannot_be_used_are_one_clear_error() -> None:
    for settings, message in (
        ({"weighting": "adaptive", "signal": "norm"}, "has no scale of its own; use 'linear'"),
        ({"when_unsure": "best"}, "when_unsure: expected one of mix, base, refuse"),
        ({"when_unsure": "base", "signal": "norm"}, "does not say how sure it is"),
        ({"calibration_prompts": ["", " "] * 8}, "expected 8 or more, found 0 that are not blank"),
        ({"calibration_prompts": "a long text"}, "calibration_prompts: expected a list of texts"),
        ({"calibration_prompts": [5] * 8}, "calibration_prompts: expected texts, found 5"),
        ({"cache": 5}, "cache: expected a folder, found 5"),
        ({"activation": 5}, "activation: expected everywhere, invocation or last:N, found 5"),
        ({"prior": "0.5"}, "prior: expected a number, found '0.5'"),
        ({"prior": 1}, "prior: expected a probability between 0 and 1, found 1"),
    ):
        with pytest.raises(UsageError, match=message):
            SelectionSettings(**settings)


# -- the window: which tokens of a text count, for prompts, texts of a calibration and examples alike ------------------

HEAD, TAIL = "Translate what follows into another language, please, ", " and that was all of it, so begin."
TEXTS = [f"{HEAD}{middle}{TAIL}" for middle in ("the ship sails " * 3, "12 + 7 = x; y < 3", "def f(x): " * 9)]


@pytest.fixture(scope="module")
def folder(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pool(llama, tmp_path_factory.mktemp("pool"))


@given(st.lists(st.integers(), max_size=40), st.integers(0, 12), st.integers(0, 12))
def test_a_window_is_the_beginning_and_the_end(ids: list[int], head: int, tail: int) -> None:
    signal = get_signal("calibrated")
    found = list(replace(signal, window=(head, tail)).windowed(ids))
    if len(ids) <= head + tail:
        assert found == ids
    else:
        assert found == ids[:head] + ids[len(ids) - tail :]
    assert list(replace(signal, window="whole").windowed(ids)) == ids


@pytest.mark.parametrize("signal", ["calibrated", "norm"])
def test_only_the_first_and_the_last_tokens_count(signal: str, llama: nn.Module, folder: Path) -> None:
    inside, whole = (engine(llama, folder, signal=signal, window=window) for window in ((32, 32), "whole"))
    first, *others = inside.select(TEXTS)
    for other in others:
        same_selection(other, first)
    wholes = inside.prompts.texts(TEXTS)
    assert whole.select(TEXTS[0]).scores != same_scores(whole.select(TEXTS[2]).scores)
    short = [*wholes[0][:32], *wholes[0][-32:]]  # as long as the window: what a long prompt stands for
    assert inside.select(short).scores == same_scores(first.scores)
    with tiny.read_tokens(llama) as seen:
        inside.select(TEXTS[2])
    assert seen == [64]


def test_short_prompts_are_read_whole_and_the_papers_signals_always(llama: nn.Module, folder: Path) -> None:
    short = ["Where is it?", "a", "3 + 4 ="]
    for signal in ("norm", "entropy"):
        plain, whole = engine(llama, folder, signal=signal), engine(llama, folder, signal=signal, window="whole")
        for one, other in zip(plain.select([*short, *TEXTS]), whole.select([*short, *TEXTS]), strict=True):
            same_selection(one, other)
    calibrated = engine(llama, folder)
    with tiny.read_tokens(llama) as seen:
        for prompt in short:
            calibrated.select(prompt)
    assert seen == [len(row) for row in calibrated.prompts.texts(short)]


def test_texts_and_examples_are_read_by_the_same_window(llama: nn.Module, folder: Path, tmp_path: Path) -> None:
    """Adapters are told apart by examples that differ in the middle alone only if the middle is read."""
    for i in range(2):  # of the same weights
        write_adapter(tmp_path / f"t{i}", llama, ("q_proj", "v_proj"), rank=2, seed=1)
        write_examples(tmp_path / f"t{i}", [TEXTS[i]])
    inside, whole = engine(llama, tmp_path, k=2), engine(llama, tmp_path, k=2, window="whole")
    scores = inside.select(TEXTS[1]).scores
    assert scores["t0"] == same_scores(scores["t1"])
    assert whole.select(TEXTS[1]).adapters[0] == "t1"
    narrow = engine(llama, folder, window=(3, 5))
    with tiny.read_tokens(llama) as seen:
        logo = engine(llama, folder, window=(3, 5), cache="")
    assert seen and max(seen) <= 16 * 8  # batches of sixteen texts
    same_selection(logo.select(TEXTS[0]), narrow.select(TEXTS[1]))


def test_another_window_is_another_calibration(llama: nn.Module, folder: Path, tmp_path: Path) -> None:
    windows: list[Any] = [(32, 32), (32, 31), "whole", (32, 32), None]
    found = [engine(llama, folder, cache=str(tmp_path), window=window).calibrate() for window in windows]
    assert [one is not None and one.measured for one in found] == [4, 4, 4, 0, 0]
    assert len(list((tmp_path / "calibration").iterdir())) == 3


@pytest.mark.parametrize("window", [5, "all", (32,), (0, 0), (-1, 3), (1.5, 2), (True, 2), (1, 2, 3)], ids=str)
def test_windows_that_are_none(window: Any) -> None:
    with pytest.raises(UsageError, match=r"window: expected whole or \(first tokens, last tokens\), found"):
        SelectionSettings(window=window)


def test_settings_go_through_json() -> None:
    settings = SelectionSettings(window=(8, 24), k=3)
    assert SelectionSettings.of(**json.loads(json.dumps(settings.changed))) == settings


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
def test_a_replaced_adapter_never_meets_old_scores(signal: str, llama: nn.Module, tmp_path: Path) -> None:
    """The same name and the same folder, while the engine is running and while its cache is known."""
    cached: dict[str, Any] = {"signal": signal, "cache": str(tmp_path / "cache")}
    logo = engine(llama, pool(llama, tmp_path / "pool"), **cached)
    before = logo.select(TEXTS[0])
    logo.pool.remove("t1")
    shutil.rmtree(tmp_path / "pool" / "t1")
    write_adapter(tmp_path / "pool" / "t1", llama, ("q_proj", "v_proj"), rank=3, seed=77, scale=4)
    logo.pool.add(tmp_path / "pool" / "t1")
    found = logo.select(TEXTS[0])
    assert found.scores != same_scores(before.scores)
    for how in (cached, {**cached, "cache": ""}):
        same_selection(found, engine(llama, tmp_path / "pool", **how).select(TEXTS[0]))


CODE = """
import sys, tiny, json
from test_calibrated import TEXTS, engine
model = tiny.model("llama", num_hidden_layers=6, **tiny.LONG)
logo = engine(model, sys.argv[1], cache=sys.argv[2])
print(json.dumps([logo.calibrate().measured, logo.select(TEXTS[0]).scores]))
"""


@pytest.mark.slow
def test_two_processes_with_one_cache_folder_agree(llama: nn.Module, folder: Path, tmp_path: Path) -> None:
    """Whether one finds what the other has written, or both write at the same time."""
    command = [*warm.python(), "-c", CODE, str(folder), str(tmp_path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parent) for _ in range(2)]
    answers = [json.loads(one.communicate(timeout=PATIENCE)[0].splitlines()[-1]) for one in both]
    logo = engine(llama, folder, cache=str(tmp_path))
    calibration = logo.calibrate()
    assert calibration is not None and calibration.measured == 0
    for _, scores in answers:
        assert scores == same_scores(logo.select(TEXTS[0]).scores)


# -- the command line --------------------------------------------------------------------------------------------------


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert run([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_calibrating_shows_what_selecting_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGO_CACHE", str(tmp_path))
    report = answer(capsys, "pool", "calibrate")
    assert report["measured"] == 16
    assert list(report["sizes"]) == report["adapters"] and all(0.05 < size < 0.2 for size in report["sizes"].values())
    assert 0 < len(report["points"]) <= len(report["ranking"]) and report["ranking"][0]["point"] in report["points"]
    assert answer(capsys, "pool", "calibrate")["measured"] == 0
    chosen = answer(capsys, "select", "What is 7 plus 5?")
    assert chosen["adapters"][0] == "add_numbers"
    named = answer(capsys, "select", "What is 7 plus 5?", "--signal", "calibrated")
    assert named["scores"] == same_scores(chosen["scores"])
    assert answer(capsys, "generate", "What is 7 plus 5?")["adapters"] == chosen["adapters"]
    assert run(["pool", "calibrate"]) == 0
    shown = capsys.readouterr()
    assert "contrast" in shown.out and "0 calibrated now, 16 known already" in shown.err
    assert f"{min(report['sizes'].values()):.3f} to {max(report['sizes'].values()):.3f}" in shown.err
