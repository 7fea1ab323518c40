"""Cases of a test that takes seconds in each of them."""

from __future__ import annotations

from typing import Any

import pytest


def some_in_ci(cases: int, *, in_ci: int) -> list[Any]:
    """The numbers below `cases`; CI runs the first `in_ci` of them, and `make test` runs all."""
    return [pytest.param(case, marks=pytest.mark.long if case >= in_ci else ()) for case in range(cases)]
