"""Configs for refusals."""

from __future__ import annotations

import math

from celmoe import (
    CELMoEConfig,
)
from tests.refusals import WIDTH

NAN, INF = math.nan, math.inf


# Structure, seen when a model or compiler is built


def levels(*each):
    return CELMoEConfig(WIDTH, list(each))
