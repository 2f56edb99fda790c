"""DirectML, the device of Windows' graphics cards through torch-directml: its name and its limits.

Its kernels have limits of their own; notes/directml.md lists all known ones. The few places that depend on DirectML ask
here. A tensor tells its device, so the answer needs no plug-in.
"""

from __future__ import annotations

import torch

# PyTorch's name for a third-party backend, which the plug-in does not rename.
DEVICE_TYPE = "privateuseone"
# A tensor with one axis more ends the process.
_MOST_AXES = 5


def is_directml(device: torch.device) -> bool:
    """True if a device is DirectML's."""
    return device.type == DEVICE_TYPE


def takes(device: torch.device, num_axes: int) -> bool:
    """True if a device takes tensors of ``num_axes`` axes."""
    return num_axes <= _MOST_AXES or not is_directml(device)
