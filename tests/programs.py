"""Random expert programs, each run under ``"auto"`` and ``"grouped"`` beside an identical model that is looped.

A seed makes a program: the source of an expert class, out of pieces of tensor operations and of the Python around them
(`program_pieces`). Both models live in modules of their own, so that no state of experts is shared. A few steps with
changes between them must give the same on both sides, Python state and random streams included. This command runs a
number of programs, and prints the counts at the end::

    python -m tests.programs --count 20000 --seed 0 --workers 2
    python -m tests.programs --count 1 --seed 123 --show

A program that shows a fault is shortened as long as it still does. Programs that draw random numbers are compared by
value up to the first draw that ran grouped: a class draws for all of its rows at once.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import linecache
import logging
import multiprocessing
import os
import random
import re
import sys
import time
import types
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._dynamo.symbolic_convert import _import_module

import celmoe.engines.grouped
from celmoe import (
    CELMoEConfig,
    EngineRefusedError,
    ExpertConfig,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
)
from tests.program_pieces import PYTHON, TENSORS
from tests.program_traps import TRAPS
from tests.traps import auto_groups_all, seed_all

WIDTH = 4
LEVEL = "language"
STEPS = 3
# Relative to the largest value. A step of SGD and a few operations lie between a rounding and the compared values.
TOLERANCES = {torch.float64: 1e-8, torch.complex128: 1e-8}
OTHERS = 1e-3

_HEADER = """
import collections, contextlib, copy, enum, functools, io, itertools, logging, math, os, random, threading, time
import warnings, weakref
from collections import ChainMap, Counter, OrderedDict, deque
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from celmoe import ExpertBatch, ExpertResult

