"""The engine beyond one machine, built on ``torch.distributed``; see ``notes/distributed.md``.

- `data_parallel`: all experts on every rank: `prepare_ddp`
- `fully_sharded`: a part of each parameter on every rank: `shard_levels`
- `expert_parallel`: some experts on each rank: `shard_experts`; `placement` says which
- `sharded_level`: a level of spread experts; `meeting`, `transport`: the way of rows to their experts, and back
- `remote`: stand-ins for experts on other ranks
- `gradients`: losses and gradients of all ranks' samples
- `samplers`: each rank's share of a batch
- `checkpoints`: from any number of ranks to any other
- `groups`, `versions`: checks before anything is sent
"""

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
