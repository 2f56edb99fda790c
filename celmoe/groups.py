"""Parameter groups by expert, for learning rates and other hyperparameters of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from .errors import ConfigError, InputTypeError
from .hierarchy import HierarchicalCELMoE
from .names import NamedModules
from .patterns import matching
from .stacked.stack import Entry


def parameter_groups(model: HierarchicalCELMoE, patterns: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The model's parameters in groups, for an optimizer.

    Each pattern has one group, with the parameters of the experts that match it. The first pattern that matches an
    expert has it. A last group has all other parameters, the fusion's too, and no options: the optimizer's defaults. A
    parameter that experts of several groups share is in the first of these groups.

    A stack whose experts are in several groups is given by the experts' own tensors, which are views. The optimizers of
    `celmoe.optim` take them; PyTorch's refuse them. Give all experts of a stack to one optimizer if a `GradScaler`
    unscales their gradients: it would do so once for each optimizer.

    Args:
        model: The model.
        patterns: By a pattern of ``"level/expert"``, as in the shell (``"language/r*"``), the options of the group:
            ``{"lr": 1e-4, "weight_decay": 0.0}``.

    Returns:
        ``[{"params": [...], **options}, ...]``, in the order of the patterns.

    Raises:
        InputTypeError: ``model`` is no `HierarchicalCELMoE`, or ``patterns`` no mapping of mappings.
        UnknownExpertError: A pattern matches no expert.
        ConfigError: Earlier patterns have all experts that a pattern matches; or the options hold ``"params"``.

    Example::

        groups = celmoe.parameter_groups(model, {"language/r*": {"lr": 1e-4}, "family/*": {"weight_decay": 0.0}})
        optimizer = celmoe.optim.AdamW(groups, lr=1e-3)
    """
    if not isinstance(model, HierarchicalCELMoE):
        raise InputTypeError(f"'model' must be a HierarchicalCELMoE (got {type(model).__name__})")
    if not isinstance(patterns, Mapping) or not all(isinstance(each, Mapping) for each in patterns.values()):
        raise InputTypeError(f"'patterns' must map patterns to options, {{'level/expert': {{...}}}} (got {patterns!r})")
    experts = {
        f"{level}/{name}": expert
        for level, registry in model.level_modules.items()
        for name, expert in cast(NamedModules, registry).items()
    }
    names_of: list[list[str]] = []
    grouped: set[str] = set()
    for pattern, options in patterns.items():
        found = matching(pattern, experts, "experts of the model, by 'level/expert'")
        if "params" in options:
            raise ConfigError(f"'patterns' must hold options without 'params' (got some for {pattern!r})")
        names = [name for name in found if name not in grouped]
        if not names:
            raise ConfigError(
                f"'patterns' must leave an expert to each pattern (got {pattern!r} after patterns that match all its "
                f"experts; put it before them)"
            )
        names_of.append(names)
        grouped.update(names)
    return _grouped(model, experts, names_of, [dict(options) for options in patterns.values()])


def _grouped(
    model: nn.Module,
    experts: Mapping[str, nn.Module],
    names_of: Sequence[Sequence[str]],
    options_of: Sequence[dict[str, Any]],
) -> list[dict[str, Any]]:
    tensors = {name: list(expert.parameters()) for name, expert in experts.items()}
    taken: set[Any] = set()
    groups = []
    for names, options in zip(names_of, options_of, strict=True):
        own = {_key(tensor): tensor for name in names for tensor in tensors[name] if _key(tensor) not in taken}
        taken |= own.keys()
        groups.append({"params": _joined(list(own.values())), **options})
    views: dict[int, list[torch.Tensor]] = {}
    for tensor in (each for own in tensors.values() for each in own if isinstance(each, Entry)):
        views.setdefault(id(_whole(tensor)), []).extend([] if _key(tensor) in taken else [tensor])
    rest = [
        part for each in model.parameters() if _key(each) not in taken for part in _joined(views.get(id(each), [each]))
    ]
    return groups + ([{"params": rest}] if rest else [])


def _whole(view: Entry) -> torch.Tensor:
    return view.place.stack.whole(view.place.path)


def _key(tensor: torch.Tensor) -> Any:
    return (id(_whole(tensor)), tensor.place.member) if isinstance(tensor, Entry) else id(tensor)


def _joined(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors, with stacks in place of views of all their members."""
    wholes = {id(whole): whole for each in tensors if isinstance(each, Entry) for whole in [_whole(each)]}
    counts = Counter(id(_whole(each)) for each in tensors if isinstance(each, Entry))
    full = {key: whole for key, whole in wholes.items() if counts[key] == len(whole)}
    found = [full.get(id(_whole(each)), each) if isinstance(each, Entry) else each for each in tensors]
    return list({id(each): each for each in found}.values())