W = {width}
ODD = {odd}
LOG = logging.getLogger("programs")
SINK = io.StringIO()
"""


def _pieces(text: str) -> list[str]:
    return [each.strip("\n") for each in text.split("\n\n") if each.strip()]


_KINDS = {"tensors": _pieces(TENSORS), "python": _pieces(PYTHON), "traps": _pieces(TRAPS)}
# The blocks that the lines of a piece stand in, within `forward`.
_AROUND = {
    "plain": None,
    "method": None,
    "closure": None,
    "try": ("try:", "finally:\n    x = x * 1"),
    "except": ("try:", "except ZeroDivisionError:\n    x = x * 0"),
    "with": ("with contextlib.ExitStack() as stack:", ""),
    "for": ("for _ in range(2):", ""),
    "if": ("if x.dim() > 1 and W == 4:", ""),
    "while": ("turns = 0\nwhile turns < 1:\n    turns += 1", ""),
}


@dataclass(frozen=True)
class Piece:
    """A part of a program, its choices made.

    Attributes:
        lines: The lines of each of the piece's sections.
        around: The block around its lines in ``forward``, a key of `_AROUND`.
    """

    lines: Mapping[str, tuple[str, ...]]
    around: str


@dataclass(frozen=True)
class Plan:
    """A program.

    Attributes:
        seed: The seed of the rows, the weights and the routes.
        pieces: In the order of ``forward``.
        odd: By piece, the expert that differs; -1 for none.
        experts: The number of experts.
        is_double: True if it computes in float64.
        trailing: Axes between samples and width.
        mask: ``None``, ``"bool"`` or ``"float"``.
        scales: Each expert's ``input_gradient_scale``.
        modes: The mode of each step: ``"train"``, ``"eval"`` or ``"no_grad"``.
        strict_at: The step that ``engine="grouped"`` is tried in.
    """

    seed: int
    pieces: tuple[Piece, ...]
    odd: tuple[int, ...]
    experts: int
    is_double: bool
    trailing: tuple[int, ...]
    mask: str | None
    scales: tuple[float, ...]
    modes: tuple[str, ...]
    strict_at: int

    def source(self) -> str:
        """The program."""
        sections: dict[str, list[str]] = {key: [] for key in "tcik"}
        forward: list[str] = []
        for number, piece in enumerate(self.pieces):
            for key in "tci":
                sections[key] += piece.lines.get(key, ())
            for line in piece.lines.get("k", ()):
                sections["k"] += ["with contextlib.suppress(Exception):", f"    {line}"]
            body = list(piece.lines.get("f", ()))
            if piece.around == "method":
                sections["c"] += [f"def part_{number}(self, x, batch, losses):", *_indented(_globals_first(body))]
                sections["c"].append("    return x")
                forward.append(f"x = self.part_{number}(x, batch, losses)")
            elif piece.around == "closure":
                forward += [f"def part_{number}(x):", *_indented(_globals_first(body)), "    return x"]
                forward.append(f"x = part_{number}(x)")
            elif (around := _AROUND[piece.around]) is not None:
                forward += [*around[0].splitlines(), *_indented(body), *around[1].splitlines()]
            else:
                forward += body
        return "\n".join(
            [
                _HEADER.format(width=WIDTH, odd=dict(enumerate(self.odd))),
                *sections["t"],
                "",
                "class Expert(nn.Module):",
                *_indented(sections["c"]),
                "    def __init__(self, number):",
                "        super().__init__()",
                "        self.number = number",
                "        def odd(piece, usual, other): return other if ODD[piece] == number else usual",
                *_indented(_indented(sections["i"])),
                "    def forward(self, batch):",
                *_indented(_indented(_globals_first(["losses, x = {}, batch.hidden", *forward]))),
                "        return ExpertResult(x, losses)",
                "",
                "def change(experts, context):",
                *_indented(_globals_first(["pass", *sections["k"]])),
                "",
            ]
        )


def _indented(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]


def _globals_first(lines: Sequence[str]) -> list[str]:
    """Declarations before the first use."""
    names = [name for line in lines for name in re.findall(r"^\s*global (\w+)", line)]
    kept = [re.sub(r"^(\s*)global \w+;? ?", r"\1", line) for line in lines]
    return [*(f"global {name}" for name in dict.fromkeys(names)), *(line for line in kept if line.strip())]


def _made(text: str, number: int, draw: random.Random) -> Piece:
    text = re.sub(r"<<(.*?)>>", lambda match: draw.choice(match[1].split("||")), text).replace("$", str(number))
    lines: dict[str, tuple[str, ...]] = {}
    for line in text.split("\n"):
        lines[line[0]] = (*lines.get(line[0], ()), line[2:])
    around = draw.choice(["plain"] * 6 + list(_AROUND))
    if "global" in text or "f" not in lines:
        around = "plain"
    return Piece(lines, around)


def plan_of(seed: int) -> Plan:
    """The program that a seed makes."""
    draw = random.Random(seed)
    kinds = ["tensors"] * draw.randint(1, 3) + ["python"] * draw.randint(0, 3)
    kinds += ["traps"] * (draw.random() < 0.4)
    draw.shuffle(kinds)
    pieces = tuple(_made(draw.choice(_KINDS[kind]), number, draw) for number, kind in enumerate(kinds))
    experts = draw.randint(3, 6)
    return Plan(
        seed,
        pieces,
        tuple(draw.randrange(experts) if draw.random() < 0.3 else -1 for _ in pieces),
        experts,
        draw.random() < 0.8,
        draw.choice([(), (), (2,)]),
        draw.choice([None, None, "bool", "float"]),
        tuple(draw.choice([1.0] * 8 + [0.5, 0.0]) for _ in range(experts)),
        tuple(draw.choice(["train"] * 4 + ["eval", "no_grad"]) for _ in range(STEPS)),
        draw.randrange(STEPS),
    )


class FaultError(AssertionError):
    """A program shows a fault of the engine."""


class RoundingError(FaultError):
    """Values differ by less than float32 rounds the largest value of the step to: differences of large numbers do."""


class Options:
    """An object in a context."""

    def __init__(self) -> None:
        self.factor = 0.5
        self.nested = {"factor": 2.0}


_FOREIGN = (types.ModuleType, types.BuiltinFunctionType, logging.Logger, np.random.RandomState)


_NUMBERS = itertools.count()


class Side:
    """One of the two models, in a Python module of its own."""

    def __init__(self, plan: Plan, name: str, engine: str) -> None:
        self.plan = plan
        # The tracer remembers modules by their names.
        self.name = f"random_program_{next(_NUMBERS)}_{name}"
        self.module = types.ModuleType(self.name)
        sys.modules[self.name] = self.module
        source = plan.source()
        file = f"<{self.name}>"
        linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file
        seed_all(plan.seed)
        exec(compile(source, file, "exec"), vars(self.module))
        names = [chr(ord("a") + number) for number in range(plan.experts)]
        experts = {name: ExpertConfig(name) for name in names}
        for each, scale in zip(experts.values(), plan.scales, strict=True):
            each.gradient_scale = scale
        config = CELMoEConfig(WIDTH, [HierarchyLevelConfig(LEVEL, experts)], use_learned_fusion=False)
        numbers = iter(range(plan.experts))
        self.model = HierarchicalCELMoE(config, lambda *_: self.module.Expert(next(numbers)), engine=engine)
        if plan.is_double:
            self.model.double()
            for parameter in self.model.parameters():
                if parameter.is_complex():
                    parameter.data = parameter.data.to(torch.complex128)
        self.names = names
        self.options, self.log, self.store = Options(), [], {}
        self.context: dict[str, Any] = {}

    @property
    def experts(self) -> list[nn.Module]:
        return [self.model.level_modules[LEVEL][name] for name in self.names]

    def close(self) -> None:
        """Forget the module."""
        sys.modules.pop(self.name, None)
        _import_module.cache_clear()
        linecache.cache.pop(f"<{self.name}>", None)

    def prepare(self, step: int) -> None:
        """Make the step's batch, and the change before it."""
        plan = self.plan
        draw = random.Random(plan.seed * 7 + step)
        generator = torch.Generator().manual_seed(plan.seed * 7 + step)
        counts = [draw.choice([0, 1, 1, 2, 3, 4, 5, 7]) for _ in self.names]
        first, second = draw.sample(range(plan.experts), 2)
        counts[first], counts[second] = draw.randint(1, 5), draw.randint(2, 6)
        counts[first] += max(0, 7 - sum(counts))
        routes = [name for name, count in zip(self.names, counts, strict=True) for _ in range(count)]
        draw.shuffle(routes)
        size, dtype = len(routes), torch.float64 if plan.is_double else torch.float32
        ones = (1,) * len(plan.trailing)
        hidden = torch.randn(size, *plan.trailing, WIDTH, generator=generator).to(dtype)
        scale = (torch.rand(size, *ones, 1, generator=generator) + 0.5).to(dtype)
        table = torch.rand(3, WIDTH, generator=generator).to(dtype)
        square = torch.rand(WIDTH, WIDTH, generator=generator).to(dtype)
        self.leaves = {"hidden": hidden, "scale": scale, "table": table, "square": square}
        if draw.random() < 0.8:
            self.leaves = {name: leaf.requires_grad_() for name, leaf in self.leaves.items()}
        self.mask = None if plan.mask is None else torch.rand((size, *plan.trailing), generator=generator) < 0.7
        if plan.mask == "float":
            self.mask = self.mask.to(dtype)
        self.context = {
            **{name: leaf for name, leaf in self.leaves.items() if name != "hidden"},
            "index": torch.randint(0, 5, (size,), generator=generator),
            "level": 2,
            "flags": (1, 3),
            "options": self.options,
            "log": self.log,
            "store": self.store,
        }
        self.routing = {LEVEL: routes}
        self.mode = plan.modes[step]
        self.model.train(self.mode != "eval")
        self.model.zero_grad(set_to_none=True)
        seed_all(plan.seed + step)
        if step:
            self.module.change(self.experts, self.context)
        seed_all(plan.seed + step)

    def run(self) -> dict[str, Any]:
        """A call, its backward pass and a step of SGD: all that they give."""
        found: dict[str, Any] = {}
        grad = torch.no_grad() if self.mode == "no_grad" else contextlib.nullcontext()
        try:
            with grad:
                output = self.model(self.leaves["hidden"], self.routing, self.context, self.mask)
        except EngineRefusedError:
            raise
        except Exception as error:  # noqa: BLE001  # both sides must raise it
            found["raised"] = f"{type(error).__name__}: {str(error).replace(self.name, '')}"
            return found | self.state()
        level = output.levels[LEVEL]
        found |= {"hidden": level.hidden.detach(), "fused": output.fused_hidden.detach(), "aux": repr(level.aux)}
        found["flows"] = level.hidden.requires_grad
        losses = {name: torch.as_tensor(loss) for name, loss in output.losses.items()}
        found |= {f"loss {name}": loss.detach() for name, loss in losses.items()}
        found |= {
            f"loss {name} is": (type(loss), torch.is_tensor(loss) and loss.requires_grad)
            for name, loss in output.losses.items()
        }
        found["weights"] = repr(output.loss_weights)
        objective = _objective(level.hidden, losses)
        if objective is not None:
            try:
                objective.backward()
            except RuntimeError as error:
                found["raised backward"] = str(error).split(" at ")[0]
                return found | self.state()
        for name, leaf in [*self.leaves.items(), *self.model.named_parameters()]:
            found[f"gradient of {name}"] = None if leaf.grad is None else leaf.grad.clone()
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.05 * parameter.grad)
        return found | self.state()

    def state(self) -> dict[str, Any]:
        """All lasting state: tensors, Python values, random streams."""
        found: dict[str, Any] = {}
        seen: dict[int, str] = {}
        for name, value in vars(self.module).items():
            if not name.startswith("__") and not isinstance(value, _FOREIGN):
                _describe(value, name, found, seen, self.name)
        for number, expert in enumerate(self.experts):
            _describe(expert, f"experts[{number}]", found, seen, self.name)
        _describe(self.context, "context", found, seen, self.name)
        _describe(self.mask, "mask", found, seen, self.name)
        found["torch's stream"] = torch.get_rng_state()
        found["Python's stream"] = hash(random.getstate())
        found["NumPy's stream"] = hash(np.random.get_state()[1].tobytes())  # noqa: NPY002
        found["NumPy's place"] = np.random.get_state()[2]  # noqa: NPY002
        return found


