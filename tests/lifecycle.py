"""Random lives of a model beside a plain reference: each expert alone, with an optimizer of its own."""

from __future__ import annotations

import json
import random
from typing import Any

import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig, ConfigError, ExpertConfig, ExpertModule, ExpertResult, HierarchicalCELMoE, PlanError
from celmoe.optim import load_state_by_name, state_by_name

WIDTH = 4
TOLERANCE = 1e-9
ADAMW = {"lr": 0.01, "weight_decay": 0.1}
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
# By name, the model's optimizer and the reference's; those of PyTorch are for models without stacks.
OPTIMIZERS = {
    "AdamW": (celmoe.optim.AdamW, torch.optim.AdamW, ADAMW),
    "amsgrad": (celmoe.optim.AdamW, torch.optim.AdamW, ADAMW | {"amsgrad": True}),
    "SGD": (celmoe.optim.SGD, torch.optim.SGD, SGD),
    "torch AdamW": (torch.optim.AdamW, torch.optim.AdamW, ADAMW),
    "torch SGD": (torch.optim.SGD, torch.optim.SGD, SGD),
    "torch Adagrad": (torch.optim.Adagrad, torch.optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.1}),
}


class Wide(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.rand(WIDTH))

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.scale * self.down(torch.tanh(self.up(batch.hidden))))


