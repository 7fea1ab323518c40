"""Whitening against the textbook formula."""

from __future__ import annotations

import pytest
import torch

from logo.selection import whitening
from logo.selection.whitening import SHRINKAGE, Whitening
from make_adapters import index_of
from tolerances import same_tensor


def sample(tokens: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -2, width)
    return torch.randn(tokens, width, generator=generator) * scales + torch.randn(width, generator=generator)


def textbook(hidden: torch.Tensor) -> torch.Tensor:
    """(C / m + λ)^-1/2 up to a constant that makes directions without variance pass unchanged."""
    centred = (hidden - hidden.mean(0)).double()
    c = centred.T @ centred / len(hidden)
    values, vectors = torch.linalg.eigh(c)
    gain = (SHRINKAGE / (values.clamp_min(0) / values.clamp_min(0).mean() + SHRINKAGE)).sqrt()
    return (vectors @ torch.diag(gain) @ vectors.T).float()


@pytest.mark.parametrize(("tokens", "width"), [(200, 12), (9, 40)], ids=["more tokens", "fewer tokens"])
def test_whitening_is_the_formula(tokens: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whitening, "_NEGLIGIBLE", 0.0)
    hidden = sample(tokens, width)
    found = Whitening.of(hidden)
    torch.testing.assert_close(found.fold(torch.eye(width)), textbook(hidden), atol=1e-4, rtol=1e-3)
    same_tensor(found.mean, hidden.mean(0))


def test_directions_that_hardly_matter_are_left_alone() -> None:
    hidden = sample(500, 64)
    found = Whitening.of(hidden)
    assert 0 < len(found.gain) < 64
    torch.testing.assert_close(found.fold(torch.eye(64)), textbook(hidden), atol=0.03, rtol=0)


def test_text_without_variance_is_only_centred() -> None:
    found = Whitening.of(torch.ones(5, 4))
    same_tensor(found.fold(torch.eye(4)), torch.eye(4))


def test_the_index_scores_whitened_vectors() -> None:
    generator = torch.Generator().manual_seed(1)
    factors = [(torch.randn(r, 12, generator=generator), torch.randn(7, r, generator=generator)) for r in (1, 3, 9)]
    hidden = sample(100, 12)
    found = Whitening.of(hidden)
    scored = index_of(factors, found).norms(hidden)
    particular = (hidden - found.mean) @ found.fold(torch.eye(12))
    expected = torch.stack([(particular @ a.T @ b.T).norm(dim=1) for a, b in factors], dim=1)
    same_tensor(scored, expected)


def test_a_sketch_keeps_lengths_up_to_its_noise() -> None:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator) + 2
    found = Whitening.of(hidden)
    centred = hidden - found.mean
    exact = found.fold(centred).norm(dim=1)  # W is symmetric
    ratio = (centred @ found.sketch().T).norm(dim=1) / exact
    assert 0.9 < ratio.mean() < 1.1
    assert ratio.std() < 0.13
    same_tensor(found.sketch(), found.sketch())
