"""What counts as equal between two computations: small numbers are held to as many digits as large ones."""

from __future__ import annotations

import math

import pytest
import torch

from tolerances import same_scores, same_tensor


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e6])
def test_numbers_are_held_to_four_digits_whatever_their_size(size: float) -> None:
    assert size * 1.00005 == same_scores(size)
    assert size * 1.0002 != same_scores(size)
    same_tensor(torch.tensor([size * 1.00005]), torch.tensor([size]))
    with pytest.raises(AssertionError):
        same_tensor(torch.tensor([size * 1.0002]), torch.tensor([size]))


@pytest.mark.parametrize("others", [[2.0], [2.0, -math.inf]])
def test_what_is_near_nothing_is_measured_by_its_neighbours(others: list[float]) -> None:
    assert [1e-5, *others] == same_scores([0.0, *others])
    assert [1e-4, *others] != same_scores([0.0, *others])
    assert same_scores({"a": 0.0, "b": 2.0}) == {"a": 1e-5, "b": 2.0}
    assert same_scores({"a": 0.0, "b": 2.0}) != {"a": 1e-4, "b": 2.0}