def _objective(hidden: torch.Tensor, losses: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    total: Any = None
    for index, each in enumerate([hidden, *losses.values()]):
        if each.requires_grad:
            flat = each.reshape(-1)
            flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
            part = (flat * torch.linspace(0.1, 0.3 + 0.1 * index, flat.numel()).to(flat.dtype)).sum().double()
            total = part if total is None else total + part
    return total


# A memo's hits differ, for verifying asks it, too. Comparing also fills it before it refuses, which no result shows.
_MEMO = " memo"
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range)


def _describe(value: Any, path: str, found: dict[str, Any], seen: dict[int, str], own: str) -> None:
    """Write down a value's parts, by path."""
    if isinstance(value, _PLAIN):
        # Addresses differ.
        is_id = type(value) is int and value > 1 << 40
        found[path] = "an id" if is_id else (type(value).__name__, repr(value).replace(own, ""))
        return
    if id(value) in seen:
        found[path] = f"is {seen[id(value)]}"
        return
    seen[id(value)] = path
    if isinstance(value, torch.Tensor):
        found[path] = value.detach().clone()
        found[f"{path} is"] = type(value).__name__, value.requires_grad, value.is_leaf
        found[f"{path} hooks"] = len(value._backward_hooks or ()) if value.is_leaf else 0
        for name, each in getattr(value, "__dict__", {}).items():
            _describe(each, f"{path}.{name}", found, seen, own)
        return
    said = next((tell(value) for kind, tell in _TOLD.items() if isinstance(value, kind)), None)
    said = next((tell(value) for name, tell in _TOLD_BY.items() if hasattr(value, name)), said)
    found[path] = type(value).__name__ if said is None else said
    if hasattr(value, "cache_info"):
        found[path + _MEMO] = value.cache_info().currsize
    for name, each in _parts(value, path, own):
        if not isinstance(each, _FOREIGN):
            _describe(each, f"{path}.{name}", found, seen, own)


