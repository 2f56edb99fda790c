"""Puts the experts present at a level in classes: experts of one class share a program, and run as one.

Two experts are of one class if the guards of one captured graph hold for both (`capture`). Two graphs that were lowered
to equal programs count as one. Every call evaluates the guards, which see a change of anything that the graph depends
on. Captures are kept by the experts' Python class, for all models of a process.

Axes: R rows, P experts present.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from celmoe.rows.context import ContextRows
from celmoe.stacked.stack import Stack
from celmoe.torch_internals import apart

from .capture import Captured, Refusal, Sample, capture, sample_of, tracer_missing
from .program import Program, lower
from .values import CannotGroupError
from .verify import Few, verify
from .waiting import told

# Number of graphs kept for one Python class; the least recently used ones go.
_MOST_CAPTURES = 256
# After this many refused captures of one layout, a call refuses the layout's other experts alike.
_MOST_TRIES = 2


@dataclass(frozen=True, eq=False)
class Layout:
    """The tensors of an expert, for the choice of an engine. Experts of one kind share a layout.

    Attributes:
        tensors: The name, shape and dtype of each parameter and buffer.
    """

    tensors: tuple[tuple[str, torch.Size, torch.dtype], ...]


_LAYOUTS: weakref.WeakKeyDictionary[type, dict[Any, Layout]] = weakref.WeakKeyDictionary()


@dataclass(eq=False)
class ClassRecord:
    """The findings on a class.

    Attributes:
        captured: The graph.
        program: The lowered graph; ``None`` if the graph can't be lowered, or with ``same_as``.
        fault: The reason that the class's experts can't run as one, in words that follow "its experts".
        operations_looped: Operations without a grouped form, which run member by member, and how often.
        writes: True if the class's experts write into their rows.
        draws: True if the class's experts draw random numbers.
        verified: By the id of an expert that was compared with the loop: the expert, and the difference if any.
        same_as: The first record with an equal program, which runs for all. This record only tells for which experts
            its own graph holds, and which were verified with the graph. PyTorch makes a Python class for each module
            with parametrizations, and one graph's guards never hold for two such modules.
    """

    captured: Captured
    program: Program | None = None
    fault: str | None = None
    operations_looped: dict[str, int] = field(default_factory=dict)
    writes: bool = False
    draws: bool = False
    verified: dict[int, tuple[weakref.ref[nn.Module], str | None]] = field(default_factory=dict)
    same_as: ClassRecord | None = None

    @property
    def first(self) -> ClassRecord:
        """The record of the class: ``same_as``, or this one."""
        return self.same_as or self

    def identity_of(self, expert: nn.Module) -> tuple[int, ...]:
        """A key that experts of the class share if they have the same bases: others don't run as one with them."""
        return id(self), *map(id, self.captured.bases(expert))

    def last_identity_of(self, expert: nn.Module) -> tuple[int, ...] | None:
        """`identity_of` an expert that was of the class when it was last asked; ``None`` if its base is another now."""
        try:
            return self.identity_of(expert)
        except (LookupError, AttributeError, TypeError):
            return None

    def note(self, expert: nn.Module, fault: str | None) -> None:
        """Keep the finding of an expert's comparison with the loop."""
        self.verified[id(expert)] = weakref.ref(expert), fault

    def forget_gone(self) -> None:
        """Drop experts that no longer exist."""
        self.verified = {key: known for key, known in self.verified.items() if known[0]() is not None}

    def fault_of(self, expert: nn.Module) -> tuple[bool, str | None]:
        """True if the expert has been verified, and the difference if any."""
        known = self.verified.get(id(expert))
        if known is None or known[0]() is not expert:
            return False, None
        return True, known[1]


# By member, the tensors that are its own.
Tensors: TypeAlias = tuple[Sequence[torch.Tensor], ...]


