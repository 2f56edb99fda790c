"""The engine beyond one machine, on what ``torch.distributed`` has; see ``notes/distributed.md``."""

from .data_parallel import prepare_ddp
from .gradients import joined_mean, reduce_gradients

__all__ = [
    "joined_mean",
    "prepare_ddp",
    "reduce_gradients",
]
