"""The norms of the experts' gradients, read from the device once.

Axes: M members of a stack, T tensors of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch

from .errors import InputTypeError
from .hierarchy import HierarchicalCELMoE
from .names import NamedModules
from .stacked.presence import reached
from .stacked.stack import Stack, slots_of


class _Part(NamedTuple):
    """Experts whose norms come together.

    Attributes:
        names: The experts' names: all members of a stack, or one.
        is_asked: ``[M]``: true for the members that have a gradient.
        norms: T times ``[M]``: the norms of their tensors' gradients.
    """

    names: Sequence[str]
    is_asked: npt.NDArray[np.bool_]
    norms: list[torch.Tensor]


def gradient_norms(model: HierarchicalCELMoE) -> dict[str, dict[str, float]]:
    """The 2-norm of each expert's gradient.

    An expert without a gradient is left out: one that was absent since gradients were cleared, or is frozen. A shared
    parameter counts for each expert that has it. The host waits for the device once. The time on the host does not grow
    with the tensors of stacked experts. If gradients are spread over ranks, all ranks must call.

    Args:
        model: The model.

    Returns:
        By level, by expert, in their order, the norm of the gradients of all its parameters together.

    Raises:
        InputTypeError: ``model`` is no `HierarchicalCELMoE`.
    """
    if not isinstance(model, HierarchicalCELMoE):
        raise InputTypeError(f"'model' must be a HierarchicalCELMoE (got {type(model).__name__})")
    parts = {level: _parts(cast(NamedModules, registry)) for level, registry in model.level_modules.items()}
    norms = [norm for own in parts.values() for part in own for norm in part.norms]
    if not norms:
        return {level: {} for level in parts}
    device = norms[0].device
    values = torch.cat([norm.to(device, non_blocking=True) for norm in norms]).cpu().double().numpy()
    found: dict[str, dict[str, float]] = {}
    start = 0
    for level, own in parts.items():
        by_name: dict[str, float] = {}
        for part in own:
            end = start + len(part.norms) * len(part.names)
            together = np.sqrt(np.square(values[start:end].reshape(-1, len(part.names))).sum(axis=0))
            by_name |= compress(zip(part.names, together.tolist(), strict=True), part.is_asked.tolist())
            start = end
        registry = cast(NamedModules, model.level_modules[level])
        found[level] = {name: by_name[name] for name in registry if name in by_name}
    return found


def _parts(registry: NamedModules) -> list[_Part]:
    names, experts = list(registry), list(registry.values())
    stacks: dict[Stack, list[int]] = {}
    found = []
    for name, expert, slot in zip(names, experts, slots_of(experts), strict=True):
        if slot is not None and slot.member in slot.stack.intact:
            stacks.setdefault(slot.stack, []).append(slot.member)
        elif norms := [_norm(each.grad, 0) for each in expert.parameters() if each.grad is not None]:
            found.append(_Part([name], np.ones(1, dtype=np.bool_), norms))
    return found + [part for stack, members in stacks.items() if (part := _of_stack(stack, members)).norms]


def _of_stack(stack: Stack, members: Sequence[int]) -> _Part:
    wholes = [whole for whole in map(stack.whole, stack.keys) if whole.grad is not None]
    is_asked = np.zeros(len(stack.names), dtype=np.bool_)
    for whole in wholes:
        present = reached(whole)
        is_asked |= True if present is None else present
    is_asked[list(set(range(len(stack.names))) - set(members) | stack.frozen)] = False
    return _Part(stack.names, is_asked, [_norm(cast(torch.Tensor, whole.grad), 1) for whole in wholes])


def _norm(grad: torch.Tensor, num_axes: int) -> torch.Tensor:
    """The norms over all but the first axes: of none of them ``[1]``, else ``[M]``."""
    if grad.layout is not torch.strided:
        grad = grad.coalesce().values()
    rows = grad.reshape(*(grad.shape[:num_axes] or (1,)), -1)
    is_narrow = rows.dtype in (torch.float16, torch.bfloat16)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32 if is_narrow else None)
    # A gradient that is spread over ranks.
    full = getattr(norms, "full_tensor", None)
    return norms if full is None else cast(torch.Tensor, full())