class Unit(NamedTuple):
    """Experts that run together.

    Attributes:
        positions: The experts' places among the experts present.
        modules: The experts.
        record: The record of the experts' class; ``None`` if the experts have none.
        scale: The factor of the gradient into the experts' input.
        fault: The reason that the experts can't run as one, or that a loop is better.
        tensors: By member its own tensors, in the graph's order.
        stack: The stack of the members' tensors; ``None`` if each member has its own.
        members: The members' places in the stack.
    """

    positions: tuple[int, ...]
    modules: tuple[nn.Module, ...]
    record: ClassRecord | None
    scale: float
    fault: str | None
    tensors: Tensors = ()
    stack: Stack | None = None
    members: tuple[int, ...] = ()

    def taken(self, places: Sequence[int]) -> Unit:
        """A unit of some of the members, in the given order."""
        return self._replace(
            positions=tuple(self.positions[place] for place in places),
            modules=tuple(self.modules[place] for place in places),
            tensors=tuple(self.tensors[place] for place in places) if self.tensors else (),
            members=tuple(self.members[place] for place in places) if self.members else (),
        )

    @property
    def is_alone(self) -> bool:
        """True if the experts run one by one."""
        return self.fault is not None or len(self.modules) == 1


class LevelInputLike(NamedTuple):
    """The input of a level's experts, in batch order.

    Attributes:
        hidden: The hidden states, ``[B, ...]``.
        mask: The mask, ``[B, ...]``, or ``None``.
        context: The batch's context.
    """

    hidden: torch.Tensor
    mask: torch.Tensor | None
    context: ContextRows


# By the experts' Python class; the latest used first.
_RECORDS: weakref.WeakKeyDictionary[type, list[ClassRecord]] = weakref.WeakKeyDictionary()
# By Python class, then by modes and program, the record that was there first.
_FIRST: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[Any, ClassRecord]] = weakref.WeakKeyDictionary()


class LevelClasses:
    """The experts of one level and their classes."""

    def __init__(self) -> None:
        self._layouts: dict[str, tuple[nn.Module, Layout]] = {}
        # By name and kind of input the expert's last refusal, and by name the record that the expert last fitted.
        self._refused: dict[tuple[str, Any], tuple[weakref.ref[nn.Module], str]] = {}
        self._latest: dict[str, tuple[weakref.ref[nn.Module], ClassRecord]] = {}
        # Of each stack whose members can't change unseen, by its id: see `settle`.
        self._settled: dict[int, _Settled] = {}

    def layouts(self, names: Sequence[str], experts: Sequence[nn.Module]) -> list[Layout]:
        """Each expert's layout, as it was when the expert was first seen."""
        found = []
        for name, expert in zip(names, experts, strict=True):
            known = self._layouts.get(name)
            if known is None or known[0] is not expert:
                known = self._layouts[name] = expert, layout_of(expert)
            found.append(known[1])
        return found

    def known(self, name: str, expert: nn.Module) -> ClassRecord | None:
        """The record of the graph that an expert last fitted: its `first` is the record of the class."""
        latest = self._latest.get(name)
        return latest[1] if latest is not None and latest[0]() is expert else None

    def refusal(self, name: str, expert: nn.Module) -> str | None:
        """The reason that an expert was refused, for any kind of input."""
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
        """The experts by class, in the order of the classes' first members; experts of no class have a fault.

        Args:
            names: The P experts' names.
            experts: The experts.
            scales: For each expert the factor of the gradient into its input.
            given: The level's input.
            retries: If true, experts that were refused before are captured again.
        """
        search = _Search(self, given, retries, torch.is_grad_enabled())
        if (unit := search.as_before(names, experts, scales)) is not None:
            return [unit]
        groups: dict[tuple[Any, float], list[int]] = {}
        faults: dict[tuple[Any, float], str | None] = {}
        found: dict[tuple[Any, float], ClassRecord | None] = {}
        for position, (record, fault) in enumerate(search.find_all(names, experts, scales)):
            scale = scales[position]
            expert = experts[position]
            kind = (type(expert), fault) if record is None or fault is not None else record.identity_of(expert)
            key = kind, scale
            groups.setdefault(key, []).append(position)
            faults[key], found[key] = fault, record
        units = []
        for key, positions in groups.items():
            members = tuple(experts[position] for position in positions)
            fault, record = faults[key], found[key]
            tensors: Tensors = ()
            if fault is None and record is not None and len(members) > 1:
                tensors = tuple(map(record.captured.own, members))
                fault = _shared(record, members, tensors)
            units.append(Unit(tuple(positions), members, record, key[1], fault, tensors))
        return search.verified([list(map(names.__getitem__, unit.positions)) for unit in units], units)

    def settle(self, stack: Stack, names: Sequence[str], unit: Unit, members: Sequence[int]) -> None:
        """Keep that members of a stack are one class, as long as the stack's state stays as it is.

        A member alone was not verified: it is kept apart.

        Args:
            stack: The stack.
            names: The members' names.
            unit: The unit that `units` found for ordinary modules like the members.
            members: The members' places in the stack.
        """
        state = stack.state
        known = self._settled.get(id(stack))
        if known is None or known.stack() is not stack or known.state is not state:
            known = self._settled[id(stack)] = _Settled(weakref.ref(stack), state, stack.is_fixed)
        records = {self.known(name, module) for name, module in zip(names, unit.modules, strict=True)}
        record = records.pop()
        if known.is_fixed and record is not None and not records:
            (known.members if len(members) > 1 else known.alone).setdefault(record, set()).update(members)

    def settled(
        self, stack: Stack, members: Sequence[int], first: tuple[str, nn.Module], scale: float, given: LevelInputLike
    ) -> ClassRecord | None:
        """The record of members of a stack that were one class before, if that still holds; asks the first only.

        Args:
            stack: The stack.
            members: The members' places in it.
            first: The name of the first, and an ordinary module like it.
            scale: The factor of the gradient into the members' input.
            given: The level's input.
        """
        known = self._settled.get(id(stack))
        if known is None or known.stack() is not stack or known.state is not stack.state:
            return None
        record = self.known(*first)
        if record is None or record.first.program is None:
            return None
        is_known = known.members.get(record, _NONE).issuperset(members)
        if not is_known and (len(members) > 1 or members[0] not in known.alone.get(record, _NONE)):
            return None
        search = _Search(self, given, retries=False, is_grad_enabled=torch.is_grad_enabled())
        search._sample(scale == 0.0)
        with apart():
            return record.first if search._holds(record, first[1], scale == 0.0) else None


