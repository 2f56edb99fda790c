"""Hypothesis strategies: whole cases, small and plain enough to be read when one fails.

A `Case` is plain data. `Case.model` and `Case.inputs` make the same modules and tensors of it every time, from its
seed: hypothesis draws structure, a generator draws numbers (bounded, so that sums stay finite).

Axes: B samples, D width; the axes between them are called trailing.
"""

from __future__ import annotations

import itertools
import random
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from hypothesis import Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn

from celmoe import CELMoEConfig, ExpertConfig, HierarchicalCELMoE, HierarchyLevelConfig, RoutingCompiler, Rows, Shared
from tests.experts import KINDS, NUM_TOKENS, Encoding, Features, Pair, Plain, Registry

# Names that a path, a checkpoint, a regular expression or an nn.ModuleDict could trip over.
NAMES = (
    *("de", "fr", "b", "a", "B", "expert_1", "expert_10", "expert_2", "0"),
    *("zh.Hant", "to", "keys", "training", ".", "..", "%2E", "zh%2EHant", "a b", "weights/x", "ü", "名", " "),
)
WIDTHS = (4, 6)
# Samples with several experts, or none; for a whole batch, too.
MIXED_FORMS = ("mixed", "mixed", "mixed ids", "one mixed", "none")
FORMS = ("list", "tuple", "ids", "id tuple", "np str", "np object", "np int64", "np uint8", "tensor", "tensor int32")
# Contexts with a batch-aligned value other than a dense tensor: experts that read it do not run as one.
IRREGULAR = ("lists", "arrays", "marked")
CONTEXTS = (
    *("none", "rows", "dict", "nested", "dataclass", "named tuple", "list", "shared"),
    *("encoding", "object", "chain", *IRREGULAR),
)
MASKS = ("none", "bool", "float", "samples", "grad")
LAYOUTS = ("contiguous", "expanded", "transposed", "strided", "not a leaf")
FUSIONS = ("learned", "position_aware", "mean", "own")
OBJECTIVES = ("all", "fused", "last", "losses")


@dataclass(frozen=True)
class Expert:
    """One expert of a case."""

    name: str
    kind: str
    loss_weight: float = 1.0
    stop: bool = False
    scale: float | None = None
    parent: str | None = None


@dataclass(frozen=True)
class Level:
    """One level of a case."""

    name: str
    experts: tuple[Expert, ...]
    fallback: str | None = None
    enabled: bool = True


@dataclass(frozen=True)
class Routes:
    """One level's routes: ids by sample, and the form in which the caller passes them."""

    ids: tuple[int, ...]
    form: str = "list"

    def __repr__(self) -> str:
        runs = [(each, len(list(run))) for each, run in itertools.groupby(self.ids)]
        ids = " + ".join(f"({each},) * {length}" for each, length in runs) or "()"
        return f"Routes({ids if len(runs) < len(self.ids) else self.ids}, {self.form!r})"


@dataclass
class Inputs:
    """The inputs of a model's call, and the leaves whose gradients are compared."""

    hidden: torch.Tensor
    routing: Any
    context: Any
    mask: torch.Tensor | None
    leaves: dict[str, torch.Tensor]


class OwnFusion(nn.Module):
    """A user's fusion that works in place on its own tensors."""

    def __init__(self, num_levels: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.randn(num_levels))

    def forward(self, level_hiddens: Sequence[torch.Tensor]) -> torch.Tensor:
        total = level_hiddens[0] * self.weights[0]
        for hidden, weight in zip(level_hiddens[1:], self.weights[1:], strict=True):
            total = total + hidden * weight
        return total.mul_(2)