# Descriptions of values that are not taken apart: by class, and by an attribute.
_TOLD: dict[Any, Any] = {
    np.ndarray | np.generic | Exception | itertools.count: repr,
    # Objects have another order in every set.
    set | frozenset: lambda value: sorted(map(repr, value)),
    random.Random: lambda value: hash(value.getstate()),
    torch.Generator: torch.Generator.get_state,
    Mapping: lambda value: [_key(key) for key in value] if not _are_numbers(value) else len(value),
    list | tuple | deque: len,
}
_TOLD_BY: dict[str, Any] = {
    "__length_hint__": lambda value: value.__length_hint__(),
    "getvalue": lambda value: value.getvalue(),
}


def _are_numbers(value: Mapping[Any, Any]) -> bool:
    return all(type(key) is int for key in value)


def _parts(value: Any, path: str, own: str) -> list[tuple[Any, Any]]:
    """The parts of a value, by name."""
    if isinstance(value, type):
        is_own = value.__module__ == own
        return [(name, each) for name, each in vars(value).items() if is_own and not name.startswith("__")]
    if isinstance(value, types.FunctionType):
        if value.__module__ != own:
            return []
        cells = [(f"cell {place}", _content(cell)) for place, cell in enumerate(value.__closure__ or ())]
        return [*cells, ("defaults", value.__defaults__), ("attributes", vars(value))]
    parts: list[tuple[Any, Any]] = []
    if isinstance(value, Mapping):
        # Hooks are numbered for the process.
        keys = range(len(value)) if path.endswith("_hooks") else map(_key, value)
        parts = list(zip(keys, value.values(), strict=True))
    elif isinstance(value, list | tuple | deque):
        parts = list(enumerate(value))
    parts += list(getattr(value, "__dict__", {}).items())
    slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
    return parts + [(name, getattr(value, name)) for name in slots if hasattr(value, name)]


