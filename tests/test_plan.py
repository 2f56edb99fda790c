"""Routing plans: their content, against a sort in plain Python, and their travels."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from celmoe import CELMoEConfig, ExpertConfig, HierarchicalCELMoE, HierarchyLevelConfig, RoutingCompiler, RoutingPlan
from tests.experts import Linear
from tests.strategies import FORMS, Case, cases, examples, pool, route_ids

pytestmark = pytest.mark.usefixtures("_as_few_and_as_many")


def config_of(**experts_by_level: list[str]) -> CELMoEConfig:
    """A config with these experts."""
    return CELMoEConfig(
        4,
        [
            HierarchyLevelConfig(level, {name: ExpertConfig(name) for name in experts})
            for level, experts in experts_by_level.items()
        ],
    )


def check_plan(plan: RoutingPlan, routes_by_level: dict[str, list[str]], config: CELMoEConfig) -> None:
    """Everything that a plan says, against Python's own sort of the same routes."""
    above = None
    for level in config.levels:
        if not level.enabled:
            assert level.name not in plan.levels
            continue
        routes, experts = routes_by_level[level.name], list(level.experts)
        told = plan.levels[level.name]
        order = sorted(range(len(routes)), key=lambda sample: (routes[sample], sample))
        counts = Counter(routes)
        assert told.name == level.name
        assert told.present == tuple(sorted(counts))
        assert told.counts == tuple(counts[name] for name in sorted(counts))
        assert all(type(count) is int for count in told.counts)
        assert told.order.tolist() == order
        assert [told.inverse.tolist()[sample] for sample in order] == list(range(len(routes)))
        assert told.expert_ids.tolist() == [experts.index(name) for name in routes]
        ends = [sum(told.counts[: index + 1]) for index in range(len(told.counts))]
        assert told.offsets.tolist() == told.ends.tolist() == ends
        assert told.is_sorted == (order == sorted(order))
        assert told.follows_previous == (above == order)
        assert plan.routes(level.name) == routes
        assert {told.order.dtype, told.inverse.dtype, told.expert_ids.dtype} == {torch.int64}
        assert told.offsets.dtype == torch.int32
        above = order
    assert plan.batch_size == len(above or [])


def names_of(case: Case) -> dict[str, list[str]]:
    """The names that a case routes to; missing levels are inferred by hand."""
    names: dict[str, list[str]] = {}
    for position in reversed(range(len(case.levels))):
        level = case.levels[position]
        if not level.enabled:
            continue
        if level.name in case.routing:
            names[level.name] = [level.experts[each].name for each in case.routing[level.name].ids]
        else:
            names[level.name] = [_inferred(case, position, names, sample) for sample in range(case.batch_size)]
    return names


def _inferred(case: Case, position: int, names: dict[str, list[str]], sample: int) -> str:
    below = next((index for index in range(position + 1, len(case.levels)) if case.levels[index].enabled), None)
    name = names[case.levels[below].name][sample] if below is not None else None
    for index in range(below or 0, position, -1):
        name = next((each.parent for each in case.levels[index].experts if each.name == name), None)
    level = case.levels[position]
    if name is None:
        name = level.experts[0].name if len(level.experts) == 1 else level.fallback
    assert name is not None
    return name


@examples(120)
@given(case=cases())
def test_a_plan_says_what_a_plain_sort_says(case: Case):
    plan = RoutingCompiler(case.config())(case.routes(case.batch_size), case.batch_size)
    check_plan(plan, names_of(case), case.config())


@pytest.mark.parametrize("num_experts", [1, 2, 255, 256, 257, 300, 70_000])
def test_any_number_of_experts(num_experts: int):
    rng = random.Random(num_experts)
    experts = [f"e{each:06}" for each in range(num_experts)]
    rng.shuffle(experts)
    config = config_of(level=experts)
    compiler = RoutingCompiler(config)
    ids = [rng.randrange(num_experts) for _ in range(500)] + [0, num_experts - 1]
    names = [experts[each] for each in ids]
    for routes in (
        names,
        tuple(names),
        np.array(names),
        np.array(names, dtype=object),
        ids,
        np.array(ids),
        torch.tensor(ids),
    ):
        plan = compiler({"level": routes})
        order = sorted(range(len(names)), key=lambda sample: (names[sample], sample))
        told = plan.levels["level"]
        assert told.order.tolist() == order
        assert told.present == tuple(sorted(set(names)))
        assert told.expert_ids.tolist() == ids
        assert plan.routes("level") == names


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_routes_makes_the_same_plan(form: str):
    from tests.strategies import _in_form

    names = ["b", "a", "zh.Hant"]
    ids = [2, 0, 0, 1, 2, 1]
    plan = RoutingCompiler(config_of(level=names))({"level": _in_form(ids, names, form)})
    check_plan(plan, {"level": [names[each] for each in ids]}, config_of(level=names))