@dataclass(frozen=True)
class Case:
    """One model and the batches that it is given.

    Attributes:
        levels: The hierarchy.
        batch_size: Samples of batch 0. Every later batch has the first half of the one before, so that some experts
            stay away from then on.
        routing: By enabled level; a missing level is left out of the routing.
        trailing: Axes between samples and width.
        planned: True if the routing is compiled by hand first.
        one_name: Levels whose routes are passed as a bare name.
        draws_integers: True if hidden states are integers.
    """

    levels: tuple[Level, ...]
    batch_size: int
    routing: Mapping[str, Routes]
    trailing: tuple[int, ...] = ()
    width: int = 4
    dtype: torch.dtype = torch.float32
    planned: bool = False
    one_name: frozenset[str] = frozenset()
    context: str = "none"
    mask: str = "none"
    layout: str = "contiguous"
    fusion: str = "mean"
    fusion_dropout: float = 0.0
    hidden_grad: bool = True
    training: bool = True
    draws_integers: bool = False
    objective: str = "all"
    seed: int = 0

    @property
    def kinds(self) -> set[str]:
        """The kinds of all experts of enabled levels."""
        return {expert.kind for level in self.enabled for expert in level.experts}

    @property
    def enabled(self) -> tuple[Level, ...]:
        """The enabled levels."""
        return tuple(level for level in self.levels if level.enabled)

    def config(self) -> CELMoEConfig:
        """The config."""
        return CELMoEConfig(
            self.width,
            [
                HierarchyLevelConfig(
                    level.name,
                    {
                        expert.name: ExpertConfig(
                            f"label of {expert.name}",
                            expert.loss_weight,
                            expert.stop,
                            {"kind": expert.kind},
                            gradient_scale=expert.scale,
                            parent=expert.parent,
                        )
                        for expert in level.experts
                    },
                    level.fallback,
                    level.enabled,
                )
                for level in self.levels
            ],
            use_learned_fusion=self.fusion != "mean",
            fusion_dropout=self.fusion_dropout,
            fusion_type="position_aware" if self.fusion == "position_aware" else "learned",
            fusion_max_positions=2,
        )

    def model(self, engine: str = "auto") -> HierarchicalCELMoE:
        """The model, the same one every time."""
        registry = Registry(self.width)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = HierarchicalCELMoE(
                self.config(),
                lambda level, expert, metadata: KINDS[str(metadata["kind"])].make(self.width, registry),
                OwnFusion(len(self.enabled)) if self.fusion == "own" else None,
                engine=engine,
            )
        return model.to(self.dtype).train(self.training)

    def inputs(self, step: int = 0, device: torch.device | None = None) -> Inputs:
        """Batch number ``step``, the same one every time, on the CPU or on another device."""
        batch_size = self.batch_size >> step
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        maker = _TensorMaker(generator, self.dtype, device)
        hidden = self._hidden(maker, batch_size)
        context = _context(self.context, maker, batch_size, tuple(hidden.shape), self.dtype)
        mask = _mask(self.mask, maker, tuple(hidden.shape))
        routing = self.routes(batch_size)
        if self.planned and device is not None:
            routing = routing.to(device)
        return Inputs(hidden, routing, context, mask, maker.leaves)

    def routes(self, batch_size: int) -> Any:
        """The routing as the caller passes it."""
        routing = {}
        for level in self.enabled:
            if level.name in self.one_name:
                routing[level.name] = level.experts[self.routing[level.name].ids[0]].name
            elif level.name in self.routing:
                names = [expert.name for expert in level.experts]
                routes = self.routing[level.name]
                in_form = _in_mixed_form if routes.form in MIXED_FORMS else _in_form
                routing[level.name] = in_form(routes.ids[:batch_size], names, routes.form)
        if self.planned:
            return RoutingCompiler(self.config())(routing, batch_size)
        return routing or None

    def _hidden(self, maker: _TensorMaker, batch_size: int) -> torch.Tensor:
        shape = (batch_size, *self.trailing, self.width)
        if self.draws_integers:
            return maker.integers(NUM_TOKENS, shape)
        match self.layout:
            case "expanded":
                return maker.leaf("hidden", (1, *shape[1:]), self.hidden_grad).expand(shape)
            case "transposed":
                return maker.leaf("hidden", shape[::-1], self.hidden_grad).permute(*reversed(range(len(shape))))
            case "strided":
                return maker.leaf("hidden", (2 * batch_size, *shape[1:]), self.hidden_grad)[::2]
            case "not a leaf":
                return maker.leaf("hidden", shape, self.hidden_grad) * 1
        return maker.leaf("hidden", shape, self.hidden_grad)