_NONE: frozenset[int] = frozenset()


@dataclass(eq=False)
class _Settled:
    """What was found for a stack's members.

    Attributes:
        stack: The stack.
        state: The stack's state then.
        is_fixed: See `Stack.is_fixed`.
        members: By record of a graph, the places of the members that it was found to hold for, and verified with.
        alone: By record of a graph, the places of the members that it was found to hold for, each alone.
    """

    stack: weakref.ref[Stack]
    state: object
    is_fixed: bool
    members: dict[ClassRecord, set[int]] = field(default_factory=dict)
    alone: dict[ClassRecord, set[int]] = field(default_factory=dict)


class _Search:
    """The search for the classes of one call's experts."""

    def __init__(self, classes: LevelClasses, given: LevelInputLike, retries: bool, is_grad_enabled: bool) -> None:
        self._classes = classes
        self._given = given
        self._retries = retries
        self._samples: dict[bool, Sample] = {}
        self._last: dict[bool, ClassRecord] = {}
        # By an expert's id, the graph that holds now: only that graph's record tells if the expert was verified.
        self._own: dict[int, ClassRecord] = {}
        # By graph: the arguments of its guard, empty if the graph is no longer alive; and the answer of `fits`.
        self._questions: dict[tuple[ClassRecord, bool], dict[str, Any]] = {}
        self._fits: dict[tuple[ClassRecord, bool], bool] = {}
        self._tries: dict[tuple[Layout, bool], list[str]] = {}
        self._is_grad_enabled = is_grad_enabled
        self._is_aside = False

    @cached_property
    def _kind(self) -> tuple[Any, ...]:
        return _kind_of(self._given), self._is_grad_enabled

    def _given_to(self, is_detached: bool) -> LevelInputLike:
        """The input that experts see: without gradients if they are detached from the level above."""
        return self._given._replace(hidden=self._given.hidden.detach()) if is_detached else self._given

    def _sample(self, is_detached: bool) -> Sample:
        if is_detached not in self._samples:
            self._samples[is_detached] = sample_of(*self._given_to(is_detached))
        return self._samples[is_detached]

    def as_before(self, names: Sequence[str], experts: Sequence[nn.Module], scales: Sequence[float]) -> Unit | None:
        """All experts as one unit if they were one before and nothing has changed: the usual case, tried first."""
        scale, latest = scales[0], self._classes._latest
        record = self._classes.known(names[0], experts[0])
        if record is None or record.first.program is None or scales.count(scale) < len(scales) or tracer_missing():
            return None
        self._sample(scale == 0.0)
        guard, verified = record.captured.guard, record.verified
        with apart():
            if not self._holds(record, experts[0], scale == 0.0):
                return None
            for name, expert in zip(names, experts, strict=True):
                known, found = latest.get(name), verified.get(id(expert))
                if known is None or known[1] is not record or known[0]() is not expert:
                    return None
                if found is None or found[0]() is not expert or found[1] is not None:
                    return None
            if not guard.holds_for_all(self._questions[record, scale == 0.0], experts):
                return None
        members = tuple(experts)
        if not _have_same_bases(record, members):
            return None
        tensors: Tensors = tuple(map(record.first.captured.own, members))
        fault = _shared(record.first, members, tensors)
        return Unit(tuple(range(len(members))), members, record.first, scale, fault, tensors)

    def find_all(
        self, names: Sequence[str], experts: Sequence[nn.Module], scales: Sequence[float]
    ) -> list[tuple[ClassRecord | None, str | None]]:
        """Each expert's class, or the reason that the expert has none."""
        if (missing := tracer_missing()) is not None:
            return [(None, f"can't be captured ({missing})")] * len(names)
        are_detached = [scale == 0.0 for scale in scales]
        for each in set(are_detached):
            self._sample(each)
        # Guards also look at the caller's modes and hooks, which change nothing here.
        with apart():
            asked = told(zip(names, experts, are_detached, strict=True), len(names), "tracing experts")
            return [self._find(*each) for each in asked]

    def _find(self, name: str, expert: nn.Module, is_detached: bool) -> tuple[ClassRecord | None, str | None]:
        record = self._classes.known(name, expert)
        if record is None or not self._holds(record, expert, is_detached):
            record = self._held(expert, is_detached)
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
            if not self._is_aside:
                self._classes._latest[name] = weakref.ref(expert), record
        self._last[is_detached] = record
        self._own[id(expert)] = record
        return record.first, record.fault

    def _held(self, expert: nn.Module, is_detached: bool) -> ClassRecord | None:
        """The record of a known graph that holds for the expert."""
        last = self._last.get(is_detached)
        if last is not None and self._holds(last, expert, is_detached):
            return last
        records = _RECORDS.get(type(expert), [])
        for record in records:
            if record is not last and self._holds(record, expert, is_detached):
                records.remove(record)
                records.insert(0, record)
                return record
        return None

    def _holds(self, record: ClassRecord, expert: nn.Module, is_detached: bool) -> bool:
        """True if a graph holds for an expert."""
        captured, key = record.captured, (record, is_detached)
        question = self._questions.get(key)
        if question is None:
            question = self._sample(is_detached).arguments() if captured.guard.is_alive() else {}
            self._questions[key] = question
        if not question or captured.kind() is not type(expert):
            return False
        question["expert"] = expert
        if not captured.guard.holds(question):
            return False
        # The answer is the same for all experts. The guard comes first: another context may lack the graph's inputs.
        if key not in self._fits:
            self._fits[key] = captured.fits(self._sample(is_detached))
        return self._fits[key]

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
        else:
            # A program was verified in the modes of its capture, and other modes need a record of their own.
            of_class = _FIRST.setdefault(type_before_parametrizations(expert), weakref.WeakValueDictionary())
            first = of_class.setdefault((self._kind, record.program.key), record)
            if first is not record:
                record.same_as, record.program = first, None
        records = _RECORDS.setdefault(type(expert), [])
        records.insert(0, record)
        del records[_MOST_CAPTURES:]
        return record

    def verified(self, names: Sequence[Sequence[str]], units: Sequence[Unit]) -> list[Unit]:
        """The units, apart from the experts that differ from their class's program."""
        found = []
        for of_unit, unit in zip(names, units, strict=True):
            if unit.is_alone or unit.record is None or unit.record.program is None:
                found.append(unit)
                continue
            self._verify(of_unit, unit, unit.record)
            found += self._parted(unit)
        return found

    def _verify(self, names: Sequence[str], unit: Unit, record: ClassRecord) -> None:
        if not self._compare(record, unit.modules, unit.scale == 0.0) or not record.draws:
            return
        good = [place for place, each in enumerate(unit.modules) if self._fault_of(each)[1] is None]
        modules = [unit.modules[place] for place in good]
        faults = self._otherwise([names[place] for place in good], modules, unit.scale)
        for expert, fault in zip(modules, faults, strict=True):
            if fault is not None:
                self._own[id(expert)].note(expert, fault)

    def _fault_of(self, expert: nn.Module) -> tuple[bool, str | None]:
        """True if the expert has been verified as it is, and the difference if any."""
        return self._own[id(expert)].fault_of(expert)

    def _compare(self, record: ClassRecord, members: Sequence[nn.Module], is_detached: bool) -> bool:
        """Compare the members that are not verified yet with the loop; true if there are any."""
        new = [each for each in members if not self._fault_of(each)[0]]
        if new:
            # Two members at least: the program has nothing to keep apart with one.
            asked = new if len(new) > 1 else [*new, next(each for each in members if each is not new[0])]
            for expert, fault in zip(asked, verify(record, asked, Few(*self._given_to(is_detached))), strict=True):
                self._own[id(expert)].note(expert, fault)
                self._own[id(expert)].forget_gone()
        return bool(new)

    def _otherwise(self, names: Sequence[str], members: Sequence[nn.Module], scale: float) -> list[str | None]:
        """The reasons that experts that draw random numbers can't run as one in the other grad mode.

        A checkpoint computes once with and once without gradients, and must draw the same numbers both times.
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
            found_all = search.find_all(names, members, [scale] * len(members))
            for expert, (record, fault) in zip(members, found_all, strict=True):
                faults.append(fault)
                if fault is None and record is not None:
                    groups.setdefault(record, []).append(expert)
            for record, of_record in groups.items():
                if len(of_record) > 1:
                    search._compare(record, of_record, scale == 0.0)
                else:
                    own = search._own[id(of_record[0])]
                    own.note(of_record[0], "are not alike in every grad mode, and draw random numbers")
        found = {id(each): search._fault_of(each)[1] for some in groups.values() for each in some}
        return [fault or found.get(id(each)) for each, fault in zip(members, faults, strict=True)]

    def _parted(self, unit: Unit) -> list[Unit]:
        """The unit split into experts that equal their program, and experts that don't, by fault."""
        faults = [self._fault_of(each)[1] for each in unit.modules]
        if not any(faults):
            return [unit]
        parts: dict[str | None, list[int]] = {}
        for place, fault in enumerate(faults):
            parts.setdefault(fault, []).append(place)
        return [unit.taken(places)._replace(fault=fault) for fault, places in parts.items()]


