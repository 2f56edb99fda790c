"""The experts present at a level, put in classes: those of one class share a program, and run as one.

Two experts are of one class where the guards of one captured graph hold for both (`capture`). They are asked at every
call, so that a change of anything that the graph depends on is seen. Captures are kept by the experts' Python class,
for all models of a process.

Axes: R rows, P experts present.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .capture import Captured, Refusal, Sample, capture, sample_of, tracer_missing
from .context import ContextRows
from .program import Program, lower
from .ragged import CannotGroupError
from .verify import Few, verify

# Graphs of one Python class that are kept; the least recently used ones go.
_MOST_CAPTURES = 256
# Siblings that are tried before the rest is taken to be refused alike.
_MOST_TRIES = 2


class Layout(NamedTuple):
    """What the choice of an engine looks at: an expert's class, and its tensors.

    Attributes:
        kind: The Python class.
        tensors: The name, shape and dtype of each parameter and buffer.
    """

    kind: type
    tensors: tuple[tuple[str, torch.Size, torch.dtype], ...]


@dataclass(eq=False)
class ClassRecord:
    """What is known of a class.

    Attributes:
        captured: The graph.
        program: It, lowered; ``None`` where it can't be.
        fault: Why its experts can't run as one, in words that follow "its experts".
        operations_looped: Operations without a grouped form, which run member by member, and how often.
        writes: Whether its experts write into their rows.
        draws: Whether its experts draw random numbers.
        verified: By the id of an expert that was compared with the loop: the expert, and the difference if any.
    """

    captured: Captured
    program: Program | None = None
    fault: str | None = None
    operations_looped: dict[str, int] = field(default_factory=dict)
    writes: bool = False
    draws: bool = False
    verified: dict[int, tuple[weakref.ref[nn.Module], str | None]] = field(default_factory=dict)

    def note(self, expert: nn.Module, fault: str | None) -> None:
        """Keep what the comparison of an expert with the loop found."""
        self.verified[id(expert)] = weakref.ref(expert), fault

    def fault_of(self, expert: nn.Module) -> tuple[bool, str | None]:
        """Whether the expert has been verified, and what was found."""
        known = self.verified.get(id(expert))
        if known is None or known[0]() is not expert:
            return False, None
        return True, known[1]


class Unit(NamedTuple):
    """Experts that run together.

    Attributes:
        positions: Their places among the experts present.
        modules: They.
        record: What is known of their class; ``None`` where they have none.
        scale: What the gradient into their input is multiplied by.
        fault: Why they can't run as one, or why a loop is better.
    """

    positions: tuple[int, ...]
    modules: tuple[nn.Module, ...]
    record: ClassRecord | None
    scale: float
    fault: str | None

    @property
    def is_alone(self) -> bool:
        """Whether its experts run one by one."""
        return self.fault is not None or len(self.modules) == 1


class LevelInputLike(NamedTuple):
    """What the experts of a level are given, in batch order.

    Attributes:
        hidden: ``[B, ...]``.
        mask: ``[B, ...]`` or ``None``.
        context: The batch's context.
    """

    hidden: torch.Tensor
    mask: torch.Tensor | None
    context: ContextRows


# By the experts' Python class; the latest used first.
_RECORDS: weakref.WeakKeyDictionary[type, list[ClassRecord]] = weakref.WeakKeyDictionary()


class LevelClasses:
    """The experts of one level and their classes. A copy of a model starts without any.

    Attributes:
        looped_anyway: By name, experts of classes that are too small for grouping ever to pay. They are not asked again
            whether they have changed, for a loop is right whatever they are.
    """

    def __init__(self) -> None:
        self.looped_anyway: dict[str, nn.Module] = {}
        self._layouts: dict[str, tuple[nn.Module, Layout]] = {}
        # By name and kind of input, what was last found for the expert.
        self._refused: dict[tuple[str, Any], tuple[weakref.ref[nn.Module], str]] = {}
        self._latest: dict[str, tuple[weakref.ref[nn.Module], ClassRecord]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> LevelClasses:
        return LevelClasses()

    def __reduce__(self) -> tuple[type[LevelClasses], tuple[()]]:
        return LevelClasses, ()

    def layouts(self, names: Sequence[str], experts: Sequence[nn.Module]) -> list[Layout]:
        """What the choice of an engine looks at, of each expert: as it was when it was first seen."""
        found = []
        for name, expert in zip(names, experts, strict=True):
            known = self._layouts.get(name)
            if known is None or known[0] is not expert:
                known = self._layouts[name] = expert, layout_of(expert)
            found.append(known[1])
        return found

    def known(self, name: str, expert: nn.Module) -> ClassRecord | None:
        """The class that an expert was last found in."""
        latest = self._latest.get(name)
        return latest[1] if latest is not None and latest[0]() is expert else None

    def refusal(self, name: str, expert: nn.Module) -> str | None:
        """Why an expert was last refused, whatever it was given."""
        if (missing := tracer_missing()) is not None:
            return f"can't be captured ({missing})"
        for (of, _), (refused, reason) in self._refused.items():
            if of == name and refused() is expert:
                return reason
        return None

    def units(
        self,
        names: Sequence[str],
        experts: Sequence[nn.Module],
        scales: Sequence[float],
        given: LevelInputLike,
        *,
        retries: bool = False,
    ) -> list[Unit]:
        """The experts by class, in the order of their first members; those of no class have a fault.

        Args:
            names: Of the experts, P.
            experts: They.
            scales: What the gradient into each one's input is multiplied by.
            given: What the level is given.
            retries: Whether experts that were refused before are captured again.
        """
        search = _Search(self, given, retries, torch.is_grad_enabled())
        groups: dict[tuple[Any, float], list[int]] = {}
        faults: dict[tuple[Any, float], str | None] = {}
        found: dict[tuple[Any, float], ClassRecord | None] = {}
        for position, (name, expert, scale) in enumerate(zip(names, experts, scales, strict=True)):
            record, fault = search.find(name, expert, scale)
            key = (id(record) if record is not None and fault is None else (type(expert), fault), scale)
            groups.setdefault(key, []).append(position)
            faults[key], found[key] = fault, record
        units = []
        for key, positions in groups.items():
            members = tuple(experts[position] for position in positions)
            fault = faults[key]
            if fault is None and len(members) > 1:
                fault = _shared(found[key], members)
            units.append(Unit(tuple(positions), members, found[key], key[1], fault))
        return search.verified([list(map(names.__getitem__, unit.positions)) for unit in units], units)


class _Search:
    """The search for the classes of one call's experts."""

    def __init__(self, classes: LevelClasses, given: LevelInputLike, retries: bool, is_grad_enabled: bool) -> None:
        self._classes = classes
        self._given = given
        self._retries = retries
        self._samples: dict[bool, Sample] = {}
        self._last: dict[bool, ClassRecord] = {}
        self._missing = tracer_missing()
        self._alive: dict[int, bool] = {}
        self._fitting: dict[tuple[int, bool], bool] = {}
        self._tries: dict[tuple[Layout, bool], list[str]] = {}
        self._kind = _kind_of(given), is_grad_enabled
        self._is_grad_enabled = is_grad_enabled
        self._is_aside = False

    def _sample(self, is_detached: bool) -> Sample:
        if is_detached not in self._samples:
            hidden, mask, context = self._given
            self._samples[is_detached] = sample_of(hidden.detach() if is_detached else hidden, mask, context)
        return self._samples[is_detached]

    def find(self, name: str, expert: nn.Module, scale: float) -> tuple[ClassRecord | None, str | None]:
        """The expert's class, or why it has none."""
        if self._missing is not None:
            return None, f"can't be captured ({self._missing})"
        is_detached = scale == 0.0
        arguments = self._sample(is_detached).arguments(expert)
        record = self._held(name, expert, arguments, is_detached)
        if record is None:
            key = name, (self._kind, is_detached, expert.training)
            known = self._classes._refused.get(key)
            if known is not None and known[0]() is expert and not self._retries:
                return None, known[1]
            new = self._captured(expert, self._sample(is_detached), is_detached)
            if isinstance(new, str):
                self._classes._refused[key] = weakref.ref(expert), new
                return None, new
            record = new
        self._last[is_detached] = record
        if not self._is_aside:
            self._classes._latest[name] = weakref.ref(expert), record
        return record, record.fault

    def _held(self, name: str, expert: nn.Module, arguments: dict[str, Any], is_detached: bool) -> ClassRecord | None:
        """The class that one of the graphs that are there puts the expert in."""
        last, latest = self._last.get(is_detached), self._classes.known(name, expert)
        records = _RECORDS.get(type(expert), [])
        for record in dict.fromkeys((last, latest, *records)):
            if record is None or record.captured.kind is not type(expert) or not self._is_alive(record):
                continue
            if record.captured.guard.holds(arguments) and self._fits(record, is_detached):
                if record is not last and record is not latest:
                    records.remove(record)
                    records.insert(0, record)
                return record
        return None

    def _fits(self, record: ClassRecord, is_detached: bool) -> bool:
        key = id(record), is_detached
        if key not in self._fitting:
            self._fitting[key] = record.captured.fits(self._sample(is_detached))
        return self._fitting[key]

    def _is_alive(self, record: ClassRecord) -> bool:
        if id(record) not in self._alive:
            self._alive[id(record)] = record.captured.guard.is_alive()
        return self._alive[id(record)]

    def _captured(self, expert: nn.Module, sample: Sample, is_detached: bool) -> ClassRecord | str:
        tries = self._tries.setdefault((layout_of(expert), is_detached), [])
        if len(tries) >= _MOST_TRIES:
            return tries[-1]
        found = capture(expert, sample)
        if isinstance(found, Refusal):
            tries.append(found.reason)
            return found.reason
        record = ClassRecord(found)
        try:
            record.program = lower(found)
        except CannotGroupError as error:
            record.fault = error.args[0]
        records = _RECORDS.setdefault(type(expert), [])
        records.insert(0, record)
        del records[_MOST_CAPTURES:]
        return record

    def verified(self, names: Sequence[Sequence[str]], units: Sequence[Unit]) -> list[Unit]:
        """The units without the experts that differ from their class's program."""
        found = []
        for of_unit, unit in zip(names, units, strict=True):
            if unit.is_alone or unit.record is None or unit.record.program is None:
                found.append(unit)
                continue
            self._verify(of_unit, unit, unit.record)
            found += _parted(unit)
        return found

    def _verify(self, names: Sequence[str], unit: Unit, record: ClassRecord) -> None:
        if not self._compare(record, unit.modules) or not record.draws:
            return
        good = [place for place, each in enumerate(unit.modules) if record.fault_of(each)[1] is None]
        modules = [unit.modules[place] for place in good]
        faults = self._otherwise([names[place] for place in good], modules, unit.scale)
        for expert, fault in zip(modules, faults, strict=True):
            if fault is not None:
                record.note(expert, fault)

    def _compare(self, record: ClassRecord, members: Sequence[nn.Module]) -> bool:
        """Compare members with the loop that have not been yet; whether there are any."""
        new = [each for each in members if not record.fault_of(each)[0]]
        if new:
            # Two at least: with one there is nothing to keep apart.
            asked = new if len(new) > 1 else [*new, next(each for each in members if each is not new[0])]
            for expert, fault in zip(asked, verify(record, asked, Few(*self._given)), strict=True):
                record.note(expert, fault)
        return bool(new)

    def _otherwise(self, names: Sequence[str], members: Sequence[nn.Module], scale: float) -> list[str | None]:
        """Why experts that draw random numbers can't run as one in the other grad mode.

        A checkpoint computes once with and once without gradients, and must draw the same both times.
        """
        is_grad_enabled = not self._is_grad_enabled
        faults: list[str | None] = []
        groups: dict[ClassRecord, list[nn.Module]] = {}
        with torch.inference_mode(False), torch.set_grad_enabled(is_grad_enabled):
            hidden = self._given.hidden.detach()
            if is_grad_enabled and (hidden.is_floating_point() or hidden.is_complex()):
                hidden = hidden.clone().requires_grad_()
            search = _Search(self._classes, self._given._replace(hidden=hidden), self._retries, is_grad_enabled)
            search._is_aside = True
            for name, expert in zip(names, members, strict=True):
                record, fault = search.find(name, expert, scale)
                faults.append(fault)
                if fault is None and record is not None:
                    groups.setdefault(record, []).append(expert)
            for record, of_record in groups.items():
                if len(of_record) > 1:
                    search._compare(record, of_record)
                else:
                    record.note(of_record[0], "are not alike in every grad mode, and draw random numbers")
        found = {id(each): record.fault_of(each)[1] for record, some in groups.items() for each in some}
        return [fault or found.get(id(each)) for each, fault in zip(members, faults, strict=True)]


