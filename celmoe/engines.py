"""The engines by name, and which one ``"auto"`` is.

A new engine is one entry here; the property tests run over this table.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from torch import nn

from .errors import EngineError, listed, nearest
from .experts import ExpertBatch, ExpertResult
from .looped import run_looped

Engine: TypeAlias = Callable[[Sequence[nn.Module], Iterable[ExpertBatch]], list[ExpertResult]]

AUTO = "auto"
ENVIRONMENT = "CELMOE_ENGINE"
ENGINES: dict[str, Engine] = {"looped": run_looped}


def resolve_engine(name: str) -> str:
    """The engine that a name means, with `ENVIRONMENT` deciding what ``"auto"`` is.

    Raises:
        EngineError: No engine has this name.
    """
    _require_known("'engine'", name)
    if name != AUTO:
        return name
    wanted = os.environ.get(ENVIRONMENT) or AUTO
    _require_known(f"'{ENVIRONMENT}'", wanted)
    return "looped" if wanted == AUTO else wanted


def _require_known(where: str, name: str) -> None:
    names = [AUTO, *ENGINES]
    if name not in names:
        raise EngineError(f"{where} must be one of {listed(names)} (got {name!r}; {nearest(str(name), names)})")
