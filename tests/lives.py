"""Lives of a model, drawn step by step: a state machine of hypothesis over the public API, beside a plain reference.

A step builds, routes, trains, saves, loads or changes a model (`pairs`) and does the same to a reference in which each
expert is alone (`alone`). After each step both must be equal: values, gradients, optimizer state, config, layout. An
error must be one of `celmoe.errors`, at a call that the reference refuses, too, and then nothing may have changed.

The suite lives a few short lives. This command makes a number of steps, others for each seed::

    python -m tests.lives --steps 10000 --seed 0 --workers 2

A life that shows a fault is made short, and printed as code that repeats it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._dynamo  # it is imported at some step else, and has many objects
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from torch import nn

import celmoe
from celmoe import ExpertConfig
from celmoe.distributed import load_checkpoint, load_file, save_checkpoint, write_file
from celmoe.torch_internals import tracer_missing
from tests.alone import Alone, Expert, Level, RefusedError, matching
from tests.pairs import CLASSES, FORMS, LEFT_OUT, MAKERS, SHAPES, UNKNOWN, WAYS, Pair, Saved, factory
from tests.wrong_calls import WRONG_CALLS

# Places in lists that only a life knows; they are taken modulo the length.
PLACES = st.integers(0, 11)
MAYBE = st.none() | PLACES
NAMES = ("new", "x.y", "to", "keys", "[ab]", "r*", "ru", "it", "a", "b", "%2E", "a->b", "ü")
PATTERNS = ("*", "{}", "{:.1}*", "[!{:.1}]*", "?", "nobody")
FLAGS = ("loss_weight", "gradient_scale", "stop_gradient_from_parent", "fallback", "no fallback")
HOW_TO_GO_ON = ("state_dict", "checkpoint", "file", "pickle", "deepcopy", "pickle both", "deepcopy both")
# PyTorch that can't capture experts refuses "grouped".
ENGINES = ("auto", "looped", "grouped") if tracer_missing() is None else ("auto", "looped")


class Lives(RuleBasedStateMachine):
    """A model's life."""

    #: The beginning of all lives, in place of a drawn one.
    begins: Mapping[str, Any] = {}
    #: Steps of all lives of this process.
    steps = 0
    #: Steps by rule.
    kinds: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize(
        shape=st.sampled_from([*SHAPES]),
        optimizer=st.sampled_from([*MAKERS]),
        engine=st.sampled_from(ENGINES),
        seed=st.integers(0, 99),
        is_stacked=st.booleans(),
        has_groups=st.booleans(),
        has_fusion=st.booleans(),
    )
    def build(self, **drawn):
        # Changes of stacks go through all objects, to find optimizers; those that are there by now are none of a life.
        gc.collect()
        gc.freeze()
        self.pair = Pair(**drawn | self.begins)
        # Changes then meet gradients, and states of some experts.
        self.pair.run(self.pair.batch(["names"] * 3, 4, (), 0), "routing", is_trained=True)
        self._step()
        self.pair.run(self.pair.batch(["names"] * 3, 2, (), 1), "routing", is_trained=True)
        self.saves: list[Saved] = []
        self.plan: tuple[Any, Any] | None = None
        # A model that was copied, and must stay as it was then.
        self.left: tuple[Any, Any] | None = None
        self.done("build")

    def done(self, name: str) -> None:
        """Look at all after a step."""
        Lives.steps += 1
        Lives.kinds[name] += 1
        self.pair.check()

    @property
    def alone(self) -> Alone:
        return self.pair.alone

    def _level(self, place: int, *, disabled: bool = False) -> Level:
        levels = self.alone.levels if disabled else self.alone.enabled
        return levels[place % len(levels)]

    def _name(self, level: Level, place: int) -> str:
        # A subset may leave nobody to a level that is disabled.
        return [*level.experts][place % len(level.experts)] if level.experts else "nobody"

    # Routes.

    @rule(
        ways=st.lists(st.sampled_from([*WAYS, LEFT_OUT]), min_size=3, max_size=3),
        form=st.sampled_from(FORMS),
        size=st.sampled_from([0, 1, 2, 5, 9]),
        trailing=st.sampled_from([(), (2,)]),
        values=st.integers(0, 999),
    )
    def route(self, ways, form, size, trailing, values):
        self.pair.run(self.pair.batch(ways, size, trailing, values), form)
        self.done("route")

    @rule(
        ways=st.lists(st.sampled_from([*WAYS, LEFT_OUT]), min_size=3, max_size=3),
        form=st.sampled_from(FORMS),
        size=st.sampled_from([0, 1, 5, 9]),
        values=st.integers(0, 999),
        clears=st.sampled_from(["model", "optimizer", "zeros", "nothing"]),
        steps=st.booleans(),
    )
    def train(self, ways, form, size, values, clears, steps):
        if clears == "model":
            self.pair.model.zero_grad()
            self._clear(lambda _: None)
        elif clears != "nothing":
            self.pair.optimizer.zero_grad(set_to_none=clears == "optimizer")
            self._clear(lambda grad: None if clears == "optimizer" else torch.zeros_like(grad), only_held=True)
        self.pair.run(self.pair.batch(ways, size, (), values), form, is_trained=True)
        self._check_norms()
        if steps:
            self._step()
        self.done("train")

    def _clear(self, of: Callable[[torch.Tensor], torch.Tensor | None], *, only_held: bool = False) -> None:
        for expert in self.alone.experts:
            for path in expert.parameters if not only_held else expert.groups:
                value = expert.tensors[path]
                value.grad = None if value.grad is None else of(value.grad)

    def _check_norms(self) -> None:
        found = celmoe.gradient_norms(self.pair.model)
        for level in self.alone.enabled:
            for name, expert in level.experts.items():
                grads = [each.grad for each in expert.tensors.values() if each.grad is not None]
                norm = float(torch.stack([each.norm() for each in grads]).norm()) if grads else None
                mine = found[level.name].get(name)
                assert (mine is None) == (norm is None), f"norm of {name}: is {mine}, should be {norm}"
                assert norm is None or abs(mine - norm) < 1e-4 * (1 + norm), f"norm of {name}: {mine}, not {norm}"

    def _step(self) -> None:
        pair = self.pair
        try:
            pair.alone.step()
        except RefusedError as fault:
            pair.attempt(fault.args, pair.optimizer.step)
        else:
            pair.optimizer.step()

    @rule()
    def step(self):
        self._step()
        self.done("step")

    @rule(factor=st.sampled_from([0.5, 2.0]), place=PLACES)
    def schedule(self, factor, place):
        number = place % len(self.alone.groups)
        self.pair.optimizer.param_groups[number]["lr"] *= factor
        self.alone.groups[number]["lr"] *= factor
        self.done("schedule")

    @rule(
        way=st.sampled_from([way for way in WAYS if way != UNKNOWN]),
        values=st.integers(0, 99),
        is_pickled=st.booleans(),
    )
    def keep_a_plan(self, way, values, is_pickled):
        batch = self.pair.batch([way] * 3, 4, (), values)
        plan = self.pair.planned(batch, "pickled plan" if is_pickled else "plan")
        self.plan = plan, copy.deepcopy(self.alone.layout)
        self.done("keep_a_plan")

    @rule()
    def use_the_plan(self):
        if self.plan is not None:
            plan, layout = self.plan
            hidden = torch.ones(4, 4, dtype=self.alone.dtype)
            faults = [] if layout == self.alone.layout else ["PlanError"]
            self.pair.attempt(faults, lambda: self.pair.model(hidden, plan))
        self.done("use_the_plan")

    @rule(engine=st.sampled_from(ENGINES), is_training=st.booleans())
    def switch(self, engine, is_training):
        self.pair.model.engine = engine
        self.pair.model.train(is_training)
        self.done("switch")

    @rule(level=PLACES, expert=PLACES, flag=st.sampled_from(FLAGS), value=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
    def set_a_flag(self, level, expert, flag, value):
        own = self._level(level)
        name = self._name(own, expert)
        config = next(each for each in self.pair.model.config.levels if each.name == own.name)
        if flag == "loss_weight":
            config.experts[name].loss_weight = own.experts[name].loss_weight = value
        elif "gradient" in flag:
            is_scale = flag == "gradient_scale"
            config.experts[name].gradient_scale = value if is_scale else None
            config.experts[name].stop_gradient_from_parent = not is_scale and value < 1
            own.experts[name].gradient_scale = value if is_scale else 0.0 if value < 1 else None
        else:
            config.fallback_expert = own.fallback = name if flag == "fallback" else None
        self.done("set_a_flag")

    # Experts come and go.

    @rule(
        level=PLACES,
        name=st.sampled_from(NAMES),
        kind=st.sampled_from([*CLASSES, None, None]),
        source=MAYBE,
        parent=MAYBE,
        has_optimizer=st.booleans() | st.just(True),
        has_factory=st.booleans(),
    )
    def add(self, level, name, kind, source, parent, has_optimizer, has_factory):
        alone, own = self.alone, self._level(level, disabled=True)
        above = alone.above(own)
        source_name = None if source is None else self._name(own, source)
        start = own.experts.get(self._name(own, source or 0), Expert("wide"))
        kind = kind or start.kind
        parent_name = None if parent is None else self._name(above or own, parent)
        faults = set[str]()
        if not own.enabled:
            faults.add("UnknownLevelError")
        has_parent = parent is None or (above is not None and parent_name in above.experts)
        if name in own.experts or not has_parent or (source is not None and start.kind != kind):
            faults.add("ConfigError")
        if not has_factory and not self.pair.has_factory:
            faults.add("ConfigError")
        like = [each for each in own.experts.values() if each.stack is not None and each.kind == kind]
        made = Expert(kind, parent_name, stack=min((each.stack for each in like), default=None))
        if made.stack is not None and not has_optimizer:
            faults.add("StackedError")
        if own.enabled and has_optimizer:
            try:
                made.groups = alone.group_of(own, made, None if source is None else start)
            except RefusedError as fault:
                faults.update(fault.args)
        config = ExpertConfig(name, metadata={"kind": kind}, parent=parent_name)
        self.pair.attempt(
            faults,
            lambda: self.pair.model.add_expert(
                *(own.name, name, config),
                warm_start=source_name,
                factory=factory if has_factory else None,
                optimizer=self.pair.optimizer if has_optimizer else None,
            ),
        )
        if not faults:
            own.experts[name] = made
            self.pair.copy(own.name, name)
            made.states = {path: self._first_state(own, made, path) for path in made.groups}
            for path, value in start.tensors.items() if source is not None else ():
                self.pair.close(f"{path} of the new expert", made.tensors[path], value)
        self.done("add")

    def _first_state(self, level: Level, expert: Expert, path: str) -> dict[str, Any]:
        first = self.alone.first(expert, path)
        members = [each for each in level.experts.values() if each.stack is not None and each.stack == expert.stack]
        like = next((each.states[path] for each in members if each is not expert and each.states.get(path)), None)
        if not self.alone.moves_absent or like is None:
            return first
        # The stack's steps are counted together.
        zeros = {key: torch.zeros_like(each) if isinstance(each, torch.Tensor) else each for key, each in like.items()}
        return zeros | first | {key: like[key] for key in ("step",) if key in like}

    @rule(level=PLACES, expert=PLACES, has_optimizer=st.booleans() | st.just(True))
    def remove(self, level, expert, has_optimizer):
        alone, own = self.alone, self._level(level, disabled=True)
        name = self._name(own, expert)
        gone = own.experts.get(name, Expert("wide"))
        below = alone.below(own)
        faults = set[str]()
        if not own.enabled:
            faults.add("UnknownLevelError")
        is_parent = below is not None and name in {each.parent for each in below.experts.values()}
        if is_parent or own.fallback == name or len(own.experts) == 1:
            faults.add("ConfigError")
        if not has_optimizer and gone.stack is not None:
            faults.add("StackedError")
        # An ordinary expert's parameters would stay in the optimizer.
        has_optimizer = has_optimizer or (gone.stack is None and bool(gone.groups))
        given = self.pair.optimizer if has_optimizer else None
        self.pair.attempt(faults, lambda: self.pair.model.remove_expert(own.name, name, optimizer=given))
        if not faults:
            del own.experts[name]
        self.done("remove")

    @rule(level=PLACES, expert=PLACES, new=st.sampled_from(NAMES), has_optimizer=st.booleans() | st.just(True))
    def rename(self, level, expert, new, has_optimizer):
        alone, own = self.alone, self._level(level, disabled=True)
        name = self._name(own, expert)
        faults = set[str]()
        if not own.enabled:
            faults.add("UnknownLevelError")
        if new in own.experts:
            faults.add("ConfigError")
        if not has_optimizer and name in own.experts and own.experts[name].stack is not None:
            faults.add("StackedError")
        given = [self.pair.optimizer] if has_optimizer else None
        self.pair.attempt(faults, lambda: self.pair.model.rename_expert(own.name, name, new, optimizer=given))
        if not faults:
            # The model may have another order of parameters now.
            self.pair.is_in_order &= has_optimizer
            own.experts = {new if key == name else key: each for key, each in own.experts.items()}
            own.fallback = new if own.fallback == name else own.fallback
            for child in getattr(alone.below(own), "experts", {}).values():
                child.parent = new if child.parent == name else child.parent
        self.done("rename")

    @rule(level=PLACES, expert=PLACES, pattern=st.sampled_from(PATTERNS), is_frozen=st.booleans())
    def freeze(self, level, expert, pattern, is_frozen):
        own = self._level(level)
        pattern = pattern.format(self._name(own, expert))
        names = matching(pattern, [*own.experts])
        call = self.pair.model.freeze if is_frozen else self.pair.model.unfreeze
        found = self.pair.attempt([] if names else ["UnknownExpertError"], lambda: call(own.name, pattern))
        assert found == (names or None), f"names are {found}, should be {names}"
        for name in names:
            own.experts[name].is_frozen = is_frozen
            own.experts[name].marked()
        self.done("freeze")

    @rule(has_rate=st.booleans())
    def take_in(self, has_rate):
        """Give the optimizer a group of parameters that it does not have."""
        alone = self.alone
        new = [
            (key, module, expert)
            for key, module, expert in self.pair.own()
            if len(expert.groups) < len(expert.parameters)
        ]
        if new:
            options = {"lr": 0.02} if has_rate else {}
            parameters = [
                module.get_parameter(path)
                for _, module, expert in new
                for path in expert.parameters
                if path not in expert.groups
            ]
            self.pair.optimizer.add_param_group({"params": parameters, **options})
            alone.groups.append(dict(alone.groups[0]) | {"lr": self.pair.optimizer.defaults["lr"]} | options)
            for _, _, expert in new:
                paths = [path for path in expert.parameters if path not in expert.groups]
                expert.groups |= dict.fromkeys(paths, len(alone.groups) - 1)
                expert.states |= {path: alone.first(expert, path) for path in paths}
            if any(expert.states[path] for _, _, expert in new for path in expert.groups):
                # PyTorch's Adagrad makes states when it is made, and fails for groups that come later.
                make, _ = MAKERS[self.pair.maker]
                self.pair.optimizer.state.update(make(parameters, **alone.optimizer.options).state)
        self.done("take_in")

    @rule(levels=MAYBE, is_stacked=st.booleans(), is_refused=st.booleans())
    def restack(self, levels, is_stacked, is_refused):
        pair, alone = self.pair, self.alone
        names = [level.name for level in alone.enabled] if levels is None else [self._level(levels).name]
        given = None if levels is None else names
        after = [each.stack for each in alone.experts]
        state, before = pair.state(), alone.copied()
        alone.stack(names) if is_stacked else alone.unstack(names)
        changes = after != [each.stack for each in alone.experts]
        if is_stacked and is_refused and changes:
            pair.attempt(["StackedError"], lambda: celmoe.stack_experts(pair.model, given))
        pair.optimizer = None
        if is_stacked:
            celmoe.stack_experts(pair.model, given)
        else:
            celmoe.unstack_experts(pair.model, given)
        pair.renew(state, before)
        self.done("restack")

    @rule(level=PLACES, expert=PLACES, kind=st.sampled_from([*CLASSES, None, None]), is_cast=st.booleans())
    def replace(self, level, expert, kind, is_cast):
        """Put another module in an expert's place."""
        pair, own = self.pair, self._level(level)
        name = self._name(own, expert)
        old = own.experts[name]
        kind = kind or old.kind
        state, before = pair.state(), self.alone.copied()
        module = CLASSES[kind]()
        pair.model.level_modules[own.name][name] = module.to(self.alone.dtype) if is_cast else module
        pair.model.to(self.alone.dtype)
        config = next(each for each in pair.model.config.levels if each.name == own.name).experts[name]
        config.metadata = {"kind": kind}
        own.experts[name] = Expert(kind, old.parent, loss_weight=old.loss_weight, gradient_scale=old.gradient_scale)
        pair.copy(own.name, name)
        before.level(own.name).experts[name].kind = "another"
        pair.renew(state, before)
        self.done("replace")

    @rule(dtype=st.sampled_from([torch.float64, torch.float64, torch.float32]), is_new=st.booleans())
    def cast(self, dtype, is_new):
        pair = self.pair
        state, before = pair.state(), self.alone.copied()
        pair.model.to(dtype)
        self.alone.cast(dtype)
        if is_new:
            pair.renew(state, before)
        else:
            # As PyTorch says: the state takes the parameters' dtypes.
            pair.optimizer.load_state_dict(pair.optimizer.state_dict())
        self.done("cast")

    # Saving, loading, copying.

    @rule()
    def save(self):
        self.saves = [*self.saves, self.pair.saved()][-2:]
        self.done("save")

    @rule(place=PLACES)
    def load(self, place):
        """Load a save into the same model, if both have the same experts."""
        pair = self.pair
        saved = self.saves[place % len(self.saves)] if self.saves else pair.saved()
        mine = [{name: each.kind for name, each in level.experts.items()} for level in self.alone.enabled]
        theirs = [{name: each.kind for name, each in level.experts.items()} for level in saved.alone.enabled]
        orders = [
            ([name for name in one if name in other], [name for name in other if name in one])
            for one, other in zip(mine, theirs, strict=True)
        ]
        if any(one != other for one, other in orders):
            pair.attempt(["CheckpointError"], lambda: pair.model.load_state_dict(saved.read()))
        elif mine == theirs:
            pair.model.load_state_dict(saved.read())
            before = dict(zip([key for key, _, _ in pair.own()], saved.alone.experts, strict=True))
            with torch.no_grad():
                for key, _, expert in pair.own():
                    for path, value in before[key].tensors.items():
                        expert.tensors[path].copy_(value)
            if all(before[key].groups == expert.groups for key, _, expert in pair.own()) and (
                len(saved.alone.groups) == len(self.alone.groups)
            ):
                self.alone.groups = copy.deepcopy(saved.alone.groups)
                pair.load(saved.optimizer, before)
        self.done("load")

    @rule(place=PLACES, level=PLACES, old=PLACES, new=MAYBE)
    def load_experts(self, place, level, old, new):
        """Load a save by name, one expert under another name."""
        pair = self.pair
        saved = self.saves[place % len(self.saves)] if self.saves else pair.saved()
        own = self._level(level)
        theirs = saved.alone.level(own.name)
        old_name = self._name(theirs, old)
        new_name = old_name if new is None else self._name(own, new)
        renamed = {} if new is None else {own.name: {old_name: new_name}}
        faults, loads = set[str](), []
        for each in self.alone.enabled:
            others = saved.alone.level(each.name).experts
            names = [renamed.get(each.name, {}).get(name, name) for name in others]
            if len(set(names)) < len(names):
                faults.add("CheckpointError")
            for name, expert in zip(names, others.values(), strict=True):
                if name in each.experts:
                    loads.append((each.experts[name], expert))
        if not loads or any(one.kind != other.kind for one, other in loads):
            faults.add("CheckpointError")
        pair.attempt(faults, lambda: celmoe.load_experts(pair.model, saved.read(), renamed))
        with torch.no_grad():
            for one, other in [*loads, (self.alone.fusion, saved.alone.fusion)] if not faults else ():
                for path, value in other.tensors.items():
                    one.tensors[path].copy_(value)
        self.done("load_experts")

    @rule(how=st.sampled_from(HOW_TO_GO_ON), is_stacked=st.booleans())
    def go_on(self, how, is_stacked):
        """Go on with a copy, or with a new model that has loaded a save; the old model must stay as it is."""
        pair = self.pair
        self._check_left()
        state, before = pair.state(), self.alone.copied()
        old, old_optimizer = pair.model, pair.optimizer
        after = self.alone.copied()
        if how in ("state_dict", "checkpoint", "file"):
            self._load_into_a_new_model(how, state, before, after, is_stacked=is_stacked)
        else:
            both = old, old_optimizer
            made = pickle.loads(pickle.dumps(both)) if "pickle" in how else copy.deepcopy(both)
            pair.has_factory &= "pickle" not in how
            pair.go_on_with(made[0], after)
            pair.optimizer = made[1]
            if "both" not in how:
                pair.renew(state, before)
        self.left = old, _values(old)
        self.done("go_on")

    def _load_into_a_new_model(self, how: str, state: Any, before: Alone, after: Alone, *, is_stacked: bool) -> None:
        pair = self.pair
        folder, file = Path(self.folder.name) / "checkpoint", Path(self.folder.name) / "file.pt"
        if how == "state_dict":
            saved = pair.saved()
        else:
            save_checkpoint(folder, pair.model, pair.optimizer)
        if how == "file":
            write_file(folder, file)
        model = pair.new_model(is_stacked=is_stacked and how != "state_dict")
        # A checkpoint tells of no frozen experts.
        for expert in after.experts:
            expert.is_frozen, expert.stack = False, None
            expert.marked()
        pair.go_on_with(model, after)
        pair.has_factory = True
        if how == "state_dict":
            model.load_state_dict(saved.read())
            if is_stacked:
                celmoe.stack_experts(model)
        if is_stacked:
            after.stack([level.name for level in after.enabled])
        if how == "state_dict":
            pair.renew(state, before)
            return
        held = all(len(expert.groups) == len(expert.parameters) for expert in after.experts)
        alike = [[dict(each.groups) for each in own.values()] for own in after.members().values()]
        if not held or (after.moves_absent and any(each != some[0] for some in alike for each in some)):
            # The optimizer's groups must be those that were saved.
            (load_checkpoint if how == "checkpoint" else load_file)(folder if how == "checkpoint" else file, model)
            pair.renew(state, before)
            return
        states = {id(expert): expert.states for expert in after.experts}
        pair.begin(copy.deepcopy(before.groups))
        by_key = {key: states[id(expert)] for key, _, expert in pair.own()}
        faults = pair._unstackable(by_key) and {"CheckpointError", "StackedError"}
        load = load_checkpoint if how == "checkpoint" else load_file
        path = folder if how == "checkpoint" else file
        if faults:
            pair.attempt(faults, lambda: load(path, model, pair.optimizer))
            load(path, model)
        else:
            load(path, model, pair.optimizer)
            for key, _, expert in pair.own():
                expert.states = by_key[key]

    def _check_left(self) -> None:
        if self.left is not None:
            model, values = self.left
            for name, value in _values(model).items():
                assert torch.equal(value, values[name]), f"{name} of the model that was copied has changed"

    @rule(
        level=PLACES,
        expert=PLACES,
        pattern=st.sampled_from(PATTERNS),
        more=MAYBE,
        goes_on=st.booleans(),
        values=st.integers(0, 99),
    )
    def subset(self, level, expert, pattern, more, goes_on, values):
        pair, own = self.pair, self._level(level)
        pattern = pattern.format(self._name(own, expert))
        wanted = {own.name: [pattern]}
        if more is not None:
            other = self._level(level + 1)
            wanted.setdefault(other.name, []).append(self._name(other, more))
        faults = set[str]()
        if pattern not in own.experts and not matching(pattern, [*own.experts]):
            faults.add("UnknownExpertError")
        smaller = None
        if not faults:
            try:
                smaller = self.alone.subset(wanted)
            except RefusedError as fault:
                faults.update(fault.args)
        made = pair.attempt(faults, lambda: pair.model.subset(wanted))
        if smaller is not None:
            state, before, old = pair.state(), self.alone.copied(), (pair.model, pair.optimizer, self.alone)
            pair.go_on_with(made, smaller)
            pair.renew(state, before)
            pair.check()
            # The model that the subset was made of must not follow.
            pair.run(pair.batch(["names"] * 3, 4, (), values), "plan", is_trained=True)
            self._step()
            pair.check()
            if not goes_on:
                plan = made.compile_routing({each.name: next(iter(each.experts)) for each in smaller.enabled}, 2)
                pair.model, pair.optimizer, pair.alone = old
                faults = [] if smaller.layout == self.alone.layout else ["PlanError"]
                pair.attempt(faults, lambda: pair.model(torch.ones(2, 4, dtype=self.alone.dtype), plan))
        self.done("subset")

    @rule(which=st.sampled_from([*WRONG_CALLS]), level=PLACES, expert=PLACES)
    def refuse(self, which, level, expert):
        own = self._level(level)
        faults, call = WRONG_CALLS[which]
        self.pair.attempt(faults, lambda: call(self.pair, own.name, self._name(own, expert)))
        self.done("refuse")


def _repeat(name: str, times: int) -> None:
    """Let a rule be drawn more often."""
    drawn = vars(Lives)[name].hypothesis_stateful_rule
    for number in range(1, times):
        setattr(Lives, f"{name}_{number}", rule(**drawn.arguments)(drawn.function))


for _name, _times in {"train": 4, "add": 2, "remove": 2, "rename": 2, "restack": 2, "freeze": 2}.items():
    _repeat(_name, _times)


def _values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]


