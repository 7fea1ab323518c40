"""How far floats may be apart where two computations stand for the same numbers, and how long anything may take.

One prompt alone or in a batch, the server or the library, our forward pass or PEFT's, another number of threads: sums
are taken in another order, so the last digits differ. Equal means: scores within 1e-4 relative, or within 1e-5 of
the largest that they are compared beside; weights within 1e-5; the same adapters and the same tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

SCORES = 1e-4  # relative
NOTHING = 1e-7  # absolute: what stands for 0
WEIGHTS = 1e-5  # absolute

PATIENCE = 600  # seconds: long enough for any machine, so that only what hangs is ended


def same_scores(expected: Any) -> Any:
    """Compares with scores, negative log-likelihoods and other sums over activations: a number, a list or a mapping."""
    listed = list(expected.values()) if isinstance(expected, Mapping) else expected
    numbers = listed if isinstance(listed, (list, tuple)) else [listed]
    return pytest.approx(expected, rel=SCORES, abs=_floor(map(abs, numbers)))


def same_weights(expected: Any) -> Any:
    """Compares with the weights of a selection."""
    return pytest.approx(expected, abs=WEIGHTS)


def same_selection(found: Any, expected: Any) -> None:
    """Asserts that two selections are one."""
    assert found.adapters == expected.adapters
    assert found.weights == same_weights(expected.weights)
    assert found.scores == same_scores(expected.scores)


def same_tensor(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Asserts that two tensors are one, of which each entry is a sum over others: logits, responses, hidden vectors."""
    import torch

    floor = _floor(expected.detach().abs().flatten().tolist())
    torch.testing.assert_close(found, expected, rtol=SCORES, atol=floor)


def _floor(sizes: Iterable[float]) -> float:
    """How far numbers near 0 may be apart where others are of these sizes: sums of large terms leave large errors."""
    return max([NOTHING, *(WEIGHTS * size for size in sizes if math.isfinite(size))])
