"""What `logo train` writes beside adapters: their responses to neutral texts, so that a new pool answers at once."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from learning import contents
from logo import AdapterPool, LoGo
from logo.adapters.files import RESPONSES
from logo.adapters.format import Adapter
from logo.cli.run import run
from logo.models import demo_folder
from logo.selection.cache import CalibrationCache


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of the demo's base model, hardly trained."""
    root = tmp_path_factory.mktemp("calibrated")
    (root / "tasks").mkdir()
    for name in ("plural", "antonym"):
        shutil.copy(demo_folder() / "heldout" / f"{name}.jsonl", root / "tasks")
    assert run(trained(root)) == 0
    return root / "pool"


def trained(root: Path) -> list[str]:
    return ["train", "--rows", str(root / "tasks"), "--out", str(root / "pool"), "--steps", "2", "--device", "cpu"]


def measured(pool: Path, cache: Path, capsys: pytest.CaptureFixture[str], *more: str) -> int:
    capsys.readouterr()
    assert (
        run(["pool", "calibrate", "--adapters", str(pool), "--cache", str(cache), "--device", "cpu", "--json", *more])
        == 0
    )
    found: int = json.loads(capsys.readouterr().out)["measured"]
    return found


def test_a_new_pool_is_known_where_nothing_else_is(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(pool, tmp_path / "moved")
    assert measured(moved, tmp_path / "cache", capsys) == 0
    for folder in moved.glob(f"*/{RESPONSES}"):
        shutil.rmtree(folder)
    assert measured(moved, tmp_path / "another cache", capsys) == 2


def test_what_is_published_is_believed_only_if_it_is_measured_so(
    pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked once for all pools of a machine, and only what was checked is kept."""

    def scores(cache: str) -> dict[str, float]:
        logo = LoGo.from_pretrained("demo", AdapterPool.open(str(moved)), cache=str(tmp_path / cache), device="cpu")
        return logo.select("What is the plural of box?").scores

    moved = shutil.copytree(pool, tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        want = pytest.approx(scores("honest"), abs=1e-3)
        monkeypatch.setattr("logo.selection.calibration._refuted", lambda *_: pytest.fail("it was checked again"))
        shutil.rmtree(tmp_path / "honest" / "index")
        assert scores("honest") == want
        monkeypatch.undo()
    [file] = (moved / "plural").glob(f"{RESPONSES}/*/*.safetensors")
    claimed = load_file(file)
    save_file({key: response - 1.0 for key, response in claimed.items()}, file)
    with pytest.warns(
        UserWarning, match=r"published with 'plural' \(1 of 2 adapters\) is not what the base model gives"
    ):
        assert scores("tampered") == want
    save_file({key: response[:, :10].contiguous() for key, response in claimed.items()}, file)
    with pytest.warns(UserWarning, match="is damaged and computed anew: .*expected float32 of shape"):
        assert scores("cut") == want


def test_adapters_are_stored_once_whether_measured_or_checked(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: list[str] = []
    keep = CalibrationCache.keep_responses

    def noted(cache: CalibrationCache, adapter: Adapter, responses: Mapping[str, Tensor]) -> None:
        stored.append(adapter.name)
        keep(cache, adapter, responses)

    moved = shutil.copytree(pool, tmp_path / "moved")
    shutil.rmtree(moved / "antonym" / RESPONSES)
    monkeypatch.setattr(CalibrationCache, "keep_responses", noted)
    assert measured(moved, tmp_path / "cache", capsys) == 1
    assert sorted(stored) == ["antonym", "plural"]


def test_an_adapter_does_not_answer_for_the_one_it_replaced(
    pool: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = shutil.copytree(pool, tmp_path / "moved")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(pool / "antonym" / name, moved / "plural" / name)
    assert measured(moved, tmp_path / "cache", capsys) == 1


def test_a_task_that_is_added_touches_nothing_of_the_others_and_a_run_that_was_cut_is_made_up_for(
    pool: Path, tmp_path: Path
) -> None:
    root = tmp_path / "root"
    shutil.copytree(pool.parent, root)
    before = contents(root / "pool" / "plural")
    shutil.copy(demo_folder() / "heldout" / "capital.jsonl", root / "tasks")
    shutil.rmtree(root / "pool" / "antonym" / RESPONSES)  # as if the run had been killed before it was written
    assert run(trained(root)) == 0
    assert contents(root / "pool" / "plural") == before
    assert all(list((root / "pool" / name / RESPONSES).rglob("*.safetensors")) for name in ("antonym", "capital"))
