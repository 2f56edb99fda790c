"""Batches for a ``DataLoader``, with a plan in each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from torch.utils.data import default_collate

from .errors import ConfigError, InputTypeError, UnknownLevelError, listed, nearest
from .routing.compiler import RoutingCompiler

#: The key of the plan in a batch, and the keyword of a model with attached experts.
PLAN = "plan"


class Collator:
    """Collates samples, and compiles their routes: ``DataLoader(dataset, collate_fn=Collator(...))``.

    It can be pickled, and runs in workers. ``DataLoader(pin_memory=True)`` pins the plan with the rest.

    Args:
        compiler: Compiles the routes of a batch.
        route_keys: By level the key of a sample's route: ``{"language": "lang"}``; or the levels, whose names are the
            keys then. Samples are mappings, or sequences with positions for keys. The routes are taken out of samples
            that are mappings.
        collate: Collates the samples without their routes; ``torch.utils.data.default_collate`` by default. A data
            collator of transformers will do.

    Raises:
        InputTypeError, ConfigError: An argument is of the wrong kind, or ``route_keys`` is empty.
        UnknownLevelError: The compiler has no such level.

    Example::

        collate = Collator(RoutingCompiler(config), {"language": "lang"}, DataCollatorWithPadding(tokenizer))
        for batch in DataLoader(dataset, 64, collate_fn=collate):
            output = model(**batch)  # batch["plan"] is a RoutingPlan
    """

    def __init__(
        self,
        compiler: RoutingCompiler,
        route_keys: Mapping[str, Hashable] | Sequence[str],
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:
        if not isinstance(compiler, RoutingCompiler):
            raise InputTypeError(f"'compiler' must be a RoutingCompiler (got {type(compiler).__name__})")
        if isinstance(route_keys, str) or not isinstance(route_keys, (Mapping, Sequence)):
            raise InputTypeError(f"'route_keys' must be a mapping of levels to keys, or levels (got {route_keys!r})")
        keys = dict(route_keys) if isinstance(route_keys, Mapping) else {level: level for level in route_keys}
        if not keys:
            raise ConfigError("'route_keys' must have a level (got none)")
        levels = [level.name for level in compiler.layout.levels]
        if unknown := [level for level in keys if level not in levels]:
            raise UnknownLevelError(
                f"'route_keys' must have levels of the compiler (got {listed(unknown)}; {nearest(unknown, levels)})"
            )
        if not callable(collate):
            raise InputTypeError(f"'collate' must be callable (got {collate!r})")
        self.compiler = compiler
        self.route_keys = keys
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        """The batch of some samples.

        Returns:
            The collated samples with ``"plan"`` for one more key; ``(collated, plan)`` if they are no mapping.

        Raises:
            InputTypeError: A sample has no route.
            CELMoEError: The routes can't be compiled: see `RoutingCompiler`.
        """
        routing: dict[str, list[Any]] = {level: [] for level in self.route_keys}
        for number, sample in enumerate(samples):
            for level, key in self.route_keys.items():
                try:
                    routing[level].append(sample[key])
                except (KeyError, IndexError, TypeError):
                    has = f"keys {listed(sample)}" if isinstance(sample, Mapping) else type(sample).__name__
                    raise InputTypeError(
                        f"samples must have a route of level {level!r} under {key!r} (got {has} for sample {number})"
                    ) from None
        plan = self.compiler(routing, len(samples))
        taken = set(self.route_keys.values())
        rest = [
            {key: value for key, value in sample.items() if key not in taken} if isinstance(sample, Mapping) else sample
            for sample in samples
        ]
        collated = self.collate(rest)
        if not isinstance(collated, Mapping):
            return collated, plan
        collated[PLAN] = plan  # type: ignore[index]  # a dict, or BatchEncoding of transformers
        return collated
