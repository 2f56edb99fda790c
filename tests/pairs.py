"""A model beside its reference: the calls that both take, and a comparison of the two."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig, CELMoEError, ExpertModule, ExpertResult, HierarchicalCELMoE, RoutingCompiler
from celmoe.names import name_key
from celmoe.optim import load_state_by_name, state_by_name
from celmoe.reference import reference_forward
from celmoe.stacked.naming import named_tensors
from celmoe.stacked.stack import slot_of
from tests.alone import KINDS, OPTIMIZERS, Alone, Choice, Expert, Level, RefusedError
from tests.lifecycle import Narrow, Wide, assert_same, picture

WIDTH = 4
# Absolute, by dtype: values are around 1. The reference takes over the model's float32 values after each comparison.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 2e-4}


class Adapted(ExpertModule):
    """Reads a base that is not trained, and has a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, batch):
        out = batch.hidden + self.down(torch.tanh(self.base(batch.hidden)))
        return ExpertResult(out, losses={"size": out.square().sum()})


CLASSES = {"wide": Wide, "narrow": Narrow, "adapted": Adapted}
# By name, the model's optimizer, and the reference's.
MAKERS: dict[str, tuple[Any, str]] = {
    "AdamW": (celmoe.optim.AdamW, "AdamW"),
    "amsgrad": (celmoe.optim.AdamW, "amsgrad"),
    "Adam": (celmoe.optim.Adam, "Adam"),
    "SGD": (celmoe.optim.SGD, "SGD"),
    "nesterov": (celmoe.optim.SGD, "nesterov"),
    "torch AdamW": (torch.optim.AdamW, "AdamW"),
    "torch SGD": (torch.optim.SGD, "SGD"),
    "torch Adagrad": (torch.optim.Adagrad, "Adagrad"),
}


def factory(_level: str, _name: str, metadata: Any) -> nn.Module:
    return CLASSES[metadata["kind"]]()


class Shape(NamedTuple):
    """A hierarchy to begin with.

    Attributes:
        levels: By level, its experts' parents by name.
        fallbacks: By level, its fallback.
        disabled: The levels that no model has.
    """

    levels: Mapping[str, Mapping[str, str | None]]
    fallbacks: Mapping[str, str]
    disabled: Collection[str] = ()


SHAPES = {
    "families": Shape(
        {
            "family": dict.fromkeys(("slavic", "romance", "other")),
            "language": {
                **dict.fromkeys(("ru", "pl", "uk"), "slavic"),
                **dict.fromkeys(("it", "es"), "romance"),
                **dict.fromkeys(("fi", "hu"), "other"),
            },
        },
        {"family": "other"},
    ),
    "alone": Shape({"lang.uage": dict.fromkeys(("zh.Hant", "to", "x", "keys"))}, {"lang.uage": "to"}),
    "disabled between": Shape(
        {
            "area": dict.fromkeys(("north", "south")),
            "family": {"slavic": "north", "romance": "south"},
            "language": {"ru": "slavic", "it": "romance", "es": "romance", "eo": None},
        },
        {"area": "south"},
        ("family",),
    ),
    "one above": Shape({"core": {"only": None}, "language": dict.fromkeys(("a", "b", "[ab]", "r*"))}, {}),
    "three": Shape(
        {
            "a": dict.fromkeys(("a", "b")),
            "b": {"a": "b", "b": "a", "c": "b"},
            "c": {"a": "c", "b": "b", "c": None, "d": "a", "e": "c"},
        },
        {},
    ),
}


class Saved(NamedTuple):
    """The saved state of a pair.

    Attributes:
        state: The model's ``state_dict``, as `torch.save` writes it.
        optimizer: The optimizer's state by name.
        alone: A copy of the reference.
    """

    state: bytes
    optimizer: Any
    alone: Alone

    def read(self) -> Any:
        """The ``state_dict``."""
        return torch.load(io.BytesIO(self.state), weights_only=True)


# Ways to route a level: from the names drawn for each sample to the caller's argument, and to the choices it means.
Way = Callable[[Level, Sequence[str], random.Random], tuple[Any, Sequence[Choice] | Choice]]


UNKNOWN = "some unknown"


def _single(names: Sequence[str]) -> list[Choice]:
    return [{name: 1.0} for name in names]