def _slots(kind: type) -> tuple[str, ...]:
    found = vars(kind).get("__slots__", ())
    named = (found,) if isinstance(found, str) else tuple(found)
    return tuple(name for name in named if not name.startswith("__"))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _key(key: Any) -> str:
    if type(key) is int and key > 1 << 40:
        return "an id"
    return repr(key) if isinstance(key, _PLAIN) or type(key) is tuple else type(key).__name__


def process_state() -> dict[str, Any]:
    """The process state of PyTorch and Python that a call could leave changed."""
    from torch._dynamo import config

    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    return {
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_cache_enabled()),
        "modes": (torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()),
        "hooks": hooks(True) is None,
        "kernels": (torch._C._get_mkldnn_enabled(), torch._C._get_nnpack_enabled()),
        "dtype": torch.get_default_dtype(),
        "loggers": [logging.getLogger(name).disabled for name in ("torch._dynamo", "torch._guards")],
        "warnings": len(warnings.filters),
        "tracer": (config.suppress_errors, config.specialize_float, config.recompile_limit, config.specialize_int),
        "stdout": id(sys.stdout),
        "environment": "RANDOM_PROGRAM" in os.environ,
    }


@contextlib.contextmanager
def _process_restored() -> Iterator[None]:
    dtype, grad, environ = torch.get_default_dtype(), torch.is_grad_enabled(), dict(os.environ)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        os.environ.clear()
        os.environ.update(environ)


def assert_same(mine: Mapping[str, Any], theirs: Mapping[str, Any], *, values: bool = True) -> None:
    """Both found the same.

    Args:
        mine: The subject's findings.
        theirs: The loop's findings.
        values: True to compare numbers, false to compare their presence alone.

    Raises:
        FaultError: They differ.
    """
    for name in (*theirs, *mine):
        if (name in mine) != (name in theirs):
            raise FaultError(f"{name}: {'is there' if name in mine else 'is missing'}")
    for name, wanted in theirs.items():
        given = mine[name]
        if "stream" in name and not values:
            continue
        if isinstance(wanted, torch.Tensor) and isinstance(given, torch.Tensor):
            if (given.shape, given.dtype) != (wanted.shape, wanted.dtype):
                raise FaultError(f"{name}: is {_kind(given)}, should be {_kind(wanted)}")
            if values and not _close(given, wanted):
                kind = RoundingError if _differ_by_rounding(given, wanted, theirs) else FaultError
                raise kind(f"{name}: is {_shown(given)}, should be {_shown(wanted)}")
        elif type(given) is not type(wanted) or (given != wanted and (values or given is None)):
            raise FaultError(f"{name}: is {given!r}, should be {wanted!r}")


def _differ_by_rounding(mine: torch.Tensor, theirs: torch.Tensor, step: Mapping[str, Any]) -> bool:
    if theirs.dtype is not torch.float32 or not bool((mine.isfinite() & theirs.isfinite()).all()):
        return False
    tensors = [each for each in step.values() if isinstance(each, torch.Tensor) and each.dtype is torch.float32]
    largest = max(float(each.nan_to_num(0, 0, 0).abs().max()) for each in tensors if each.numel())
    return float((mine - theirs).abs().max()) <= torch.finfo(torch.float32).eps * largest


def _shown(tensor: torch.Tensor) -> str:
    text = str(tensor.tolist())
    return text if len(text) < 300 else f"{text[:300]} ..."


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    if not (theirs.is_floating_point() or theirs.is_complex()):
        return torch.equal(mine, theirs)
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()):
        return False
    largest = theirs.where(finite, 0).abs().max() if theirs.numel() else torch.zeros(())
    return bool(
        ((mine - theirs).where(finite, 0).abs() <= TOLERANCES.get(theirs.dtype, OTHERS) * largest + 1e-12).all()
    )


