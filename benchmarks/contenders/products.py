"""The contenders that multiply sorted rows by their experts' weights: no plan, no moving, one linear layer an expert.

Axes: R rows sorted by expert, E experts, H width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional

import celmoe
from benchmarks.contenders.contender import AUTO, DENSE, LOOPED, STACK, VMAP, AbsentError, Contender, Maker, Terms
from benchmarks.contenders.layouts import Padded, Ragged
from benchmarks.contenders.planned import require_little_padding
from benchmarks.contenders.stack import StackedLinear, takes_grouped_mm
from benchmarks.harness.equality import Part
from celmoe.grouped.kernels.members import linear_of_members
from celmoe.grouped.segments import Segments

_LEVEL = "language"


class _Rows:
    """The rows of each expert present, by their number: the order in which the grouped engine puts a few rows each."""

    def __init__(self, terms: Terms) -> None:
        model = cast(celmoe.HierarchicalCELMoE, terms.workload.build(celmoe))
        self.plan = model.compile_routing(terms.workload.routing())
        level = self.plan.levels[_LEVEL]
        by_count = sorted(zip(level.counts, level.present, strict=True))
        self.counts = [count for count, _ in by_count]
        modules = model.level_modules[_LEVEL]
        self.layers = nn.ModuleList(modules[name].body for _, name in by_count).to(terms.device)  # type: ignore[index]  # a mapping
        # A plan of rows that stand in that order already: names in order are experts in order.
        places = [f"{place:05}" for place in range(len(by_count))]
        sorted_names = [place for place, count in zip(places, self.counts, strict=True) for _ in range(count)]
        present = celmoe.CELMoEConfig(
            terms.workload.hidden_size,
            [celmoe.HierarchyLevelConfig(_LEVEL, {place: celmoe.ExpertConfig(place) for place in places})],
        )
        self.sorted_level = celmoe.RoutingCompiler(present)({_LEVEL: sorted_names}).to(terms.device).levels[_LEVEL]


def _ours(terms: Terms) -> Contender:
    rows = _Rows(terms)
    layers = cast(list[nn.Linear], list(rows.layers))
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        # Segments are new at every pass, as in a model: the first product fills their caches.
        return linear_of_members(hidden, weights, biases, Segments(rows.counts, terms.device), 1)

    return Contender(rows.layers, forward, dict(rows.layers.named_parameters()))


def _looped(terms: Terms) -> Contender:
    rows = _Rows(terms)

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        blocks = hidden.split(rows.counts)
        return torch.cat([layer(block) for layer, block in zip(rows.layers, blocks, strict=True)])

    return Contender(rows.layers, forward, dict(rows.layers.named_parameters()))


def _dense(terms: Terms) -> Contender:
    width = terms.workload.hidden_size
    layer, same = (nn.Linear(width, width).to(terms.device) for _ in range(2))

    def expected() -> Contender:
        same.load_state_dict(layer.state_dict())
        return Contender(same, same, dict(same.named_parameters()))

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return functional.linear(hidden, layer.weight, layer.bias)

    return Contender(layer, forward, dict(layer.named_parameters()), expected)


def _laid_out(kind: type[Ragged | Padded], terms: Terms) -> Contender:
    rows = _Rows(terms)
    if kind is Ragged and not takes_grouped_mm(terms.device):
        raise AbsentError(f"PyTorch {torch.__version__} has no grouped product of float32 on {terms.device.type}")
    if kind is Padded:
        require_little_padding(terms.workload, [rows.plan])
    stacked = StackedLinear(cast(list[nn.Linear], list(rows.layers)))
    layout = kind(rows.sorted_level, len(rows.layers))

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        if kind is Ragged:
            return cast(torch.Tensor, stacked(hidden, layout))
        return layout.restore(stacked(layout.arrange(hidden), layout))

    parts = {
        f"{place}.{name}": Part(whole, place, is_transposed)
        for place in range(len(rows.layers))
        for name, (whole, is_transposed) in stacked.stacks().items()
    }
    return Contender(stacked, forward, parts)


# *stack* is PyTorch's grouped product over stacked weights, *vmap* a batched one over padded rows.
PRODUCTS: dict[str, Maker] = {
    AUTO: _ours,
    LOOPED: _looped,
    DENSE: _dense,
    STACK: lambda terms: _laid_out(Ragged, terms),
    VMAP: lambda terms: _laid_out(Padded, terms),
}