def _ids(level: Level, names: Sequence[str]) -> list[int]:
    known = [*level.experts]
    return [known.index(name) for name in names]


def _one(level: Level, names: Sequence[str], _: random.Random) -> tuple[Any, Choice]:
    name = (names or [*level.experts])[0]
    return name, {name: 1.0}


def _mixture(level: Level, name: str, numbers: random.Random, *, by_id: bool = False) -> tuple[Any, Choice]:
    """A route of one sample, and its choice."""
    other, weight = numbers.choice([*level.experts]), numbers.choice([0.25, 0.7])
    choice = numbers.choice([{}, {name: 1.0}, {name: 2.0}, {name: weight}, {name: 1 - weight, other: weight}])
    keys = {each: _ids(level, [each])[0] if by_id else each for each in level.experts}
    route: Any = {keys[each]: own for each, own in choice.items()}
    if not route:
        route = None
    elif route == {keys[name]: 1.0} and numbers.random() < 0.5:
        route = keys[name]
    elif other != name and other not in choice:
        # A weight of zero is none.
        route[keys[other]] = 0.0
    return route, choice


def _mixed(level: Level, names: Sequence[str], numbers: random.Random) -> tuple[Any, Sequence[Choice]]:
    by_id = numbers.random() < 0.5
    drawn = [_mixture(level, name, numbers, by_id=by_id) for name in names]
    return [route for route, _ in drawn], [choice for _, choice in drawn]


def _unknown(level: Level, names: Sequence[str], numbers: random.Random) -> tuple[Any, Sequence[Choice]]:
    given = [numbers.choice([name, "nobody"]) for name in names]
    return given, _single(given)


WAYS: dict[str, Way] = {
    "names": lambda _, names, __: ([*names], _single(names)),
    "tuple": lambda _, names, __: (tuple(names), _single(names)),
    "array of names": lambda _, names, __: (np.array([*names], dtype=object), _single(names)),
    "ids": lambda level, names, _: (_ids(level, names), _single(names)),
    "array of ids": lambda level, names, _: (np.array(_ids(level, names), dtype=np.int32), _single(names)),
    "tensor": lambda level, names, _: (torch.tensor(_ids(level, names), dtype=torch.int64), _single(names)),
    "one": _one,
    "mixed": _mixed,
    "one mixture": lambda level, names, numbers: _mixture(level, (names or [*level.experts])[0], numbers),
    UNKNOWN: _unknown,
}
LEFT_OUT = "left out"
# Forms of the routing that the model gets.
FORMS = ("routing", "plan", "plan of a compiler", "pickled plan", "cut plan", "joined plan")


class Batch(NamedTuple):
    """A batch.

    Attributes:
        hidden: ``[B, ..., D]``.
        routing: The caller's routing.
        given: The choices that it means.
        has_unknown: True if unknown names must go to the fallback.
    """

    hidden: torch.Tensor
    routing: dict[str, Any]
    given: dict[str, Sequence[Choice] | Choice]
    has_unknown: bool


