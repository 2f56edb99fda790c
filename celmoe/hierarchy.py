"""The model: levels of named experts in sequence, and a fusion of the levels' outputs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Self, cast

import torch
from torch import nn

from .config import CELMoEConfig, ExpertConfig, HierarchyLevelConfig, enabled_levels
from .engines.registry import resolve_engine
from .errors import ConfigError, ConfigTypeError, InputError, InputTypeError, UnknownLevelError, nearest
from .experts import ExpertContext
from .explain import Explanation
from .fusion import LearnedFusion, PositionAwareFusion, build_fusion
from .level import Level, LevelInput, present_experts
from .lifecycle.changes import Optimizers, add, remove, rename
from .lifecycle.newcomer import Factory, KeptFactory, made
from .lifecycle.order import EXPERTS, note_order, require_order
from .lifecycle.subsets import subset
from .names import NamedModules
from .outputs import CELMoEOutput, LevelOutput
from .patterns import matching
from .routing.compiler import RoutingCompiler
from .routing.layout import Layout
from .routing.plan import RoutingPlan
from .routing.routes import Routing
from .rows.context import NO_CONTEXT, ContextRows
from .stacked.freezing import freeze, unfreeze
from .stacked.parallel import tied, ties_of
from .stacked.stack import Stack
from .torch_internals import TRACES_LEVELS, is_traced
from .traced.registered import register

# Methods that subclasses of celmoe-vp's model override. Nothing here would call them.
_PEERS_METHODS = ("_run_level", "_select_context", "_normalize_routing", "_level_registry", "_expert_module")


class HierarchicalCELMoE(nn.Module):
    """Route every sample by name through one expert a level, and fuse the levels.

    Building the model reads the config's structure: its levels and experts, their names, order and parents. Later
    changes of the structure have no effect on the model (`check_config` finds them). Every call reads the flags:
    `fallback_expert` from `levels`; `stop_gradient_from_parent`, `gradient_scale` and `loss_weight` from the
    `ExpertConfig` under the expert's name there. If that name is gone, the call reads the `ExpertConfig` that the
    expert was built with.

    Args:
        config: The hierarchy.
        expert_factory: Makes each expert: ``factory(level_name, expert_name, metadata) -> nn.Module``, called in level
            order, then expert order, before the fusion is made.
        fusion_module: Replaces the built-in fusion; called with the list of the levels' hidden states.
        engine: ``"auto"`` or the name of an engine; see `engines.ENGINES`.

    Attributes:
        config: The config.
        levels: The enabled levels' configs, which hold the flags.
        layout: The part of the config that plans depend on.
        level_modules: The experts: ``level_modules[level][expert]``.
        fusion: The fusion module.

    Raises:
        ConfigError, ConfigTypeError: The config is not sound, or the factory returned no module. Defining a subclass
            that overrides a private method of celmoe-vp's model raises, too.
        EngineError: No engine has this name.

    Example::

        experts = {"de": ExpertConfig("de"), "fr": ExpertConfig("fr")}
        config = CELMoEConfig(64, [HierarchyLevelConfig("language", experts)])
        model = HierarchicalCELMoE(config, lambda level, expert, metadata: MyExpert())
        output = model(hidden, routing={"language": ["de", "fr", "de"]})
    """

    def __init__(
        self,
        config: CELMoEConfig,
        expert_factory: Factory,
        fusion_module: nn.Module | None = None,
        *,
        engine: str = "auto",
    ) -> None:
        super().__init__()
        self._engine = resolve_engine(engine)
        self.config = config
        self.levels: list[HierarchyLevelConfig] = enabled_levels(config)
        if not callable(expert_factory):
            raise ConfigTypeError(f"'expert_factory' must be callable (got {expert_factory!r})")
        self._factory = KeptFactory(expert_factory)
        self._compiler = RoutingCompiler(config)
        self.level_modules = NamedModules(
            {
                level.name: NamedModules(
                    {
                        name: made(expert_factory, level.name, name, expert.metadata)
                        for name, expert in level.experts.items()
                    }
                )
                for level in self.levels
            }
        )
        self._levels = [Level(level) for level in self.levels]
        self.fusion = build_fusion(config, len(self.levels), fusion_module)
        self._stacks: dict[str, list[Stack]] = {}
        self._key = register(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for method in _PEERS_METHODS:
            if method in vars(cls):
                raise ConfigTypeError(
                    f"{cls.__name__!r} must not override {method!r} (got a subclass written for celmoe-vp, whose model "
                    f"calls it; this one never does: change the experts, their context, or 'forward' in its place)"
                )

    @property
    def engine(self) -> str:
        """The engine that runs the experts; settable to any engine that the constructor takes."""
        return self._engine

    @engine.setter
    def engine(self, engine: str) -> None:
        self._engine = resolve_engine(engine)

    @property
    def layout(self) -> Layout:
        """The part of the config that plans depend on: the structure from construction, and the current fallbacks."""
        return self._compiler.layout

    def check_config(self) -> None:
        """Check that the config still has the structure that the model was built with.

        Raises:
            ConfigError: The structure differs; the message names the first difference.
            ConfigTypeError: The config is not sound any more.
        """
        if found := RoutingCompiler(self.config).layout.difference(self.layout):
            raise ConfigError(
                f"'config' must have the structure that the model was built with, {found[0]} (got {found[1]}); build a "
                f"new model"
            )

    def compile_routing(
        self, routing: Routing | RoutingPlan | None = None, batch_size: int | None = None
    ) -> RoutingPlan:
        """Compile the routing of one batch; see `RoutingCompiler.__call__`."""
        return self._compiler(routing, batch_size)

    def explain(
        self, plan_or_routing: RoutingPlan | Routing | None = None, batch_size: int | None = None
    ) -> Explanation:
        """A table of how each level would run; runs no expert.

        Args:
            plan_or_routing: Gives the rows of each expert; without a plan or routing, the table has the levels only.
            batch_size: See `compile_routing`.

        Raises:
            CELMoEError: The errors of `compile_routing`; or an expert in the plan has been removed.
        """
        plan = None if plan_or_routing is None and batch_size is None else self._compiler(plan_or_routing, batch_size)
        present = None if plan is None else present_experts(self.level_modules, plan)
        lines = []
        for index, level in enumerate(self._levels):
            name = level.name
            modules = cast(NamedModules, self.level_modules[name])
            experts = list(modules.values()) if present is None else present[index]
            lines.append(level.explain(modules, self._engine, experts, None if plan is None else plan.levels[name]))
        return Explanation(tuple(lines))

    def freeze(self, level: str, pattern: str = "*") -> list[str]:
        """Freeze experts: they run as before, buffers included, and are not trained.

        Their parameters get no gradients, and lose those that they have. Optimizers of PyTorch and `celmoe.optim` leave
        these experts as they are; of stacked experts, only those of `celmoe.optim` do, and others refuse to step.

        Args:
            level: The level's name.
            pattern: A pattern of the experts' names, as in the shell: ``"r*"``.

        Returns:
            The names that match, in the level's order.

        Raises:
            UnknownLevelError: The model has no such level.
            UnknownExpertError: No expert matches.
            InputTypeError: The pattern is no string.
        """
        names, experts = self._matching(level, pattern)
        freeze(experts, self._experts())
        return names

    def unfreeze(self, level: str, pattern: str = "*") -> list[str]:
        """Let experts be trained as before `freeze`.

        Parameters that required no gradients before stay so: a frozen base below adapters, for example. Those that an
        expert shares with a frozen one stay frozen.

        Args:
            level: The level's name.
            pattern: A pattern of the experts' names, as in the shell: ``"r*"``.

        Returns:
            The names that match, in the level's order.

        Raises:
            UnknownLevelError: The model has no such level.
            UnknownExpertError: No expert matches.
            InputTypeError: The pattern is no string.
        """
        names, experts = self._matching(level, pattern)
        unfreeze(experts, self._experts())
        return names

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
        """Add an expert, the last of its level: the ids of all others stay.

        The expert goes to the devices, dtypes and mode of the level's others, and joins the stack whose members it is
        like. The config of the level gets it, too. Old plans and compilers are refused from then on.

        Args:
            level: The level's name.
            name: The new expert's name.
            config: The new expert's config.
            warm_start: The name of an expert of the level, whose values the new one takes: parameters and buffers.
            factory: Makes the expert, like the constructor's ``expert_factory``; by default that of the constructor.
            optimizer: The optimizer of the model, or several. Each new parameter goes into the group of the same tensor
                of ``warm_start``, else into the one group of that tensor of the other experts. Everybody's state stays.
                If the new expert joins a stack, all optimizers that hold the stack must be given.

        Raises:
            UnknownLevelError, UnknownExpertError: The model has no such level, or the level no such ``warm_start``.
            ConfigError, ConfigTypeError: The name exists, the parent does not, the factory makes no module or one that
                ``warm_start`` does not fit, or nothing tells one group for the new parameters.
            StackedError: An optimizer holds the stack, and was not given; or its state can't be kept apart by expert.
            ProcessGroupError: The model is spread over ranks.
            InputTypeError: ``optimizer`` is none.
        """
        add(self, level, name, config, warm_start=warm_start, factory=factory, optimizer=optimizer)

    def remove_expert(self, level: str, name: str, *, optimizer: Optimizers = None) -> None:
        """Remove an expert. The ids of those after it are one less from then on; old plans are refused.

        Args:
            level: The level's name.
            name: The expert's name.
            optimizer: The optimizer of the model, or several: each drops the expert's parameters and state. If the
                expert is stacked, all optimizers that hold the stack must be given.

        Raises:
            UnknownLevelError, UnknownExpertError: The model has no such level, or the level no such expert.
            ConfigError: The expert is the level's last, its fallback, or somebody's parent.
            StackedError: An optimizer holds the stack, and was not given; or its state can't be kept apart by expert.
            ProcessGroupError: The model is spread over ranks.
            InputTypeError: ``optimizer`` is none.
        """
        remove(self, level, name, optimizer=optimizer)

    def rename_expert(self, level: str, name: str, new_name: str, *, optimizer: Optimizers = None) -> None:
        """Rename an expert, which keeps its id. Children and fallback follow; old plans are refused.

        The order of ``parameters()`` may change. An optimizer that is not given keeps its own: what it saves by
        position fits no new model then (`celmoe.optim.state_by_name` saves by name).

        Args:
            level: The level's name.
            name: The expert's name.
            new_name: Its name from then on.
            optimizer: The optimizer of the model, or several. If the expert is stacked, all optimizers that hold the
                stack must be given.

        Raises:
            UnknownLevelError, UnknownExpertError: The model has no such level, or the level no such expert.
            ConfigError, ConfigTypeError: The new name exists, or is no name.
            StackedError: An optimizer holds the stack, and was not given; or its state can't be kept apart by expert.
            ProcessGroupError: The model is spread over ranks.
            InputTypeError: ``optimizer`` is none.
        """
        rename(self, level, name, new_name, optimizer=optimizer)

    def subset(self, experts: Mapping[str, str | Collection[str]]) -> Self:
        """A smaller model for serving, with copies of some experts.

        Each level above has the parents of the kept experts. If a kept expert has no parent, its level above has the
        fallback too; without a fallback, that level has all its experts unless it is named. The levels below have the
        experts whose parents are kept, or who have none. A fallback that is not kept is none any more. The experts of
        the result are not stacked; ids are positions among the kept experts.

        Args:
            experts: By level, names of experts, or patterns as in the shell.

        Returns:
            A model of the same class, which shares no tensor with this one.

        Raises:
            UnknownLevelError, UnknownExpertError: The model has no such level, or the level no such expert.
            ConfigTypeError, InputTypeError: ``experts`` is of the wrong kind.
            ConfigError: A level keeps no expert.
            ProcessGroupError: The model is spread over ranks.

        Example::

            one = model.subset({"language": ["nl"]})
        """
        made: Self = subset(self, experts)
        return made

    def _matching(self, level: str, pattern: str) -> tuple[list[str], list[nn.Module]]:
        if level not in self.level_modules:
            raise UnknownLevelError(
                f"'level' must be a level of the model (got {level!r}; {nearest(level, self.level_modules)})"
            )
        registry = cast(NamedModules, self.level_modules[level])
        names = matching(pattern, registry, f"experts of level {level!r}")
        return names, [registry[name] for name in names]

    def _experts(self) -> list[nn.Module]:
        return [each for registry in self.level_modules.values() for each in cast(NamedModules, registry).values()]

    def forward(
        self,
        hidden: torch.Tensor,
        routing: Routing | RoutingPlan | None = None,
        context: ExpertContext = None,
        mask: torch.Tensor | None = None,
    ) -> CELMoEOutput:
        """Run the batch through all levels.

        Args:
            hidden: ``[B, D]`` or ``[B, S, D]``, or any trailing shape that experts and fusion take.
            routing: A plan, or a routing for `compile_routing`. The output row of a sample with several experts is
                the weighted sum of theirs. A sample without an expert keeps its row.
            context: Anything that experts read. Batch-aligned values are cut to each expert's samples: see
                `celmoe.rows.context`, `Rows` and `Shared`.
            mask: ``[B, ...]``, cut to each expert's samples.

        Raises:
            InputError, InputTypeError: Hidden, mask or context do not fit together.
            PlanError: The plan was made for another config or batch size.
            ResultError, ResultTypeError: An expert's result does not fit.
            CELMoEError: The errors of `compile_routing`.
        """
        fusion = self.fusion
        _check_hidden(hidden, fusion)
        batch_size = hidden.shape[0]
        if mask is not None:
            _check_mask(mask, hidden)
        if TRACES_LEVELS and batch_size and is_traced(hidden):
            from .traced.forward import forward_traced  # noqa: PLC0415  # importing the tracer takes seconds

            return forward_traced(self, hidden, routing, context, mask)
        context_rows = NO_CONTEXT if context is None else ContextRows(context, batch_size, hidden.device)
        host_plan = self._compiler.compile(routing, batch_size, told_by="'hidden'")
        plan = host_plan
        if plan.device != hidden.device:
            # Nothing would wait for a non-blocking copy into the host's memory.
            plan = plan.to(hidden.device, non_blocking=hidden.device.type != "cpu")
        experts = present_experts(self.level_modules, plan)
        outputs: dict[str, LevelOutput] = {}
        losses: dict[str, torch.Tensor] = {}
        loss_weights: dict[str, float] = {}
        loss_shares: dict[str, float] = {}
        given = LevelInput(hidden, None, context_rows, mask)
        ties = ties_of(self.level_modules) if Stack.is_used else {}
        recast = ""
        for level, some in zip(self._levels, experts, strict=True):
            planned = plan.levels[level.name]
            present = some or [*cast(NamedModules, self.level_modules[level.name]).values()]
            try:
                level_output, blocks = level.run(present, self._engine, given, planned, host_plan)
            except Exception as error:
                if recast:
                    error.add_note(recast)
                raise
            recast = level_output._recast or recast
            if ties:
                level_output.hidden = tied(level_output.hidden, ties[level.name])
            outputs[planned.name] = level_output
            if level_output.losses:
                losses.update(level_output.losses)
                loss_weights.update(level_output.loss_weights)
                loss_shares.update(level_output.loss_shares)
            given = LevelInput(level_output.hidden, blocks, context_rows, mask)
        fused = fusion([level.hidden for level in outputs.values()])
        # Made last, which a tracer can do again: none follows what is put into an object's dict.
        return CELMoEOutput(outputs, fused, losses, loss_weights=loss_weights, loss_shares=loss_shares)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_order(self.layout, destination, prefix)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        # First of all: experts below are loaded afterwards.
        require_order(self.layout, local_metadata.get(EXPERTS))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch annotates it not
        self.__dict__.setdefault("_stacks", {})
        self.__dict__.setdefault("_factory", KeptFactory(None))
        self._key = register(self)
        # A compiler is copied without its configs; the model's compiler must read the model's own.
        self._compiler.configs = [level.config for level in self._levels]

    def extra_repr(self) -> str:
        """The engine, in the model's repr."""
        return f"engine={self.engine!r}"


def _check_hidden(hidden: Any, fusion: nn.Module) -> None:
    if not isinstance(hidden, torch.Tensor):
        raise InputTypeError(f"'hidden' must be a tensor (got {type(hidden).__name__})")
    if hidden.dim() == 0:
        raise InputError("'hidden' must have the samples for its first axis (got a tensor of no axes)")
    # A subclass may take other widths than its base class.
    if type(fusion) is LearnedFusion or type(fusion) is PositionAwareFusion:
        fusion.check_hidden(hidden)


def _check_mask(mask: Any, hidden: torch.Tensor) -> None:
    if not isinstance(mask, torch.Tensor):
        raise InputTypeError(f"'mask' must be a tensor (got {type(mask).__name__})")
    if mask.dim() == 0 or mask.shape[0] != hidden.shape[0]:
        raise InputError(
            f"'mask' must have one row for each of the {hidden.shape[0]} samples (got shape {tuple(mask.shape)})"
        )
    if mask.device != hidden.device:
        raise InputError(f"'mask' must be on {hidden.device}, where 'hidden' is (got {mask.device})")
