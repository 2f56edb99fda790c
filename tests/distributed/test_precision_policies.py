"""A `MixedPrecisionPolicy` means to `shard_levels` as much as to ``fully_shard`` on a plain stack of modules."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import celmoe
from celmoe.distributed import shard_levels
from tests.distributed.jobs import assert_close

WIDTH = 8
EXPERTS = ("a", "b", "c")
ROUTES = [["a", "b", "c", "a", "b"], ["c", "a", "b", "c", "b"]]  # by rank: all have all experts
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass
class Case:
    """A policy, and a model to try it on; the case travels to the processes."""

    policy: MixedPrecisionPolicy
    levels: int = 2
    fusion: str = "learned"
    positions: int | None = None
    dtype: torch.dtype = F32
    rows: torch.dtype = F32
    context: dict[str, Any] = field(default_factory=dict)
    has_mask: bool = False
    has_buffers: bool = False
    casts_itself: bool = False
    tells: bool = True
    has_network: bool = False
    num_micros: int = 1


class Block(celmoe.ExpertModule):
    """A residual product with a loss; it may tell the dtypes that it sees."""

    def __init__(self, case):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=case.dtype)
        self.casts_itself = case.casts_itself
        self.tells = case.tells
        if case.has_buffers:
            self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))

    def forward(self, batch):
        rows, context = batch.hidden, batch.context or {}
        seen = {"rows": rows.dtype, "mask": None if batch.mask is None else batch.mask.dtype}
        seen |= {name: value.dtype for name, value in context.items() if isinstance(value, torch.Tensor)}
        hidden = rows + self.linear(rows.to(self.linear.weight.dtype) if self.casts_itself else rows)
        if "scale" in context:
            hidden = hidden * context["scale"].unsqueeze(-1)
        if batch.mask is not None:
            hidden = hidden * batch.mask.unsqueeze(-1)
        if hasattr(self, "shift"):
            hidden = hidden + self.shift
        return celmoe.ExpertResult(hidden, {"size": hidden.square().mean()}, seen if self.tells else {})


class Scores(nn.Module):
    """A user's fusion."""

    def __init__(self, dtype):
        super().__init__()
        self.score = nn.Linear(WIDTH, 1, dtype=dtype)

    def forward(self, level_hiddens):
        return sum(torch.sigmoid(self.score(hidden)) * hidden for hidden in level_hiddens)


class PlainLevel(nn.Module):
    """A level's experts one after another; ``fully_shard`` sees all that goes in and comes out."""

    def __init__(self, name, experts):
        super().__init__()
        self.name, self.experts = name, nn.ModuleDict(experts)

    def forward(self, hidden, routes, context, mask):
        places, blocks, losses, aux = [], [], {}, {}
        for name, expert in self.experts.items():
            own = [place for place, route in enumerate(routes) if route == name]
            index = torch.tensor(own)
            cut = {
                key: value[index] if isinstance(value, torch.Tensor) and len(value) == len(routes) else value
                for key, value in context.items()
            }
            result = expert(celmoe.ExpertBatch(hidden[index], cut, None if mask is None else mask[index]))
            places, blocks = places + own, [*blocks, result.hidden]
            losses[f"{self.name}.{name}.size"] = result.losses["size"]
            aux[name] = result.aux
        return torch.cat(blocks)[torch.tensor(places).argsort()], losses, aux


class PlainStack(nn.Module):
    """The levels and the fusion as modules of a stack, with the model's outputs."""

    def __init__(self, model):
        super().__init__()
        self.levels = nn.ModuleList(
            PlainLevel(level.name, copy.deepcopy(dict(model.level_modules[level.name].items())))
            for level in model.levels
        )
        self.fusion = copy.deepcopy(model.fusion)

    def forward(self, hidden, routes, context, mask):
        output = celmoe.CELMoEOutput({}, hidden)
        for level in self.levels:
            hidden, losses, aux = level(hidden, routes[level.name], context, mask)
            output.levels[level.name] = celmoe.LevelOutput(level.name, hidden, [], losses, aux)
            output.losses.update(losses)
        output.fused_hidden = self.fusion([level.hidden for level in output.levels.values()])
        return output


