"""How tokens are weighed: sums of parts make the sum of the whole, and weights fall towards the beginning."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from logo.selection.emphasis import (
    FADING,
    behind,
    column_weights,
    emphasised,
    fading,
    late_count,
    late_weights,
)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_behind_counts_the_later_vectors_of_a_cell(cells: list[int]) -> None:
    want = [cells[i + 1 :].count(cell) for i, cell in enumerate(cells)]
    assert behind(torch.tensor(cells)).tolist() == want


@given(st.integers(1, 60))
def test_late_weights_fall_towards_the_beginning_and_sum_to_the_late_count(tokens: int) -> None:
    weights = late_weights(torch.zeros(tokens, dtype=torch.int64))
    torch.testing.assert_close(weights, fading(torch.arange(tokens).flip(0)))
    torch.testing.assert_close(late_count(torch.tensor(tokens)), weights.sum())


def test_late_means_follow_the_end_and_even_means_do_not() -> None:
    values = torch.tensor([[8.0], [0.0], [0.0], [4.0]])
    owners = torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(emphasised(values, owners, 2, 0).flatten(), torch.tensor([8 / 3, 4.0]))
    late = emphasised(values, owners, 2, 1).flatten()
    torch.testing.assert_close(late, torch.tensor([8 * FADING**2 / (1 + FADING + FADING**2), 4.0]))


def test_readings_of_the_end_count_half() -> None:
    assert column_weights(3, 3).tolist() == [1, 1, 1]
    assert column_weights(4, 2).tolist() == [1, 1, 0.5, 0.5]