def _parted(unit: Unit) -> list[Unit]:
    """The unit's experts that equal their program, and those that don't."""
    assert unit.record is not None
    faults = [unit.record.fault_of(each)[1] for each in unit.modules]
    if not any(faults):
        return [unit]
    parts: dict[str | None, list[int]] = {}
    for place, fault in enumerate(faults):
        parts.setdefault(fault, []).append(place)
    return [
        unit._replace(
            positions=tuple(unit.positions[place] for place in places),
            modules=tuple(unit.modules[place] for place in places),
            fault=fault,
        )
        for fault, places in parts.items()
    ]


def layout_of(expert: nn.Module) -> Layout:
    """See `Layout`."""
    tensors = [*expert.named_parameters(), *expert.named_buffers()]
    return Layout(type(expert), tuple((name, _shape(tensor), tensor.dtype) for name, tensor in tensors))


def _shape(tensor: torch.Tensor) -> torch.Size:
    return torch.Size() if nn.parameter.is_lazy(tensor) else tensor.shape


def _shared(record: ClassRecord | None, members: Sequence[nn.Module]) -> str | None:
    """What two of the experts share, in words."""
    if len({id(each) for each in members}) < len(members):
        return "share a module"
    if record is None:
        return None
    seen: dict[int, int] = {}
    for number, member in enumerate(members):
        for tensor, name in zip(record.captured.own(member), record.captured.names, strict=True):
            if seen.setdefault(id(tensor), number) != number:
                return f"share the tensor {name!r}"
    return None


def _kind_of(given: LevelInputLike) -> tuple[Any, ...]:
    """What of an input a refusal may depend on, beside its sizes."""
    hidden, mask, context = given
    device = hidden.device.type
    return (
        _facts(hidden),
        None if mask is None else _facts(mask),
        tuple(map(_facts, context.aligned)),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )


def _facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.dim(), tensor.device, tensor.requires_grad
