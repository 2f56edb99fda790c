"""The engine beyond one machine, on what ``torch.distributed`` has; see ``notes/distributed.md``."""

from .data_parallel import prepare_ddp
from .expert_parallel import ExpertSharding, shard_experts
from .fully_sharded import shard_levels
from .gradients import joined_mean, reduce_gradients
from .sharded_level import RemoteExpert

__all__ = [
    "ExpertSharding",
    "RemoteExpert",
    "joined_mean",
    "prepare_ddp",
    "reduce_gradients",
    "shard_experts",
    "shard_levels",
]
