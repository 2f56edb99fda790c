"""LoRA experts: a base that many share and that runs once, ranks and alphas by expert, and folding one away."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import celmoe
from celmoe import (
    CELMoEConfig,
    EngineRefusedError,
    ExpertBatch,
    ExpertConfig,
    ExpertResult,
    GraphError,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    InputError,
    zoo,
)
from celmoe.based import BasedExpert
from celmoe.reference import reference_forward
from tests.traps import assert_same, auto_groups_all, observe

WIDTH = 8
INPUT = 6
LEVEL = "language"
NAMES = ("a", "b", "c", "d", "e", "absent")
ROUTES = ["a", "c", "b", "a", "d", "c", "a", "e", "b", "d", "c"]
# By expert its rank and alpha.
RANKS = {"a": (2, 2.0), "b": (2, 4.0), "c": (3, 3.0), "d": (2, 5.0), "e": (3, 1.0), "absent": (2, 2.0)}


class Block(nn.Module):
    """A base of several layers, with a norm, a buffer and a product that is no linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 12)
        self.down = nn.Linear(12, WIDTH, bias=False)
        self.register_buffer("scale", torch.rand(WIDTH) + 0.5)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows + self.down(F.gelu(self.up(self.norm(rows)))) * self.scale


BASES: dict[str, Callable[[], nn.Module]] = {"linear": lambda: nn.Linear(WIDTH, WIDTH), "block": Block}


