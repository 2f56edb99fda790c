"""The features that older versions of torch lack: their tests are skipped, and name the version that brought them."""

import inspect

import pytest
import torch
from torch.nn import functional as F
from torch.utils import checkpoint

needs_grouped_mm = pytest.mark.skipif(
    not hasattr(F, "grouped_mm"), reason="torch.nn.functional.grouped_mm came with torch 2.10"
)
needs_weighted_losses = pytest.mark.skipif(
    "weight" not in inspect.signature(F.mse_loss).parameters, reason="mse_loss takes weights in later versions"
)
needs_selective_checkpoints = pytest.mark.skipif(
    not hasattr(checkpoint, "create_selective_checkpoint_contexts"), reason="selective checkpoints came with torch 2.5"
)
# True if torch can say that no hook observes the tensors that autograd saves (2.7).
TELLS_WATCHERS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
HAS_DISTRIBUTED = hasattr(torch.distributed, "all_gather_single")
needs_distributed = pytest.mark.skipif(not HAS_DISTRIBUTED, reason="celmoe.distributed wants torch 2.13")
# The first dual tensor of a process makes torch load its decompositions, which it compiles by a function that it calls
# deprecated: in a DeprecationWarning up to 2.13, in a FutureWarning since.
loads_decompositions = pytest.mark.filterwarnings("ignore:`torch.jit.script` is:Warning:torch.jit._script")