class Narrow(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        return ExpertResult(torch.tanh(self.only(batch.hidden)))


def factory(_level: str, _name: str, metadata: Any) -> nn.Module:
    return Narrow() if metadata.get("is_narrow") else Wide()


def build(*, is_stacked: bool, seed: int = 0, engine: str = "looped") -> HierarchicalCELMoE:
    """A model of two levels, whose experts are of two classes."""
    torch.manual_seed(seed)
    tree = {"slavic": ["ru", "pl", "uk"], "romance": ["it", "es"], "other": ["fi", "hu"]}
    config = CELMoEConfig.from_tree(tree, ("family", "language"), WIDTH, use_learned_fusion=False)
    for name in ("pl", "es", "hu"):
        config.levels[1].experts[name].metadata = {"is_narrow": True}
    config.levels[0].fallback_expert = "other"
    model = HierarchicalCELMoE(config, factory, engine=engine).double()
    if is_stacked:
        celmoe.stack_experts(model)
    return model


class Life:
    """A model and its reference, and what may happen to both.

    Args:
        seed: Chooses all that happens.
        optimizer: A name of `OPTIMIZERS`.
        is_stacked: True for a model with stacks.
        has_groups: True for learning rates by expert.
        engine: The model's engine.
    """

    def __init__(
        self, seed: int, optimizer: str, *, is_stacked: bool, has_groups: bool = False, engine: str = "looped"
    ) -> None:
        self.random = random.Random(seed)
        self.make, self.make_alone, self.options = OPTIMIZERS[optimizer]
        self.is_stacked = is_stacked
        self.model = build(is_stacked=is_stacked, seed=seed, engine=engine)
        patterns = {"language/[r-z]*": {"lr": 0.03}, "language/[!i]*": {"lr": 0.02}} if has_groups else {}
        self.rates = dict.fromkeys(("ru", "uk"), patterns["language/[r-z]*"]["lr"]) if has_groups else {}
        self.rates |= dict.fromkeys(("pl", "es", "fi", "hu"), 0.02) if has_groups else {}
        self.has_groups = has_groups
        self.optimizer = self.make(celmoe.parameter_groups(self.model, patterns), **self.options)
        self.alone: dict[str, dict[str, nn.Module]] = {}
        self.optimizers: dict[nn.Module, torch.optim.Optimizer] = {}
        for level in self.model.levels:
            self.alone[level.name] = {}
            for name in level.experts:
                self._copy(level.name, name)
        self.parents = {name: each.parent for name, each in self.model.levels[1].experts.items()}
        self.fallback = "other"
        self.plan = self.model.compile_routing({"language": ["ru"]})
        self.log: list[str] = []

    def _copy(self, level: str, name: str) -> None:
        """Make the reference's expert from the model's."""
        config = next(each for each in self.model.levels if each.name == level).experts[name]
        made = factory(level, name, config.metadata).double()
        made.load_state_dict({key: each.clone() for key, each in self.expert(level, name).state_dict().items()})
        self.alone[level][name] = made
        rate = self.rates.get(name, 0.01) if level == "language" else 0.01
        self.optimizers[made] = self.make_alone(made.parameters(), **self.options | {"lr": rate})

    def expert(self, level: str, name: str) -> Any:
        return self.model.level_modules[level][name]

    def backward(self) -> None:
        """A forward and a backward pass of both."""
        self.model.zero_grad()
        known = [*self.alone["language"]]
        names = self.random.choices(self.random.sample(known, min(3, len(known))), k=self.random.choice((1, 4)))
        families = [self.parents[name] or self.fallback for name in names]
        hidden = torch.randn(len(names), WIDTH, dtype=torch.float64)
        ids = self.random.random() < 0.5
        routing: dict[str, Any] = {"language": [known.index(name) for name in names] if ids else names}
        fused = self.model(hidden, routing).fused_hidden
        if fused.requires_grad:
            fused.square().sum().backward()
        for some in self.alone.values():
            for each in some.values():
                each.zero_grad()
        loss = torch.zeros(())
        for row, (family, name) in enumerate(zip(families, names, strict=True)):
            first = self._run("family", family, hidden[row : row + 1])
            second = self._run("language", name, first)
            torch.testing.assert_close(fused[row : row + 1], (first + second) / 2, rtol=0, atol=TOLERANCE)
            loss = loss + ((first + second) / 2).square().sum()
        if loss.requires_grad:
            loss.backward()
        self.log.append(f"backward {names}")

    def _run(self, level: str, name: str, hidden: torch.Tensor) -> torch.Tensor:
        return self.alone[level][name](celmoe.ExpertBatch(hidden)).hidden

    def step(self) -> None:
        self.optimizer.step()
        for each in self.optimizers.values():
            each.step()
        self.log.append("step")

    def train(self) -> None:
        self.backward()
        self.step()

    def add(self) -> None:
        level = self.random.choice(["language", "language", "family"])
        name = self.random.choice([f"{letter}{self.random.randrange(99)}" for letter in "ahz"] + ["x.y", "to"])
        if name in self.alone[level]:
            return
        source = self.random.choice([None, *self.alone[level]])
        like = source or self.random.choice([*self.alone[level]])
        metadata = next(each for each in self.model.levels if each.name == level).experts[like].metadata
        parent = self.random.choice([None, *self.alone["family"]]) if level == "language" else None
        config = ExpertConfig(name, metadata=metadata, parent=parent)
        self.log.append(f"add {level} {name} from {source}")
        if self.has_groups and level == "language":
            rates = {
                self.rates.get(each, 0.01) for each in self.alone[level] if self._has_same_paths(level, each, like)
            }
            if source is None and len(rates) > 1:
                try:
                    self.model.add_expert(level, name, config, optimizer=self.optimizer)
                except ConfigError:
                    return
                raise AssertionError(f"{name} was added")
            self.rates[name] = rates.pop() if source is None else self.rates.get(source, 0.01)
        self.model.add_expert(level, name, config, warm_start=source, optimizer=self.optimizer)
        if source is not None:
            for key, value in self.expert(level, source).state_dict().items():
                assert torch.equal(self.expert(level, name).state_dict()[key], value), key
        self._copy(level, name)
        if level == "language":
            self.parents[name] = parent

    def _has_same_paths(self, level: str, one: str, other: str) -> bool:
        experts = self.alone[level]
        return [*experts[one].state_dict()] == [*experts[other].state_dict()]

    def remove(self) -> None:
        level = self.random.choice(["language", "language", "family"])
        name = self.random.choice([*self.alone[level]])
        self.log.append(f"remove {level} {name}")
        is_needed = level == "family" and (name in self.parents.values() or name == self.fallback)
        if is_needed or len(self.alone[level]) == 1:
            try:
                self.model.remove_expert(level, name, optimizer=self.optimizer)
            except ConfigError:
                return
            raise AssertionError(f"{name} was removed")
        self.model.remove_expert(level, name, optimizer=self.optimizer)
        del self.optimizers[self.alone[level].pop(name)]
        if level == "language":
            del self.parents[name]
            self.rates.pop(name, None)

    def rename(self) -> None:
        level = self.random.choice(["language", "language", "family"])
        name = self.random.choice([*self.alone[level]])
        new = self.random.choice([f"{letter}{self.random.randrange(99)}" for letter in "ahz"] + ["q.r", "keys", name])
        self.log.append(f"rename {level} {name} {new}")
        if new in self.alone[level]:
            try:
                self.model.rename_expert(level, name, new, optimizer=self.optimizer)
            except ConfigError:
                return
            raise AssertionError(f"{name} was renamed")
        self.model.rename_expert(level, name, new, optimizer=self.optimizer)
        self.alone[level] = {new if each == name else each: made for each, made in self.alone[level].items()}
        if level == "language":
            self.parents = {new if each == name else each: parent for each, parent in self.parents.items()}
            self.rates = {new if each == name else each: rate for each, rate in self.rates.items()}
        else:
            self.parents = {each: new if parent == name else parent for each, parent in self.parents.items()}
            self.fallback = new if self.fallback == name else self.fallback

    def freeze(self) -> None:
        level = self.random.choice([*self.alone])
        name = self.random.choice([*self.alone[level], "*"])
        self.log.append(f"freeze {level} {name}")
        self.model.freeze(level, name)
        for each in [*self.alone[level].values()] if name == "*" else [self.alone[level][name]]:
            each.requires_grad_(False).zero_grad()

    def unfreeze(self) -> None:
        level = self.random.choice([*self.alone])
        self.log.append(f"unfreeze {level}")
        self.model.unfreeze(level)
        for each in self.alone[level].values():
            each.requires_grad_(True)

    def reload(self) -> None:
        """Go on with a new model and optimizer, from what is saved of both."""
        self.log.append("reload")
        self.unfreeze_all()
        saved = json.loads(json.dumps(self.model.config.to_dict(), sort_keys=True))
        model = HierarchicalCELMoE(CELMoEConfig.from_dict(saved), factory, engine=self.model.engine).double()
        model.load_state_dict(self.model.state_dict())
        state = state_by_name(self.model, self.optimizer)
        if self.is_stacked:
            celmoe.stack_experts(model)
        optimizer = self.make(model.parameters(), **self.options)
        if not self.is_stacked:
            # By position: the parameters must stand in the order that a new model has.
            optimizer.load_state_dict(self.optimizer.state_dict())
        else:
            load_state_by_name(model, optimizer, state)
        self.model, self.optimizer = model, optimizer
        # A new model has no gradients.
        for some in self.alone.values():
            for each in some.values():
                each.zero_grad()

    def unfreeze_all(self) -> None:
        for level, some in self.alone.items():
            self.model.unfreeze(level)
            for each in some.values():
                each.requires_grad_(True)

    def change(self) -> None:
        self.random.choice([self.add, self.remove, self.rename, self.rename, self.freeze, self.unfreeze])()

    def check(self) -> None:
        """Compare both."""
        try:
            self._check()
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log}") from error

    def _check(self) -> None:
        state = self.model.state_dict()
        assert len(state) == sum(len(each.state_dict()) for some in self.alone.values() for each in some.values())
        for level, some in self.alone.items():
            config = next(each for each in self.model.levels if each.name == level)
            layout = next(each for each in self.model.layout.levels if each.name == level)
            assert [*some] == [*config.experts] == [*self.model.level_modules[level]] == [*layout.experts]
            for name, made in some.items():
                own = self.expert(level, name).state_dict()
                for key, value in made.state_dict().items():
                    where = f"{level}/{name}/{key}"
                    torch.testing.assert_close(
                        own[key], value, rtol=0, atol=TOLERANCE, msg=lambda text, at=where: f"{at}: {text}"
                    )
        assert {name: each.parent for name, each in self.model.levels[1].experts.items()} == self.parents
        assert self.model.levels[0].fallback_expert == self.fallback
        self._check_optimizer()
        # A plan is taken exactly if it was compiled for the model as it is.
        first = next(iter(self.alone["language"]))
        self.model(torch.zeros(1, WIDTH, dtype=torch.float64), self.model.compile_routing({"language": [first]}))
        if self.plan.layout != celmoe.RoutingCompiler(self.model.config).layout:
            try:
                self.model(torch.zeros(1, WIDTH, dtype=torch.float64), self.plan)
            except PlanError:
                pass
            else:
                raise AssertionError("a stale plan was taken")
        self.plan = self.model.compile_routing({"language": [first]})

    def _check_optimizer(self) -> None:
        held = [id(each) for group in self.optimizer.param_groups for each in group["params"]]
        own = [id(each) for each in self.model.parameters()]
        are_in_order = not self.is_stacked and not self.has_groups
        assert held == own if are_in_order else sorted(held) == sorted(own), "parameters of the optimizer"
        assert {id(each) for each in self.optimizer.state} <= set(own), "state of parameters that are gone"
        found = state_by_name(self.model, self.optimizer)["state"]
        expected: dict[str, dict[str, Any]] = {}
        for level, some in self.alone.items():
            for name, made in some.items():
                names = {id(each): path for path, each in made.named_parameters()}
                for parameter, state in self.optimizers[made].state.items():
                    key = f"level_modules.{celmoe.names.name_key(level)}.{celmoe.names.name_key(name)}"
                    if any(each is not None for each in state.values()):
                        expected[f"{key}.{names[id(parameter)]}"] = state
        found = {key: state for key, state in found.items() if any(each is not None for each in state.values())}
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        for name, state in expected.items():
            for key, value in state.items():
                torch.testing.assert_close(
                    torch.as_tensor(found[name][key]).double(),
                    torch.as_tensor(value).double(),
                    rtol=0,
                    atol=TOLERANCE,
                    msg=lambda text, at=(name, key): f"{at}: {text}",
                )


def live(seed: int, optimizer: str, *, length: int = 12, has_groups: bool = False, **options: Any) -> None:
    """A life of some changes, each between steps or between a backward pass and its step."""
    life = Life(seed, optimizer, has_groups=has_groups, **options)
    life.train()
    for _ in range(length):
        if life.random.random() < 0.3:
            life.backward()
            life.change()
            life.check()
            life.step()
        else:
            life.change()
            life.train()
        life.check()
        if life.random.random() < 0.1 and not has_groups:
            life.reload()
            life.check()
