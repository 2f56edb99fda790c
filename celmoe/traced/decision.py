"""How a level can be part of a graph, decided while the tracer runs.

The tensors at hand are symbolic then. The level's classes are asked with a few rows of zeros like them, outside of the
tracer: experts are captured and verified as in an eager call.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import nn

from celmoe.based import bases_of
from celmoe.engines.choice import LevelChoice, Present
from celmoe.experts import ExpertBatch
from celmoe.grouped.capture import sample_of
from celmoe.grouped.classes import ClassRecord, LevelInputLike, Unit
from celmoe.names import NamedModules, modules_named
from celmoe.rows.context import ContextRows
from celmoe.stacked.stack import slots_of
from celmoe.torch_internals import apart, example_of, tree_flatten, tree_unflatten

from .modes import Modes, modes_of

#: The level's operations are the graph's.
INSIDE = "inside"
#: The level is one operator.
OPAQUE = "opaque"
#: The graph breaks around the model.
APART = "apart"


# Operations whose graph grows with the number of positions.
_UNROLLED = {"lstm", "rnn_tanh", "rnn_relu"}


class Way(NamedTuple):
    """How a level can be part of a graph.

    Attributes:
        way: `INSIDE`, `OPAQUE` or `APART`.
        reason: The reason for `APART` or `OPAQUE`, in words that follow "its experts".
        unit: All experts as one; ``None`` if they are several.
        holds: The record of the graph that holds for the first expert.
        given: The few rows that the level's classes were asked with.
        dtype: The dtype of the results.
        modes: The modes at hand.
        is_trained: True if a parameter of the experts requires gradients.
    """

    way: str
    reason: str
    unit: Unit | None
    holds: ClassRecord | None
    given: LevelInputLike
    dtype: torch.dtype
    modes: Modes
    is_trained: bool

    def fits(self, hidden: torch.Tensor, *, requires_grad: bool) -> bool:
        """True if the level was asked about such hidden states."""
        given = self.given.hidden
        return (given.dtype, given.dim(), given.requires_grad) == (hidden.dtype, hidden.dim(), requires_grad)


def way_of(
    level: Any,
    modules: NamedModules,
    hidden: Any,
    mask: Any,
    context: Any,
    *,
    requires_grad: bool,
    is_exported: bool,
) -> Way:
    """Decide for a level.

    Args:
        level: The level.
        modules: The level's experts.
        hidden: ``[B, ...]``, symbolic or not, as are all tensors.
        mask: ``[B, ...]`` or ``None``.
        context: The context as passed.
        requires_grad: True if the level's hidden states will require gradients.
        is_exported: If true, parameters are symbolic, too, and stay parameters of their own.
    """
    choice: LevelChoice = level.choice
    is_trained = any(each.requires_grad for each in modules.parameters())
    modes = modes_of(hidden.device.type)
    # Leaving the inference mode turns gradients on.
    with apart(), torch.inference_mode(False), torch.set_grad_enabled(modes.is_grad_enabled):
        given = _with_values(hidden, mask, context, requires_grad)
        names = sorted(level.experts)
        experts = modules_named(modules, names)
        if is_exported:
            experts, choice = _with_own_values(experts), LevelChoice(level.name, len(names))
        units = choice.survey(Present(names, experts, level.scales(names), None), given)
    for unit in units:
        if unit.record is None or unit.record.captured.losses:
            reason = unit.fault or "return losses, of which every routing has others"
            return Way(APART, reason, None, None, given, given.hidden.dtype, modes, is_trained)
    why_not = "are of several classes" if len(units) > 1 else _reason(units[0], is_exported=is_exported)
    dtype = _dtype_of(units, given)
    return Way(
        OPAQUE if why_not else INSIDE,
        why_not or "",
        units[0],
        choice.holding(names[0], experts[0]),
        given,
        dtype,
        modes,
        is_trained,
    )


def _reason(unit: Unit, *, is_exported: bool) -> str | None:
    """The reason that a unit of all experts can't be the graph's own operations, or ``None``."""
    stack, record = unit.stack, unit.record
    if len(unit.modules) == 1:
        return "are one, which the tracer does not follow"
    if unit.fault is not None or record is None or record.program is None:
        return unit.fault or "can't run as one"
    if record.captured.has_bases:
        return "read tensors of a base"
    if is_exported:
        return None
    if not _UNROLLED.isdisjoint(step.name for step in record.program.steps):
        return "run position by position"
    if stack is None or unit.members != tuple(range(len(stack.names))):
        return "are not stacked"
    if not all(name in stack.keys for name in record.captured.names):
        return "read tensors that are not stacked"
    if not stack.is_fixed:
        # A graph looks at the first member only.
        return "hold objects of their own that may change"
    return None


def _dtype_of(units: Sequence[Unit], given: LevelInputLike) -> torch.dtype:
    """The dtype of the results: what the dtypes of all classes promote to."""
    rows = sample_of(*given)
    dtypes: list[torch.dtype] = []
    with apart(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for unit in units:
            batch = ExpertBatch(rows.hidden.detach().clone(), rows.context, rows.mask)
            dtypes.append(unit.modules[0](batch).hidden.dtype)
    return reduce(torch.promote_types, dtypes)


def _with_values(hidden: Any, mask: Any, context: Any, requires_grad: bool) -> LevelInputLike:
    """A few rows of zeros like those of a batch, with a context like the batch's."""
    leaves, spec = tree_flatten(context)
    tensors = [each for each in (hidden, mask, *leaves) if isinstance(each, torch.Tensor)]
    taken = {example_of(size) for each in tensors for size in each.shape}
    # A number that no other axis has: the context's rule must see the same axes as the batch's.
    num_rows = next(number for number in range(5, 1 << 20) if number not in taken)
    batch_size = hidden.shape[0]

    def made(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        shape = [example_of(size) for size in leaf.shape]
        if leaf.dim() and leaf.shape[0] == batch_size:
            shape[0] = num_rows
        requires_grad = leaf.requires_grad and torch.is_grad_enabled()
        return torch.zeros(shape, dtype=leaf.dtype, device=leaf.device).requires_grad_(requires_grad)

    like = tree_unflatten([made(leaf) for leaf in leaves], spec)
    rows = made(hidden).detach()
    if rows.is_floating_point() or rows.is_complex():
        rows.requires_grad_(requires_grad)
    return LevelInputLike(rows, made(mask), ContextRows(like, num_rows, hidden.device))


def _with_own_values(experts: list[nn.Module]) -> list[nn.Module]:
    """Ordinary experts like these, whose tensors are symbolic, with values of their own."""
    made: list[nn.Module] = []
    for expert, slot in zip(experts, slots_of(experts), strict=True):
        ordinary = expert if slot is None else slot.stack.twins([expert], [slot.member])[0]
        memo: dict[int, Any] = {id(base): base for base in bases_of(ordinary)}
        for tensor in (*ordinary.parameters(), *ordinary.buffers()):
            shape = [example_of(size) for size in tensor.shape]
            values = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(values, tensor.requires_grad) if is_parameter else values
        made.append(copy.deepcopy(ordinary, memo))
    return made
