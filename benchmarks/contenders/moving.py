"""The contenders that send the rows of one level to experts that return them: planned, moved there, and moved back.

All begin with names, so that everyone's time holds the planning, the moving, and the calls of its experts.
"""

from __future__ import annotations

import torch
from torch import nn

import celmoe
from benchmarks.contenders.contender import (
    DENSE,
    ORACLE,
    OURS,
    PEERS,
    STACK,
    VMAP,
    Contender,
    Maker,
    Terms,
)
from benchmarks.contenders.layouts import Padded, Ragged
from benchmarks.contenders.models import MODELS
from benchmarks.contenders.planned import require_little_padding
from benchmarks.harness.steps import Routes, cycled, routings_of


def _laid_out(kind: type[Ragged | Padded], terms: Terms) -> Contender:
    experts = terms.workload.num_experts
    model = terms.workload.build(celmoe)
    assert isinstance(model, celmoe.HierarchicalCELMoE)
    compiler, routings = celmoe.RoutingCompiler(model.config), routings_of(terms.workload)
    if kind is Padded:
        require_little_padding(terms.workload, map(compiler, routings))

    def call(hidden: torch.Tensor, routes: Routes) -> torch.Tensor:
        (level,) = compiler(routes).to(terms.device).levels.values()
        layout = kind(level, experts)
        return layout.restore(layout.arrange(hidden))

    return Contender(nn.Identity(), cycled(call, routings))


def _copied(_terms: Terms) -> Contender:
    """A copy each way, as if the batch already stood in expert order; it must return its input."""
    return Contender(
        nn.Identity(),
        lambda hidden: hidden.clone().clone(),
        expected=lambda: Contender(nn.Identity(), lambda hidden: hidden),
    )


MOVERS: dict[str, Maker] = {
    **{name: MODELS[name] for name in (*OURS, *PEERS, ORACLE)},
    DENSE: _copied,
    STACK: lambda terms: _laid_out(Ragged, terms),
    VMAP: lambda terms: _laid_out(Padded, terms),
}
