"""The contenders that run whole hierarchies, by name."""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch

import celmoe
from benchmarks.contenders.bare import make_bare
from benchmarks.contenders.contender import (
    AUTO,
    BARE,
    DENSE,
    GROUPED,
    LOOPED,
    ORACLE,
    PEERS,
    PEFT,
    STACK,
    STACKED,
    TRANSFORMERS,
    VMAP,
    AbsentError,
    Contender,
    Maker,
    Terms,
    load_present,
)
from benchmarks.contenders.dense import make_dense
from benchmarks.contenders.foreign import PeftAdapters, TransformersMLP
from benchmarks.contenders.planned import Planned, require_little_padding
from benchmarks.contenders.stack import HAND_STACKED, fastest_stack, takes_grouped_mm
from benchmarks.contenders.vmapped import Vmapped
from benchmarks.harness.equality import Part, Weights
from benchmarks.harness.steps import Routes, cycled, mask_on, routed, routings_of
from benchmarks.workloads.bodies import LOW_RANK
from celmoe.reference import reference_forward

# Experts that vmap does not take, and why.
NOT_VMAPPED = {
    "block": "vmap has no rule for attention on a CPU",
    "masked-block": "vmap has no rule for attention on a CPU",
    "gru": "vmap has no rule for GRUs",
    "two-widths": "weights of two widths can not be stacked",
}
# The oracle picks rows one by one, and each one's gradient is a tensor for the whole batch: so many bytes it may write.
MOST_ORACLE_BYTES = 8 * 2**30


def _ours(engine: str, terms: Terms) -> Contender:
    model = terms.model(engine)
    if engine == "grouped":
        try:
            # Not by the timed forward pass, which goes through the routings in step with the others'.
            some = routings_of(terms.workload)[:1]
            routed(model, terms.workload, some, terms.device)(terms.workload.hidden().to(terms.device))
        except celmoe.EngineRefusedError as error:
            raise AbsentError(f"the engine refuses these experts: {error}") from None
    return terms.whole(model)


def make_compiled(terms: Terms) -> Contender:
    """Stacked experts under ``torch.compile``; names are compiled to plans before, in the step's time."""
    model = terms.model("auto")
    weights = stacked_weights(model, celmoe.stack_experts(model))
    compiled = torch.compile(model)
    mask = mask_on(terms.device, terms.workload)

    def call(hidden: torch.Tensor, routes: Routes) -> torch.Tensor:
        fused: torch.Tensor = compiled(hidden, model.compile_routing(routes).to(terms.device), mask=mask).fused_hidden
        return fused

    return Contender(model, cycled(call, routings_of(terms.workload)), weights)


def _stacked(terms: Terms) -> Contender:
    model = terms.model("auto")
    return terms.whole(model, stacked_weights(model, celmoe.stack_experts(model)))


def stacked_weights(model: celmoe.HierarchicalCELMoE, report: celmoe.StackReport) -> Weights:
    """A stacked model's parameters by the names that they have without stacks, or the parts of them."""
    parts = {
        f"level_modules.{stacked.level}.{expert}.{path}": Part(whole, place)
        for stacked in report.classes
        for path, key in stacked.parameters.items()
        for whole in [model.level_modules[stacked.level].get_parameter(key)]
        for place, expert in enumerate(stacked.experts)
    }
    saved = model.state_dict().keys()
    return parts | {name: parameter for name, parameter in model.named_parameters() if name in saved}


def _peer(version: str, terms: Terms) -> Contender:
    return terms.whole(terms.prepared(terms.workload.build(load_present(version))))


def _oracle(terms: Terms) -> Contender:
    written = len(terms.workload.levels()) * terms.workload.batch_size * terms.workload.hidden().nbytes
    if terms.is_training and written > MOST_ORACLE_BYTES:
        raise AbsentError(f"its backward pass would write {written / 2**30:,.0f} GiB a step, row by row")
    model = terms.model("looped")
    mask = mask_on(terms.device, terms.workload)

    def call(hidden: torch.Tensor, routes: Routes) -> torch.Tensor:
        return reference_forward(model, hidden, routes, mask=mask).fused_hidden

    return Contender(model, cycled(call, routings_of(terms.workload)), dict(model.named_parameters()))


def _stack(terms: Terms) -> Contender:
    _require_kind(terms, HAND_STACKED, "is written by hand for")
    model = terms.model("looped")
    if not takes_grouped_mm(terms.device):
        _require_little_padding(terms, model)
    return _planned(terms, model, fastest_stack(model, terms.workload, terms.device))


def _vmap(terms: Terms) -> Contender:
    if (why_not := NOT_VMAPPED.get(terms.workload.expert)) is not None:
        raise AbsentError(why_not)
    model = terms.model("looped")
    _require_little_padding(terms, model)
    return _planned(terms, model, Vmapped(model))


def _transformers(terms: Terms) -> Contender:
    _require_kind(terms, ("mlp",), "has products for")
    _require_package("transformers")
    model = terms.model("looped")
    return _planned(terms, model, TransformersMLP(model))


def _planned(terms: Terms, model: celmoe.HierarchicalCELMoE, made: Planned) -> Contender:
    terms.prepared(made)
    return Contender(made, made.routed(routings_of(terms.workload)), made.weights_of(model))


def _peft(terms: Terms) -> Contender:
    _require_kind(terms, (LOW_RANK,), "mixes")
    if terms.is_training:
        raise AbsentError("it mixes adapters in inference only")
    _require_package("peft")
    adapters = PeftAdapters(terms.model("looped")).to(terms.device).eval()
    return Contender(adapters, cycled(adapters, routings_of(terms.workload)))


# In the order of a report.
MODELS: dict[str, Maker] = {
    AUTO: functools.partial(_ours, "auto"),
    STACKED: _stacked,
    GROUPED: functools.partial(_ours, "grouped"),
    LOOPED: functools.partial(_ours, "looped"),
    **{name: functools.partial(_peer, version) for name, version in PEERS.items()},
    ORACLE: _oracle,
    DENSE: make_dense,
    BARE: make_bare,
    STACK: _stack,
    VMAP: _vmap,
    TRANSFORMERS: _transformers,
    PEFT: _peft,
}


def _require_kind(terms: Terms, kinds: tuple[str, ...], what_it_does: str) -> None:
    if terms.workload.expert not in kinds:
        raise AbsentError(f"it {what_it_does} {' and '.join(kinds)} experts only")


def _require_little_padding(terms: Terms, model: celmoe.HierarchicalCELMoE) -> None:
    require_little_padding(terms.workload, map(model.compile_routing, routings_of(terms.workload)))


def _require_package(name: str) -> None:
    if find_spec(name) is None:
        raise AbsentError(f'{name} is not installed (to get it: pip install -e ".[peers]")')
