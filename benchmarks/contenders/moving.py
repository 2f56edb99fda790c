"""The contenders that move the rows of one level into expert order and back, and do nothing to them there."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

import celmoe
from benchmarks.contenders.contender import (
    AUTO,
    DENSE,
    ORACLE,
    PEERS,
    STACK,
    VMAP,
    AbsentError,
    Contender,
    Maker,
    Terms,
)
from benchmarks.contenders.layouts import Padded, Ragged
from benchmarks.contenders.models import MODELS
from benchmarks.contenders.planned import padding
from benchmarks.contenders.stack import MOST_PADDING
from benchmarks.steps import ROUTINGS, routings_of, turns
from celmoe.dispatch import combine, dispatch


def _plans(terms: Terms) -> list[celmoe.RoutingPlan]:
    model = cast(celmoe.HierarchicalCELMoE, terms.workload.build(celmoe))
    return [model.compile_routing(routing).to(terms.device) for routing in routings_of(terms.workload)]


def _ours(terms: Terms) -> Contender:
    plans, turn = _plans(terms), turns(ROUTINGS)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        (plan,) = plans[turn()].levels.values()
        return combine(dispatch(hidden, plan), plan)

    return Contender(nn.Identity(), forward)


def _laid_out(kind: type[Ragged | Padded], terms: Terms) -> Contender:
    experts = terms.workload.num_experts
    plans, turn = _plans(terms), turns(ROUTINGS)
    most = max(padding(terms.workload, plan) for plan in plans)
    if kind is Padded and most > MOST_PADDING:
        raise AbsentError(f"it would pad the rows to {most:.0f} times as many")
    layouts = [kind(plan, experts) for each in plans for plan in each.levels.values()]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        layout = layouts[turn()]
        return layout.restore(layout.arrange(hidden))

    return Contender(nn.Identity(), forward)


def _copied(_terms: Terms) -> Contender:
    """A copy each way, as if the batch already stood in expert order."""
    return Contender(nn.Identity(), lambda hidden: hidden.clone().clone())


# Peers and the oracle have no moving apart from the rest: they run experts that return their rows, routing included.
MOVERS: dict[str, Maker] = {
    AUTO: _ours,
    **{name: MODELS[name] for name in (*PEERS, ORACLE)},
    DENSE: _copied,
    STACK: lambda terms: _laid_out(Ragged, terms),
    VMAP: lambda terms: _laid_out(Padded, terms),
}
