"""Puts experts behind a host's modules, in place, and takes them away."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from torch import nn

from celmoe.config import CELMoEConfig
from celmoe.errors import ConfigError, ConfigTypeError, listed
from celmoe.lifecycle.newcomer import Factory, random_numbers_given_back
from celmoe.torch_internals import is_compiled

from .hosts import hosts_in, seat_of
from .place import CHILD, SEAT, Attached, LastLevel, Seat, after, arguments_of
from .root import Root
from .runs import Group
from .where import named_modules, places

Host = TypeVar("Host", bound=nn.Module)

_ROOT = "_celmoe_root"
_FUSIONS = ("last", "config")


def attach(
    model: Host,
    config: CELMoEConfig,
    factory: Factory,
    where: str | Collection[str],
    *,
    fusion: str | nn.Module = "last",
    engine: str = "auto",
) -> Host:
    """Put a hierarchy of experts behind each of some modules of any model, in place.

    A module's output then goes through its experts: a tensor ``[B, ...]``, or the first of a tuple, a mapping or a
    ``ModelOutput``. Each place has experts and a config of its own. The experts are the module's child ``celmoe``: they
    move with the model, are in its ``state_dict`` and among its parameters. The model's initializers leave them alone,
    ``model.apply`` as well as those of transformers. Make optimizers afterwards, and compile the model afterwards.

    Call the model within ``with celmoe.routed(model, plan):``, or with ``plan=plan`` for one more keyword.

    Experts keep the dtype that the factory gives them; a host's rows of another dtype are cast there and back, if not
    under autocast. An expert with the attribute ``reads_input`` set to true finds the first argument of its module,
    ``[B, ...]``, as ``batch.context["input"]``: LoRA needs it.

    Args:
        model: The host.
        config: The hierarchy. ``hidden_size`` matters to fusions only. Places have copies of it.
        factory: Makes each expert: ``factory(level_name, expert_name, metadata) -> nn.Module``, place by place.
        where: A pattern of the dotted names in ``model.named_modules()``, or several. ``*`` stands for one part of a
            name: ``"encoder.layer.*"``.
        fusion: ``"last"`` for the last level's output, so that experts that start as the identity change nothing;
            ``"config"`` for the config's fusion; or a module of your own, which all places share.
        engine: See `HierarchicalCELMoE`.

    Returns:
        ``model``.

    Raises:
        ConfigError: A pattern matches no module, or one that can't have experts behind it, or has some; the model is
            compiled, wrapped for several ranks, or has no weights yet; or the config is not sound.
        ConfigTypeError: An argument, or the factory's result, is of the wrong kind.

    Example::

        celmoe.attach(encoder, config, lambda level, name, metadata: celmoe.zoo.Pfeiffer(768, 48), "encoder.layer.*")
    """
    if not isinstance(model, nn.Module):
        raise ConfigTypeError(f"'model' must be a torch.nn.Module (got {type(model).__name__})")
    if not isinstance(fusion, nn.Module) and fusion not in _FUSIONS:
        raise ConfigError(f"'fusion' must be 'last', 'config' or a module (got {fusion!r})")
    found = places(model, where, Attached)
    _require_attachable(model, found)
    group = Group()
    module = LastLevel() if fusion == "last" else None if isinstance(fusion, str) else fusion
    with random_numbers_given_back():
        made = {
            name: Attached(config, factory, module, engine=engine).to(_device(each, model))
            for name, each in found.items()
        }
        for name, hierarchy in made.items():
            if any(each.is_meta for each in (*hierarchy.parameters(), *hierarchy.buffers())):
                raise ConfigError(
                    f"'model' must have its weights before experts are attached (got a device of shapes only at "
                    f"{name!r}; load the model first)"
                )
    for name, hierarchy in made.items():
        hierarchy.train(found[name].training)
        found[name].add_module(CHILD, hierarchy)
        handle = found[name].register_forward_hook(after, with_kwargs=True)
        found[name].__dict__[SEAT] = Seat(name, group, handle, arguments_of(found[name]))
    root: Root | None = model.__dict__.get(_ROOT)
    if root is None:
        root = model.__dict__[_ROOT] = Root(model)
    root.places.append((group, list(found.values())))
    return model


def detach(model: Host) -> Host:
    """Take away all experts that `attach` put into a model, or into a part of it.

    Returns:
        ``model``, as it was before.

    Raises:
        ConfigError: No experts are attached.
    """
    for host in hosts_in(model).values():
        del host._modules[CHILD]
        seat_of(host).handle.remove()
        del host.__dict__[SEAT]
    for _, module in list(named_modules(model, Attached)):
        root: Root | None = module.__dict__.get(_ROOT)
        if root is not None and not root.leads():
            root.remove()
            del module.__dict__[_ROOT]
    return model


def _device(module: nn.Module, model: nn.Module) -> torch.device | None:
    tensors = (each for part in (module, model) for each in (*part.parameters(), *part.buffers()))
    return next((each.device for each in tensors), None)


def _require_attachable(model: nn.Module, found: Mapping[str, nn.Module]) -> None:
    fault = ""
    if taken := [name for name, module in found.items() if CHILD in module._modules or hasattr(module, CHILD)]:
        fault = f"{listed(taken)}, which have experts or another {CHILD!r} already"
    elif any(isinstance(each, torch.jit.ScriptModule) for each in (model, *found.values())):
        fault = "one of torch.jit, which takes no modules"
    elif any(map(is_compiled, model.modules())):
        fault = "a compiled one; attach, then compile"
    elif _is_wrapped(model):
        fault = "one that is wrapped for several ranks; attach, then wrap"
    if fault:
        raise ConfigError(f"'model' must be one that experts can be attached to (got {fault})")


def _is_wrapped(model: nn.Module) -> bool:
    names = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return not names.isdisjoint({"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"})
