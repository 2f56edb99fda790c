"""Lets attached experts follow a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from celmoe.errors import InputTypeError
from celmoe.experts import ExpertContext
from celmoe.routing.plan import RoutingPlan

from .hosts import hosts_in
from .root import run_for
from .runs import Run, begin, begin_span, end, end_span


@contextmanager
def routed(
    model: nn.Module,
    plan: RoutingPlan | Mapping[str, Any],
    *,
    context: ExpertContext = None,
    mask: torch.Tensor | None = None,
    num_beams: int = 1,
) -> Iterator[Run]:
    """Within, the experts that are attached to a model follow a plan.

    The plan is this thread's. It holds for all places whose config it was made for; contexts nest. A recomputation by
    activation checkpointing, of either kind, follows the plan of its own forward pass, within or afterwards.

    Args:
        model: The host, or a part of it.
        plan: A plan of B samples, or a routing to compile: ``{"language": ["de", "nl"]}``.
        context: The experts' context: see `HierarchicalCELMoE.forward`.
        mask: ``[B, ...]``, the experts' mask.
        num_beams: In generation, rows of each sample, one after another. Modules may have a row for each beam, or, as
            encoders do, one for each sample.

    Yields:
        The run. Its ``losses``, ``loss_weights`` and ``loss_shares`` have the losses that experts return, by
        ``<place>.<level>.<expert>.<loss>``, of the last forward pass. A place that it runs several times has
        the sum.

    Raises:
        ConfigError: No experts are attached to the model.
        PlanError: The plan was made for another config than any place has.
        InputTypeError, InputError: An argument is of the wrong kind, or ``num_beams`` below 1.
        CELMoEError: A routing can't be compiled: see `RoutingCompiler`.
    """
    hosts = list(hosts_in(model).values())
    if isinstance(num_beams, bool) or not isinstance(num_beams, int) or num_beams < 1:
        raise InputTypeError(f"'num_beams' must be an integer from 1 on (got {num_beams!r})")
    run = run_for(hosts, plan, context, mask, num_beams)
    run.losses = {}
    begin(run)
    run.whole = None if torch.compiler.is_compiling() else begin_span(run)
    try:
        yield run
    finally:
        end(run)
        if run.whole is not None:
            end_span(run.whole)
