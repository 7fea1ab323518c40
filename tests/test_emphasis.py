"""How tokens are weighed: sums of parts make the sum of the whole, and weights fall towards the beginning."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from logo.selection.emphasis import FADING, behind, column_weights, emphasised, faded, fading, late_count


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_behind_counts_the_later_vectors_of_a_cell(cells: list[int]) -> None:
    want = [cells[i + 1 :].count(cell) for i, cell in enumerate(cells)]
    assert behind(torch.tensor(cells)).tolist() == want


@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 100))
def test_late_sums_of_parts_make_that_of_the_whole(first: int, second: int, seed: int) -> None:
    values = torch.rand(first + second, 3, generator=torch.Generator().manual_seed(seed))
    one = torch.zeros(first + second, dtype=torch.int64)
    whole = faded(values, one).sum(dim=0)
    parts = faded(values[:first], one[:first]).sum(dim=0), faded(values[first:], one[first:]).sum(dim=0)
    torch.testing.assert_close(parts[0] * fading(torch.tensor(second)) + parts[1], whole)
    torch.testing.assert_close(late_count(torch.tensor(first + second)), fading(torch.arange(first + second)).sum())


def test_late_means_follow_the_end_and_even_means_do_not() -> None:
    values = torch.tensor([[8.0], [0.0], [0.0], [4.0]])
    owners = torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(emphasised(values, owners, 2, 0).flatten(), torch.tensor([8 / 3, 4.0]))
    late = emphasised(values, owners, 2, 1).flatten()
    torch.testing.assert_close(late, torch.tensor([8 * FADING**2 / (1 + FADING + FADING**2), 4.0]))


def test_readings_of_the_end_count_half() -> None:
    assert column_weights(3, 3).tolist() == [1, 1, 1]
    assert column_weights(4, 2).tolist() == [1, 1, 0.5, 0.5]
