"""A two-stage index chooses what one stage chooses: bounds hold for all factors and vectors, and numbers are equal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import tiny
from logo import AdapterPool, LoGo, SelectionSettings, UsageError
from logo.adapters.examples import write_examples
from logo.backends.vllm.options import Options
from logo.errors import NotFinite
from logo.selection import index as index_module
from logo.selection import index_file, scorers
from logo.selection.emphasis import emphasised
from logo.selection.first_stage import FirstStage
from logo.selection.index import ScoringIndex
from logo.selection.mapped import mapped, read_mapped
from logo.selection.scorer import NOT_SCORED, Best
from logo.selection.two_stage import TwoStageScorer
from make_adapters import index_of
from test_engine import PROMPTS, tokenizer, write_adapter

ONE = torch.zeros(1, dtype=torch.int64)


def pool_index(seed: int, ranks: list[int], width: int, fall: float, scale: float) -> ScoringIndex:
    """Adapters with singular values that fall by a factor, some of them zero, some alike."""
    g = torch.Generator().manual_seed(seed)
    factors = []
    for i, rank in enumerate(ranks):
        a = torch.randn(rank, width, generator=g) * fall ** torch.arange(rank)[:, None] * scale
        b = torch.randn(width + 1, rank, generator=g) * float(torch.rand((), generator=g) > 0.1)
        factors.append(factors[0] if i and seed % 3 == 0 and i % 4 == 0 else (a, b))
    return index_of(factors)


cases = st.tuples(
    st.integers(0, 2**16),
    st.lists(st.integers(1, 5), min_size=1, max_size=24),
    st.integers(2, 24),
    st.sampled_from([0.05, 0.4, 1.0]),
    st.sampled_from([1e-6, 1.0, 1e5]),
)


@settings(max_examples=60, deadline=None)
@given(cases, st.integers(1, 6), st.integers(1, 4))
def test_bounds_hold_for_any_factors_and_vectors(case: Any, rank: int, vectors: int) -> None:
    seed, ranks, width, fall, scale = case
    index = pool_index(seed, ranks, width, fall, scale)
    g = torch.Generator().manual_seed(seed + 1)
    texts, hidden = torch.randn(5, width, generator=g), torch.randn(vectors, width, generator=g) * scale
    hidden[0] = 100 * texts[0]  # almost within the shared space
    first = FirstStage.of(index, None, texts, rank)
    owners = torch.zeros(vectors, dtype=torch.int64)
    low, high = first.bounds(hidden, owners, 1)
    estimate = first.estimates(hidden, owners, 1)
    exact = index.norms(hidden).mean(dim=0)
    assert (low[0] <= exact * (1 + 1e-6)).all() and (exact <= high[0] * (1 + 1e-6)).all()
    assert (low <= estimate * (1 + 1e-6)).all() and (estimate <= high * (1 + 1e-6)).all()


@pytest.mark.parametrize("late", [0, 1])
def test_estimates_that_keep_everything_are_what_the_signal_responds(late: int) -> None:
    index = pool_index(5, [3, 4, 2], 12, 0.4, 1.0)
    index = ScoringIndex(index.stacked, index.ranks, None, [], index.point, (torch.eye(12), torch.zeros(12)))
    hidden = torch.randn(9, 12, generator=torch.Generator().manual_seed(1))
    owners = torch.tensor([0] * 4 + [1] * 5)
    first = FirstStage.of(index, None, hidden, 4)
    found = first.estimates(hidden, owners, 2, index.units(hidden), late)
    torch.testing.assert_close(found, emphasised(index.relative(hidden), owners, 2, late), rtol=2e-3, atol=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**16), st.integers(5, 8))
def test_what_is_kept_whole_is_known_to_half_precision(seed: int, rank: int) -> None:
    """Bounds are worth something: nothing is left out where the kept rank is the adapters' own."""
    index = pool_index(seed, [3, 5, 2, 4], 16, 0.4, 1.0)
    g = torch.Generator().manual_seed(seed)
    texts, hidden = torch.randn(9, 16, generator=g), torch.randn(1, 16, generator=g)
    low, high = FirstStage.of(index, None, texts, rank).bounds(hidden, ONE, 1)
    norms = torch.stack([torch.linalg.vector_norm(index.stacked[rows]) for rows in index.rows])
    assert (high[0] - low[0] <= 4e-3 * norms * hidden.norm()).all()