@dataclass
class Found:
    """The findings of a program's run.

    Attributes:
        grouped: Steps in which a class ran as one.
        steps: All steps.
        refusals: The reasons for which ``engine="grouped"`` was refused.
        draws: True if random numbers were drawn for a class at once.
        raises: True if the program raised.
    """

    grouped: int = 0
    steps: int = 0
    refusals: tuple[str, ...] = ()
    draws: bool = False
    raises: bool = False


def run_program(plan: Plan) -> Found:
    """Run a program on both sides.

    Raises:
        FaultError: The engine gives something else than the loop, raises another error, or leaves something behind.
    """
    try:
        return _run(plan)
    except RoundingError:
        # Float64 tells if it is rounding.
        return _run(replace(plan, is_double=True))


def _run(plan: Plan) -> Found:
    found = Found()
    with contextlib.ExitStack() as stack:
        subject, twin = Side(plan, "subject", "auto"), Side(plan, "twin", "looped")
        stack.callback(subject.close)
        stack.callback(twin.close)
        stack.enter_context(auto_groups_all())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        spy = stack.enter_context(_spied())
        for step in range(STEPS):
            subject.prepare(step)
            twin.prepare(step)
            spy.clear()
            with _process_restored():
                mine = _stepped(subject, step == plan.strict_at, found) | process_state()
            found.draws |= spy["draws"] > 0
            found.grouped += spy["runs"] > 0
            found.steps += 1
            seed_all(plan.seed + step)
            with _process_restored():
                theirs = twin.run() | process_state()
            found.raises |= "raised" in theirs
            try:
                assert_same(mine, theirs, values=not found.draws)
            except FaultError as error:
                how = "grouped" if spy["runs"] else "looped"
                raise type(error)(f"step {step} ({how}): {error}") from None
            if found.draws or "raised" in theirs:
                # Weights and rows are others from here on.
                break
        _assert_gone(subject, twin)
    classes = {side.name: weakref.ref(side.module.Expert) for side in (subject, twin)}
    for side in (subject, twin):
        # Drop the classes, as a notebook does that defines them anew.
        vars(side.module).clear()
    gc.collect()
    kept = [name for name, each in classes.items() if each() is not None]
    if kept == [subject.name]:
        raise FaultError(f"the class of the experts is alive after all is gone: {kept}")
    return found


def _stepped(subject: Side, is_strict: bool, found: Found) -> dict[str, Any]:
    if is_strict:
        subject.model.engine = "grouped"
        before = subject.state() | process_state()
        try:
            return subject.run()
        except EngineRefusedError as error:
            found.refusals += (str(error),)
        finally:
            subject.model.engine = "auto"
        try:
            after = subject.state() | process_state()
            memos = [path for path in after if path.endswith(_MEMO) and path in before]
            assert_same(after, before | {path: after[path] for path in memos})
        except FaultError as error:
            raise FaultError(f"a refused call left something behind: {error} ({found.refusals[-1]})") from None
    try:
        return subject.run()
    except EngineRefusedError as error:
        raise FaultError(f"'auto' was refused: {error}") from None


@contextlib.contextmanager
def _spied() -> Iterator[Counter[str]]:
    seen: Counter[str] = Counter()
    right = celmoe.engines.grouped.run_program

    def spied(*args: Any, **options: Any) -> Any:
        outcome = right(*args, **options)
        seen["runs"] += 1
        seen["draws"] += outcome.draws
        return outcome

    with mock.patch.object(celmoe.engines.grouped, "run_program", spied):
        yield seen


def _assert_gone(subject: Side, twin: Side) -> None:
    """The subject's model frees all objects that the loop's model frees."""
    experts = [[weakref.ref(each) for each in side.experts] for side in (subject, twin)]
    tensors = [[weakref.ref(each) for each in side.model.parameters()] for side in (subject, twin)]
    for side in (subject, twin):
        side.__dict__ = {"name": side.name, "module": side.module}
    gc.collect()
    for what, (mine, theirs) in {"experts": experts, "parameters": tensors}.items():
        alive = [[each() is not None for each in some] for some in (mine, theirs)]
        if any(here and not there for here, there in zip(*alive, strict=True)):
            raise FaultError(f"{what} alive after the model is gone: {alive[0]}, should be {alive[1]}")


