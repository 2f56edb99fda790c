"""Losses of many scopes, gathered into one weighted total."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from .config import require_finite
from .errors import ConfigError, ConfigTypeError, InputError, InputTypeError, UnknownLevelError, listed, nearest
from .experts import ExpertContext
from .names import scope_key
from .outputs import CELMoEOutput, LevelOutput

LossMap: TypeAlias = Mapping[str, torch.Tensor]
LossResult: TypeAlias = torch.Tensor | LossMap
LossCallable: TypeAlias = Callable[[CELMoEOutput, object | None, ExpertContext], LossResult]
LevelLossCallable: TypeAlias = Callable[[LevelOutput, CELMoEOutput, object | None, ExpertContext], LossResult]
BridgeLossCallable: TypeAlias = Callable[
    [LevelOutput, LevelOutput, CELMoEOutput, object | None, ExpertContext], LossResult
]


# The key of a level called ``global``, if a global loss has the same name as its loss.
_LEVEL_GLOBAL = ".%67lobal"


@dataclass
class LossTerm:
    """One loss: its name, a scalar tensor, its weight in the total, and its scope.

    ``scope`` is ``"expert"``, ``"global"``, a level's name, or ``"<parent>-><child>"``.
    """

    name: str
    value: torch.Tensor
    weight: float | torch.Tensor = 1.0
    scope: str = "global"

    def __post_init__(self) -> None:
        _require_weight(self.weight)
        if not isinstance(self.value, torch.Tensor):
            if not isinstance(self.value, numbers.Real):
                raise InputTypeError(f"'value' of loss {self.name!r} must be a tensor or a number (got {self.value!r})")
            self.value = torch.as_tensor(self.value)


class LossBundle:
    """Loss terms in the order in which they were added.

    Args:
        terms: The first terms.
    """

    def __init__(self, terms: list[LossTerm] | None = None) -> None:
        self.terms = list(terms) if terms is not None else []
        # The total of computed losses that are none.
        self._of_no_losses: torch.Tensor | None = None

    def add(self, name: str, value: torch.Tensor, weight: float | torch.Tensor = 1.0, scope: str = "global") -> None:
        """Append a term.

        Args:
            name: The term's name in `as_dict`.
            value: A scalar; a plain number becomes a tensor.
            weight: A finite number, or a tensor, which may be learned.
            scope: The term's origin; see `LossTerm`.

        Raises:
            ConfigError, ConfigTypeError: The weight is not finite, or no number.
            InputTypeError: The value is neither tensor nor number.
        """
        self.terms.append(LossTerm(name, value, weight, scope))

    @property
    def total(self) -> torch.Tensor:
        """The weighted sum of all terms, a differentiable scalar.

        Experts return no losses for a batch without samples: computed losses then total zero, and can run backward. So
        do losses averaged over samples of which no expert returned a loss.

        Raises:
            InputError: There is no term.
        """
        if not self.terms:
            if self._of_no_losses is not None:
                return self._of_no_losses
            raise InputError("'terms' must hold at least one loss term (got none)")
        total = self.terms[0].value.new_zeros(())
        for term in self.terms:
            total = total + (term.value if _is_one(term.weight) else term.weight * term.value)
        return total

    def as_dict(self) -> dict[str, float]:
        """The unweighted values by name, read from each device in one transfer; of two equal names, the later wins."""
        positions_by_device: dict[torch.device, list[int]] = {}
        for position, term in enumerate(self.terms):
            positions_by_device.setdefault(term.value.device, []).append(position)
        values = [0.0] * len(self.terms)
        for positions in positions_by_device.values():
            scalars = [_scalar(self.terms[position]) for position in positions]
            dtype = scalars[0].dtype
            for scalar in scalars:
                dtype = torch.promote_types(dtype, scalar.dtype)
            read = torch.stack([scalar.to(dtype) for scalar in scalars]).tolist()
            for position, value in zip(positions, read, strict=True):
                values[position] = float(value)
        return {term.name: value for term, value in zip(self.terms, values, strict=True)}


class CELMoELossAPI:
    """Losses over outputs, registered once and computed for every batch.

    A callable returns a scalar tensor, or a mapping of names to scalars: one term each, named ``<name>.<item>``.
    `celmoe.names.scope_key` writes the levels' names in terms' names, so no two scopes share a term's name. All else is
    as in celmoe-vp: a loss named like an expert's loss, or like another loss's item, shares a term's name.

    By default the total sums the losses of all experts present, each times its `ExpertConfig.loss_weight`. A batch that
    meets more experts has a larger total. ``normalize="samples"`` averages over samples instead. Each loss of an expert
    then has the weight::

        loss_weight * n / B

    with n samples of the expert at its level (of samples with several experts, their weights), and B samples in the
    batch. If each loss is the mean over its expert's samples, a level adds exactly the mean over the batch, whichever
    experts the batch meets::

        1 / B * sum(loss_weight[e[i]] * loss[i])  # over samples i with experts e[i]

    A mean over positions counts by samples, too, however many positions each has. A sum over samples would count n
    twice: let experts return means. A loss that no sample has a part in, such as a penalty on parameters, counts by the
    expert's share. Global, level and bridge losses keep their weights: each is one loss for the batch.

    On several ranks, n and B are of the rank's own batch, and ``joined_mean(total * B, B)`` is the mean over all ranks'
    samples. Under `shard_experts` they are of all ranks that share experts: the mean of these ranks' totals is the
    total of one process, so the objective adds the total as it is.

    Args:
        normalize: ``"samples"``, or ``None`` for the sum over experts.

    Raises:
        ConfigError: ``normalize`` is something else.
    """

    def __init__(self, *, normalize: Literal["samples"] | None = None) -> None:
        if normalize not in (None, "samples"):
            raise ConfigError(f"'normalize' must be None or 'samples' (got {normalize!r})")
        self._normalize = normalize
        self.global_losses: list[tuple[str, float | torch.Tensor, LossCallable]] = []
        self.level_losses: dict[str, list[tuple[str, float | torch.Tensor, LevelLossCallable]]] = {}
        self.bridge_losses: list[tuple[str, str, str, float | torch.Tensor, BridgeLossCallable]] = []

    @property
    def normalize(self) -> str | None:
        """``"samples"`` or ``None``, as given."""
        return self._normalize

    def add_global(self, name: str, fn: LossCallable, weight: float | torch.Tensor = 1.0) -> None:
        """Add a loss over the whole output: ``fn(output, targets, context)``, named ``global.<name>``."""
        _require_callable(name, fn)
        _require_weight(weight)
        self.global_losses.append((name, weight, fn))

    def add_level(self, level_name: str, name: str, fn: LevelLossCallable, weight: float | torch.Tensor = 1.0) -> None:
        """Add a loss over one level: ``fn(level_output, output, targets, context)``, named ``<level>.<name>``."""
        _require_callable(name, fn)
        _require_weight(weight)
        self.level_losses.setdefault(level_name, []).append((name, weight, fn))

    def add_bridge(
        self, parent_level: str, child_level: str, name: str, fn: BridgeLossCallable, weight: float | torch.Tensor = 1.0
    ) -> None:
        """Add a loss between two levels, named ``<parent>-><child>.<name>``.

        ``fn`` is called with ``(parent_output, child_output, output, targets, context)``.
        """
        _require_callable(name, fn)
        _require_weight(weight)
        self.bridge_losses.append((parent_level, child_level, name, weight, fn))

    def compute(self, output: CELMoEOutput, targets: object | None = None, context: ExpertContext = None) -> LossBundle:
        """All terms of one output: the experts' own, then global, level and bridge losses.

        Raises:
            UnknownLevelError: A loss was registered for a level that the output does not have; raised before any loss
                runs.
            InputError: An expert's loss has no share in ``loss_shares``, and losses are averaged over samples; raised
                before any loss runs.
            InputTypeError: A loss returned neither tensor nor number.
        """
        self._check_levels(output)
        weights = self._expert_weights(output)
        bundle = LossBundle()
        for name, value in output.losses.items():
            bundle.add(name, value, weights[name], "expert")
        for name, weight, global_fn in self.global_losses:
            _add(bundle, "global", name, weight, global_fn(output, targets, context), "global")
        for level_name, specs in self.level_losses.items():
            level = output.levels[level_name]
            for name, weight, level_fn in specs:
                is_taken = level_name == "global" and any(name == other for other, _, _ in self.global_losses)
                key = _LEVEL_GLOBAL if is_taken else scope_key(level_name)
                _add(bundle, level_name, name, weight, level_fn(level, output, targets, context), key)
        for parent_name, child_name, name, weight, bridge_fn in self.bridge_losses:
            parent, child = output.levels[parent_name], output.levels[child_name]
            result = bridge_fn(parent, child, output, targets, context)
            key = f"{scope_key(parent_name)}->{scope_key(child_name)}"
            _add(bundle, f"{parent_name}->{child_name}", name, weight, result, key)
        hiddens = [level.hidden for level in output.levels.values()]
        if not bundle.terms and hiddens and (self.normalize or hiddens[0].shape[:1] == (0,)):
            # A rank without losses can then run a backward pass, like the ranks that have some.
            bundle._of_no_losses = sum((hidden[:0].sum() for hidden in hiddens[1:]), hiddens[0][:0].sum())
        return bundle

    def _expert_weights(self, output: CELMoEOutput) -> dict[str, float]:
        """The weight in the total of each loss of an expert."""
        weights = {name: output.loss_weights.get(name, 1.0) for name in output.losses}
        if self.normalize is None:
            return weights
        if missing := [name for name in weights if name not in output.loss_shares]:
            raise InputError(
                f"'output.loss_shares' must have all of 'output.losses' for normalize='samples' (got none for "
                f"{listed(missing)}; set the share of the batch's samples that each is of)"
            )
        return {name: weight * output.loss_shares[name] for name, weight in weights.items()}

    def _check_levels(self, output: CELMoEOutput) -> None:
        asked = [(level, "level", name) for level, specs in self.level_losses.items() for name, _, _ in specs]
        for parent, child, name, _, _ in self.bridge_losses:
            asked += [(parent, "bridge", name), (child, "bridge", name)]
        if unknown := [each for each in asked if each[0] not in output.levels]:
            losses = dict.fromkeys(f"{kind} loss {name!r}" for _, kind, name in unknown)
            levels = [*dict.fromkeys(level for level, _, _ in unknown)]
            raise UnknownLevelError(
                f"{', '.join(losses)} must be registered for levels of the output (got {listed(levels)}; "
                f"{nearest(levels, output.levels)})"
            )


def _scalar(term: LossTerm) -> torch.Tensor:
    if term.value.numel() != 1:
        raise InputError(f"'value' of loss {term.name!r} must be a scalar (got shape {tuple(term.value.shape)})")
    return term.value.detach().reshape(())


def _add(bundle: LossBundle, scope: str, name: str, weight: float | torch.Tensor, result: LossResult, key: str) -> None:
    """Add the result of a scope's loss, under names that begin with ``key``."""
    if isinstance(result, Mapping):
        for item, value in result.items():
            bundle.add(f"{key}.{name}.{item}", value, weight, scope)
    else:
        bundle.add(f"{key}.{name}", result, weight, scope)


def _require_callable(name: str, fn: object) -> None:
    if not callable(fn):
        raise ConfigTypeError(f"'fn' of loss {name!r} must be callable (got {fn!r})")


def _require_weight(weight: object) -> None:
    # A tensor may be a learned weight: reading its value would wait for its device.
    if not isinstance(weight, torch.Tensor):
        require_finite("weight", weight)


def _is_one(weight: object) -> bool:
    return not isinstance(weight, torch.Tensor) and weight == 1.0
