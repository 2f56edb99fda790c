"""Makes a new expert, where the others are and as they are trained, and gives it a neighbour's values."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from celmoe.errors import ConfigError, ConfigTypeError
from celmoe.experts import ExpertMetadata
from celmoe.stacked.stack import slot_of

Factory = Callable[[str, str, ExpertMetadata], nn.Module]


class KeptFactory:
    """The factory that a model was built with. Copies share it; a pickled model has none, as it may be any function."""

    def __init__(self, factory: Factory | None) -> None:
        self.factory = factory

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptFactory:
        return self

    def __reduce__(self) -> tuple[type[KeptFactory], tuple[None]]:
        return KeptFactory, (None,)


def made(factory: Factory, level: str, name: str, metadata: ExpertMetadata) -> nn.Module:
    """The expert that a factory makes.

    Raises:
        ConfigTypeError: The factory made no module.
    """
    module = factory(level, name, metadata)
    if not isinstance(module, nn.Module):
        got = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise ConfigTypeError(
            f"'expert_factory' must return a torch.nn.Module (got {got} for expert {name!r} of level {level!r})"
        )
    return module


@contextlib.contextmanager
def random_numbers_given_back() -> Iterator[None]:
    """Within, an error gives back the random numbers that were drawn from PyTorch's generators."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    states = torch.get_rng_state(), [torch.cuda.get_rng_state(device) for device in devices]
    try:
        yield
    except BaseException:
        torch.set_rng_state(states[0])
        for device, state in zip(devices, states[1], strict=True):
            torch.cuda.set_rng_state(state, device)
        raise


def settle(expert: nn.Module, experts: Mapping[str, nn.Module], level: str, warm_start: str | None) -> None:
    """Give a new expert the devices, dtypes and mode of a level's experts, and one's values.

    Args:
        expert: The new expert.
        experts: The level's experts.
        level: The level's name.
        warm_start: The name of the expert whose values it takes; ``None`` for its own.

    Raises:
        ConfigError: The new expert is not like the source, or shares tensors with others.
    """
    tensors = [each for other in experts.values() for each in (*other.parameters(), *other.buffers())]
    known = {id(each) for each in tensors} | {id(each) for other in experts.values() for each in other.modules()}
    if any(slot_of(module) is not None for module in expert.modules()):
        raise ConfigError(
            f"'factory' must return a module with parameters of its own (got one of a stack for level {level!r})"
        )
    likes = [experts[warm_start]] if warm_start is not None else list(experts.values())
    _place(expert, likes, tensors, known)
    for module in expert.modules():
        if id(module) not in known:
            module.training = next(iter(experts.values())).training
    if warm_start is not None:
        _warm_start(expert, experts[warm_start], known, f"{warm_start!r} of level {level!r}")


def _place(expert: nn.Module, likes: list[nn.Module], tensors: list[torch.Tensor], known: set[int]) -> None:
    """Move a new expert's tensors to the devices and dtypes of like ones; what others hold, too, stays."""
    by_path: dict[str, torch.Tensor] = {}
    for like in likes:
        for path, tensor in _named(like):
            by_path.setdefault(path, tensor)
    floats = {each.dtype for each in tensors if each.is_floating_point()}
    devices = {each.device for each in tensors}
    for path, tensor in _named(expert):
        if id(tensor) in known or nn.parameter.is_lazy(tensor):
            continue
        other = by_path.get(path)
        dtype, device = tensor.dtype, tensor.device
        if other is not None and other.is_floating_point() == tensor.is_floating_point():
            dtype, device = other.dtype, other.device
        else:
            dtype = next(iter(floats)) if len(floats) == 1 and tensor.is_floating_point() else dtype
            device = next(iter(devices)) if len(devices) == 1 else device
        if (dtype, device) != (tensor.dtype, tensor.device):
            with torch.no_grad():
                tensor.data = tensor.detach().to(device, dtype)


def _warm_start(expert: nn.Module, source: nn.Module, known: set[int], where: str) -> None:
    theirs = dict(_named(source))
    for path, tensor in _named(expert):
        if id(tensor) in known and theirs.get(path) is not tensor:
            raise ConfigError(
                f"'warm_start' must be an expert that shares what the new expert shares with others (got {where}, and "
                f"{path!r} of the new one, which is another expert's, too)"
            )
    try:
        # A deep copy of a view would copy the whole stack.
        state = {
            key: each.detach().clone() if isinstance(each, torch.Tensor) else copy.deepcopy(each)
            for key, each in source.state_dict().items()
        }
        expert.load_state_dict(state)
    except RuntimeError as error:
        raise ConfigError(
            f"'warm_start' must be an expert like the new one (got {where}; {' '.join(str(error).split())}; take "
            f"another, or give a 'factory')"
        ) from error
    # Buffers that are in no state_dict.
    kept = expert.state_dict().keys()
    with torch.no_grad():
        for path, buffer in expert.named_buffers():
            if path not in kept and path in theirs and theirs[path].shape == buffer.shape:
                buffer.copy_(theirs[path])


def _named(expert: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*expert.named_parameters(), *expert.named_buffers()]