class Given(TwoStageScorer):
    """Of one index whose hidden vectors are given; no model."""

    def __init__(self, index: ScoringIndex, signal: Any, texts: torch.Tensor, rank: int) -> None:
        from logo.selection.two_stage import FirstStages

        first = FirstStages((FirstStage.of(index, None, texts, rank),))
        super().__init__(index.adapters, [index], None, None, signal, first)  # type: ignore[arg-type]


@settings(max_examples=80, deadline=None)
@given(cases, st.integers(1, 4), st.integers(1, 30), st.booleans())
def test_the_best_are_those_of_one_stage(case: Any, rank: int, k: int, some: bool) -> None:
    seed, ranks, width, fall, scale = case
    index = pool_index(seed, ranks, width, fall, scale)
    # Points name the module that Loose adapters have.
    scorer = Given(index, SelectionSettings(signal="norm").reading, torch.eye(width)[:3], rank)
    hidden = torch.randn(1, width, generator=torch.Generator().manual_seed(seed + 2))
    names = [adapter.name for adapter in index.adapters]
    among = names[:: 1 + seed % 3] if some else None
    found = scorer.of_vectors([hidden], Best(k, among))
    exact = index.norms(hidden)[0]
    scored = found != NOT_SCORED
    assert torch.allclose(found[scored], exact[scored], rtol=1e-5, atol=float(exact.max()) * 1e-6)
    eligible = torch.tensor([among is None or name in among for name in names])
    assert not scored[~eligible].any()
    left = exact.masked_fill(~eligible, NOT_SCORED)
    count = min(k, int(eligible.sum()))
    threshold = left.topk(count).values[-1]
    assert scored[left > threshold * (1 + 1e-6)].all() and int(scored.sum()) >= count


def test_what_falls_quickly_leaves_few() -> None:
    """Otherwise a first stage that leaves everything would pass."""
    index = pool_index(1, [4] * 400, 64, 0.05, 1.0)
    scorer = Given(index, SelectionSettings(signal="norm").reading, torch.eye(64)[:3], 2)
    hidden = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    assert int((scorer.of_vectors([hidden], Best(5)) != NOT_SCORED).sum()) <= 20


def test_an_index_in_passes_is_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    index = pool_index(4, [1, 4, 2, 3] * 9, 16, 0.4, 1.0)
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    whole = index.norms(hidden)
    monkeypatch.setattr(index_module, "_PASS", 100)
    assert torch.allclose(index.norms(hidden), whole, rtol=1e-5)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.model("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pool")
    for i in range(12):
        names = ("q_proj", "v_proj", "o_proj") if i % 4 else ("q_proj",)
        write_adapter(root / f"t{i:02}", model, names, rank=2 + i % 3, seed=i)
    return root


def opened(model: Any, folder: Path, **chosen: Any) -> LoGo:
    settings = SelectionSettings.of(**{"k": 2, "cache": "", "probe_depth": 1, **chosen})
    return LoGo(model, tokenizer(), AdapterPool.from_directory(folder), settings=settings)


