"""How far floats may be apart where two computations stand for the same numbers, and how long anything may take.

One prompt alone or in a batch, the server or the library, our forward pass or PEFT's, another number of threads: sums
are taken in another order, so the last digits differ. Equal means: scores within 1e-4 relative, weights within 1e-5,
the same adapters and the same tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

SCORES = 1e-4  # relative
WEIGHTS = 1e-5  # absolute

PATIENCE = 600  # seconds: long enough for any machine, so that only what hangs is ended


def same_scores(expected: Any) -> Any:
    """Compares with scores, negative log-likelihoods and other sums over activations: a number, a list or a mapping."""
    return pytest.approx(expected, rel=SCORES, abs=SCORES)


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

    largest = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found, expected, rtol=SCORES, atol=WEIGHTS * largest)
