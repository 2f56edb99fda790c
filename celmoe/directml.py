"""The device that is Windows' graphics cards through torch-directml: what it is called, and what it does not take.

Its kernels differ in what they can do; see notes/directml.md for all that is known. The few places that choose by it
ask here. A tensor that says it is there needs no plug-in to be asked.
"""

from __future__ import annotations

import torch

# The plug-in does not rename what PyTorch calls a backend of somebody else's.
DEVICE_TYPE = "privateuseone"
# With one axis more it ends the process.
_MOST_AXES = 5


def is_directml(device: torch.device) -> bool:
    """Whether a device is DirectML's."""
    return device.type == DEVICE_TYPE


def takes(device: torch.device, num_axes: int) -> bool:
    """Whether a device takes tensors of so many axes."""
    return num_axes <= _MOST_AXES or not is_directml(device)
