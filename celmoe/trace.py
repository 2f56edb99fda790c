"""What gradients come by in a run with losses: each place where an operation takes a value is an edge of its own.

An objective may leave losses out. Then what is computed for those alone must have no part in the backward pass, as it
has none when experts run one by one: not even that of a zero, which is no zero behind a derivative that is not finite.
Which results came by which edges is read from PyTorch's own graph: it knows of views and of what is written into.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from typing import Any

import torch

from .ragged import CannotGroupError, Common, Ragged, Repeated, Rows, Stack, like, registered, repeated
from .segments import Segments
from .tally import Tally, blocks_entering, edges_behind, members_entering

# What is made without gradients, whatever has some.
_WITHOUT_GRADIENTS = """
    detach data numel is_floating_point is_complex zeros_like ones_like full_like new_zeros new_ones new_full new_empty
"""
# A gradient of zero is one behind these, too, whatever they were given.
_KEEP_ZEROS = """
    view reshape view_as reshape_as flatten unflatten transpose swapaxes swapdims t T mT adjoint matrix_transpose
    permute movedim moveaxis unsqueeze squeeze expand expand_as broadcast_to chunk split split_with_sizes tensor_split
    unbind narrow select __getitem__ diagonal unfold contiguous float double half bfloat16 to type_as positive __pos__
    dropout alpha_dropout feature_alpha_dropout dropout1d dropout2d dropout3d add sub subtract rsub neg negative __add__
    __radd__ __sub__ __rsub__ __neg__ sum mean clone cat concat concatenate stack repeat tile pad flip roll
"""
_HAS_NO_GRADIENT = frozenset(_WITHOUT_GRADIENTS.split())
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

    def take(self, name: str, values: Iterable[Any]) -> list[Any]:
        """What an operation is to be given in place of its arguments.

        Raises:
            CannotGroupError: Gradients come back to what is no member's.
        """
        if name in _HAS_NO_GRADIENT or not torch.is_grad_enabled():
            return list(values)
        return [self._entered(value, name) for value in values]

    def _entered(self, value: Any, name: str) -> Any:
        if type(value) in (list, tuple):
            return type(value)(self._entered(each, name) for each in value)
        if not isinstance(value, Ragged) or not value.requires_grad:
            return value
        if isinstance(value, Common):
            raise CannotGroupError(f"return losses, and give gradients to a tensor that is shared ({name})")
        is_own = isinstance(value, Stack) and value.members is not None
        if name in _KEEPS_ZEROS and not is_own:
            return value
        entered = self._by_edge(value, next(self._edges))
        entered.origin = value
        return entered

    def _by_edge(self, value: Ragged, edge: int) -> Ragged:
        if isinstance(value, Repeated) and value.source is not None:
            source = self._by_edge(value.source, edge)
            assert isinstance(source, Stack)
            return repeated(source, value._write_out, value.plain_shape[0] // value.factor, value.factor)
        if isinstance(value, Stack) and value.members is not None:
            return registered(members_entering(value.members, self._tally, edge))
        if isinstance(value, Rows):
            axis, sizes = value.axis, [each * value.factor for each in self._counts]
        else:
            axis, sizes = 0, [1] * len(self._counts)
        entered = like(value, blocks_entering(value.plain, self._tally, edge, axis, sizes))
        if isinstance(value, Stack) and isinstance(entered, Stack):
            entered.is_own = value.is_own
        return entered

    def returned(self, loss: Ragged) -> Ragged:
        """A loss that an expert returns: one of its tensors as it is was taken by no operation yet."""
        (taken,) = self.take("clone", [loss])
        assert isinstance(taken, Ragged)
        return taken

    def edges_behind(self, value: Ragged) -> frozenset[int]:
        """The edges that gradients of a result come by."""
        return edges_behind(value.plain, self._tally)
