"""What gradients come by in a run with losses: each place where an operation takes a value is an edge of its own.

An objective may leave losses out. Then what is computed for those alone must have no part in the backward pass, as it
has none when experts run one by one: not even that of a zero, which is no zero behind a derivative that is not finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

import torch

from .ragged import CannotGroupError, Common, Memory, Ragged, Repeated, Rows, Stack, like, registered, repeated
from .segments import Segments
from .tally import Tally, blocks_entering, members_entering

# A gradient of zero is one behind these, too, whatever they were given.
_KEEP_ZEROS = """
    view reshape view_as reshape_as flatten unflatten transpose swapaxes swapdims t T mT adjoint matrix_transpose
    permute movedim moveaxis unsqueeze squeeze expand expand_as broadcast_to chunk split split_with_sizes tensor_split
    unbind narrow select __getitem__ diagonal unfold contiguous float double half bfloat16 to type_as detach data
    positive __pos__ dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d add sub subtract rsub neg negative
    __add__ __radd__ __sub__ __rsub__ __neg__ sum mean clone cat concat concatenate stack repeat tile pad flip roll
    zeros_like ones_like full_like new_zeros new_ones new_full new_empty numel is_floating_point is_complex
"""
_KEEPS_ZEROS = frozenset(_KEEP_ZEROS.split())


class Trace:
    """The edges of one run.

    Args:
        tally: Who is reached on the way back.
        segments: The rows of each member.
    """

    def __init__(self, tally: Tally, segments: Segments) -> None:
        self._tally = tally
        self._counts = segments.counts
        self._edges = count()
        self._taken: set[int] = set()

    def take(self, name: str, values: Iterable[Any]) -> list[Any]:
        """What an operation is to be given in place of its arguments.

        Raises:
            CannotGroupError: Gradients come back to what is no member's.
        """
        self._taken = set()
        if not torch.is_grad_enabled():
            return list(values)
        keeps_zeros = name in _KEEPS_ZEROS
        return [self._entered(value, name, keeps_zeros) for value in values]

    def _entered(self, value: Any, name: str, keeps_zeros: bool) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self._entered(each, name, keeps_zeros) for each in value)
        is_own = isinstance(value, Stack) and value.members is not None
        if not isinstance(value, Ragged) or not value.requires_grad or (keeps_zeros and not is_own):
            return value
        if isinstance(value, Common):
            raise CannotGroupError(f"return losses, and give gradients to a tensor that is shared ({name})")
        edge = next(self._edges)
        self._taken.add(edge)
        entered = self._by_edge(value, edge)
        entered.origin = value
        entered.memory = _memory_of(value)
        return entered

    def _by_edge(self, value: Ragged, edge: int) -> Ragged:
        if isinstance(value, Repeated) and value.source is not None:
            source = self._by_edge(value.source, edge)
            assert isinstance(source, Stack)
            return repeated(source, value._write_out, value.plain_shape[0] // value.factor, value.factor)
        if isinstance(value, Stack) and value.members is not None:
            return registered(members_entering(value.members, self._tally, edge), value._is_param)
        if isinstance(value, Rows):
            axis, sizes = value.axis, [each * value.factor for each in self._counts]
        else:
            axis, sizes = 0, [1] * len(self._counts)
        entered = like(value, blocks_entering(value.plain, self._tally, edge, axis, sizes))
        if isinstance(value, Stack) and isinstance(entered, Stack):
            entered.is_own = value.is_own
        return entered

    def give(self, name: str, result: Any, args: Iterable[Any]) -> None:
        """Know what gradients of a result come by, and what shares its memory."""
        given, made = list(_flat(args)), list(_flat([result]))
        if name in ("detach", "data") or not torch.is_grad_enabled():
            # No gradient goes that way, in either direction.
            return
        sources = frozenset(self._taken).union(*(_memory_of(each).sources for each in given))
        lent = {_place(each): each.memory for each in given}
        kept = {id(each.memory) for each in given if any(each is other for other in made)}
        for each in made:
            # What was written into, and its views, hold what the others gave from now on.
            shared = lent.get(_place(each)) if id(each) not in map(id, given) else each.memory
            each.memory = lent[_place(each)] = shared or Memory()
            each.memory.sources |= sources
            kept.add(id(each.memory))
        for each in given:
            each.memory.is_used |= each.requires_grad and id(each.memory) not in kept

    def returned(self, loss: Ragged) -> Ragged:
        """A loss that an expert returns: one of its tensors as it is was taken by no operation yet."""
        (taken,) = self.take("sum", [loss])
        assert isinstance(taken, Ragged)
        if taken is not loss:
            taken.memory = Memory(frozenset(self._taken))
        return taken

    @staticmethod
    def sources(value: Ragged) -> frozenset[int]:
        """The edges that its gradients come by."""
        return _memory_of(value).sources

    def require_own(self, value: Ragged, name: str) -> None:
        """Refuse to write into what has been taken already: which gradients came by what is not known from then on."""
        if _memory_of(value).is_used:
            raise CannotGroupError(f"return losses, and write into what has been used before ({name})")


def _memory_of(value: Ragged) -> Memory:
    try:
        return value.memory
    except AttributeError:
        value.memory = Memory()
        return value.memory


def _place(value: Ragged) -> Any:
    """Which memory a value has; one of its own where it is not written out."""
    is_whole = not isinstance(value, Repeated) and not (isinstance(value, Stack) and value.members is not None)
    return value.plain.untyped_storage()._cdata if is_whole else id(value)


def _flat(values: Iterable[Any]) -> Iterator[Ragged]:
    for value in values:
        if isinstance(value, Ragged):
            yield value
        elif isinstance(value, list | tuple):
            yield from _flat(value)
