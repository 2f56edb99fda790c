"""Refuses a PyTorch that is too old for its neighbours, before they fail at a name that they miss."""

import torch
import torch.distributed as dist

# A name that came with the version for which the package was written.
if dist.is_available() and not hasattr(dist, "all_gather_single"):
    raise ImportError(f"'celmoe.distributed' must have PyTorch 2.13 or later (got {torch.__version__})")
