"""The window: which tokens of a text count, for prompts, texts of a calibration and examples alike; and what a
calibration is kept under."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
import warm
from logo import SelectionSettings, UsageError
from logo.adapters.examples import write_examples
from logo.selection.texts import windowed
from test_calibrated import engine, pool
from test_engine import write_adapter
from tolerances import PATIENCE, same_scores, same_selection

HEAD, TAIL = "Translate what follows into another language, please, ", " and that was all of it, so begin."
TEXTS = [f"{HEAD}{middle}{TAIL}" for middle in ("the ship sails " * 3, "12 + 7 = x; y < 3", "def f(x): " * 9)]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return tiny.model("llama", max_position_embeddings=512, num_hidden_layers=6)


@pytest.fixture(scope="module")
def folder(llama: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pool(llama, tmp_path_factory.mktemp("pool"))


@given(st.lists(st.integers(), max_size=40), st.integers(0, 12), st.integers(0, 12))
def test_a_window_is_the_beginning_and_the_end(ids: list[int], head: int, tail: int) -> None:
    found = list(windowed(ids, (head, tail)))
    if len(ids) <= head + tail:
        assert found == ids
    else:
        assert found == ids[:head] + ids[len(ids) - tail :]
    assert list(windowed(ids, "whole")) == ids


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


# -- what scores are kept under ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
def test_a_replaced_adapter_never_meets_old_scores(signal: str, llama: nn.Module, tmp_path: Path) -> None:
    """The same name and the same folder, while the engine is running and while its cache is known."""
    logo = engine(llama, pool(llama, tmp_path / "pool"), signal=signal, cache=str(tmp_path / "cache"))
    before = logo.select(TEXTS[0])
    logo.pool.remove("t1")
    shutil.rmtree(tmp_path / "pool" / "t1")
    write_adapter(tmp_path / "pool" / "t1", llama, ("q_proj", "v_proj"), rank=3, seed=77, scale=4)
    logo.pool.add(tmp_path / "pool" / "t1")
    found = logo.select(TEXTS[0])
    assert found.scores != same_scores(before.scores)
    same_selection(found, engine(llama, tmp_path / "pool", signal=signal, cache="").select(TEXTS[0]))
    same_selection(
        found, engine(llama, tmp_path / "pool", signal=signal, cache=str(tmp_path / "cache")).select(TEXTS[0])
    )


CODE = """
import sys, tiny, json
from test_calibrated import engine
from test_window import TEXTS
model = tiny.model("llama", max_position_embeddings=512, num_hidden_layers=6)
logo = engine(model, sys.argv[1], cache=sys.argv[2])
print(json.dumps([logo.calibrate().measured, logo.select(TEXTS[0]).scores]))
"""


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
