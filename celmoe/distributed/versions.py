"""Refuse a PyTorch that is too old, before other modules of this package fail at a name that it lacks."""

import torch
import torch.distributed as dist

# The PyTorch version for which the package was written added this name.
if dist.is_available() and not hasattr(dist, "all_gather_single"):
    raise ImportError(f"'celmoe.distributed' must have PyTorch 2.13 or later (got {torch.__version__})")
