"""The contract between the library and a user's experts: an expert's input and its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeAlias, TypeVar

import torch
from torch import nn

Value = TypeVar("Value")


@dataclass(frozen=True)
class Shared(Generic[Value]):
    """A context value that every expert sees whole, even if its first axis has the batch's length by chance.

    Experts see the bare value. Example: ``context={"table": Shared(table), "lengths": lengths}``.
    """

    value: Value


@dataclass(frozen=True)
class Rows(Generic[Value]):
    """A context value that holds one row or item for each sample, in batch order; another length is an error.

    Experts see the bare value, cut to their samples. Example: ``context={"images": Rows(images)}``.

    Attributes:
        value: A tensor or NumPy array ``[B, ...]``, or a list or tuple of B items of any kind.
    """

    value: Value


ExpertMetadata: TypeAlias = Mapping[str, object]
ExpertContextMap: TypeAlias = Mapping[str, object]
# Any value is legal at run time; celmoe-vp's callers annotate with these names.
ExpertContext: TypeAlias = torch.Tensor | ExpertContextMap | Shared[object] | Rows[object] | None
ExpertAux: TypeAlias = dict[str, object]


@dataclass
class ExpertBatch:
    """One expert's input: its own samples, in ascending batch order.

    Attributes:
        hidden: ``[N, ...]``, the rows of the expert's N samples. The memory is the expert's own: in-place work is
            allowed.
        context: The context. Batch-aligned values are cut to these samples; all others are as passed.
        mask: ``[N, ...]``, the mask's rows, or ``None``.
        state: ``{"level": ..., "expert": ...}``.
    """

    hidden: torch.Tensor
    context: ExpertContext = None
    mask: torch.Tensor | None = None
    state: dict[str, str] = field(default_factory=dict)


@dataclass
class ExpertResult:
    """One expert's result.

    Attributes:
        hidden: The samples' new rows, in the shape of `ExpertBatch.hidden`.
        losses: Losses by name, any number of them.
        aux: Anything else that the expert hands to the caller.
    """

    hidden: torch.Tensor
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    aux: ExpertAux = field(default_factory=dict)


def is_aux(aux: object) -> bool:
    """True if valid as `ExpertResult.aux`: a mapping, or, as in celmoe-vp, ``None`` or an empty sequence."""
    return aux is None or isinstance(aux, Mapping) or (isinstance(aux, Sequence) and len(aux) == 0)


class ExpertModule(nn.Module):
    """Base class for experts; any ``nn.Module`` with this ``forward`` will do."""

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        """Run on the samples in ``batch``."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(batch) -> ExpertResult")