@pytest.mark.parametrize("signal", ["norm", "spectr", "norm_z", "calibrated"])
def test_an_engine_selects_the_same_with_the_same_weights(model: Any, folder: Path, signal: str) -> None:
    one = opened(model, folder, signal=signal)
    two = opened(model, folder, signal=signal, index="two-stage", index_rank=4)
    for whole, best in zip(one.select(PROMPTS), two.select(PROMPTS), strict=True):
        assert best.adapters == whole.adapters
        assert best.weights == pytest.approx(whole.weights, rel=1e-4)
        assert {name: whole.scores[name] for name in best.scores} == pytest.approx(best.scores, rel=1e-4, abs=1e-5)
    texts = [generation.text for generation in one.generate(PROMPTS, max_new_tokens=4)]
    assert [generation.text for generation in two.generate(PROMPTS, max_new_tokens=4)] == texts


def test_what_was_not_scored_is_not_listed(model: Any, folder: Path) -> None:
    logo = opened(model, folder, signal="calibrated", index="two-stage", index_left=6)
    [selection] = logo.select([PROMPTS[0]])
    assert len(selection.scores) == 6 and set(selection.adapters) <= set(selection.scores)
    [among] = logo.select([PROMPTS[0]], candidates=["t00", "t05", "t09"], k=2)
    assert set(among.scores) == {"t00", "t05", "t09"}
    alone = opened(model, folder, signal="calibrated").select([PROMPTS[0]])[0].scores
    assert {name: alone[name] for name in among.scores if name != "t00"} == pytest.approx(
        {name: score for name, score in among.scores.items() if name != "t00"}, rel=1e-4
    )


@pytest.fixture
def examples(folder: Path, tmp_path: Path) -> Path:
    """The same pool; every second adapter has an example, and the first ones have those prompts that are asked."""
    copy = tmp_path / "pool"
    shutil.copytree(folder, copy)
    asked = [*PROMPTS, "w9 w8 w7", "w3 w3", "w1 w4 w1 w5"]
    for i, prompt in enumerate(asked[:6]):
        write_examples(copy / f"t{2 * i:02}", [prompt])
    return copy


@pytest.mark.parametrize("signal", ["calibrated", "signature"])
def test_examples_count_in_both_stages(model: Any, examples: Path, signal: str) -> None:
    one = opened(model, examples, signal=signal)
    all_of_them = opened(model, examples, signal=signal, index="two-stage")
    for whole, best in zip(one.select(PROMPTS), all_of_them.select(PROMPTS), strict=True):
        assert best.adapters == whole.adapters and best.confidence == pytest.approx(whole.confidence, abs=1e-4)
        assert best.weights == pytest.approx(whole.weights, rel=1e-4)
        assert best.scores == pytest.approx(whole.scores, rel=1e-4, abs=1e-4)
    # An adapter whose example is the prompt is left, however little it seems to respond.
    few = opened(model, examples, signal=signal, index="two-stage", index_left=2)
    ignoring = opened(model, examples, index="two-stage", index_left=2, examples="ignore")
    lost = 0
    for i, (found, without) in enumerate(zip(few.select(PROMPTS, k=1), ignoring.select(PROMPTS, k=1), strict=True)):
        assert f"t{2 * i:02}" in found.scores
        lost += f"t{2 * i:02}" not in without.scores
    assert lost  # there was something to be lost


def test_scores_are_one_stages_where_all_adapters_have_examples(model: Any, examples: Path) -> None:
    for i in range(12):
        write_examples(examples / f"t{i:02}", [f"w{i} w{i + 1} w2", f"w{12 - i}"])
    whole = opened(model, examples).select(PROMPTS)
    few = opened(model, examples, index="two-stage", index_left=6).select(PROMPTS)
    for one, two in zip(whole, few, strict=True):
        assert len(two.scores) == 6
        assert two.scores == pytest.approx({name: one.scores[name] for name in two.scores}, rel=1e-4, abs=1e-4)


def test_a_row_does_not_depend_on_its_batch(model: Any, folder: Path) -> None:
    logo = opened(model, folder, signal="calibrated", index="two-stage", index_left=6)
    together = logo.select(PROMPTS)
    for prompt, found in zip(PROMPTS, together, strict=True):
        assert list(logo.select([prompt])[0].scores) == list(found.scores)


