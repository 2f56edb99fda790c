"""The places in a host: modules by patterns of their dotted names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from celmoe.errors import ConfigError, ConfigTypeError, nearest

# Modules whose own forward pass runs, or never runs, all that is registered in them.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def places(host: nn.Module, where: str | Collection[str], inside: type[nn.Module]) -> dict[str, nn.Module]:
    """The host's modules that some pattern matches, by name, in the host's order.

    Args:
        host: The host.
        where: See `matching`.
        inside: The class of modules that no place lies in.

    Raises:
        ConfigTypeError: See `matching`.
        ConfigError: A pattern matches no module; or a module that can't have experts behind it.
    """
    named = dict(named_modules(host, inside))
    found = matching(named, where, "modules of the model")
    for name, module in found.items():
        _require_place(name, module, named)
    return found


def matching(named: Mapping[str, nn.Module], where: str | Collection[str], what: str) -> dict[str, nn.Module]:
    """The modules that some pattern matches, in their order.

    Args:
        named: Modules by dotted name.
        where: Patterns of dotted names, in which ``*``, ``?`` and ``[abc]`` stand for part of one part.
        what: The modules in words, for errors.

    Raises:
        ConfigTypeError: ``where`` is neither a string nor a collection of strings.
        ConfigError: A pattern matches no module.
    """
    patterns = [where] if isinstance(where, str) else where
    if not isinstance(patterns, Collection) or not patterns or not all(isinstance(each, str) for each in patterns):
        raise ConfigTypeError(f"'where' must be a pattern of module names, or several (got {where!r})")
    found = set[str]()
    for pattern in patterns:
        matched = {name for name in named if _matches(name, pattern)}
        if not matched:
            raise ConfigError(f"'where' must match {what} (got {pattern!r}; {nearest(pattern, named)})")
        found |= matched
    return {name: module for name, module in named.items() if name in found}


def named_modules(host: nn.Module, inside: type[nn.Module], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The host's modules by dotted name, each once, without those of a class and all below."""
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [(prefix, host)]
    while waiting:
        name, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield name, module
        children = [
            (f"{name}.{child}" if name else child, each)
            for child, each in module._modules.items()
            if each is not None and not isinstance(each, inside)
        ]
        waiting.extend(reversed(children))


def _matches(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    # The model itself has no name, which no part stands for.
    return bool(name) == bool(pattern) and len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _require_place(name: str, module: nn.Module, named: dict[str, nn.Module]) -> None:
    fault = ""
    if isinstance(module, _CONTAINERS):
        inner = [each for each in module._modules if module._modules[each] is not None]
        cure = f"; name its last module, {f'{name}.{inner[-1]}'.lstrip('.')!r}" if inner else ""
        fault = f"a {type(module).__name__}, which runs whatever is put into it, or is not called itself{cure}"
    parent: Any = named.get(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention) and module is not parent:
        fault = f"a part of {type(parent).__name__}, which is not called; name the attention itself"
    if getattr(module, "batch_first", True) is False or _is_torch_layer_by_positions(module):
        fault = f"a {type(module).__name__} with batch_first=False, whose first axis is not the samples'"
    if fault:
        raise ConfigError(f"'where' must match modules that are called and give rows by sample (got {name!r}: {fault})")


def _is_torch_layer_by_positions(module: nn.Module) -> bool:
    if not isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        return False
    return not module.self_attn.batch_first
