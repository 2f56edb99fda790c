"""The model and the checks of the message tests: a small model that counts its experts' calls, and a look at refusals.

A refusal is right when its class is celmoe's and the builtin's, when its message is the expected one to the letter, and
when nothing ran or changed: no expert was called, the random stream and the arguments are as before, and the next good
call gives a fresh model's result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    CELMoEError,
    ExpertBatch,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
)

LANGUAGE = "\"routing['language']\""

WIDTH = 4
FAMILIES = ("slavic", "romance", "germanic")
LANGUAGES = ("ru", "pl", "fr", "de")
GOOD = {"family": ["slavic", "germanic", "romance"], "language": ["ru", "de", "fr"]}


class Counting(ExpertModule):
    """A linear expert with dropout that counts how often it ran."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        Counting.calls += 1
        hidden = torch.dropout(self.linear(batch.hidden), 0.5, self.training)
        return ExpertResult(hidden, {"size": hidden.pow(2).mean()})


def level(name: str, experts: tuple[str, ...] = ("a", "b"), **fields: Any) -> HierarchyLevelConfig:
    """A level of experts with default configs."""
    return HierarchyLevelConfig(name, {expert: ExpertConfig(expert) for expert in experts}, **fields)


def two_levels(**fields: Any) -> CELMoEConfig:
    """Families above languages, without parents or fallbacks."""
    return CELMoEConfig(WIDTH, [level("family", FAMILIES), level("language", LANGUAGES)], **fields)


def build(config: CELMoEConfig | None = None, **options: Any) -> HierarchicalCELMoE:
    """A model of counting experts, always with the same parameters."""
    torch.manual_seed(0)
    return HierarchicalCELMoE(config or two_levels(), lambda *_: Counting(), **options)


def rows(batch_size: int = 3, *middle: int) -> torch.Tensor:
    """Hidden rows, always the same."""
    return torch.randn(batch_size, *middle, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_error(error: BaseException, kind: type[CELMoEError], builtin: type[Exception], message: str) -> None:
    """The class, and every word."""
    assert type(error) is kind
    assert isinstance(error, builtin)
    assert isinstance(error, CELMoEError)
    assert str(error) == message, f"got      {error}\nexpected {message}"


def assert_refused(
    model: HierarchicalCELMoE,
    call: Callable[[], object],
    kind: type[CELMoEError],
    builtin: type[Exception],
    message: str,
    *arguments: Any,
) -> None:
    """The call is refused in these words, and leaves no trace on the model, its arguments or the random stream."""
    before = (copy.deepcopy(model.config), snapshot(arguments), copy.deepcopy(model.state_dict()))
    Counting.calls = 0
    torch.manual_seed(2)
    random = torch.get_rng_state()
    with pytest.raises(CELMoEError) as caught:
        call()
    assert_error(caught.value, kind, builtin, message)
    assert Counting.calls == 0
    assert torch.equal(torch.get_rng_state(), random)
    assert model.config == before[0]
    assert snapshot(arguments) == before[1]
    assert all(
        torch.equal(mine, old) for mine, old in zip(model.state_dict().values(), before[2].values(), strict=True)
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_like_fresh(model)


def assert_like_fresh(model: HierarchicalCELMoE) -> None:
    """The next good call gives the result of a new model, gradients and dropout included."""
    gradients = []
    for each in (model, build(copy.deepcopy(model.config))):
        torch.manual_seed(3)
        hidden = rows().requires_grad_()
        output = each(hidden, GOOD)
        gradients.append([output.fused_hidden, *torch.autograd.grad(output.fused_hidden.sum(), hidden)])
    for mine, fresh in zip(*gradients, strict=True):
        assert torch.equal(mine, fresh)


def snapshot(value: Any) -> Any:
    """A value that compares equal as long as the original was left alone."""
    if isinstance(value, torch.Tensor):
        return (str(value.device), value.dtype, None if value.is_meta else value.tolist(), value._version)
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.tolist())
    if isinstance(value, dict):
        return {key: snapshot(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [snapshot(item) for item in value]
    return repr(value)
