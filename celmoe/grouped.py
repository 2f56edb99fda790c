"""The engine that runs all experts of one class as one module.

A class runs as one where its structure allows it (`signature`), where all that its forward pass does is known to act on
each row alone (`template`), and where that has been compared with the loop (`proof`). Whatever stands in the way is a
reason in words; the class then runs looped, or is refused if ``engine="grouped"`` was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch.autograd import forward_ad

from .context import ContextRows
from .dispatch import cut
from .errors import EngineRefusedError, listed
from .experts import ExpertBatch, ExpertResult
from .grouping import ClassRecord, Unit
from .looped import run_looped
from .proof import prove
from .ragged import CannotGroupError, NeedsOwnRowsError
from .segments import Segments
from .tally import Tally, entering
from .template import Given, Outcome, Template, run_template
from .watchers import StopRecomputationError, is_symbolic, is_watched, unwatched

# Losses and aux of an expert.
Extras: TypeAlias = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]

# Programs of one class: more of them are a class that computes something else at every call.
_MOST_PROOFS = 32


@dataclass
class UnitBatch(ExpertBatch):
    """The rows of all experts of a unit.

    Attributes:
        level: The level's name.
        names: The experts' names.
        counts: Rows of each.
        aligned: The context's batch-aligned tensors, ``[R, ...]`` each.
        context_rows: What builds an expert's context around its rows of those.
    """

    level: str = ""
    names: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    aligned: list[torch.Tensor] = field(default_factory=list)
    context_rows: ContextRows | None = None


@dataclass
class UnitResult(ExpertResult):
    """What the experts of a unit gave: their rows together, and the rest by expert, in the unit's order.

    Attributes:
        blocks: The rows, in as many tensors as they were computed in.
        by_expert: Losses and aux of each; empty where none has any.
    """

    blocks: list[torch.Tensor] = field(default_factory=list)
    by_expert: list[Extras] = field(default_factory=list)


def kind_of(batch: UnitBatch) -> tuple[Any, ...]:
    """What of an input a fault may depend on, beside its sizes."""
    device = batch.hidden.device.type
    return (
        _facts(batch.hidden),
        None if batch.mask is None else _facts(batch.mask),
        tuple(map(_facts, batch.aligned)),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.dim(), tensor.device, tensor.requires_grad


def run_grouped(units: Sequence[Any], batches: Iterable[ExpertBatch], *, is_strict: bool = True) -> list[ExpertResult]:
    """Run each unit on its batch.

    Args:
        units: The level's units; or experts, which run one after another.
        batches: A `UnitBatch` for a unit that is to run as one, an `ExpertBatch` for one expert alone.
        is_strict: Whether a unit that can't run as one is refused; else it is looped.

    Raises:
        EngineRefusedError: A unit can't run as one.
        CELMoEError: As for `looped.run_looped`.
    """
    if not isinstance(units[0], Unit):
        return run_looped(units, batches)
    results: list[ExpertResult] = []
    for unit, batch in zip(units, batches, strict=True):
        if isinstance(batch, UnitBatch):
            results.append(_run_unit(unit, batch, is_strict))
        else:
            results.extend(run_looped([member.module for member in unit.members], [batch]))
    return results


def run_auto(units: Sequence[Any], batches: Iterable[ExpertBatch]) -> list[ExpertResult]:
    """As `run_grouped`; what can't run as one is looped."""
    return run_grouped(units, batches, is_strict=False)


def _run_unit(unit: Unit, batch: UnitBatch, is_strict: bool) -> ExpertResult:
    record, kind = unit.record, kind_of(batch)
    why_not = unit.fault or _passing(record) or record.faults.get(kind)
    outcome: Outcome | None = None
    error: Exception | None = None
    watched = is_watched()
    # A checkpoint runs this call again and must be shown the same: what is tried in vain is tried in vain then, too.
    is_repeated = watched and kind in record.kinds
    if why_not is None and watched and not is_repeated:
        # On trial first: a failed attempt, and a proof, are not for the caller's watchers.
        state = _random_state(batch.hidden.device)
        with unwatched():
            why_not, error = _attempt(unit, batch)[1:]
        _set_random_state(batch.hidden.device, state)
    if why_not is None:
        outcome, why_not, error = _attempt(unit, batch, learns=not is_repeated)
    if outcome is not None:
        record.kinds.add(kind)
        losses = outcome.losses
        extras: list[Extras] = (
            [({name: values[place] for name, values in losses.items()}, {}) for place in range(len(unit.members))]
            if losses
            else []
        )
        return UnitResult(outcome.hidden, blocks=[outcome.hidden], by_expert=extras)
    assert why_not is not None
    if is_strict and error is None:
        raise refusal(batch.level, batch.names, unit, why_not)
    result = _run_members(unit, batch)
    # The experts themselves did not raise: their being run as one did.
    if unit.fault is None and _passing(record) is None:
        (record.repeated_faults if is_repeated else record.faults)[kind] = why_not
    if is_strict:
        raise refusal(batch.level, batch.names, unit, why_not)
    return result