class _TensorMaker:
    """Draws tensors, and keeps those that get gradients by name."""

    def __init__(self, generator: torch.Generator, dtype: torch.dtype, device: torch.device | None) -> None:
        self.generator = generator
        self.dtype = dtype
        self.device = device
        self.leaves: dict[str, torch.Tensor] = {}

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        return torch.randn(tuple(shape), generator=self.generator, dtype=torch.float64).to(self.dtype).to(self.device)

    def integers(self, end: int, shape: Sequence[int]) -> torch.Tensor:
        return torch.randint(0, end, tuple(shape), generator=self.generator).to(self.device)

    def flags(self, shape: Sequence[int], likely: float) -> torch.Tensor:
        return (torch.rand(tuple(shape), generator=self.generator) < likely).to(self.device)

    def leaf(self, name: str, shape: Sequence[int], grad: bool = True) -> torch.Tensor:
        tensor = self.normal(shape).requires_grad_(grad)
        if grad:
            self.leaves[name] = tensor
        return tensor


def _context(kind: str, maker: _TensorMaker, batch_size: int, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
    # A shared tensor must not have the batch's length by chance: then only `Shared` keeps it whole.
    other = batch_size + 1
    match kind:
        case "none":
            return None
        case "rows":
            return maker.leaf("context", shape)
        case "dict":
            return {
                "row_hidden": maker.leaf("context.row_hidden", shape),
                "row_ids": maker.integers(NUM_TOKENS, (batch_size,)),
                "row_flags": maker.flags((batch_size, 2), 0.5),
                "all_table": maker.leaf("context.all_table", (other, 3)),
                "all_number": maker.leaf("context.all_number", ()),
                "temperature": 0.5,
                "label": "plain",
                "nothing": None,
            }
        case "nested":
            row = maker.leaf("context.row", (batch_size, 2))
            return {
                "inner": {"row": row, "deeper": [{"rows": (maker.leaf("context.deep", (batch_size,)), 2)}]},
                "again": row,
                "all_left": {"table": maker.leaf("context.table", (other,))},
                "features": Features(maker.normal((batch_size, 1)), maker.leaf("context.features", (2, other))),
            }
        case "dataclass":
            return Features(maker.leaf("context.scale", (batch_size, 3)), maker.normal((other,)))
        case "named tuple":
            return {"pair": Pair(maker.leaf("context.left", (batch_size, 1, 2)), maker.leaf("context.right", (other,)))}
        case "list":
            return [maker.leaf("context.0", (batch_size,)), 3, [maker.normal((batch_size, 2))], True]
        case "shared":
            return {
                "all_table": Shared(maker.leaf("context.table", (batch_size, 2))),
                "all_nested": {"table": Shared([maker.normal((batch_size,))])},
                "row": maker.leaf("context.row", (batch_size,)),
            }
    return _context_of_other_kinds(kind, maker, batch_size, other)


def _context_of_other_kinds(kind: str, maker: _TensorMaker, batch_size: int, other: int) -> Any:
    match kind:
        case "encoding":
            row = maker.leaf("context.row", (batch_size, 2))
            return Encoding({"row": row, "all_table": maker.leaf("context.table", (other,)), "again": {"row": row}})
        case "object":
            plain = Plain(maker.leaf("context.row", (batch_size,)), maker.leaf("context.table", (other, 2)))
            return {"plain": plain, "deep": Plain([MappingProxyType({"row": plain.row_scale})], 0.5)}
        case "chain":
            first = {"row_scale": maker.leaf("context.first", (batch_size, 2))}
            return ChainMap(
                first,
                {"row_scale": 1, "all_table": maker.normal((other,)), "row_flags": maker.flags((batch_size,), 0.5)},
            )
        case "lists":
            numbers = maker.normal((batch_size,)).tolist()
            return {
                "row": maker.leaf("context.row", (batch_size, 2)),
                "items_numbers": numbers,
                "deep": [{"items_pairs": tuple(zip(numbers, numbers[::-1], strict=True))}],
                "all_numbers": [0.5] * other,
            }
        case "arrays":
            return Encoding(
                {"items_array": maker.normal((batch_size, 3)).cpu().numpy(), "all_array": np.ones((other, 2))}
            )
        case "marked":
            return {
                "row": Rows(maker.leaf("context.row", (batch_size, 2))),
                "items_numbers": Rows(maker.normal((batch_size,)).tolist()),
                "all_table": Shared(maker.leaf("context.table", (batch_size, 2))),
            }
    raise AssertionError(kind)


def _mask(kind: str, maker: _TensorMaker, shape: tuple[int, ...]) -> torch.Tensor | None:
    match kind:
        case "none":
            return None
        case "bool":
            return maker.flags(shape[:-1], 0.7)
        case "float":
            return maker.normal(shape[:-1])
        case "samples":
            return maker.integers(5, shape[:1])
        case "grad":
            return maker.leaf("mask", shape[:-1])
    raise AssertionError(kind)


def _in_form(ids: Sequence[int], names: Sequence[str], form: str) -> Any:
    routes = [names[each] for each in ids]
    match form:
        case "list":
            return routes
        case "tuple":
            return tuple(routes)
        case "ids":
            return list(ids)
        case "id tuple":
            return tuple(ids)
        case "np str":
            return np.array(routes, dtype=np.str_)
        case "np object":
            return np.array(routes, dtype=object)
        case "np int64":
            return np.array(ids, dtype=np.int64)
        case "np uint8":
            return np.array(ids, dtype=np.uint8)
        case "tensor":
            return torch.tensor(ids, dtype=torch.int64)
        case "tensor int32":
            return torch.tensor(ids, dtype=torch.int32)
    raise AssertionError(form)


def _in_mixed_form(ids: Sequence[int], names: Sequence[str], form: str) -> Any:
    match form:
        case "mixed":
            return _mixed(ids, names)
        case "mixed ids":
            return tuple(_mixed(ids, range(len(names))))
        case "one mixed":
            return dict(zip(names, (0.25, 0.5, 0.125), strict=False))
        case "none":
            return None
    raise AssertionError(form)


def _mixed(ids: Sequence[int], experts: Sequence[Any]) -> list[Any]:
    """Routes of which a part has several experts, one with a weight, or none."""
    rng = random.Random(repr(ids))
    found: list[Any] = []
    for own in ids:
        drawn = rng.sample(range(len(experts)), rng.randint(1, min(3, len(experts))))
        shares = {experts[each]: rng.choice([0.1, 0.5, 0.7, 1.0, 0.0, 2.5]) for each in drawn}
        shares[experts[own]] = rng.choice([0.3, 1.0])
        found.append(rng.choice([experts[own], experts[own], None, shares]))
    return found


# Kinds that meet only together or on certain inputs would seldom do so by chance.
THEMES: dict[str, tuple[str, ...]] = {
    "any": tuple(KINDS),
    "any again": tuple(KINDS),
    "integers": tuple(KINDS),
    "context": ("reads_context", "context_view", "embedding", "embeddings", "id_arithmetic", "in_place_surroundings"),
    "shared": ("reads_context",),
    "mask": ("reads_mask", "in_place_surroundings", "transformer", "attention", "encoder_layer", "masked_losses"),
    "results": ("losses", "aux", "non_contiguous", "own_parameter", "own_buffer", "shared_module", "identity"),
    "in place": ("in_place", "in_place_discarded", "in_place_relu", "in_place_surroundings", "identity"),
    "random": ("dropout", "linear"),
    "dtypes": ("double", "brain", "scale", "identity", "in_place"),
    "one architecture": ("linear", "mlp", "scale", "transformer", "gru", "conv"),
}


def inferable(levels: Sequence[Level], position: int) -> bool:
    """True if the level there may be left out of the routing, for any routes of the level below."""
    level = levels[position]
    if len(level.experts) == 1 or level.fallback is not None:
        return True
    below = next((index for index in range(position + 1, len(levels)) if levels[index].enabled), None)
    if below is None:
        return False
    return all(_ancestor(levels, expert, below, position) is not None for expert in levels[below].experts)


def _ancestor(levels: Sequence[Level], expert: Expert, start: int, end: int) -> str | None:
    parent = expert.parent
    for index in range(start - 1, end, -1):
        parent = next((each.parent for each in levels[index].experts if each.name == parent), None)
    return parent


SCALES = st.sampled_from([None, None, None, 0.0, -1.0, 0.25, 0.5, 1.0, 3.0])
LOSS_WEIGHTS = st.sampled_from([1.0, 1.0, 0.0, 0.5, -2.0])
BATCH_SIZES = st.one_of(st.integers(0, 12), st.sampled_from([0, 1, 2, 3, 17, 31, 60]), st.just(130))
TRAILINGS = st.sampled_from([(), (), (1,), (3,), (3,), (2, 3), (5,)])


@st.composite
def hierarchies(draw: st.DrawFn, kinds: Sequence[str]) -> tuple[Level, ...]:
    """One to four levels, at least one of them enabled."""
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
    enabled = [draw(st.integers(0, 3)) > 0 for _ in names]
    if not any(enabled):
        enabled[-1] = True
    # A level of one architecture is the common case, and the one that grouping is about.
    level_kinds = [draw(st.one_of(st.none(), st.sampled_from(list(kinds)))) for _ in names]
    all_detached = [draw(st.integers(0, 7)) == 0 for _ in names]
    levels: list[Level] = []
    for position, name in enumerate(names):
        experts = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
        above = [each.name for each in levels[-1].experts] if position else []
        parents = st.sampled_from([None, *above] if not above or draw(st.booleans()) else above)
        made = [
            Expert(
                expert,
                level_kinds[position] or draw(st.sampled_from(list(kinds))),
                draw(LOSS_WEIGHTS),
                all_detached[position] or draw(st.integers(0, 5)) == 0,
                None if all_detached[position] else draw(SCALES),
                draw(parents),
            )
            for expert in experts
        ]
        fallback = draw(st.one_of(st.none(), st.sampled_from(experts)))
        levels.append(Level(name, tuple(made), fallback, enabled[position]))
    return tuple(levels)


@st.composite
def route_ids(draw: st.DrawFn, batch_size: int, num_experts: int, sorted_ids: Sequence[int]) -> tuple[int, ...]:
    """Ids by sample: drawn one by one, random, skewed to one expert, sorted in running order, in blocks, or all one."""
    pattern = draw(st.sampled_from(["drawn", "random", "skewed", "sorted", "blocks", "constant"]))
    if pattern == "constant" or num_experts == 1:
        return (draw(st.integers(0, num_experts - 1)),) * batch_size
    if pattern == "drawn" and batch_size <= 12:
        ids = st.integers(0, num_experts - 1)
        return tuple(draw(st.lists(ids, min_size=batch_size, max_size=batch_size)))
    rng = random.Random(draw(st.integers(0, 1000)))
    if pattern == "skewed":
        often = rng.randrange(num_experts)
        return tuple(often if rng.random() < 0.9 else rng.randrange(num_experts) for _ in range(batch_size))
    if pattern == "blocks":
        return tuple(num_experts * sample // max(batch_size, 1) for sample in range(batch_size))
    ids_drawn = [rng.randrange(num_experts) for _ in range(batch_size)]
    if pattern == "sorted":
        return tuple(sorted(ids_drawn, key=sorted_ids.index))
    return tuple(ids_drawn)


@st.composite
def cases(draw: st.DrawFn, *, row_wise: bool = False, stochastic: bool = True, mixed: bool = False) -> Case:
    """Whole cases.

    Args:
        row_wise: True for experts whose rows depend on nothing else.
        stochastic: True if experts and fusions may drop out.
        mixed: True if samples may have several experts, or none.
    """
    theme = draw(st.sampled_from(list(THEMES)))
    mode = theme if theme in {"dtypes", "integers"} else "floats"
    batch_size = draw(BATCH_SIZES)
    trailing = draw(TRAILINGS)
    if mode == "floats" and draw(st.integers(0, 20)) == 0:
        trailing = (0,)
    kinds = [
        name
        for name, kind in KINDS.items()
        if (kind.row_wise or not row_wise)
        and (stochastic or not kind.stochastic)
        and not (kind.needs_positions and 0 in trailing)
        and (kind.any_dtype if mode == "dtypes" else not kind.changes_dtype)
        and (kind.takes_integers if mode == "integers" else True)
    ]
    levels = draw(hierarchies([name for name in kinds if name in THEMES[theme]] or kinds))
    fusions = ["mean", "own"] if mode == "dtypes" else ["mean"] if mode == "integers" else list(FUSIONS)
    if len(trailing) > 1 and "position_aware" in fusions:
        fusions.remove("position_aware")
    case = Case(
        levels=levels,
        batch_size=batch_size,
        routing={},
        trailing=trailing,
        width=draw(st.sampled_from(WIDTHS)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        planned=draw(st.booleans()),
        context=draw(st.sampled_from({"context": CONTEXTS[1:], "shared": ["shared"]}.get(theme, CONTEXTS))),
        mask=draw(st.sampled_from(MASKS[1:] if theme == "mask" else MASKS)),
        layout=draw(st.sampled_from(["contiguous", *LAYOUTS])),
        fusion=draw(st.sampled_from(fusions)),
        fusion_dropout=draw(st.sampled_from([0.0, 0.3])) if stochastic else 0.0,
        hidden_grad=draw(st.integers(0, 3)) > 0,
        training=draw(st.integers(0, 4)) > 0,
        draws_integers=mode == "integers",
        objective=draw(st.sampled_from(["all", *OBJECTIVES])),
        seed=draw(st.integers(0, 100)),
    )
    return draw(with_routing(case, mixed=mixed))


@st.composite
def with_routing(draw: st.DrawFn, case: Case, *, mixed: bool = False) -> Case:
    """The case, with routes for its levels in any legal form, or without if they can be inferred."""
    routing: dict[str, Routes] = {}
    one_name = set()
    # If levels nest, an expert's siblings stand together: the order of the level below is that of the level itself.
    nested = draw(st.integers(0, 3)) == 0
    previous: Sequence[int] | None = None
    for position, level in enumerate(case.levels):
        if not level.enabled or (inferable(case.levels, position) and draw(st.booleans())):
            continue
        names = [expert.name for expert in level.experts]
        sorted_ids = sorted(range(len(names)), key=names.__getitem__)
        ids = draw(route_ids(case.batch_size, len(names), sorted_ids))
        if nested and previous is not None:
            ids = _nested_in(previous, sorted_ids)
        if nested:
            previous = [sorted_ids.index(each) for each in ids]
        if ids and len(set(ids)) == 1 and draw(st.booleans()):
            one_name.add(level.name)
        forms = FORMS
        # Integers that pass through are no hidden states to train on.
        if mixed and not case.draws_integers and level.name not in one_name and draw(st.integers(0, 2)) == 0:
            forms = MIXED_FORMS
        routing[level.name] = Routes(ids, draw(st.sampled_from(forms)))
    return replace(case, routing=routing, one_name=frozenset(one_name))


def _nested_in(codes_above: Sequence[int], sorted_ids: Sequence[int]) -> tuple[int, ...]:
    """Ids whose running order is that of the level above."""
    present = sorted(set(codes_above))
    per_parent = [sorted_ids[min(rank, len(sorted_ids) - 1)] for rank in range(len(present))]
    return tuple(per_parent[present.index(code)] for code in codes_above)


def of_siblings(case: Case) -> Case:
    """The case with one class a level: kind, flag and scale are the first expert's, so that more of them run as one."""
    levels = tuple(
        replace(
            level,
            experts=tuple(replace(each, kind=first.kind, stop=first.stop, scale=first.scale) for each in level.experts),
        )
        for level in case.levels
        for first in level.experts[:1]
    )
    return replace(case, levels=levels)


def examples(number: int) -> settings:
    """Settings for this many examples under the default profile, and as many times more as another profile draws."""
    return settings(max_examples=max(1, number * settings.default.max_examples // 100))


_drawn: list[list[Case]] = []


def pool(number: int = 2000) -> Iterator[Case]:
    """Cases that `cases` draws, the same ones every time: tests look for examples without a search and its shrinking.

    They are drawn when they are asked for: most questions are answered by the first few hundred.
    """
    # Hypothesis varies its earlier draws: many short runs hold more kinds of cases than a long one.
    for start in range(number // 50):
        if start == len(_drawn):
            _drawn.append(_run_of_cases(start))
        yield from _drawn[start]


def _run_of_cases(start: int) -> list[Case]:
    drawn: list[Case] = []

    @settings(max_examples=50, phases=[Phase.generate])
    @given(case=cases())
    def collect(case: Case) -> None:
        drawn.append(case)

    seed(start)(collect)()
    return drawn
