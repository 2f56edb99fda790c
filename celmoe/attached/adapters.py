"""All experts that are attached to a model, changed alike at every place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from celmoe.config import CELMoEConfig, ExpertConfig
from celmoe.errors import ConfigError
from celmoe.groups import parameter_groups
from celmoe.lifecycle.changes import Optimizers
from celmoe.lifecycle.newcomer import Factory
from celmoe.routing.compiler import RoutingCompiler
from celmoe.routing.plan import RoutingPlan
from celmoe.routing.routes import Routing
from celmoe.stacking import StackReport, stack_experts, unstack_experts

from .hosts import hierarchy_of, hosts_in
from .place import CHILD, Attached
from .where import matching, named_modules


class Adapters(Mapping[str, Attached]):
    """The hierarchies that are attached to a model, by the names of their places: see `adapters`.

    Methods do at every place what the method of `HierarchicalCELMoE` does at one. All places must have one config; if
    `attach` was called with several, ``celmoe.adapters(model, "encoder.layer.*")`` takes the places of one.

    Attributes:
        model: The host.
    """

    def __init__(self, model: nn.Module, hosts: Mapping[str, nn.Module]) -> None:
        self.model = model
        self._hosts = dict(hosts)

    def __getitem__(self, place: str) -> Attached:
        if place not in self._hosts:
            raise KeyError(place)
        return hierarchy_of(self._hosts[place])

    def __iter__(self) -> Iterator[str]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)

    def __repr__(self) -> str:
        config = self.config
        levels = ", ".join(f"{level.name}: {len(level.experts)} experts" for level in config.levels if level.enabled)
        return f"Adapters({len(self)} places, {levels})"

    @property
    def config(self) -> CELMoEConfig:
        """The config of the first place. Configs of the other places are equal to it, and their own."""
        return self._lead.config

    @property
    def compiler(self) -> RoutingCompiler:
        """A compiler of routings for the experts as they are now: for a `Collator`, for instance."""
        return RoutingCompiler(self.config)

    def compile_routing(
        self, routing: Routing | RoutingPlan | None = None, batch_size: int | None = None
    ) -> RoutingPlan:
        """Compile the routing of one batch; see `RoutingCompiler.__call__`."""
        return self._lead.compile_routing(routing, batch_size)

    def explain(self, plan_or_routing: RoutingPlan | Routing | None = None) -> str:
        """How each level would run, place by place: the tables of `HierarchicalCELMoE.explain`, each told once."""
        places: dict[str, list[str]] = {}
        for place, each in self.items():
            places.setdefault(str(each.explain(plan_or_routing)), []).append(place)
        return "\n\n".join(f"{', '.join(names)}:\n{table}" for table, names in places.items())

    def freeze(self, level: str, pattern: str = "*") -> list[str]:
        """Freeze experts; see `HierarchicalCELMoE.freeze`."""
        names: list[str] = []
        for each in self._alike():
            names = each.freeze(level, pattern)
        return names

    def unfreeze(self, level: str, pattern: str = "*") -> list[str]:
        """Let experts be trained as before `freeze`; see `HierarchicalCELMoE.unfreeze`."""
        names: list[str] = []
        for each in self._alike():
            names = each.unfreeze(level, pattern)
        return names

    def parameter_groups(self, patterns: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """All experts' parameters in groups for an optimizer, those of all places together; see `parameter_groups`.

        The host's own parameters that are trained are in the last group, with the optimizer's defaults.
        """
        by_place = [parameter_groups(each, patterns) for each in self._alike()]
        groups = [
            {**groups[0], "params": [parameter for group in groups for parameter in group["params"]]}
            for groups in zip(*(each[: len(patterns)] for each in by_place), strict=True)
        ]
        rest = [parameter for each in by_place for group in each[len(patterns) :] for parameter in group["params"]]
        own = [each for _, module in named_modules(self.model, Attached) for each in module.parameters(recurse=False)]
        rest += list({id(each): each for each in own if each.requires_grad}.values())
        return [*groups, {"params": rest}] if rest else groups

    def stack(self, levels: Collection[str] | None = None) -> dict[str, StackReport]:
        """Stack the experts of each place; see `stack_experts`. Returns the reports by place."""
        return {place: stack_experts(each, levels) for place, each in self.items()}

    def unstack(self, levels: Collection[str] | None = None) -> None:
        """Take the stacks of each place apart; see `unstack_experts`."""
        for each in self.values():
            unstack_experts(each, levels)

    def add_expert(
        self,
        level: str,
        name: str,
        config: ExpertConfig,
        *,
        warm_start: str | None = None,
        factory: Factory | None = None,
        optimizer: Optimizers = None,
    ) -> None:
        """Add an expert at every place, or, if one place refuses, at none; see `HierarchicalCELMoE.add_expert`."""
        done: list[Attached] = []
        try:
            for each in self._alike():
                each.add_expert(level, name, config, warm_start=warm_start, factory=factory, optimizer=optimizer)
                done.append(each)
        except BaseException:
            for each in done:
                each.remove_expert(level, name, optimizer=optimizer)
            raise

    def remove_expert(self, level: str, name: str, *, optimizer: Optimizers = None) -> None:
        """Remove an expert at every place; see `HierarchicalCELMoE.remove_expert`."""
        for each in self._alike():
            each.remove_expert(level, name, optimizer=optimizer)

    def rename_expert(self, level: str, name: str, new_name: str, *, optimizer: Optimizers = None) -> None:
        """Rename an expert at every place; see `HierarchicalCELMoE.rename_expert`."""
        for each in self._alike():
            each.rename_expert(level, name, new_name, optimizer=optimizer)

    def keep(self, experts: Mapping[str, str | Collection[str]]) -> None:
        """Keep some experts only, in place: for serving. With one expert a level, the model needs no plan any more.

        Optimizers keep the tensors of before: make others afterwards.

        Args:
            experts: By level, names of experts or patterns; see `HierarchicalCELMoE.subset`.

        Raises:
            CELMoEError: See `HierarchicalCELMoE.subset`; then nothing has changed.
        """
        kept = [each.subset(experts) for each in self._alike()]
        for host, smaller in zip(self._hosts.values(), kept, strict=True):
            host._modules[CHILD] = smaller

    @property
    def _lead(self) -> Attached:
        return next(iter(self._alike()))

    def _alike(self) -> list[Attached]:
        found = list(self.values())
        for each in found[1:]:
            if difference := found[0].layout.difference(each.layout):
                raise ConfigError(
                    f"places must have one config to be changed alike (got {difference[0]} and {difference[1]}; take "
                    f"those of one call of attach: celmoe.adapters(model, where))"
                )
        return found


def adapters(model: nn.Module, where: str | Collection[str] | None = None) -> Adapters:
    """The experts that are attached to a model.

    Args:
        model: The host, or a part of it.
        where: Patterns of the places' names, as for `attach`; by default all places.

    Returns:
        A mapping of places to `HierarchicalCELMoE`, with methods that change all places alike.

    Raises:
        InputTypeError: ``model`` is no module.
        ConfigTypeError: ``where`` is no pattern.
        ConfigError: No experts are attached, or a pattern matches no place.
    """
    hosts = hosts_in(model)
    return Adapters(model, hosts if where is None else matching(hosts, where, "places with experts"))


def freeze_host(model: nn.Module) -> None:
    """Take all parameters of a host out of training, but for those of its attached experts.

    Raises:
        InputTypeError: ``model`` is no module.
        ConfigError: No experts are attached.
    """
    hosts_in(model)
    for _, module in named_modules(model, Attached):
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
