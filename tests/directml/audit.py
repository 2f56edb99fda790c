"""A training step of a model on the masquerade, compared with its experts alone on the masquerade.

The user's own modules may do anything on the device. Each expert therefore runs alone on its rows first. Its findings
are subtracted from those of the whole model: the rest comes from the library.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

import celmoe.grouped.verify
from celmoe import (
    CELMoEConfig,
    ExpertBatch,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    RoutingPlan,
)
from tests.directml.masquerade import Finding, masquerade
from tests.directml.operators import Kind
from tests.experts import KINDS, Registry

WIDTH, POSITIONS, TABLE = 4, 3, 7
COUNTS = (5, 3, 1, 4)
BATCH = sum(COUNTS)
_EXPERTS = [f"e{index}" for index in range(len(COUNTS))]


class Inputs(NamedTuple):
    """The inputs of a model's call."""

    hidden: torch.Tensor
    routing: dict[str, list[str]]
    context: Any
    mask: torch.Tensor | None


def inputs(*, has_positions: bool, mask: str = "bool") -> Inputs:
    """Rows of all experts, in no order; a context with rows, ids and a table; and a mask."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    shape = (BATCH, POSITIONS, WIDTH) if has_positions else (BATCH, WIDTH)
    ids = torch.randperm(BATCH, generator=generator).tolist()
    names = [name for name, count in zip(_EXPERTS, COUNTS, strict=True) for _ in range(count)]
    context = {
        "row_hidden": normal(*shape),
        "row_ids": torch.randint(0, TABLE, (BATCH,), generator=generator),
        "row_flags": torch.rand(BATCH, 2, generator=generator) < 0.5,
        "all_table": normal(TABLE, 3),
        "temperature": 0.5,
    }
    masks = {
        "none": lambda: None,
        "bool": lambda: torch.rand(shape[:-1], generator=generator) < 0.7,
        "grad": lambda: normal(*shape[:-1]),
    }
    routing = {"upper": ["u0" if each % 2 else "u1" for each in ids], "lower": [names[each] for each in ids]}
    return Inputs(normal(*shape), routing, context, masks[mask]())


def build(kind: str, engine: str, fusion: str = "learned") -> HierarchicalCELMoE:
    """A model of two levels of experts of one kind; without dropout in its fusion, which is the user's choice."""
    torch.manual_seed(0)
    registry = Registry(WIDTH)
    levels = [
        HierarchyLevelConfig("upper", {name: ExpertConfig(name, gradient_scale=0.5) for name in ("u0", "u1")}),
        HierarchyLevelConfig("lower", {name: ExpertConfig(name) for name in _EXPERTS}),
    ]
    options: dict[str, Any] = {"use_learned_fusion": False} if fusion == "mean" else {"fusion_type": fusion}
    config = CELMoEConfig(WIDTH, levels, fusion_dropout=0.0, **options)
    return HierarchicalCELMoE(config, lambda *_: KINDS[kind].make(WIDTH, registry), engine=engine)


def step(model: HierarchicalCELMoE, given: Inputs, routing: RoutingPlan | dict[str, list[str]]) -> torch.Tensor:
    """Forward and backward; gives the fused hidden states."""
    output = model(given.hidden, routing=routing, context=given.context, mask=given.mask)
    total = output.fused_hidden.sum()
    for loss in output.losses.values():
        total = total + loss.sum()
    total.backward()
    return output.fused_hidden.detach()


def alone(model: HierarchicalCELMoE, given: Inputs) -> Counter[Finding]:
    """The findings of the experts themselves, each on its rows."""
    batches = []
    for level, names in given.routing.items():
        for name, module in model.level_modules[level].items():
            rows = torch.tensor([row for row, each in enumerate(names) if each == name])

            def cut(value: Any, rows: torch.Tensor = rows) -> Any:
                if not isinstance(value, torch.Tensor) or len(value) != BATCH:
                    return value
                # A copy, for their rows are no leaves in a model, and they may write into them.
                return value.detach()[rows].requires_grad_(value.requires_grad).clone()

            context = {key: cut(value) for key, value in given.context.items()}
            state = {"level": level, "expert": name}
            batches.append((module, ExpertBatch(cut(given.hidden), context, cut(given.mask), state)))
    with masquerade() as record:
        for module, batch in batches:
            result = module(batch)
            total = result.hidden.sum()
            for loss in result.losses.values():
                total = total + loss.sum()
            if total.requires_grad:
                total.backward()
    return record.findings


@contextlib.contextmanager
def _trials_are_seen() -> Iterator[None]:
    """A comparison with the loop is kept from modes that watch; here it is watched, too."""
    with mock.patch.object(celmoe.grouped.verify, "unwatched", contextlib.nullcontext):
        yield


class Audit(NamedTuple):
    """The operations of the library that the device does not do well.

    Attributes:
        first: Findings at a first call, in which classes are verified.
        later: Findings at a later one.
        fused: The fused rows of the later call.
        gradients: The gradients of all parameters and inputs in that call.
    """

    first: Counter[Finding]
    later: Counter[Finding]
    fused: torch.Tensor
    gradients: list[torch.Tensor | None]


def audit(model: HierarchicalCELMoE, given: Inputs, *, with_plan: bool) -> Audit:
    """Run two steps of a model on the masquerade."""
    theirs = alone(model, given)
    routing = model.compile_routing(given.routing) if with_plan else given.routing
    with _trials_are_seen(), masquerade() as first:
        step(model, given, routing)
    with _trials_are_seen(), masquerade() as later:
        fused, gradients = differentiated(model, given, routing)
    # Verifying a class runs the class several times, and reads the results back.
    new = {what: count for what, count in first.findings.items() if what not in theirs and what.what != Kind.SYNC.value}
    return Audit(Counter(new), later.findings - theirs, fused, gradients)


def differentiated(
    model: HierarchicalCELMoE, given: Inputs, routing: RoutingPlan | dict[str, list[str]]
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    """Return a step's fused rows, and the gradients of all parameters and inputs."""
    inputs = [each for each in (given.hidden, given.mask, *given.context.values()) if isinstance(each, torch.Tensor)]
    leaves = [*model.parameters(), *inputs]
    for leaf in leaves:
        leaf.grad = None
    return step(model, given, routing), [leaf.grad for leaf in leaves]


def require_clean(found: Audit) -> None:
    """Fail on anything found.

    Raises:
        AssertionError: Something was; the message names every operator.
    """
    for when, findings in (("first", found.first), ("later", found.later)):
        told = [f"{each.operator} {each.what} ({count} times)" for each, count in findings.items()]
        assert not told, f"in a {when} call: {', '.join(told)}"