def refusal(level: str, names: Sequence[str], unit: Unit, why_not: str) -> EngineRefusedError:
    """The error that says why a unit's experts can't run as one."""
    return EngineRefusedError(
        f"'engine' must be 'auto' or 'looped' for level {level!r} (got 'grouped'; its experts "
        f"{listed(names)}, {type(unit.members[0].module).__name__}, {why_not})"
    )


def _passing(record: ClassRecord) -> str | None:
    """Why a class can't be grouped for now."""
    if record.has_losses and torch.is_anomaly_enabled():
        # What is held back of losses that are left out is no number now and then, and nothing is wrong.
        return "return losses while anomalies are looked for"
    if torch._C._are_functorch_transforms_active():
        return "are under a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "are differentiated forward"
    if torch._C._get_tracing_state() or torch.compiler.is_compiling() or is_symbolic():
        return "are being traced"
    return None


def _attempt(
    unit: Unit, batch: UnitBatch, *, learns: bool = True, writes: bool = False, has_losses: bool = False
) -> tuple[Outcome | None, str | None, Exception | None]:
    """Run the unit as one, and prove the program if it is new: the outcome, or why not, and what was raised.

    Args:
        unit: The unit.
        batch: Its rows.
        learns: Whether later attempts may begin with what this one finds out of writes and losses.
        writes: Whether rows are known to be written into.
        has_losses: Whether losses are known to be returned.
    """
    record = unit.record
    writes, has_losses = writes or record.writes, has_losses or record.has_losses
    if (why_not := _passing(record)) is not None:
        return None, why_not, None
    # An attempt that fails must leave the rows and the random stream as they were.
    is_known = bool(record.programs) and not writes
    tally = Tally(len(batch.counts)) if has_losses else None
    given = _given(batch, private=not is_known, tally=tally)
    state = _random_state(batch.hidden.device)
    segments = Segments(batch.counts, batch.hidden.device)
    try:
        template = record.templates.pop()
    except IndexError:
        template = Template(unit.members[0].module, unit.members[0].signature)
    error: Exception | None = None
    try:
        tensors: list[Sequence[torch.Tensor]] = list(zip(*(member.tensors for member in unit.members), strict=True))
        outcome = run_template(template, tensors, given, segments, may_write=not is_known, tally=tally)
        if tally is None and outcome.losses:
            # Found out only now: once more, with a tally.
            record.has_losses |= learns
            _set_random_state(batch.hidden.device, state)
            return _attempt(unit, batch, learns=learns, writes=writes, has_losses=True)
        record.templates.append(template)
        why_not = None if outcome.operations in record.programs else _prove(unit, batch, outcome, learns)
        if why_not is None:
            return outcome, None, None
    except NeedsOwnRowsError:
        record.writes |= learns
        _set_random_state(batch.hidden.device, state)
        return _attempt(unit, batch, learns=learns, writes=True, has_losses=has_losses)
    except CannotGroupError as fault:
        why_not = str(fault)
    except StopRecomputationError:
        raise
    except Exception as raised:  # noqa: BLE001  # the loop will tell whether it is the expert's own
        why_not, error = f"raise {type(raised).__name__} when they run as one ({raised})", raised
    _set_random_state(batch.hidden.device, state)
    return None, why_not, error


def _prove(unit: Unit, batch: UnitBatch, outcome: Outcome, learns: bool) -> str | None:
    """Prove a new program: why it can't be, or ``None``."""
    record = unit.record
    if record.attempts >= _MOST_PROOFS:
        return "compute something else at every call"
    record.attempts += 1
    given = _given(batch, private=False)
    why_not = prove(unit.members, given, outcome.operations, has_losses=bool(outcome.losses))
    if why_not is None:
        record.programs[outcome.operations] = outcome.looped
        record.writes |= outcome.writes and learns
    return why_not


def _given(batch: UnitBatch, *, private: bool, tally: Tally | None = None) -> Given:
    def own(tensor: torch.Tensor) -> torch.Tensor:
        if tally is not None:
            tensor = entering(tensor, tally)
        return tensor.clone() if private else tensor

    rows = batch.context_rows
    assert rows is not None
    return Given(
        own(batch.hidden),
        None if batch.mask is None else own(batch.mask),
        [own(each) for each in batch.aligned],
        rows.build,
        rows.shared,
    )


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _run_members(unit: Unit, batch: UnitBatch) -> UnitResult:
    """The unit's experts one after another, in the order of their names, as celmoe-vp runs them."""
    order = sorted(range(len(unit.members)), key=lambda place: unit.positions[place])
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
    found = dict(zip(order, run_looped([unit.members[place].module for place in order], batches), strict=True))
    results = [found[place] for place in range(len(order))]
    return UnitResult(
        results[0].hidden,
        blocks=[result.hidden for result in results],
        by_expert=[(dict(result.losses), dict(result.aux or {})) for result in results],
    )