class Pair:
    """A model and its reference.

    Args:
        shape: A key of `SHAPES`.
        optimizer: A key of `MAKERS`.
        engine: The model's engine.
        seed: The seed of the experts' values.
        is_stacked: True for a model with stacks.
        has_groups: True for learning rates by expert.
        has_fusion: True for a learned fusion.

    Attributes:
        model: The model.
        optimizer: Its optimizer.
        alone: The reference.
        has_factory: False after the model was pickled.
        is_in_order: True if ordinary parameters stand in the optimizer as a new model has them.
    """

    def __init__(
        self,
        shape: str,
        optimizer: str,
        engine: str,
        seed: int,
        *,
        is_stacked: bool,
        has_groups: bool,
        has_fusion: bool,
    ) -> None:
        torch.manual_seed(seed)
        kinds = random.Random(seed)
        levels, fallbacks, disabled = SHAPES[shape]
        # Mostly of one kind, so that there are stacks.
        drawn = {level: {name: kinds.choice([*KINDS, "wide"]) for name in experts} for level, experts in levels.items()}
        config = {
            "hidden_size": WIDTH,
            "use_learned_fusion": has_fusion,
            "fusion_dropout": 0.0,
            "levels": [
                {
                    "name": level,
                    "fallback_expert": fallbacks.get(level),
                    "enabled": level not in disabled,
                    "order": [*experts],
                    "experts": {
                        name: {"name": name, "parent": parent, "metadata": {"kind": drawn[level][name]}}
                        for name, parent in experts.items()
                    },
                }
                for level, experts in levels.items()
            ],
        }
        self.model = HierarchicalCELMoE(CELMoEConfig.from_dict(config), factory, engine=engine).double()
        self.has_factory = True
        self.maker = optimizer
        self.alone = Alone(
            [
                Level(
                    level,
                    {name: Expert(drawn[level][name], parent) for name, parent in experts.items()},
                    fallbacks.get(level),
                    level not in disabled,
                )
                for level, experts in levels.items()
            ],
            dict(self.model.fusion.named_parameters()),
            MAKERS[optimizer][1],
            moves_absent=optimizer.startswith("torch"),
        )
        for level in self.alone.enabled:
            for name in level.experts:
                self.copy(level.name, name)
        if is_stacked:
            celmoe.stack_experts(self.model)
            self.alone.stack([level.name for level in self.alone.enabled])
        groups: list[dict[str, float]] = [{}]
        if has_groups:
            groups = [{"lr": 0.03}, {"lr": 0.02}, {}]
            numbers = random.Random(seed)
            for expert in self.alone.experts:
                expert.groups = dict.fromkeys(expert.parameters, numbers.randrange(3))
        self.begin(groups)

    # Parts.

    def expert(self, level: str, name: str) -> nn.Module:
        """An expert of the model."""
        return self.model.level_modules[level][name]

    def own(self) -> Iterable[tuple[str, nn.Module, Expert]]:
        """The model's experts, and the fusion: the beginning of their keys, module and reference."""
        for level in self.alone.enabled:
            for name, expert in level.experts.items():
                key = f"level_modules.{name_key(level.name)}.{name_key(name)}"
                yield key, self.expert(level.name, name), expert
        yield "fusion", self.model.fusion, self.alone.fusion

    def copy(self, level: str, name: str) -> None:
        """Give the reference's expert the values of the model's."""
        self.alone.level(level).experts[name].take(self.expert(level, name).state_dict())

    def attempt(self, faults: Collection[str], call: Callable[[], Any], *others: torch.optim.Optimizer) -> Any:
        """Make a call, which is refused by one of these errors, and then changes nothing; none is for a right call.

        The errors are the library's own, or PyTorch's if an expert raises them.

        Returns:
            The result of a right call; ``None`` for a refused one.
        """
        if not faults:
            return call()
        before = self.picture(*others)
        try:
            call()
        except (CELMoEError, RuntimeError) as error:
            if type(error).__name__ not in faults:
                raise AssertionError(f"{type(error).__name__} in place of {faults}: {error}") from error
        else:
            raise AssertionError(f"was not refused: {faults}")
        assert_same(self.picture(*others), before)
        return None

    def picture(self, *others: torch.optim.Optimizer) -> Any:
        """All that a refused call leaves as it is."""
        return picture(self.model, self.optimizer, *others)

    # The optimizer.

    def begin(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Make an optimizer of these groups, with the experts that the reference has in each."""
        for expert in self.alone.experts:
            expert.groups = {path: expert.groups.get(path, 0) for path in expert.parameters}
        if self.alone.moves_absent:
            for own in self.alone.members().values():
                # PyTorch's optimizers see one parameter.
                first, *others = own.values()
                for each in others:
                    each.groups = dict(first.groups)
        make, name = MAKERS[self.maker]
        options = [dict(OPTIMIZERS[name].options) | dict(group) for group in groups]
        if len(groups) == 1:
            self.optimizer = make(self.model.parameters(), **options[0])
        else:
            self.optimizer = make(
                [{"params": self._tensors(number), **group} for number, group in enumerate(options)],
                **OPTIMIZERS[name].options,
            )
        self.is_in_order = len(groups) == 1
        self.alone.begin(groups)

    def _tensors(self, number: int) -> list[torch.Tensor]:
        order = {name: place for place, name in enumerate(named_tensors(self.model))}
        found: dict[str, torch.Tensor] = {}
        for key, module, expert in self.own():
            for path, group in expert.groups.items():
                if group == number:
                    found[f"{key}.{path}"] = module.get_parameter(path)
        tensors = [found[name] for name in sorted(found, key=order.__getitem__)]
        if not self.alone.moves_absent:
            return tensors
        wholes = [each.place.stack.whole(each.place.path) if hasattr(each, "place") else each for each in tensors]
        return [*{id(each): each for each in wholes}.values()]

    def state(self) -> Any:
        """A copy of the optimizer's state by name."""
        return copy.deepcopy(state_by_name(self.model, self.optimizer))

    def renew(self, state: Any, alone: Alone) -> None:
        """Make an optimizer with the groups of another reference, and give it the states that were saved with that.

        Args:
            state: The saved state by name.
            alone: The reference then; experts that it does not have begin anew.
        """
        kept = {key: expert for (key, _, expert) in self.own()}
        before = {key: expert for key, expert in _by_key(alone) if key in kept and kept[key].kind == expert.kind}
        for key, expert in kept.items():
            expert.groups = dict(before[key].groups) if key in before else {}
        self.begin(copy.deepcopy(alone.groups))
        fresh = state_by_name(self.model, self.optimizer)
        known = {f"{key}.{path}" for key, expert in before.items() for path in expert.groups}
        wanted = {key: own for key, own in state["state"].items() if key in known}
        groups = fresh["param_groups"]
        if [set(group["params"]) for group in groups] == [set(group["params"]) for group in state["param_groups"]]:
            groups = state["param_groups"]
        self.load({"state": fresh["state"] | wanted, "param_groups": groups}, before)

    def load(self, state: Any, before: Mapping[str, Expert]) -> None:
        """Give the optimizer a state by name, and the reference that of other experts by key."""
        states = {
            key: {
                path: _cast(before[key].states.get(path) or {}, self.alone.dtype)
                if key in before and path in before[key].groups
                else self.alone.first(expert, path)
                for path in expert.groups
            }
            for key, _, expert in self.own()
        }
        faults = self._unstackable(states)
        self.attempt(faults, lambda: load_state_by_name(self.model, self.optimizer, state))
        for key, _, expert in self.own() if not faults else ():
            expert.states = states[key]

    def _unstackable(self, states: Mapping[str, Mapping[str, Any]]) -> set[str]:
        """The error for states that an optimizer which sees one parameter can't keep."""
        for (level, _), own in self.alone.members().items() if self.alone.moves_absent else ():
            for path in next(iter(own.values())).parameters:
                some = [states[f"level_modules.{name_key(level)}.{name_key(name)}"].get(path) or {} for name in own]
                if len({bool(each) for each in some}) > 1 or len({each.get("step") for each in some}) > 1:
                    return {"StackedError"}
        return set()

    # Batches.

    def batch(self, ways: Sequence[str], size: int, trailing: Sequence[int], seed: int) -> Batch:
        """A batch whose levels are routed in these ways."""
        numbers = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(size, *trailing, WIDTH, generator=generator, dtype=torch.float64).to(self.alone.dtype)
        routing: dict[str, Any] = {}
        given: dict[str, Sequence[Choice] | Choice] = {}
        for level, way in zip(self.alone.enabled, ways, strict=False):
            # Few experts in a batch, so that some are absent.
            known = numbers.sample([*level.experts], min(3, len(level.experts)))
            names = numbers.choices(known, k=size)
            if way != LEFT_OUT:
                routing[level.name], given[level.name] = WAYS[way](level, names, numbers)
        return Batch(hidden, routing, given, UNKNOWN in ways[: len(self.alone.enabled)])

    def planned(self, batch: Batch, form: str) -> Any:
        """The batch's routing in a form."""
        size = len(batch.hidden)
        if form == "routing" and not batch.has_unknown:
            return batch.routing
        compiler = RoutingCompiler(self.model.config, unknown="fallback") if batch.has_unknown else None
        plan = (self.model.compile_routing if compiler is None else compiler)(batch.routing, size)
        if compiler is None and form == "plan of a compiler":
            plan = RoutingCompiler(self.model.config)(batch.routing, size)
        elif form == "pickled plan":
            plan = pickle.loads(pickle.dumps(plan))
        elif form == "cut plan":
            plan = type(plan).join([plan, plan]).slice(size, 2 * size)
        elif form == "joined plan":
            plan = type(plan).join([plan.slice(0, size // 2), plan.slice(size // 2, size)])
        return plan

    def run(self, batch: Batch, form: str, *, is_trained: bool = False) -> None:
        """A forward pass of both, and a backward pass if it is trained; gradients are added up."""
        hidden = batch.hidden
        try:
            choices = self.alone.choices(batch.given, len(hidden))
        except RefusedError as fault:
            self.attempt(fault.args, lambda: self.model(hidden, self.planned(batch, form)))
            return
        mine, theirs = (hidden.clone().requires_grad_(is_trained) for _ in range(2))
        with torch.set_grad_enabled(is_trained):
            routing = self.planned(batch, form)
            output = self.model(mine, routing)
            expected = self.alone.run(theirs, choices)
            self._require_same_output(output, expected)
            with torch.no_grad():
                self._require_same_output(reference_forward(self.model, hidden, routing), expected)
            if is_trained:
                losses = [output.loss_weights[key] * each for key, each in output.losses.items()]
                (output.fused_hidden.square().sum() + sum(losses)).backward()
                self.alone.objective(expected).backward()
        if len(hidden) and is_trained:
            self.close("hidden.grad", mine.grad, theirs.grad)

    def _require_same_output(self, output: Any, expected: Any) -> None:
        self.close("fused", output.fused_hidden, expected.fused)
        for (name, level), rows in zip(output.levels.items(), expected.rows, strict=True):
            self.close(f"rows of {name}", level.hidden, rows)
        wanted = {f"{name_key(level)}.{name_key(name)}.size": key for key in expected.losses for level, name in [key]}
        assert output.losses.keys() == wanted.keys(), (output.losses.keys(), wanted.keys())
        for key, (level, name) in wanted.items():
            self.close(key, output.losses[key], expected.losses[level, name])
            wanted_weight = expected.loss_weights[level, name]
            assert abs(output.loss_weights[key] - wanted_weight) < 1e-12, f"weight of {key}"

    def close(self, where: str, found: torch.Tensor | None, expected: torch.Tensor | None) -> None:
        """Refuse another value."""
        if found is None or expected is None:
            assert found is expected, f"{where}: is {found}, should be {expected}"
            return
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype), (
            f"{where}: is {found.dtype} {tuple(found.shape)}, should be {expected.dtype} {tuple(expected.shape)}"
        )
        tolerance = TOLERANCES.get(expected.dtype, 0.0)
        largest = float((found.detach() - expected.detach()).abs().max()) if found.numel() else 0.0
        assert largest <= tolerance, f"{where}: differs by {largest}"

    # The look at both.

    def check(self) -> None:
        """Refuse a model that is no longer like its reference."""
        self._check_structure()
        keys = set()
        for key, module, expert in self.own():
            state = module.state_dict()
            assert [*state] == [*expert.tensors], f"{key}: has {[*state]}, should have {[*expert.tensors]}"
            keys |= {f"{key}.{path}" for path in state}
            for path, value in expert.tensors.items():
                self.close(f"{key}.{path}", state[path], value)
            for path in expert.parameters:
                parameter, value = module.get_parameter(path), expert.tensors[path]
                assert parameter.requires_grad == value.requires_grad, f"{key}.{path}: {parameter.requires_grad=}"
                grad = parameter.grad
                if value.grad is None and expert.stack is not None and grad is not None:
                    # The stack has zeros there.
                    assert not grad.any(), f"{key}.{path}: has a gradient"
                else:
                    self.close(f"{key}.{path}.grad", grad, value.grad)
        assert {*self.model.state_dict()} == keys, "keys of the state_dict"
        self._check_optimizer()
        if self.alone.dtype is torch.float32:
            self._adopt()

    def _check_structure(self) -> None:
        model, alone = self.model, self.alone
        model.check_config()
        assert [*model.level_modules] == [level.name for level in alone.enabled]
        found = [(each.name, [*each.experts], [*each.parents], each.fallback) for each in model.layout.levels]
        assert found == alone.layout, f"layout is {found}, should be {alone.layout}"
        for level, config in zip(alone.levels, model.config.levels, strict=True):
            assert [*level.experts] == [*config.experts], f"experts of {level.name}: {[*config.experts]}"
            assert level.fallback == config.fallback_expert
            parents = {name: each.parent for name, each in config.experts.items()}
            assert parents == {name: each.parent for name, each in level.experts.items()}
            if level.enabled:
                assert [*model.level_modules[level.name]] == [*level.experts], "experts' modules"
        stacks: dict[Any, set[str]] = {}
        for key, module, _ in self.own():
            for slot in map(slot_of, module.modules()):
                if slot is not None:
                    stacks.setdefault(slot.stack, set()).add(key)
        wanted = {
            frozenset(f"level_modules.{name_key(level)}.{name_key(name)}" for name in own)
            for (level, _), own in alone.members().items()
        }
        assert {frozenset(each) for each in stacks.values()} == wanted, "members of stacks"

    def _check_optimizer(self) -> None:
        found = state_by_name(self.model, self.optimizer)
        groups: list[set[str]] = [set() for _ in self.alone.groups]
        expected = {}
        for key, _, expert in self.own():
            for path, group in expert.groups.items():
                groups[group].add(f"{key}.{path}")
                if state := expert.states.get(path):
                    expected[f"{key}.{path}"] = state
        assert [set(group["params"]) for group in found["param_groups"]] == groups, "parameters of groups"
        for own, group in zip(found["param_groups"], self.alone.groups, strict=True):
            assert abs(own["lr"] - group["lr"]) < 1e-12, "learning rates"
        states = {
            key: state for key, state in found["state"].items() if any(each is not None for each in state.values())
        }
        assert states.keys() == expected.keys(), f"states of others: {states.keys() ^ expected.keys()}"
        for name, state in expected.items():
            assert states[name].keys() == state.keys(), f"state of {name}: {[*states[name]]}"
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    self.close(f"{name}: {key}", states[name][key], value)
                else:
                    assert float(states[name][key]) == value, f"{name}: {key} is {states[name][key]}"
        if self.is_in_order and not any(expert.stack for expert in self.alone.experts):
            own = [id(each) for each in self.model.parameters()]
            held = [id(each) for each in self.optimizer.param_groups[0]["params"]]
            assert held == [each for each in own if each in set(held)], "order of the optimizer's parameters"
        parameters = set(map(id, self.model.parameters()))
        assert {id(each) for each in self.optimizer.state} <= parameters, "states of parameters that are gone"

    def _adopt(self) -> None:
        """Let the reference take over the model's roundings."""
        found = state_by_name(self.model, self.optimizer)["state"]
        with torch.no_grad():
            for key, module, expert in self.own():
                state = module.state_dict()
                for path, value in expert.tensors.items():
                    value.copy_(state[path])
                    own = expert.states.get(path) or {}
                    for name, each in own.items():
                        if isinstance(each, torch.Tensor):
                            own[name] = found[f"{key}.{path}"][name].clone()
                for path in expert.parameters:
                    if (grad := expert.tensors[path].grad) is not None:
                        grad.copy_(module.get_parameter(path).grad)

    # Saving.

    def saved(self) -> Saved:
        """The state that a user saves."""
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        return Saved(file.getvalue(), self.state(), self.alone.copied())

    def new_model(self, *, is_stacked: bool) -> HierarchicalCELMoE:
        """A new model of the same config, by way of JSON, with other values."""
        config = json.loads(json.dumps(self.model.config.to_dict(), sort_keys=True))
        made = HierarchicalCELMoE(CELMoEConfig.from_dict(config), factory, engine=self.model.engine)
        made.to(self.alone.dtype)
        if is_stacked:
            celmoe.stack_experts(made)
        return made

    def go_on_with(self, model: HierarchicalCELMoE, alone: Alone) -> None:
        """Let another model, and its reference, be the pair's."""
        self.model, self.alone = model, alone


def _by_key(alone: Alone) -> list[tuple[str, Expert]]:
    found = [
        (f"level_modules.{name_key(level.name)}.{name_key(name)}", expert)
        for level in alone.enabled
        for name, expert in level.experts.items()
    ]
    return [*found, ("fusion", alone.fusion)]


def _cast(state: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {key: each.to(dtype) if isinstance(each, torch.Tensor) else each for key, each in state.items()}
