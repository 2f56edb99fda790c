"""Which models can't change: those that are spread over ranks, where each rank would change on its own."""

from __future__ import annotations

import sys
from typing import Any

import torch

from celmoe.errors import ProcessGroupError
from celmoe.level import Level
from celmoe.stacked.fitness import alive
from celmoe.stacked.rows import is_sharded


def require_alone(model: Any, call: str) -> None:
    """Refuse a model that is spread over ranks.

    Args:
        model: The model.
        call: The call's name, for the error.

    Raises:
        ProcessGroupError: The model is spread by `shard_experts`, `shard_levels` or PyTorch's own means, or is wrapped.
    """
    found = ""
    if any(type(level) is not Level for level in model._levels):
        found = "one that is spread by celmoe.distributed"
    elif any(is_sharded(parameter) for parameter in model.parameters()):
        found = "one with sharded parameters"
    elif torch.distributed.is_available() and torch.distributed.is_initialized():
        found = _wrapper(model)
    if found:
        raise ProcessGroupError(
            f"'model' must be in one process for {call!r} (got {found}; save a checkpoint on all ranks, change the "
            f"model in one process, and spread it anew)"
        )


def _wrapper(model: Any) -> str:
    kinds: list[type] = [torch.nn.parallel.DistributedDataParallel]
    # Importing it takes a while.
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        kinds.append(fsdp.FullyShardedDataParallel)
    for kind in kinds:
        if any(model is module for wrapper in alive(kind) for module in wrapper.modules()):
            return f"one in a {kind.__name__}"
    return ""
