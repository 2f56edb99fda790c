"""The engine that runs all experts of one class as one.

Experts of one class share a program (`classes`). Any obstacle becomes a reason in words: the class then runs looped, or
is refused if ``engine="grouped"`` was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.autograd.graph import get_gradient_edge

from celmoe.errors import EngineRefusedError
from celmoe.experts import ExpertBatch, ExpertResult
from celmoe.grouped.boundary import Entered, Port, enter, leave
from celmoe.grouped.capture import Sample, WrongResult
from celmoe.grouped.classes import Unit
from celmoe.grouped.program import Bound, Outcome, run_program
from celmoe.grouped.segments import FEW_OF_A_STACK, Segments
from celmoe.grouped.values import CannotGroupError
from celmoe.rows.blocks import cut
from celmoe.rows.context import ContextRows

from .choice import refusal
from .looped import run_looped

# Losses and aux of an expert.
Extras: TypeAlias = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]


@dataclass
class UnitBatch(ExpertBatch):
    """The rows of all experts of a unit.

    Attributes:
        level: The level's name.
        names: The experts' names.
        counts: Number of rows of each expert.
        aligned: The context's batch-aligned tensors, ``[R, ...]`` each.
        context_rows: Builds an expert's context around its rows of the batch-aligned tensors.
    """

    level: str = ""
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    aligned: list[torch.Tensor] = field(default_factory=list)
    context_rows: ContextRows | None = None


@dataclass
class UnitResult(ExpertResult):
    """The results of a unit's experts: their rows together, and the rest by expert, in the unit's order.

    Attributes:
        blocks: The rows, in as many tensors as they were computed in.
        by_expert: Losses and aux of each expert; empty if no expert has any.
    """

    blocks: list[torch.Tensor] = field(default_factory=list)
    by_expert: list[Extras] = field(default_factory=list)


def run_grouped(units: Sequence[Any], batches: Iterable[ExpertBatch], *, is_strict: bool = True) -> list[ExpertResult]:
    """Run each unit on its batch.

    Args:
        units: The level's units; or experts, which run one after another.
        batches: A `UnitBatch` for a unit that is to run as one, an `ExpertBatch` for one expert alone.
        is_strict: If true, a unit that can't run as one is refused, and else looped.

    Raises:
        EngineRefusedError: A unit can't run as one.
        CELMoEError: As for `looped.run_looped`.
    """
    if not isinstance(units[0], Unit):
        return run_looped(units, batches)
    results: list[ExpertResult] = []
    state = None
    try:
        for unit, batch in zip(units, batches, strict=True):
            if is_strict and state is None:
                state = batch.hidden.device, _random_state(batch.hidden.device)
            if isinstance(batch, UnitBatch):
                results.append(_run_unit(unit, batch, is_strict))
            else:
                results.extend(run_looped(unit.modules, [batch]))
    except EngineRefusedError:
        if state is not None:
            _set_random_state(*state)
        raise
    return results


def run_auto(units: Sequence[Any], batches: Iterable[ExpertBatch]) -> list[ExpertResult]:
    """Run each unit like `run_grouped`, but loop a unit that can't run as one."""
    return run_grouped(units, batches, is_strict=False)


def _run_unit(unit: Unit, batch: UnitBatch, is_strict: bool) -> ExpertResult:
    why_not = unit.fault
    if why_not is None and unit.record is not None and unit.record.captured.losses and torch.is_anomaly_enabled():
        # Gradients that are withheld for left-out losses may be NaN, though nothing is wrong.
        why_not = "return losses while anomalies are looked for"
    if why_not is None:
        state = _random_state(batch.hidden.device) if unit.record is not None and unit.record.draws else None
        try:
            outcome = _run(unit, batch)
        except CannotGroupError as fault:
            why_not = fault.args[0]
        except (RuntimeError, IndexError, ValueError, TypeError) as error:
            why_not = WrongResult(f"raise {type(error).__name__} when they run as one ({error})")
        else:
            extras: list[Extras] = [
                ({name: values[place] for name, values in outcome.losses.items()}, {})
                for place in range(len(unit.modules))
                if outcome.losses
            ]
            return UnitResult(outcome.hidden, blocks=[outcome.hidden], by_expert=extras)
        if state is not None:
            _set_random_state(batch.hidden.device, state)
    is_wrong = isinstance(why_not, WrongResult)
    # If the fault is the experts' own, the loop raises an error that names the expert.
    if is_strict and not is_wrong:
        raise refusal(batch.level, batch.names, unit.modules[0], why_not)
    result = _run_members(unit, batch)
    if is_strict:
        raise refusal(batch.level, batch.names, unit.modules[0], why_not)
    return result