def layout_of(expert: nn.Module) -> Layout:
    """The `Layout` that all experts of this Python class with such tensors share."""
    named = [*expert.named_parameters(), *expert.named_buffers()]
    tensors = tuple((name, _shape(tensor), tensor.dtype) for name, tensor in named)
    known = _LAYOUTS.setdefault(type_before_parametrizations(expert), {})
    return known.setdefault(tensors, Layout(tensors))


def _shape(tensor: torch.Tensor) -> torch.Size:
    return torch.Size() if nn.parameter.is_lazy(tensor) else tensor.shape


def _have_same_bases(record: ClassRecord, members: Sequence[nn.Module]) -> bool:
    """True if all experts for which a graph holds read the same tensors of bases, or none."""
    if not record.captured.has_bases:
        return True
    first = record.identity_of(members[0])
    return all(record.identity_of(member) == first for member in members)


def _shared(record: ClassRecord, members: Sequence[nn.Module], tensors: Tensors) -> str | None:
    """The module or tensor that two of the experts share, in words, or ``None``."""
    if len(set(map(id, members))) < len(members):
        return "share a module"
    ids = [id(tensor) for own in tensors for tensor in own]
    if len(set(ids)) == len(ids):
        return None
    seen: dict[int, int] = {}
    for number, own in enumerate(tensors):
        for tensor, name in zip(own, record.captured.names, strict=True):
            if seen.setdefault(id(tensor), number) != number:
                return f"share the tensor {name!r}"
    return None


def _kind_of(given: LevelInputLike) -> tuple[Any, ...]:
    """The properties of an input that a refusal may depend on, beside the sizes."""
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