def fault_of(plan: Plan) -> str | None:
    """The fault that a program shows, in words."""
    try:
        run_program(plan)
    except FaultError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  # the typed errors are caught above
        return f"untyped {type(error).__name__}: {error}"
    return None


def shortened(plan: Plan) -> Plan:
    """The program with as few pieces, experts and oddities as still show a fault."""
    changed = True
    while changed:
        changed = False
        for smaller in _smaller(plan):
            if fault_of(smaller) is not None:
                plan, changed = smaller, True
                break
    return plan


def _smaller(plan: Plan) -> Iterator[Plan]:
    for place, piece in enumerate(plan.pieces):
        if piece.lines:
            yield replace(plan, pieces=(*plan.pieces[:place], Piece({}, "plain"), *plan.pieces[place + 1 :]))
    for place, piece in enumerate(plan.pieces):
        if piece.around != "plain":
            yield replace(
                plan, pieces=(*plan.pieces[:place], replace(piece, around="plain"), *plan.pieces[place + 1 :])
            )
        if piece.lines and plan.odd[place] >= 0:
            yield replace(plan, odd=(*plan.odd[:place], -1, *plan.odd[place + 1 :]))
    plain = {
        "mask": None,
        "trailing": (),
        "is_double": True,
        "scales": (1.0,) * plan.experts,
        "modes": ("train",) * STEPS,
    }
    for name, value in plain.items():
        if getattr(plan, name) != value:
            yield replace(plan, **{name: value})


def told(plan: Plan, fault: str) -> str:
    """A fault with its program."""
    source = plan.source().split("SINK = io.StringIO()\n", 1)[1]
    rest = replace(plan, pieces=())
    return f"seed {plan.seed}: {fault}\n{rest}\n{source}"


def run_seeds(seeds: Sequence[int], shorten: bool = True) -> tuple[list[Found], list[str]]:
    """Run programs, and tell of those that show a fault."""
    all_found, faults = [], []
    for seed in seeds:
        plan = plan_of(seed)
        try:
            all_found.append(run_program(plan))
        except Exception as error:  # noqa: BLE001  # told
            fault = str(error) if isinstance(error, FaultError) else f"untyped {type(error).__name__}: {error}"
            if shorten:
                plan = shortened(plan)
                fault += f"\nshortened: {fault_of(plan)}"
            faults.append(told(plan, fault))
    return all_found, faults


def _worker(seeds: Sequence[int]) -> tuple[list[Found], list[str]]:
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    return run_seeds(seeds)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.programs", description="Run random expert programs.")
    parser.add_argument("--count", type=int, default=200, help="how many programs")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed; each next one has the next")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--chunk", type=int, default=20, help="programs that a process runs before it reports")
    parser.add_argument("--show", action="store_true", help="print the programs, too")
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.count)
    if options.show:
        for seed in seeds:
            sys.stdout.write(plan_of(seed).source())
    chunks = [seeds[first : first + options.chunk] for first in range(0, len(seeds), options.chunk)]
    began = time.monotonic()
    founds: list[Found] = []
    faults: list[str] = []
    # A process keeps the tracer's memory; a new process begins without.
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=10) as pool:
        for some, wrong in pool.imap_unordered(_worker, chunks):
            founds += some
            faults += wrong
            done = len(founds) + len(faults)
            rate = done / (time.monotonic() - began)
            for each in wrong:
                sys.stdout.write(f"\n{each}\n")
                sys.stdout.flush()
            left = (options.count - done) / rate
            sys.stderr.write(
                f"\r{done}/{options.count} programs, {len(faults)} faults, {rate:.1f}/s, {left:.0f} s left"
            )
            sys.stderr.flush()
    sys.stdout.write(f"\n{summary(founds, faults)}\n")
    return 1 if faults else 0


def summary(founds: Sequence[Found], faults: Sequence[str]) -> str:
    """The figures of a run, in a line each."""
    steps = sum(each.steps for each in founds)
    lines = [
        f"programs without a fault: {len(founds)}; with one: {len(faults)}",
        f"programs with a grouped step: {sum(each.grouped > 0 for each in founds)}",
        f"steps: {steps}; with a class that ran as one: {sum(each.grouped for each in founds)}",
        f"refused under 'grouped': {sum(bool(each.refusals) for each in founds)}",
        f"compared up to a draw: {sum(each.draws for each in founds)}; raised: {sum(each.raises for each in founds)}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