class Network(nn.Module):
    """Trained layers around."""

    def __init__(self, inside, first, last):
        super().__init__()
        self.inside, self.first, self.last = inside, first, last

    def forward(self, hidden, *rest):
        output = self.inside(self.first(hidden), *rest)
        output.fused_hidden = self.last(output.fused_hidden)
        return output


def make_model(case):
    torch.manual_seed(3)
    experts = {name: celmoe.ExpertConfig(name) for name in EXPERTS}
    levels = [celmoe.HierarchyLevelConfig(f"level{index}", dict(experts)) for index in range(case.levels)]
    options = {"use_learned_fusion": case.fusion != "mean", "fusion_dropout": 0.0}
    if case.fusion == "position_aware":
        options["fusion_type"] = case.fusion
    config = celmoe.CELMoEConfig(WIDTH, levels, **options)
    own = Scores(case.dtype) if case.fusion == "own" else None
    return celmoe.HierarchicalCELMoE(config, lambda *_: Block(case), own, engine="looped").to(case.dtype)


def shard_plain(stack, mesh, inner, policy):
    for module in [*stack.levels, stack.fusion]:
        fully_shard(module, mesh=mesh, mp_policy=inner)
    return fully_shard(stack, mesh=mesh, mp_policy=policy)


def make_inputs(case, rank, micro):
    generator = torch.Generator().manual_seed(10 * rank + micro)
    shape = (5,) if case.positions is None else (5, case.positions)
    hidden = torch.randn(*shape, WIDTH, generator=generator).to(case.rows).requires_grad_()
    mask = torch.rand(shape, generator=generator).to(case.rows) if case.has_mask else None
    names = {"scale": shape, "nested": (3,)}
    context = {name: torch.rand(names[name], generator=generator).to(kind) for name, kind in case.context.items()}
    return hidden, {f"level{index}": ROUTES[rank] for index in range(case.levels)}, context, mask


def train(model, case, wrapped):
    """The outputs, the gradients of rows and parameters, and the dtypes that experts see."""
    outputs, gradients = [], []
    for micro in range(case.num_micros):
        wrapped.set_requires_gradient_sync(micro == case.num_micros - 1)
        hidden, *rest = make_inputs(case, dist.get_rank(), micro)
        output = wrapped(hidden, *rest)
        levels = output.levels.values()
        outputs += [output.fused_hidden, *(level.hidden for level in levels)]
        outputs += [losses[key] for losses in [output, *levels] for losses in [losses.losses] for key in sorted(losses)]
        loss = output.fused_hidden.float().square().mean() + sum(map(torch.Tensor.float, output.losses.values()))
        (loss + sum(level.hidden.float().mean() for level in levels)).backward()
        gradients.append(hidden.grad)
    seen = {name: level.aux for name, level in output.levels.items()}
    parts = [parameter for _, parameter in sorted((_common(name), each) for name, each in model.named_parameters())]
    assert all(isinstance(part, DTensor) and part.grad.dtype == part.dtype for part in parts)
    return [each.detach() for each in outputs], gradients + [part.grad.to_local() for part in parts], seen


def _common(name):
    """A parameter's name, the same in both."""
    *_, level, expert, module, parameter = ("", "", "", *name.replace("experts.", "").split("."))
    return f"{level.removeprefix('level')}.{expert}.{module}.{parameter}"


