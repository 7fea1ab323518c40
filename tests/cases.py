"""Parameters of slow tests, of which CI runs only some."""

from __future__ import annotations

from typing import Any

import pytest


def some_in_ci(cases: int, *, in_ci: int) -> list[Any]:
    """The numbers below `cases`; CI runs `in_ci` of them, spread evenly, and `make test` runs all."""
    chosen = {int((one + 0.5) * cases / in_ci) for one in range(in_ci)}
    return [pytest.param(case, marks=() if case in chosen else pytest.mark.long) for case in range(cases)]
