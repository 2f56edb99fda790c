"""PrivateUse1 as a backend with one device, and the CPU's memory under its name: `standin`'s needs from PyTorch.

Newer PyTorch takes backends in Python, and a few integers make the same memory another device's. Older ones, and so
the one that torch-directml is for, have neither: there a few lines of C++ are built first.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

DEVICE = torch.device("privateuseone", 0)
_HOST = torch.device("cpu")
_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILER = "g++"

Under = Callable[[torch.Tensor, torch.device], torch.Tensor]


def why_not() -> str | None:
    """Why there can't be such a backend here, if there can't."""
    if _takes_python() or shutil.which(_COMPILER) is not None:
        return None
    return f"PyTorch {torch.__version__} has no backends in Python, and there is no {_COMPILER} to build one"


def register() -> Under:
    """Make the backend, for the rest of this process.

    Returns:
        A function that gives a tensor's memory as another device's tensor.
    """
    return _register_in_python() if _takes_python() else _build()


def _takes_python() -> bool:
    return hasattr(getattr(torch._C, "_acc", None), "register_python_privateuseone_device_guard")


def _register_in_python() -> Under:
    # Renames the backend to its own name: without a name, this PyTorch runs no backward pass on the backend.
    torch.utils.rename_privateuse1_backend(DEVICE.type)
    hook, guard = torch._C._acc.PrivateUse1Hooks, torch._C._acc.DeviceGuard
    has_it = {name: lambda *_: True for name in ("is_available", "is_built", "has_primary_context")}
    torch._C._acc.register_python_privateuseone_hook(type("_Hook", (hook,), has_it)())
    is_one = {"type_": lambda _: torch._C._autograd.DeviceType.PrivateUse1}
    torch._C._acc.register_python_privateuseone_device_guard(type("_Guard", (guard,), is_one)())
    return _by_dlpack


class _DLTensorHead(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


# DLPack's numbers for the two devices.
_DLPACK_TYPES = {_HOST.type: 1, DEVICE.type: 12}
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _by_dlpack(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    capsule = torch._C._to_dlpack(tensor)
    head = _DLTensorHead.from_address(_pointer_of(capsule, b"dltensor"))
    head.device_type, head.device_id = _DLPACK_TYPES[device.type], 0
    return torch._C._from_dlpack(capsule)


def _build() -> Under:
    torch_home = Path(torch.__path__[0])
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "standin_backend.so"
        command = [
            *(
                _COMPILER,
                "-shared",
                "-fPIC",
                "-std=c++17",
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            ),
            *(f"-I{torch_home / 'include'}", str(_SOURCE), "-o", str(library)),
            *(f"-L{torch_home / 'lib'}", "-lc10", "-ltorch_cpu"),
        ]
        subprocess.run(command, check=True, timeout=300)
        torch.ops.load_library(str(library))
    under: Under = torch.ops.standin.under
    return under