def train_all(case, inner):
    """By `shard_levels`, and as a plain stack whose modules have the inner policy."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    model = make_model(case)
    stack = shard_plain(PlainStack(model), mesh, inner, case.policy)
    shard_levels(model, mesh, mp_policy=case.policy)
    assert len(list(model.parameters())) == len(list(stack.parameters()))
    found = []
    for each in (model, stack):
        wrapped = each
        if case.has_network:
            torch.manual_seed(5)
            layers = [nn.Linear(WIDTH, WIDTH, dtype=case.dtype) for _ in range(2)]
            for layer in layers:
                fully_shard(layer, mesh=mesh, mp_policy=case.policy)
            wrapped = fully_shard(Network(each, *layers), mesh=mesh, mp_policy=case.policy)
        found.append(train(each, case, wrapped))
    return found


HALF = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32, output_dtype=F32)
CASES = {
    "bfloat16, float32 at the boundary": Case(HALF),
    "output as computed": Case(replace(HALF, output_dtype=None)),
    "reduced in bfloat16": Case(replace(HALF, reduce_dtype=None)),
    "float16 all through": Case(MixedPrecisionPolicy(F16, F16, F16)),
    "float16, and float64 out": Case(MixedPrecisionPolicy(F16, F32, F64)),
    "bfloat16 rows": Case(HALF, rows=BF16),
    "float64 rows": Case(HALF, rows=F64),
    "only the output": Case(MixedPrecisionPolicy(output_dtype=BF16)),
    "only the reduction": Case(MixedPrecisionPolicy(reduce_dtype=F64)),
    "float64 parameters": Case(MixedPrecisionPolicy(F32, F64, F64), dtype=F64, rows=F64),
    "no casts at all": Case(MixedPrecisionPolicy()),
    "rows that experts cast": Case(replace(HALF, cast_forward_inputs=False), fusion="mean", casts_itself=True),
    "rows that experts cast, output as computed": Case(
        MixedPrecisionPolicy(BF16, cast_forward_inputs=False), fusion="mean", casts_itself=True
    ),
    "rows in the parameters' dtype": Case(replace(HALF, cast_forward_inputs=False), rows=BF16),
    "one level": Case(HALF, levels=1),
    "three levels": Case(HALF, levels=3),
    "mean": Case(HALF, fusion="mean"),
    "position-aware": Case(HALF, fusion="position_aware", positions=3),
    "position-aware, one position": Case(HALF, fusion="position_aware"),
    "a user's fusion": Case(HALF, fusion="own"),
    "context and mask": Case(HALF, context={"scale": F32, "nested": F32}, has_mask=True),
    "context and mask of float64": Case(HALF, rows=F64, context={"scale": F64, "nested": F16}, has_mask=True),
    "context and mask that nobody casts": Case(
        MixedPrecisionPolicy(BF16, F32, F32, cast_forward_inputs=False),
        fusion="mean",
        casts_itself=True,
        context={"scale": F32, "nested": F64},
        has_mask=True,
    ),
    "buffers, which stay": Case(HALF, has_buffers=True),
    "buffers, three levels, output as computed": Case(replace(HALF, output_dtype=None), 3, has_buffers=True),
    "buffers, mean": Case(HALF, fusion="mean", has_buffers=True),
    "buffers, a user's fusion": Case(HALF, fusion="own", has_buffers=True),
    "in a network": Case(HALF, has_network=True),
    "in a network, output as computed": Case(replace(HALF, output_dtype=None), has_network=True),
    "accumulated": Case(HALF, num_micros=3),
    "accumulated in bfloat16": Case(replace(HALF, reduce_dtype=None), num_micros=2),
}


def assert_equal(mine, theirs):
    assert [each.dtype for each in mine] == [each.dtype for each in theirs]
    assert all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("name", CASES)
def test_a_policy_is_that_of_a_plain_stack(two, name):
    """A stack whose modules leave the output's dtype to the whole: gradients add up in the same dtype, in any order."""
    case = CASES[name]
    for ours, theirs in two.run(train_all, case, replace(case.policy, output_dtype=None)):
        assert ours[2] == theirs[2]
        assert_equal(ours[0], theirs[0])
        assert_close("gradients", ours[1], theirs[1], torch.finfo(case.policy.param_dtype or case.dtype).eps)


RECAST = ["bfloat16, float32 at the boundary", "float16, and float64 out", "three levels", "position-aware"]
RECAST += ["context and mask of float64", "buffers, which stay", "in a network", "accumulated"]


@pytest.mark.parametrize("name", RECAST)
def test_outputs_are_those_of_a_stack_that_casts_in_between(two, name):
    """There gradients add up in another dtype, and differ by rounding."""
    case = CASES[name]
    for ours, theirs in two.run(train_all, case, case.policy):
        assert ours[2] == theirs[2]
        assert_equal(ours[0], theirs[0])
        assert_close("gradients", ours[1], theirs[1], 4 * torch.finfo(case.policy.param_dtype).eps)


