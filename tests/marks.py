"""Which cases of a test are slow: left out by default, run by ``-m slow``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import pytest


def slow_after(first: int, params: Sequence[Any]) -> list[Any]:
    """The cases, all but the first of them slow. A tuple is a case of several arguments."""
    return [*params[:first], *(_slow(each) for each in params[first:])]


def slow_but(kept: Collection[Any], params: Iterable[Any]) -> list[Any]:
    """The cases, all but those to keep slow.

    Raises:
        ValueError: A case to keep is none of the cases.
    """
    cases = list(params)
    if unknown := [each for each in kept if each not in cases]:
        raise ValueError(f"'kept' must be some of the cases (got {unknown})")
    return [each if each in kept else _slow(each) for each in cases]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
