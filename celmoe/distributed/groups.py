"""Process groups of a rank, with checks before anything is sent: a call that only some ranks make never returns."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from celmoe.errors import ConfigTypeError, MeshError, ProcessGroupError, listed, nearest


def require_process_group(what: str) -> None:
    """Refuse to go on without an initialised ``torch.distributed``.

    Args:
        what: The call that needs a process group.

    Raises:
        ProcessGroupError: ``torch.distributed`` is missing, or not initialised.
    """
    if not dist.is_available():
        raise ProcessGroupError(f"'{what}' must have a PyTorch that was built with torch.distributed (got one without)")
    if not dist.is_initialized():
        raise ProcessGroupError(
            f"'{what}' must be called after torch.distributed.init_process_group (got no process group; torchrun sets "
            f"what it reads from the environment)"
        )


def require_mesh(mesh: object) -> None:
    """Refuse a value that is no mesh, or a mesh without this process.

    Raises:
        ConfigTypeError, MeshError: The value is no mesh; this rank is not in the mesh.
    """
    if not isinstance(mesh, DeviceMesh):
        raise ConfigTypeError(f"'mesh' must be a torch.distributed DeviceMesh (got {type(mesh).__name__})")
    if mesh.get_coordinate() is None:
        raise MeshError(f"'mesh' must hold this process's rank (got {dist.get_rank()}, mesh {mesh.mesh.tolist()})")


def require_dimension(mesh: DeviceMesh, name: str, argument: str) -> int:
    """The position of a mesh's dimension.

    Args:
        mesh: A mesh whose dimensions have names.
        name: The dimension's name.
        argument: The argument's name, for the error.

    Raises:
        MeshError: The mesh has no such dimension.
    """
    names = mesh.mesh_dim_names or ()
    if name not in names:
        found = nearest(name, names) if names else "its dimensions have no names"
        raise MeshError(f"'{argument}' must be a dimension of the mesh (got {name!r}; {found})")
    return names.index(name)


def require_whole_world(mesh: DeviceMesh) -> None:
    """Refuse a mesh that leaves ranks out, or has more ranks than there are processes.

    Raises:
        MeshError: The mesh's size is not the number of processes.
    """
    if mesh.size() != dist.get_world_size():
        dims = listed(mesh.mesh_dim_names or ())
        raise MeshError(
            f"'mesh' must have one rank for each of the {dist.get_world_size()} processes (got {mesh.size()}, "
            f"dimensions {dims})"
        )


def groups_of(mesh: DeviceMesh, *, without: str | None = None) -> list[dist.ProcessGroup]:
    """This rank's group in each dimension with more than one rank; a sum over one after another covers all ranks.

    Args:
        mesh: The mesh.
        without: The name of a dimension to leave out.
    """
    names = mesh.mesh_dim_names or (None,) * mesh.ndim
    return [
        mesh.get_group(position)
        for position, name in enumerate(names)
        if mesh.size(position) > 1 and (without is None or name != without)
    ]
