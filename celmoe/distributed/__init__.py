"""The engine beyond one machine, built on ``torch.distributed``; see ``notes/distributed.md``."""

from . import versions  # noqa: F401  # first of all
from .checkpoints import load_checkpoint, load_file, save_checkpoint, write_file
from .data_parallel import prepare_ddp
from .expert_parallel import ExpertSharding, shard_experts
from .fully_sharded import shard_levels
from .gradients import joined_mean, reduce_gradients
from .remote import RemoteExpert
from .samplers import ExpertBalancedSampler, GlobalBatchSampler

__all__ = [
    "ExpertBalancedSampler",
    "ExpertSharding",
    "GlobalBatchSampler",
    "RemoteExpert",
    "joined_mean",
    "load_checkpoint",
    "load_file",
    "prepare_ddp",
    "reduce_gradients",
    "save_checkpoint",
    "shard_experts",
    "shard_levels",
    "write_file",
]
