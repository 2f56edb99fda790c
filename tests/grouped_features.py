"""Models for torch's features through the grouped engine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.architectures import GatedMLP, NormMLP, PackedAttention, Recurrence
from tests.traps import (
    WIDTH,
    Plain,
    auto_groups_all,
)

MAKERS = {
    "plain": Plain,
    "norm": partial(NormMLP, WIDTH),
    "gated": partial(GatedMLP, WIDTH),
    "attention": partial(PackedAttention, WIDTH),
    "gru": partial(Recurrence, WIDTH, nn.GRU),
}
# PyTorch's fused attention can be differentiated once only, in a loop as well.
WITH_DERIVATIVES = sdpa_kernel(SDPBackend.MATH)


def grads_of(model: nn.Module, *more: torch.Tensor) -> list[torch.Tensor | None]:
    return [*(each.grad for each in more), *(parameter.grad for parameter in model.parameters())]


def assert_close(found: Any, expected: Any, **tolerances: float) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, **tolerances)


@pytest.fixture(autouse=True)
def _auto_groups_few_experts() -> Iterator[None]:
    """Group experts that ``"auto"`` would loop because that is cheaper: otherwise nothing here would be grouped."""
    with auto_groups_all():
        yield