class Given:
    """One batch of rows, with several positions each."""

    def __init__(self, routes: list[str] = ROUTES, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.routing = {LEVEL: routes}
        self.leaves = {
            name: torch.randn(len(routes), 3, width, generator=generator).to(dtype).requires_grad_()
            for name, width in (("hidden", WIDTH), ("input", INPUT))
        }

    def __call__(self, forward: Callable[..., Any]) -> Any:
        return forward(self.leaves["hidden"], self.routing, {"input": self.leaves["input"]})


def built(make: Callable[[str], nn.Module], engine: str = "grouped", *, trained: bool = True) -> HierarchicalCELMoE:
    """A model of such experts, by name."""
    levels = [HierarchyLevelConfig(LEVEL, {name: ExpertConfig(name) for name in NAMES})]
    config = CELMoEConfig(WIDTH, levels, use_learned_fusion=False)
    torch.manual_seed(0)
    model = HierarchicalCELMoE(config, lambda _, name, __: make(name), engine=engine)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and trained:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def on_base(base: nn.Module, engine: str = "grouped", **options: Any) -> HierarchicalCELMoE:
    return built(lambda name: zoo.LoRA(WIDTH, base=base, **{"rank": 2, **options}), engine)


def expert_of(model: HierarchicalCELMoE, name: str = "a") -> Any:
    return model.level_modules[LEVEL][name]


def base_of(kind: str = "linear", seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return BASES[kind]()


def program_of(model: HierarchicalCELMoE) -> Any:
    record = model._levels[0].choice.classes.known("a", expert_of(model))
    assert record is not None
    return record.first.program


def classes_of(model: HierarchicalCELMoE, routes: list[str] = ROUTES) -> list[tuple[tuple[str, ...], str]]:
    (level,) = model.explain({LEVEL: routes}).levels
    return [(each.experts, each.engine) for each in level.classes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", BASES)
def test_a_shared_base_runs_grouped_and_like_the_oracle(kind: str, dtype: torch.dtype):
    subject = on_base(base_of(kind)).to(dtype)
    twin = copy.deepcopy(subject)
    for seed, routes in enumerate((ROUTES, ["a", "b", "b"], ["e", *ROUTES, "absent"])):
        mine = observe(subject, subject, Given(routes, seed, dtype))
        assert {engine for _, engine in classes_of(subject, routes)} == {"grouped"}
        theirs = observe(twin, partial(reference_forward, twin), Given(routes, seed, dtype))
        if dtype is torch.bfloat16:
            torch.testing.assert_close(mine["fused_hidden"], theirs["fused_hidden"], rtol=0.02, atol=0.05)
        else:
            assert_same(mine, theirs)


def test_a_shared_base_runs_once_in_the_program():
    """One product for the base, and two for the change; the base's parameters are everybody's."""
    model = on_base(base_of())
    Given()(model)
    program = program_of(model)
    assert program.operations.count("linear") == 3
    kinds = [kind for kind, _ in program.captured.inputs]
    assert kinds.count("base") == 2
    assert program.captured.names == ("down.weight", "scaling", "up.weight")
    assert "= base\n" in str(program)


class Counting(torch.overrides.TorchFunctionMode):
    """Notes the number of rows of each linear layer with a given weight."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.rows = weight, []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and args[1] is self.weight:
            self.rows.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def test_a_shared_base_runs_once_on_all_rows():
    base = base_of()
    grouped, looped = on_base(base), on_base(base, "looped")
    batch = Given()
    batch(grouped)
    with Counting(base.weight) as of_grouped:
        batch(grouped)
    with Counting(base.weight) as of_looped:
        batch(looped)
    assert of_grouped.rows == [len(ROUTES)]
    assert sorted(of_looped.rows) == [1, 2, 2, 3, 3]


def test_the_base_is_frozen_and_none_of_the_experts_own():
    base = base_of()
    model = on_base(base)
    assert not any(parameter.requires_grad for parameter in base.parameters())
    ours = {
        f"level_modules.{LEVEL}.{name}.{path}" for name in NAMES for path in ("down.weight", "up.weight", "scaling")
    }
    assert set(model.state_dict()) == ours
    assert not {id(each) for each in base.parameters()} & {id(each) for each in model.parameters()}
    Given()(model).fused_hidden.sum().backward()
    assert base.weight.grad is None


def test_the_base_moves_with_the_experts():
    base = base_of()
    model = on_base(base)
    model.double()
    assert base.weight.dtype == torch.float64
    assert Given(dtype=torch.float64)(model).fused_hidden.dtype == torch.float64
    assert base.training
    model.eval()
    # It stays in its own mode: a pretrained base is put in evaluation by whoever has it.
    assert base.training


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_share_one_copy_of_the_base(copied: Callable[[Any], Any]):
    model = on_base(base_of())
    other = copied(model)
    assert len({id(expert_of(each, name).base) for each in (model, other) for name in NAMES}) == 2
    assert torch.equal(Given()(other).fused_hidden, Given()(model).fused_hidden)
    part = model.subset({LEVEL: ["a", "b"]})
    assert expert_of(part, "a").base is expert_of(part, "b").base is not expert_of(model).base


def test_an_expert_comes_on_the_same_base():
    base = base_of()
    model = on_base(base)
    model.add_expert(LEVEL, "new", ExpertConfig("new"), warm_start="a")
    assert expert_of(model, "new").base is base
    routes = [*ROUTES, "new"]
    Given(routes)(model)
    assert classes_of(model, routes) == [(("a", "b", "c", "d", "e", "new"), "grouped")]


def test_a_changed_base_is_seen_in_grouped():
    """Values, another tensor, another module, and gradients: what ran before is never run again by mistake."""
    base = base_of()
    model = on_base(base, "auto")

    def compare() -> None:
        batch = Given()
        with auto_groups_all():
            found = batch(model).fused_hidden
        torch.testing.assert_close(found, batch(partial(reference_forward, model)).fused_hidden)

    compare()
    with torch.no_grad():
        base.weight.mul_(2)
    compare()
    base.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
    compare()
    base.bias = None
    compare()
    other = base_of("block")
    for name in NAMES:
        expert_of(model, name).base = other
    compare()
    expert_of(model, "c").base = base_of("block", seed=7)
    compare()
    with auto_groups_all():
        assert classes_of(model) == [(("a", "b", "d", "e"), "grouped"), (("c",), "looped")]
    other.requires_grad_()
    compare()
    for name in NAMES:
        expert_of(model, name).base = None
    assert len(classes_of(model)) == 1
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        compare()


def test_experts_on_two_bases_are_two_classes_in_grouped():
    bases = {name: base_of(seed=number % 2) for number, name in enumerate(NAMES[:2])}
    model = built(lambda name: zoo.LoRA(WIDTH, rank=2, base=bases["a" if name in "ace" else "b"]))
    batch = Given()
    for _ in range(2):
        torch.testing.assert_close(
            batch(model).fused_hidden, batch(partial(reference_forward, model)).fused_hidden, rtol=1e-5, atol=1e-5
        )
        assert classes_of(model) == [(("a", "c", "e"), "grouped"), (("b", "d"), "grouped")]
    report = celmoe.stack_experts(model)
    assert len(report.classes) == 1
    torch.testing.assert_close(
        batch(model).fused_hidden, batch(partial(reference_forward, model)).fused_hidden, rtol=1e-5, atol=1e-5
    )


def test_a_base_that_is_trained_is_refused_in_grouped():
    base = base_of()
    model = on_base(base)
    base.requires_grad_()
    with pytest.raises(EngineRefusedError, match=r"read a tensor that is not their own \(base\.weight\)"):
        Given()(model)
    model.engine = "auto"
    with auto_groups_all():
        Given()(model).fused_hidden.sum().backward()
    assert base.weight.grad is not None


class Attached(zoo.LoRA):
    """Holds a layer as a plain attribute, which is none of its own and no base."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__(WIDTH, rank=2, base=base_of())
        self.__dict__["other"] = other.requires_grad_(False)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(super().forward(batch).hidden + self.other(batch.hidden))


def test_other_tensors_that_are_not_their_own_stay_refused_in_grouped():
    other = nn.Linear(WIDTH, WIDTH)
    with pytest.raises(EngineRefusedError, match=r"read a tensor that is not their own \(other\.weight\)"):
        Given()(built(lambda name: Attached(other)))


class Norm(BasedExpert):
    """Somebody's own expert on a base, with a loss."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.base = base

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        rows = self.base(batch.hidden) * self.gain
        return ExpertResult(rows, {"size": rows.square().mean()})


def test_somebody_s_own_expert_on_a_base_in_grouped():
    base = base_of("block")
    subject, twin = (built(lambda name: Norm(base)) for _ in range(2))
    for seed in range(2):
        mine = observe(subject, subject, Given(seed=seed))
        assert_same(mine, observe(twin, partial(reference_forward, twin), Given(seed=seed)))
    assert classes_of(subject) == [(tuple("abcde"), "grouped")]


def by_rank(base: nn.Module | None) -> Callable[[str], nn.Module]:
    def make(name: str) -> nn.Module:
        rank, alpha = RANKS[name]
        features = (WIDTH,) if base is not None else (INPUT, WIDTH)
        return zoo.LoRA(*features, rank=rank, alpha=alpha, base=base)

    return make


@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no base"])
def test_a_group_for_each_rank_whatever_the_alphas(has_base: bool):
    base = base_of() if has_base else None
    subject = built(by_rank(base))
    twin = copy.deepcopy(subject)
    for seed in range(2):
        mine = observe(subject, subject, Given(seed=seed))
        assert_same(mine, observe(twin, partial(reference_forward, twin), Given(seed=seed)))
    assert classes_of(subject) == [(("a", "b", "d"), "grouped"), (("c", "e"), "grouped")]
    report = celmoe.stack_experts(subject)
    assert sorted(len(each.experts) for each in report.classes if not each.reason) == [2, 4]
    batch = Given()
    torch.testing.assert_close(
        batch(subject).fused_hidden, batch(partial(reference_forward, twin)).fused_hidden, rtol=1e-5, atol=1e-5
    )
    assert classes_of(subject) == [(("a", "b", "d"), "grouped"), (("c", "e"), "grouped")]


def test_alphas_stay_through_training_stacking_and_checkpoints():
    model = built(by_rank(None))
    wanted = {name: alpha / rank for name, (rank, alpha) in RANKS.items()}

    def found(of: HierarchicalCELMoE) -> dict[str, float]:
        return {name: pytest.approx(expert_of(of, name).scaling.item()) for name in NAMES}

    celmoe.stack_experts(model)
    optimizer = celmoe.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for seed in range(3):
        optimizer.zero_grad()
        Given(seed=seed)(model).fused_hidden.sin().sum().backward()
        optimizer.step()
    assert wanted == found(model)
    other = built(lambda name: zoo.LoRA(INPUT, WIDTH, rank=RANKS[name][0]))
    other.load_state_dict(model.state_dict())
    assert wanted == found(other)
    del optimizer
    gc.collect()
    model.freeze(LEVEL, "a")
    model.unfreeze(LEVEL)
    celmoe.unstack_experts(model)
    assert wanted == found(model)
    assert not any(expert_of(model, name).scaling.requires_grad for name in NAMES)
    assert all(expert_of(model, name).up.weight.requires_grad for name in NAMES)


@pytest.mark.parametrize("has_base", [True, False], ids=["base", "no base"])
def test_stacked_trains_like_ordinary_experts_in_grouped(has_base: bool):
    def make(name: str) -> nn.Module:
        if has_base:
            return zoo.LoRA(WIDTH, rank=2, base=base)
        return zoo.LoRA(INPUT, WIDTH, rank=2)

    base = base_of().double()
    models = [built(make).double() for _ in range(2)]
    report = celmoe.stack_experts(models[1])
    assert len(report.classes) == 1
    assert not report.classes[0].reason
    (stack,) = models[1]._stacks[LEVEL]
    assert stack.is_fixed
    options = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-3}
    optimizers = [
        torch.optim.AdamW(models[0].parameters(), **options),
        celmoe.optim.AdamW(models[1].parameters(), **options),
    ]
    for seed, routes in enumerate((ROUTES, ["a", "b", "b"], ROUTES)):
        outputs = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            outputs.append(Given(routes, seed, torch.float64)(model).fused_hidden)
            assert {engine for _, engine in classes_of(model, routes)} == {"grouped"}
            outputs[-1].sin().sum().backward()
            optimizer.step()
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    wanted = models[0].state_dict()
    for key, value in models[1].state_dict().items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9)


def test_a_stack_s_settled_members_see_a_changed_base_in_grouped():
    """A call asks one member of a stack only: what all share must be asked of that one."""
    base = base_of()
    model = on_base(base)
    celmoe.stack_experts(model)

    def compare() -> None:
        batch = Given()
        torch.testing.assert_close(
            batch(model).fused_hidden, batch(partial(reference_forward, model)).fused_hidden, rtol=1e-5, atol=1e-5
        )

    for _ in range(3):
        compare()
    with torch.no_grad():
        base.weight.add_(1)
    compare()
    base.bias = None
    compare()
    expert_of(model, "c").base = base_of(seed=9)
    compare()
    compare()


def test_compiles_as_one_operator_on_a_base():
    model = on_base(base_of(), "auto").double()
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for routes in (ROUTES, ["b"] * len(ROUTES)):
        batch = Given(routes, dtype=torch.float64)
        batch.routing = model.compile_routing(batch.routing)
        wanted = batch(partial(reference_forward, model)).fused_hidden
        torch.testing.assert_close(batch(compiled).fused_hidden, wanted, rtol=1e-10, atol=1e-10)


def test_compiles_as_the_graph_s_own_operations_behind_a_layer():
    model = built(lambda name: zoo.LoRA(INPUT, WIDTH, rank=2, alpha=ord(name[0])), "auto").double()
    celmoe.stack_experts(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for routes in (ROUTES, ["b"] * len(ROUTES)):
        batch = Given(routes, dtype=torch.float64)
        batch.routing = model.compile_routing(batch.routing)
        wanted = batch(partial(reference_forward, model)).fused_hidden
        torch.testing.assert_close(batch(compiled).fused_hidden, wanted, rtol=1e-10, atol=1e-10)


def test_exported_behind_a_layer_and_refused_on_a_base():
    batch = Given(dtype=torch.float64)
    hidden, context = batch.leaves["hidden"].detach(), {"input": batch.leaves["input"].detach()}
    behind = built(lambda name: zoo.LoRA(INPUT, WIDTH, rank=2), "auto").double()
    exported = torch.export.export(behind, (hidden, behind.compile_routing(batch.routing), context)).module()
    other = Given([*ROUTES[1:], "b"], seed=5, dtype=torch.float64)
    torch.testing.assert_close(
        exported(hidden, behind.compile_routing(other.routing), context).fused_hidden,
        reference_forward(behind, hidden, other.routing, context).fused_hidden,
    )
    model = on_base(base_of(), "auto").double()
    with pytest.raises(GraphError) as error:
        torch.export.export(model, (hidden, model.compile_routing(batch.routing)))
    assert str(error.value).startswith(
        "'model' must have experts of one class at level 'language' to be exported (got 'a', 'b', 'c', 'd', 'e', "
        "'absent', which read tensors of a base)"
    )


@pytest.mark.parametrize("bias", [True, False])
def test_folded_into_a_layer(bias: bool):
    """A layer whose weight is changed gives what the expert gives, behind a layer or on it."""
    torch.manual_seed(0)
    layer = nn.Linear(INPUT, WIDTH, bias=bias).double()
    expert = zoo.LoRA(INPUT, WIDTH, rank=2, alpha=5).double().eval()
    expert.up.weight.data.normal_()
    given = torch.randn(4, 3, INPUT, dtype=torch.float64)
    delta = expert.weight_delta()
    found = expert(ExpertBatch(layer(given), {"input": given})).hidden
    torch.testing.assert_close(F.linear(given, layer.weight + delta, layer.bias), found)
    assert delta.shape == layer.weight.shape
    assert not delta.requires_grad
    torch.testing.assert_close(delta, 5 / 2 * expert.up.weight @ expert.down.weight)


def test_it_says_if_it_reads_a_layer_s_input():
    assert zoo.LoRA(INPUT, WIDTH, rank=2).reads_input
    assert not zoo.LoRA(WIDTH, rank=2, base=base_of()).reads_input


@pytest.mark.parametrize("engine", ["looped", "grouped"])
@pytest.mark.parametrize("context", [None, {"inputs": 1}])
def test_without_a_layer_s_input(context: Any, engine: str):
    model = built(lambda name: zoo.LoRA(WIDTH, rank=2), engine)
    with pytest.raises(InputError) as error:
        model(torch.randn(len(ROUTES), WIDTH), {LEVEL: ROUTES}, context)
    assert str(error.value) == (
        "'context' must be a dict whose 'input' holds the inputs of the linear layer in front of a LoRA without a base "
        "(got none; celmoe.attach gives it, or build LoRA(..., base=layer))"
    )


def test_begins_as_the_base():
    base = base_of()
    model = built(lambda name: zoo.LoRA(WIDTH, rank=2, base=base), trained=False)
    batch = Given()
    torch.testing.assert_close(batch(model).fused_hidden, base(batch.leaves["hidden"]), rtol=0, atol=0)


def test_nothing_of_the_engine_keeps_a_base_or_its_experts_alive_in_grouped():
    base = base_of()
    model = on_base(base)
    Given()(model)
    gone = [weakref.ref(each) for each in (base, base.weight, expert_of(model))]
    del model, base
    gc.collect()
    assert [each() for each in gone] == [None] * 3