def look_at_blocks():
    """True if the second level's rows were passed on in the dtype of the first level's rows."""
    case = Case(HALF, has_buffers=True)
    model = shard_levels(make_model(case), dist.init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=HALF)
    with torch.no_grad():
        output = model(*make_inputs(case, dist.get_rank(), 0))
    return [aux["rows"] for level in output.levels.values() for aux in level.aux.values()]


def test_rows_that_are_relayed_are_cast_too(two):
    assert two.run(look_at_blocks) == [[BF16] * 6] * 2


def test_the_comparison_sees_policies(two):
    """Each field of a policy changes something that is compared."""
    ((base, _), _) = two.run(train_all, Case(HALF), HALF)
    for change in ({"param_dtype": F16}, {"reduce_dtype": BF16}, {"output_dtype": None}):
        ((other, _), _) = two.run(train_all, Case(replace(HALF, **change)), replace(HALF, **change))
        pairs = list(zip(base[0] + base[1], other[0] + other[1], strict=True))
        assert any(mine.dtype != theirs.dtype or not torch.equal(mine, theirs) for mine, theirs in pairs), change


def run_with_plans(engine):
    """A plan in place of names, a context kept whole, and one rank without samples."""
    # An expert that returns aux is never grouped.
    case = Case(HALF, context={"scale": F32, "nested": F64}, tells=engine == "looped")
    model = shard_levels(make_model(case), dist.init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=HALF)
    model.engine = engine
    hidden, routing, context, _ = make_inputs(case, dist.get_rank(), 0)
    context["nested"] = celmoe.Shared(context["nested"].expand(5, 3))
    if dist.get_rank() == 1:
        hidden, routing = hidden[:0], {level: [] for level in routing}
        context["scale"] = context["scale"][:0]
    output = model(hidden, model.compile_routing(routing), context=context)
    output.fused_hidden.square().sum().backward()
    seen = [level.aux for level in output.levels.values()]
    return output.fused_hidden.detach(), [each.grad.to_local() for each in model.parameters()], seen


def test_both_engines_with_plans_and_shared_values(two):
    looped, grouped = two.run(run_with_plans, "looped"), two.run(run_with_plans, "grouped")
    for mine, theirs in zip(grouped, looped, strict=True):
        assert mine[0].dtype == theirs[0].dtype == F32
        assert_close("grouped", list(mine[:2]), list(theirs[:2]), 4 * torch.finfo(BF16).eps)
    kinds = {"rows": BF16, "mask": None, "scale": BF16, "nested": BF16}
    assert looped[0][2] == [dict.fromkeys(EXPERTS, kinds)] * 2
    assert looped[1][0].shape == (0, WIDTH)


def run_with_a_fusion_of_its_own_policy():
    """The dtypes that a fusion sees if its user has wrapped it."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    case = Case(HALF, fusion="own")
    model = make_model(case)
    seen = []
    model.fusion.register_forward_pre_hook(lambda _, args: seen.extend(each.dtype for each in args[0]))
    fully_shard(model.fusion, mesh=mesh, mp_policy=MixedPrecisionPolicy(F64))
    shard_levels(model, mesh, mp_policy=HALF)
    return model(*make_inputs(case, dist.get_rank(), 0)).fused_hidden.dtype, seen


def test_a_fusion_keeps_the_policy_that_its_user_gave_it(two):
    assert two.run(run_with_a_fusion_of_its_own_policy) == [(F32, [F64, F64])] * 2


def refuse_policies():
    """The errors for values that are no policy, and the model's state after them."""
    model = make_model(Case(HALF))
    texts = []
    for policy in (None, BF16, MixedPrecisionPolicy):
        with pytest.raises(celmoe.ConfigTypeError) as caught:
            shard_levels(model, dist.init_device_mesh("cpu", (dist.get_world_size(),)), mp_policy=policy)
        texts.append(str(caught.value))
    return texts, any(isinstance(parameter, DTensor) for parameter in model.parameters())


def test_a_policy_that_is_none_is_refused(two):
    start = "'mp_policy' must be a MixedPrecisionPolicy (got"
    texts = [f"{start} None)", f"{start} torch.bfloat16)", f"{start} {MixedPrecisionPolicy!r})"]
    assert two.run(refuse_policies) == [(texts, False)] * 2
