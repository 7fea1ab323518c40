"""The anatomy of a pool: norms, overlaps and cosines against whole matrices, near-duplicates, outliers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from logo import AdapterPool
from logo.adapters.activation import EVERYWHERE
from logo.adapters.format import Adapter
from logo.adapters.upkeep import anatomy as anatomy_module
from logo.adapters.upkeep.anatomy import Anatomy, anatomy, module_paths
from logo.adapters.upkeep.duplicates import duplicates
from logo.adapters.upkeep.outliers import outliers
from logo.adapters.upkeep.spectra import rank_for
from make_adapters import LLAMA, Q, V, calm, edit_weights, tensors, write


def opened(root: Path) -> list[Adapter]:
    return list(AdapterPool.from_directory(root, cache=""))


def dense(adapter: Adapter) -> dict[str, torch.Tensor]:
    return {path: one.scaled_b().double() @ one.A.double() for path, one in adapter.read().items()}


def untrained(folder: Path, like: str = "lora_B") -> Path:
    return edit_weights(folder, lambda w: [w[key].zero_() for key in w if like in key])


@calm
@given(st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=2, max_size=4), st.integers(1, 200))
def test_it_says_what_whole_matrices_say(kinds: list[tuple[int, bool]], block: int) -> None:
    """Adapters of any ranks, some on half of the modules; in blocks of any size."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(anatomy_module, "_BLOCK", block)
        for number, (rank, whole) in enumerate(kinds):
            modules = LLAMA if whole else {path: shape for path, shape in LLAMA.items() if path.endswith(Q)}
            write(Path(folder) / f"a{number}", tensors(modules, rank, seed=number), r=rank)
        adapters = opened(Path(folder))
        found = anatomy(adapters)
        updates = [dense(adapter) for adapter in adapters]
    assert found.names == tuple(f"a{number}" for number in range(len(kinds)))
    for i, one in enumerate(updates):
        size = math.hypot(*(float(matrix.norm()) for matrix in one.values()))
        assert found.norm(found.names[i]) == pytest.approx(size, rel=1e-6)
        for path, matrix in one.items():
            assert found.updates[found.names[i]][path.removeprefix("model.")].norm == pytest.approx(
                float(matrix.norm()), rel=1e-6
            )
        for j, other in enumerate(updates):
            both = [path for path in one if path in other]
            overlap = sum(_overlap(one[path], other[path]) for path in both) / len(both)
            assert float(found.overlap[i, j]) == pytest.approx(overlap, abs=1e-4)
            product = sum(float((one[path] * other[path]).sum()) for path in both)
            sizes = [math.hypot(*(float(m.norm()) for m in side.values())) for side in (one, other)]
            assert float(found.cosine[i, j]) == pytest.approx(product / (sizes[0] * sizes[1]), abs=1e-5)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    sides = []
    for matrix in (one, other):
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        sides.append(left[:, : rank_for(values, anatomy_module.ENERGY)])
    return float((sides[0].T @ sides[1]).square().sum()) / min(side.shape[1] for side in sides)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Five of one recipe, of which `b` is `a` with other factors of other sizes, and `copy` is `a` in bfloat16."""
    for number, name in enumerate(("a", "c", "d")):
        write(tmp_path / name, tensors(seed=number))
    turned = {}
    for key, value in tensors(seed=0).items():
        turned[key] = 2 * value if "lora_A" in key else value / 2
    write(tmp_path / "b", {key: value.flip(0 if "lora_A" in key else 1) for key, value in turned.items()})
    write(tmp_path / "copy", {key: value.bfloat16() for key, value in tensors(seed=0).items()})
    return tmp_path


def test_near_duplicates_are_found_whatever_their_factors_size_and_dtype(pool: Path) -> None:
    adapters = opened(pool)
    found = anatomy(adapters)
    pairs = {frozenset(pair[:2]): pair[2:] for pair in found.near_duplicates(0.9)}
    assert pairs.keys() == {frozenset(pair) for pair in (("a", "b"), ("a", "copy"), ("b", "copy"))}
    assert all(value > 0.99 for values in pairs.values() for value in values)
    assert found.nearest("c") is not None and found.nearest("c")[1] < 0.9  # type: ignore[index]
    gone = duplicates(adapters, found, 0.9)
    assert [(one.name, one.kept) for one in gone] == [("b", "a"), ("copy", "a")]


def test_the_same_update_of_another_size_is_no_duplicate(tmp_path: Path) -> None:
    """Whoever has it in the pool would lose it for one that does next to nothing."""
    for name, size in (("a", 0.01), ("b", 1.0), ("c", 0.95)):
        write(tmp_path / name, {key: size * value if "lora_B" in key else value for key, value in tensors().items()})
    adapters = opened(tmp_path)
    found = anatomy(adapters)
    assert float(found.cosine[0, 1]) == pytest.approx(1.0)
    [one] = duplicates(adapters, found, 0.9)
    assert (one.name, one.kept) == ("c", "b") and one.norm == pytest.approx(0.95 * one.kept_norm, rel=1e-5)
    assert duplicates(adapters, found, 0.96) == []
    assert len(duplicates(adapters, found, 0.001)) == 2


def test_the_opposite_update_is_no_duplicate(tmp_path: Path) -> None:
    write(tmp_path / "one", tensors(seed=0))
    write(tmp_path / "other", {key: -value if "lora_B" in key else value for key, value in tensors(seed=0).items()})
    found = anatomy(opened(tmp_path))
    assert float(found.overlap[0, 1]) == pytest.approx(1.0) and float(found.cosine[0, 1]) == pytest.approx(-1.0)
    assert found.near_duplicates(0.9) == []


def test_nobody_goes_for_somebody_who_goes() -> None:
    """In a chain of likeness the ends stay apart: b goes for a, but c, which is only like b, stays."""

    def update() -> dict[str, Any]:
        return {"m": anatomy_module.Update(1.0, 1.0)}

    near = torch.tensor([[1.0, 0.95, 0.5], [0.95, 1.0, 0.95], [0.5, 0.95, 1.0]], dtype=torch.float64)
    found = Anatomy(("a", "b", "c"), {name: update() for name in "abc"}, near, near)

    class Sized:
        def __init__(self, name: str, parameters: int) -> None:
            self.name, self.parameters, self.activation, self.alone = name, parameters, EVERYWHERE, False

    equal: list[Any] = [Sized(name, 10) for name in "abc"]
    assert [(one.name, one.kept) for one in duplicates(equal, found, 0.9)] == [("b", "a")]
    middle: list[Any] = [Sized(name, 10 + (name == "b")) for name in "abc"]
    assert [(one.name, one.kept) for one in duplicates(middle, found, 0.9)] == [("a", "b"), ("c", "b")]
    assert duplicates(equal, found, 0.96) == []


def test_adapters_without_a_module_in_common_cannot_be_compared(tmp_path: Path) -> None:
    for name, kind in (("q", Q), ("v", V)):
        write(tmp_path / name, tensors({path: shape for path, shape in LLAMA.items() if path.endswith(kind)}))
    found = anatomy(opened(tmp_path))
    assert math.isnan(float(found.overlap[0, 1])) and float(found.cosine[0, 1]) == 0.0
    assert found.nearest("q") is None and found.near_duplicates(0.0) == []


def test_modules_are_one_whatever_wrappers_their_names_have(tmp_path: Path) -> None:
    write(tmp_path / "long", tensors(prefix="base_model.model.language_model."))
    write(tmp_path / "short", tensors())
    adapters = opened(tmp_path)
    assert len(module_paths(adapters)) == len(LLAMA)
    assert len(anatomy(adapters).near_duplicates(0.999)) == 1


def test_adapters_of_other_models_are_compared_with_their_own_and_stand_out(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path / f"a{number}", tensors(seed=number))
    for name in ("small", "small-again"):
        write(tmp_path / name, tensors({path: (8, 8) for path in LLAMA}))
    adapters = opened(tmp_path)
    found = anatomy(adapters)
    assert [pair[:2] for pair in found.near_duplicates(0.9)] == [("small", "small-again")]
    assert math.isnan(float(found.overlap[0, 4])) and float(found.cosine[0, 4]) == 0.0
    listed = [one for one in outliers(adapters, found) if one.kind == "base"]
    assert [one.adapters for one in listed] == [("small",), ("small-again",)]
    assert listed[0].text.endswith("goes from 8 to 8, in the others from 32 to 32")


def test_what_stands_out(tmp_path: Path) -> None:
    for number in range(8):
        write(tmp_path / f"usual{number}", tensors(seed=number))
    untrained(write(tmp_path / "dead", tensors(seed=20)))
    untrained(write(tmp_path / "half", tensors(seed=21)), f"layers.0.{Q}.lora_B")
    edit_weights(write(tmp_path / "loud", tensors(seed=22)), lambda w: [w[k].mul_(9) for k in w if "lora_B" in k])
    edit_weights(write(tmp_path / "quiet", tensors(seed=23)), lambda w: [w[k].div_(9) for k in w if "lora_B" in k])
    write(tmp_path / "wide", tensors(rank=6, seed=24), r=6)
    only_q = {path: shape for path, shape in LLAMA.items() if path.endswith(Q)}
    write(tmp_path / "narrow", tensors(only_q, seed=25))
    adapters = opened(tmp_path)
    listed = {(one.kind, one.adapters): one.text for one in outliers(adapters, anatomy(adapters))}
    assert listed.keys() == {
        ("untrained", ("dead",)),
        ("partly untrained", ("half",)),
        ("large", ("loud",)),
        ("small", ("quiet",)),
        ("rank", ("wide",)),
        ("scale", ("wide",)),  # alpha 8 over 6
        ("targets", ("narrow",)),
        ("modules", ("narrow",)),
    }
    assert listed["rank", ("wide",)] == "rank 6; 13 of 14 have rank 4"
    assert "1 of 6 modules" in listed["partly untrained", ("half",)]
    assert "times the median" in listed["large", ("loud",)] and "of the median" in listed["small", ("quiet",)]


def test_a_pool_of_mixed_recipes_has_no_habit_to_deviate_from(tmp_path: Path) -> None:
    for number, rank in enumerate((2, 2, 4, 4, 6, 6)):
        write(tmp_path / f"a{number}", tensors(rank=rank, seed=number), r=rank, lora_alpha=rank)
    adapters = opened(tmp_path)
    assert outliers(adapters, anatomy(adapters)) == []


def test_two_untrained_adapters_are_duplicates(tmp_path: Path) -> None:
    for name in ("x", "y", "z"):
        write(tmp_path / name, tensors(seed=ord(name)))
    for name in ("x", "y"):
        untrained(tmp_path / name)
    adapters = opened(tmp_path)
    found = anatomy(adapters)
    assert math.isnan(float(found.cosine[0, 1]))
    assert [(one.name, one.kept) for one in duplicates(adapters, found, 0.9)] == [("y", "x")]