def _run(unit: Unit, batch: UnitBatch) -> Outcome:
    record, rows = unit.record, batch.context_rows
    assert record is not None
    assert record.program is not None
    assert rows is not None
    mask = [] if batch.mask is None else [batch.mask]
    given: Sequence[torch.Tensor] = [batch.hidden, *mask, *batch.aligned]
    own: Sequence[Sequence[torch.Tensor] | torch.Tensor] = list(zip(*unit.tensors, strict=True))
    own = own or [()] * len(record.captured.names)
    counts: Sequence[int] = batch.counts
    if unit.stack is not None:
        own, counts = _stacked(unit, own, counts)
    entered: list[Entered] = []
    # In inference mode nothing has a node, and nothing will be differentiated.
    is_parted = bool(record.captured.losses) and not torch.is_inference_mode_enabled()
    if is_parted:
        members = [each.unbind(0) if isinstance(each, torch.Tensor) else each for each in own]
        given, own, entered = _entered(given, members, batch.counts)
    if record.writes:
        given = [each.clone() for each in given]
    sample = Sample(given[0], given[1] if mask else None, rows.build(given[1 + len(mask) :]))
    segments = Segments(counts, batch.hidden.device, is_stacked=unit.stack is not None)
    outcome = run_program(
        record.program, Bound(sample, own, record.captured.bases(unit.modules[0])), segments, may_write=record.writes
    )
    return _left(outcome, entered, batch.counts) if is_parted else outcome


def _stacked(
    unit: Unit, own: Sequence[Any], counts: Sequence[int]
) -> tuple[Sequence[Sequence[torch.Tensor] | torch.Tensor], Sequence[int]]:
    """The members' tensors with stacks for those that are stacked, and the number of rows of each of a stack's members.

    A stack holds all its members, those without rows too, where these compute nothing: no weight moves then.
    """
    stack, record = unit.stack, unit.record
    assert stack is not None
    assert record is not None
    assert record.program is not None
    calls, names = record.program.calls, record.captured.names
    members: torch.Tensor | None = None
    if unit.members != tuple(range(len(stack.names))):
        is_whole = all(name in stack.keys for name in names) and not record.captured.losses
        is_whole &= FEW_OF_A_STACK * len(unit.members) >= len(stack.names)
        if calls is not None and calls.takes_absent and is_whole and list(unit.members) == sorted(unit.members):
            all_counts = [0] * len(stack.names)
            for member, count in zip(unit.members, counts, strict=True):
                all_counts[member] = count
            counts = all_counts
        else:
            members = torch.tensor(unit.members)
    found: list[Sequence[torch.Tensor] | torch.Tensor] = []
    for name, each in zip(names, own, strict=True):
        if name not in stack.keys:
            found.append(each)
            continue
        whole = stack.whole(name)
        if unit.members[0] in stack.frozen:
            # All the unit's members are.
            whole = whole.detach()
        found.append(whole if members is None else whole.index_select(0, members.to(whole.device, non_blocking=True)))
    return found, counts


def _entered(
    given: Sequence[torch.Tensor], own: Sequence[Sequence[torch.Tensor]], counts: Sequence[int]
) -> tuple[Sequence[torch.Tensor], Sequence[Sequence[torch.Tensor]], list[Entered]]:
    """The tensors that a run with losses takes in place of rows and of the members' own, with descriptions."""
    everyone, num_given, num_members = frozenset(range(len(counts))), len(given), len(counts)
    ports = [Port(("rows", place), everyone, is_rows=True) for place in range(num_given)]
    ports += [Port(("own", place), frozenset([member])) for place in range(len(own)) for member in range(num_members)]
    taken = enter([*given, *(tensor for members in own for tensor in members)])
    pairs = zip(taken, ports, strict=True)
    entered = [Entered(each, get_gradient_edge(each), port) for each, port in pairs if each.requires_grad]
    by_input = [taken[start : start + num_members] for start in range(num_given, len(taken), num_members)]
    return taken[:num_given], by_input, entered


def _left(outcome: Outcome, entered: Sequence[Entered], counts: Sequence[int]) -> Outcome:
    """The outcome of a run with losses; a backward pass then reaches no member by losses that are left out."""
    results, ports = [outcome.hidden], [Port("hidden", frozenset(range(len(counts))), is_rows=True)]
    for name, values in outcome.losses.items():
        results += values
        ports += [Port(("loss", name), frozenset([member])) for member in range(len(values))]
    # The caller's grad mode does not matter: the expert may have enabled gradients itself.
    with torch.enable_grad():
        hidden, *losses = leave(results, ports, entered, counts)
        # Each loss gets its own memory, because callers may write into a loss, and its own node for hooks.
        own = iter([each.clone() for each in losses])
    by_name = {name: [next(own) for _ in values] for name, values in outcome.losses.items()}
    return outcome._replace(hidden=hidden, losses=by_name)


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _run_members(unit: Unit, batch: UnitBatch) -> UnitResult:
    """The unit's experts one after another, in the order of their names, as celmoe-vp runs them."""
    order = sorted(range(len(unit.modules)), key=lambda place: unit.positions[place])
    hidden = cut(batch.hidden, batch.counts)
    masks = None if batch.mask is None else cut(batch.mask, batch.counts)
    aligned = [cut(each, batch.counts) for each in batch.aligned]
    rows = batch.context_rows
    assert rows is not None
    batches = [
        ExpertBatch(
            hidden[place],
            rows.build([each[place] for each in aligned]),
            None if masks is None else masks[place],
            {"level": batch.level, "expert": batch.names[place]},
        )
        for place in order
    ]
    found = dict(zip(order, run_looped([unit.modules[place] for place in order], batches), strict=True))
    results = [found[place] for place in range(len(order))]
    return UnitResult(
        results[0].hidden,
        blocks=[result.hidden for result in results],
        by_expert=[(dict(result.losses), dict(result.aux or {})) for result in results],
    )