def live(number: int, *, lives: int, length: int, shortens: bool = True, **begins: Any) -> int:
    """Live some lives.

    Args:
        number: The seed.
        lives: The number of lives.
        length: Steps of a life.
        shortens: True to make a life that shows a fault short.
        begins: The beginning of all lives; see `Lives.build`.

    Returns:
        The number of steps.

    Raises:
        BaseException: The fault of a life, with the code that repeats it in its notes.
    """
    before = Lives.steps
    machine = seed(number)(type("Lives", (Lives,), {"begins": begins}))
    phases = [Phase.generate, *([Phase.shrink] if shortens else [])]
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=lives,
            stateful_step_count=length,
            phases=phases,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=_SLOW,
            verbosity=Verbosity.normal,
            print_blob=True,
            report_multiple_bugs=False,
        ),
    )
    return Lives.steps - before


def _worker(job: tuple[int, int, int, bool]) -> tuple[int, Counter[str], str]:
    """Steps, steps by rule, and the first fault."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    number, lives, length, shortens = job
    before = Lives.steps
    Lives.kinds.clear()
    fault = ""
    try:
        live(number, lives=lives, length=length, shortens=shortens)
    except BaseException as error:  # noqa: BLE001  # told
        fault = f"seed {number}:\n{''.join(traceback.format_exception(error))}"
    return Lives.steps - before, Counter(Lives.kinds), fault


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.lives", description="Live random lives of a model.")
    parser.add_argument("--steps", type=int, default=10000, help="how many steps, at least")
    parser.add_argument("--seed", type=int, default=0, help="the first lives' seed; each next ones have the next")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--lives", type=int, default=8, help="lives that a process lives before it reports")
    parser.add_argument("--length", type=int, default=40, help="steps of a life")
    parser.add_argument("--as-it-is", action="store_true", help="do not make a life with a fault short")
    options = parser.parse_args(arguments)

    done, kinds, fault = 0, Counter[str](), ""
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        numbers = count(options.seed)

        def begun() -> Any:
            return pool.apply_async(_worker, ((next(numbers), options.lives, options.length, not options.as_it_is),))

        waiting = [begun() for _ in range(options.workers)]
        while waiting and not fault:
            ready = next((each for each in waiting if each.ready()), None)
            if ready is None:
                time.sleep(0.1)
                continue
            waiting.remove(ready)
            steps, some, fault = ready.get()
            done += steps
            kinds += some
            if done < options.steps and not fault:
                waiting.append(begun())
            share = min(1.0, done / options.steps)
            rate = done / (time.monotonic() - began)
            bar = "#" * round(30 * share)
            sys.stderr.write(f"\r[{bar:<30}] {done}/{options.steps} steps, {rate:.0f}/s")
            sys.stderr.flush()
    sys.stderr.write("\n")
    sys.stdout.write(f"steps: {done} ({', '.join(f'{count} {name}' for name, count in kinds.most_common())})\n")
    sys.stdout.write(f"{fault or 'no fault'}\n")
    return 1 if fault else 0


if __name__ == "__main__":
    sys.exit(main())
