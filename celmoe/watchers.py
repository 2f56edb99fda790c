"""What watches a pass for the caller: hooks on the tensors that autograd saves, and modes that see every operation.

Checkpoints are made of both, and count what they are shown. What a run on trial saves and computes is not for them, or
they would find something else when they run their function again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import _StopRecomputationError

# What a checkpoint raises once it has all that it wants.
StopRecomputationError = _StopRecomputationError

# Since PyTorch 2.7; before that there is no telling.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def _is_hooked() -> bool:
    return _top_hooks is None or _top_hooks(True) is not None


def is_symbolic() -> bool:
    """Whether a mode writes operations down, or has them run without values."""
    mode, key = torch._C._get_dispatch_mode, torch._C._TorchDispatchModeKey
    return mode(key.PROXY) is not None or mode(key.FAKE) is not None


def is_watched() -> bool:
    """Whether the caller watches."""
    return torch._C._len_torch_dispatch_stack() > 0 or _is_hooked()


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Keeps what is done inside from the caller's watchers."""
    with contextlib.ExitStack() as stack:
        if torch._C._len_torch_dispatch_stack():
            stack.enter_context(_disable_current_modes())
        if _is_hooked():
            # Of several pairs only the innermost is called. Detached, for a result that was saved as it is would hold
            # its own graph.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _same))
        yield


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