def test_experts_run_in_sorted_order_and_ids_are_positions_in_the_config():
    plan = RoutingCompiler(config_of(level=["c", "a", "b"]))({"level": ["b", "c", "b", "a"]})
    told = plan.levels["level"]
    assert told.present == ("a", "b", "c")
    assert told.counts == (1, 2, 1)
    assert told.order.tolist() == [3, 0, 2, 1]
    assert told.inverse.tolist() == [1, 3, 2, 0]
    assert told.offsets.tolist() == [1, 3, 4]
    assert told.expert_ids.tolist() == [2, 0, 2, 1]


def test_all_index_tensors_share_one_storage():
    plan = three_levels()
    tensors = [
        tensor
        for level in plan.levels.values()
        for tensor in (level.order, level.inverse, level.expert_ids, level.ends)
    ]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert tensors[0].untyped_storage().nbytes() == plan.nbytes


def three_levels() -> RoutingPlan:
    config = config_of(top=["x"], middle=["b", "a"], low=["a1", "a2", "b1"])
    return RoutingCompiler(config)({"middle": list("abbaab"), "low": ["a2", "b1", "b1", "a1", "a2", "b1"]})


def same(one: RoutingPlan, other: RoutingPlan) -> None:
    assert (one.batch_size, one.layout, list(one.levels)) == (other.batch_size, other.layout, list(other.levels))
    for mine, theirs in zip(one.levels.values(), other.levels.values(), strict=True):
        for field in ("name", "present", "counts", "is_sorted", "follows_previous"):
            assert getattr(mine, field) == getattr(theirs, field)
        for field in ("order", "inverse", "expert_ids", "offsets"):
            assert torch.equal(getattr(mine, field), getattr(theirs, field))


@pytest.mark.parametrize(
    "travel",
    [
        lambda plan: pickle.loads(pickle.dumps(plan)),
        copy.deepcopy,
        copy.copy,
        lambda plan: plan.to("cpu"),
        lambda plan: plan.to(torch.device("cpu"), non_blocking=True),
    ],
    ids=["pickle", "deepcopy", "copy", "to", "to device"],
)
def test_a_plan_travels(travel: Any):
    plan = three_levels()
    same(travel(plan), plan)
    storages = {level.order.untyped_storage().data_ptr() for level in travel(plan).levels.values()}
    assert len(storages) == 1


def test_moving_to_another_device_moves_all_in_one_buffer():
    moved = three_levels().to("meta")
    assert moved.device.type == "meta"
    for level in moved.levels.values():
        assert {level.order.device.type, level.offsets.device.type} == {"meta"}
    assert moved.levels["middle"].counts == (3, 3)


class Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Names to collate."""

    names = ("ru", "fr", "de")

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return torch.full((4,), float(index)), self.names[(index * index) % 3]


class Collate:
    """Compiles in the worker; the model stays at home."""

    def __init__(self, compiler: RoutingCompiler) -> None:
        self.compiler = compiler

    def __call__(self, samples: list[tuple[torch.Tensor, str]]) -> tuple[torch.Tensor, list[str], RoutingPlan]:
        hidden, names = zip(*samples, strict=True)
        return torch.stack(hidden), list(names), self.compiler({"language": list(names)})


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_dataloader_workers_compile_plans(method: str):
    config = config_of(language=["ru", "fr", "de"])
    config.levels[0].experts["ru"].metadata = {"any": "thing"}
    model = HierarchicalCELMoE(config, lambda level, expert, metadata: Linear(4))
    loader = DataLoader(
        Batches(), 5, num_workers=2, collate_fn=Collate(RoutingCompiler(config)), multiprocessing_context=method
    )
    seen = 0
    for hidden, names, plan in loader:
        check_plan(plan, {"language": names}, config)
        output = model(hidden, routing=plan)
        assert output.levels["language"].routes == names
        output.fused_hidden.sum().backward()
        seen += len(names)
    assert seen == 24


def test_a_compiler_pickles_without_a_model():
    compiler = RoutingCompiler(config_of(level=["a", "zh.Hant"]))
    data = pickle.dumps(compiler)
    assert b"HierarchicalCELMoE" not in data
    same(pickle.loads(data)({"level": ["a", "zh.Hant"]}), compiler({"level": ["a", "zh.Hant"]}))


def test_a_compiler_pickles_whatever_the_metadata():
    config = config_of(level=["a", "b"])
    for expert in config.levels[0].experts.values():
        expert.metadata = {"make": lambda: None, "module": Linear(100)}
    config.levels[0].fallback_expert = "b"
    data = pickle.dumps(RoutingCompiler(config))
    assert len(data) < 2_000
    assert pickle.loads(data)(None, 2).routes("level") == ["b", "b"]


def test_a_copied_model_reads_its_own_configs_fallback():
    model = HierarchicalCELMoE(config_of(level=["a", "b"]), lambda *_: Linear(4))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.config.levels[0].fallback_expert = "b"
        assert twin.compile_routing(None, 2).routes("level") == ["b", "b"]
    with pytest.raises(KeyError):
        model.compile_routing(None, 2)


def test_plans_of_levels_are_equal_to_themselves_alone():
    compiler = RoutingCompiler(config_of(level=["a", "b"]))
    first, second = (compiler({"level": ["a", "b"]}).levels["level"] for _ in range(2))
    assert first == first
    assert first != second
    assert len({first, second}) == 2


def test_routes_given_by_name_are_known_whatever_the_device():
    model = HierarchicalCELMoE(config_of(level=["a", "b"]), lambda *_: Linear(4)).to("meta")
    output = model(torch.empty(3, 4, device="meta"), {"level": ["b", "a", "b"]})
    assert output.levels["level"].routes == ["b", "a", "b"]


def test_plans_made_in_inference_mode_work_in_training():
    config = config_of(top=["x", "y"], low=["a", "b", "c"])
    model = HierarchicalCELMoE(config, lambda level, expert, metadata: Linear(4))
    routing = {"top": list("xyxyy"), "low": list("cabba")}
    with torch.inference_mode():
        plan = model.compile_routing(routing)
        moved = plan.to("cpu")
        copied = pickle.loads(pickle.dumps(plan))
    hidden = torch.randn(5, 4, requires_grad=True)
    wanted = torch.autograd.grad(model.eval()(hidden, routing=routing).fused_hidden.sum(), hidden)[0]
    for each in (plan, moved, copied):
        found = torch.autograd.grad(model(hidden, routing=each).fused_hidden.sum(), hidden)[0]
        assert torch.equal(found, wanted)


def test_a_list_changed_between_two_calls_is_seen():
    config = config_of(level=["a", "b"])
    compiler = RoutingCompiler(config)
    routes = ["a", "b", "a"]
    routing = {"level": routes}
    first = compiler(routing)
    routes[:] = ["b", "b", "a"]
    check_plan(compiler(routing), {"level": ["b", "b", "a"]}, config)
    check_plan(first, {"level": ["a", "b", "a"]}, config)
    array = np.array([0, 1, 1])
    before = compiler({"level": array})
    array[:] = [1, 0, 0]
    check_plan(before, {"level": ["a", "b", "b"]}, config)
    check_plan(compiler({"level": array}), {"level": ["b", "a", "a"]}, config)


def test_routes_of_a_plan_can_be_changed_by_who_asked_for_them():
    plan = three_levels()
    plan.routes("low").clear()
    plan.routes("top").clear()
    assert plan.routes("low") == ["a2", "b1", "b1", "a1", "a2", "b1"]
    assert plan.routes("top") == ["x"] * 6


def test_the_fallback_is_read_at_every_call():
    config = config_of(level=["a", "b"])
    compiler = RoutingCompiler(config)
    config.levels[0].fallback_expert = "a"
    assert compiler(None, 2).routes("level") == ["a", "a"]
    config.levels[0].fallback_expert = "b"
    assert compiler(None, 2).routes("level") == ["b", "b"]


class TestTheStrategiesReach:
    """The drawn cases include those that the property tests are for."""

    def find(self, condition: Any) -> None:
        assert any(map(condition, pool()))

    @pytest.mark.parametrize(
        "condition",
        [
            lambda case: case.batch_size == 0,
            lambda case: case.batch_size == 1 and len(case.enabled) > 1,
            lambda case: case.batch_size > 100,
            lambda case: 0 in case.trailing,
            lambda case: any(not level.enabled for level in case.levels[:-1]) and len(case.levels) > 2,
            lambda case: any(level.name not in case.routing for level in case.enabled) and case.batch_size > 3,
            lambda case: bool(case.one_name) and case.batch_size > 3,
            lambda case: case.planned and case.batch_size > 3,
            lambda case: case.draws_integers and case.batch_size > 1,
            lambda case: {"double", "brain"} <= case.kinds,
            lambda case: case.layout == "expanded" and case.hidden_grad and case.batch_size > 3,
            lambda case: case.mask == "grad" and "reads_mask" in case.kinds,
            lambda case: any(kind.startswith("in_place") for kind in case.kinds) and case.layout == "not a leaf",
        ],
    )
    def test_whole_cases(self, condition: Any):
        self.find(condition)

    def test_absent_experts_and_groups_of_one_row(self):
        def condition(case: Case) -> bool:
            counts = [Counter(names) for names in names_of(case).values()]
            absent = any(
                len(count) < len(level.experts) for count, level in zip(counts[::-1], case.enabled, strict=True)
            )
            return absent and any(1 in count.values() and len(count) > 2 for count in counts)

        self.find(condition)

    def test_batches_in_order_and_orders_that_follow(self):
        def plan(case: Case) -> list[Any]:
            compiled = RoutingCompiler(case.config())(case.routes(case.batch_size), case.batch_size)
            return list(compiled.levels.values())

        self.find(lambda case: any(level.is_sorted and len(level.counts) > 2 for level in plan(case)))
        self.find(lambda case: any(level.follows_previous and not level.is_sorted for level in plan(case)))
        self.find(lambda case: case.batch_size > 9 and not any(level.follows_previous for level in plan(case)[1:]))

    def test_levels_whose_experts_are_all_detached(self):
        self.find(
            lambda case: (
                any(all(expert.stop and expert.scale is None for expert in level.experts) for level in case.enabled)
                and case.hidden_grad
                and case.batch_size > 1
            )
        )

    def test_levels_inferred_across_a_disabled_one(self):
        def condition(case: Case) -> bool:
            return any(
                level.enabled
                and not below.enabled
                and level.name not in case.routing
                and len(set(names_of(case)[level.name])) > 1
                for level, below in itertools.pairwise(case.levels)
            )

        self.find(condition)

    @given(data=st.data())
    def test_routes_are_one_a_sample(self, data: Any):
        size, experts = data.draw(st.integers(0, 40)), data.draw(st.integers(1, 5))
        ids = data.draw(route_ids(size, experts, list(range(experts))))
        assert len(ids) == size
        assert all(0 <= each < experts for each in ids)


def test_a_plan_is_pinned_by_the_loaders_own_function(monkeypatch):
    """Page-locked memory needs a CUDA device; a copy stands in for it here."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self.clone())
    plan = RoutingCompiler(config_of(level=["a", "b"]))({"level": ["b", "a"]})
    _, found = pin_memory((torch.zeros(2), plan))
    assert isinstance(found, RoutingPlan)
    # One buffer for the plan, beside the tensor.
    assert len(pinned) == 2
    same(found, plan)


@pytest.mark.parametrize(("device", "non_blocking"), [("cpu", False), ("meta", True)])
def test_nothing_is_read_before_it_has_arrived(monkeypatch, device, non_blocking):
    """A copy into the host's memory is waited for; one into a device's is waited for by that device."""
    model = HierarchicalCELMoE(config_of(level=["a", "b"]), lambda *_: Linear(4)).to(device)
    other = "meta" if device == "cpu" else "cpu"
    plan = model.compile_routing({"level": ["b", "a"]}).to(other)
    calls = []
    right = RoutingPlan.to
    monkeypatch.setattr(
        RoutingPlan,
        "to",
        lambda self, *args, **options: (
            calls.append(options) or right(model.compile_routing({"level": ["b", "a"]}), *args)
        ),
    )
    model(torch.zeros(2, 4, device=device), plan)
    assert calls == [{"non_blocking": non_blocking}]
