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
    late_along,
    late_count,
    late_weights,
)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_behind_counts_the_later_vectors_of_a_cell(cells: list[int]) -> None:
    want = [cells[i + 1 :].count(cell) for i, cell in enumerate(cells)]
    assert behind(torch.tensor(cells)).tolist() == want


@given(st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any), st.integers(0, 100))
def test_late_sums_of_parts_make_that_of_the_whole(tokens: list[int], seed: int) -> None:
    counts = torch.tensor(tokens)
    values = torch.rand(sum(tokens), 3, generator=torch.Generator().manual_seed(seed))
    before = torch.rand(3, generator=torch.Generator().manual_seed(seed + 1))
    cells = torch.arange(len(tokens)).repeat_interleave(counts)
    parts = torch.zeros(len(tokens), 3).index_add_(0, cells, values * late_weights(cells)[:, None])
    along, left = late_along(counts)
    found = along @ parts + left[:, None] * before
    end = 0
    for row, count in zip(found, tokens, strict=True):
        end += count
        weights = fading(torch.arange(end).flip(0))
        torch.testing.assert_close(row, (values[:end] * weights[:, None]).sum(dim=0) + before * FADING**end)
    torch.testing.assert_close(late_count(counts.sum()), fading(torch.arange(sum(tokens))).sum())


def test_late_means_follow_the_end_and_even_means_do_not() -> None:
    values = torch.tensor([[8.0], [0.0], [0.0], [4.0]])
    owners = torch.tensor([0, 0, 0, 1])
    torch.testing.assert_close(emphasised(values, owners, 2, 0).flatten(), torch.tensor([8 / 3, 4.0]))
    late = emphasised(values, owners, 2, 1).flatten()
    torch.testing.assert_close(late, torch.tensor([8 * FADING**2 / (1 + FADING + FADING**2), 4.0]))


def test_readings_of_the_end_count_half() -> None:
    assert column_weights(3, 3).tolist() == [1, 1, 1]
    assert column_weights(4, 2).tolist() == [1, 1, 0.5, 0.5]
