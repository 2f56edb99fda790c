"""The engines by name, and the engine behind ``"auto"``.

A new engine is one entry here; the property tests run over this table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

from celmoe.errors import EngineError, listed, nearest
from celmoe.experts import ExpertBatch, ExpertResult

from .choice import AUTO, GROUPED, LOOPED
from .grouped import run_auto, run_grouped
from .looped import run_looped

__all__ = ["AUTO", "ENGINES", "ENVIRONMENT", "GROUPED", "LOOPED", "Engine", "resolve_engine"]

# A function that runs a level: experts one by one, or units of experts.
Engine: TypeAlias = Callable[[Sequence[Any], Iterable[ExpertBatch]], list[ExpertResult]]

ENVIRONMENT = "CELMOE_ENGINE"
ENGINES: dict[str, Engine] = {AUTO: run_auto, LOOPED: run_looped, GROUPED: run_grouped}


def resolve_engine(name: str) -> str:
    """The engine that a name means; `ENVIRONMENT` decides the engine behind ``"auto"``.

    Raises:
        EngineError: No engine has this name.
    """
    _require_known("'engine'", name)
    if name != AUTO:
        return name
    wanted = os.environ.get(ENVIRONMENT) or AUTO
    _require_known(f"'{ENVIRONMENT}'", wanted)
    return wanted


def _require_known(where: str, name: str) -> None:
    names = list(ENGINES)
    if name not in names:
        raise EngineError(f"{where} must be one of {listed(names)} (got {name!r}; {nearest(str(name), names)})")