def test_an_overflow_is_an_error_of_the_prompt(folder: Path) -> None:
    index = pool_index(1, [4] * 30, 16, 0.4, 1.0)
    scorer = Given(index, SelectionSettings(signal="norm").reading, torch.eye(16)[:3], 2)
    found = scorer.of_vectors([torch.full((1, 16), torch.nan)], Best(2))
    assert found.isnan().any()
    from logo.selection.selector import Selector

    with pytest.raises(NotFinite):
        Selector(2)(found[found != NOT_SCORED], [str(i) for i in range(30)])


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"signal": "entropy"}, "'entropy' is no norm"),
        ({"baseline": "running"}, "needs every adapter's score"),
        ({"index_rank": 0}, "index_rank: expected 1 or more"),
        ({"index_left": 0}, "index_left: expected 1 or more"),
        ({"index": "three-stage"}, "expected one of exact, two-stage"),
    ],
)
def test_what_cannot_be_is_refused(chosen: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        SelectionSettings.of(**{"index": "two-stage", **chosen})


def test_vllm_refuses_it() -> None:
    with pytest.raises(UsageError, match="leave out index 'two-stage'"):
        Options.of({"logo": {"pool": "p", "index": "two-stage"}}, {})


@pytest.mark.parametrize("signal", ["norm", "calibrated"])
def test_an_index_made_within_its_file_is_the_same(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signal: str
) -> None:
    made = opened(model, folder, signal=signal, cache=str(tmp_path / "one"))
    made.calibrate()
    monkeypatch.setattr(index_file, "MAPPED", 0)
    monkeypatch.setattr(index_module, "_TOLD", 5)
    kept: list[Any] = []
    monkeypatch.setattr(scorers, "keep_index", lambda *given: kept.append(given))
    told: list[tuple[int, int]] = []
    mapped = opened(model, folder, signal=signal, cache=str(tmp_path / "two"), index="two-stage")
    mapped.calibrate(tell=lambda done, of: told.append((done, of)))
    assert told == [(0, 12), (5, 12), (10, 12), (12, 12)] and not kept
    names = {path.name: path for path in (tmp_path / "two" / "index").iterdir()}
    assert list(names) == [path.name for path in (tmp_path / "one" / "index").iterdir()]
    again = opened(model, folder, signal=signal, cache=str(tmp_path / "two"), index="two-stage")
    monkeypatch.setattr(scorers, "read_indices", None)
    monkeypatch.setattr(scorers, "read_texts", None)
    for other in (mapped, again):
        for a, b in zip(made.scorer.indices, other.scorer.indices, strict=True):
            assert a.ranks == b.ranks and a.stacked.equal(b.stacked)
            assert (a.offset is None) == (b.offset is None)
            if a.offset is not None and b.offset is not None:
                assert a.offset.equal(b.offset)
        assert [s.adapters for s in other.select(PROMPTS)] == [s.adapters for s in made.select(PROMPTS)]


def test_half_a_file_is_no_index(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    mapped(file, {"a": (3, 4), "b": (5,)}, {"about": "it"})["b"].copy_(torch.arange(5.0))
    tensors, metadata = read_mapped(file)
    assert metadata == {"about": "it"} and tensors["b"].tolist() == [0, 1, 2, 3, 4]
    assert load_file(file)["b"].equal(tensors["b"]) and tensors["a"].data_ptr() % 64 == 0
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ValueError, match="within the file"):
        read_mapped(file)


def test_a_disk_that_is_full_is_said_once_and_costs_the_file_only(
    model: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_file, "MAPPED", 0)
    monkeypatch.setattr(index_file, "mapped", full)
    monkeypatch.setattr(scorers, "keep_index", lambda *given: None)
    logo = opened(model, folder, signal="norm", cache=str(tmp_path), index="two-stage")
    with pytest.warns(UserWarning, match="No space left on device"):
        assert logo.select([PROMPTS[0]])[0].adapters
