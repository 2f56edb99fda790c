"""Moving rows: the results of dispatch and combine, their cost, and their gradients."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import celmoe.rows.dispatch
from celmoe import CELMoEConfig, ExpertConfig, HierarchicalCELMoE, HierarchyLevelConfig, RoutingCompiler
from celmoe.reference import reference_forward
from celmoe.routing.plan import LevelPlan
from celmoe.rows.dispatch import combine, dispatch, relay
from tests.experts import Linear

WIDTH = 4
GATHERS = {"index_select", "index", "gather", "index_add", "index_add_", "index_copy", "index_copy_", "index_put_"}
ROUTES = {"mixed": "bacabcca", "sorted": "aabbbccc", "one expert": "bbbbbbbb", "one each": "cab"}


def plan_of(routes: str) -> LevelPlan:
    config = CELMoEConfig(WIDTH, [HierarchyLevelConfig("level", {name: ExpertConfig(name) for name in "abc"})])
    return RoutingCompiler(config)({"level": list(routes)}).levels["level"]


class Moves(TorchDispatchMode):
    """Counts the operators that move rows by an index."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in GATHERS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def _by_functions(monkeypatch):
    monkeypatch.setattr(celmoe.rows.dispatch, "FEW_ROWS", 0)


paths = pytest.mark.parametrize("few_rows", [0, 512])
orders = pytest.mark.parametrize("routes", ROUTES.values(), ids=ROUTES)


@paths
@orders
@pytest.mark.parametrize("trailing", [(WIDTH,), (2, WIDTH), ()])
def test_blocks_hold_each_experts_rows_and_come_back(routes, trailing, few_rows, monkeypatch):
    monkeypatch.setattr(celmoe.rows.dispatch, "FEW_ROWS", few_rows)
    plan = plan_of(routes)
    rows = torch.randn(len(routes), *trailing, requires_grad=True)
    blocks = dispatch(rows, plan)
    for name, block in zip(plan.present, blocks, strict=True):
        assert torch.equal(block, rows[[position for position, each in enumerate(routes) if each == name]])
    assert torch.equal(combine(blocks, plan), rows)


@paths
@orders
def test_gradients_of_both_orders(routes, few_rows, monkeypatch):
    monkeypatch.setattr(celmoe.rows.dispatch, "FEW_ROWS", few_rows)
    plan = plan_of(routes)

    def through(rows):
        # Every block is scaled in its own way, so that a row that comes back at another's place shows.
        return combine([block.sin() * scale for scale, block in enumerate(dispatch(rows, plan), start=1)], plan)

    rows = torch.randn(len(routes), WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, (rows,))
    assert torch.autograd.gradgradcheck(through, (rows,))


@paths
def test_a_block_that_nobody_uses_gets_zeros(few_rows, monkeypatch):
    monkeypatch.setattr(celmoe.rows.dispatch, "FEW_ROWS", few_rows)
    rows = torch.randn(8, WIDTH, requires_grad=True)
    dispatch(rows, plan_of(ROUTES["mixed"]))[1].sum().backward()
    assert torch.equal(rows.grad, torch.tensor([[float(each == "b")] * WIDTH for each in ROUTES["mixed"]]))


@pytest.mark.parametrize("case", ["sorted", "one expert"])
def test_rows_in_expert_order_cost_no_gather(case):
    plan = plan_of(ROUTES[case])
    rows = torch.randn(8, WIDTH, requires_grad=True)
    with Moves() as moves:
        combine([block * 2 for block in dispatch(rows, plan)], plan).sum().backward()
    assert not moves.counts


@pytest.mark.usefixtures("_by_functions")
def test_other_rows_cost_one_index_select_each_way():
    plan = plan_of(ROUTES["mixed"])
    rows = torch.randn(8, WIDTH, requires_grad=True)
    with Moves() as moves:
        result = combine([block * 2 for block in dispatch(rows, plan)], plan)
    assert moves.counts == {"index_select": 2}
    with Moves() as moves:
        result.sum().backward()
    assert moves.counts == {"index_select": 2}


@pytest.mark.usefixtures("_by_functions")
def test_the_backward_does_not_grow_with_the_experts():
    """One gather a level, however many experts: celmoe-vp takes one for each of them."""
    counts = []
    for experts in (4, 64):
        names = [f"expert-{index}" for index in range(experts)]
        level = HierarchyLevelConfig("level", {name: ExpertConfig(name) for name in names})
        model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level]), lambda *_: Linear(WIDTH))
        hidden = torch.randn(2 * experts, WIDTH, requires_grad=True)
        output = model(hidden, {"level": names + names[::-1]})
        with Moves() as moves:
            output.fused_hidden.sum().backward()
        counts.append(moves.counts)
    assert counts == [{"index_select": 2}, {"index_select": 2}]


@paths
@pytest.mark.parametrize("grad", [False, True])
def test_levels_whose_orders_are_one_cost_no_gather_between(grad, few_rows, monkeypatch):
    monkeypatch.setattr(celmoe.rows.dispatch, "FEW_ROWS", few_rows)
    levels = [HierarchyLevelConfig(name, {each: ExpertConfig(each) for each in "abc"}) for name in ("upper", "lower")]
    compiler = RoutingCompiler(CELMoEConfig(WIDTH, levels))
    plan = compiler({"upper": list("bacabcca"), "lower": list("bacabcca")}).levels["lower"]
    assert plan.follows_previous
    blocks = [torch.randn(count, WIDTH, requires_grad=grad) for count in plan.counts]
    rows = combine(blocks, plan)
    with Moves() as moves:
        relayed = relay(rows, blocks, plan)
    # A few rows that gradients flow through are gathered by PyTorch's own operator.
    assert moves.counts == ({"index_select": 1} if grad and few_rows else {})
    assert all(map(torch.equal, relayed, blocks))
    if grad:
        weights = [torch.randn_like(block) for block in blocks]
        found = torch.autograd.grad(relayed, [rows, *blocks], weights, retain_graph=True)
        wanted = torch.autograd.grad(dispatch(rows, plan), [rows, *blocks], weights)
        assert all(map(torch.equal, found, wanted))


class Other(Linear):
    """Belongs to another class, so that it never runs with those of the first."""


# Routes of the lower level, whose experts' parents are their first letters, and the upper experts of another class.
MOVES = {
    "above, by number of rows": (["b1", "b1", "a1", "a2", "a2"], ""),
    "above, by class": (["c1", "c1", "b1", "b1", "a1"], "b"),
    "below": (["b1", "b1", "b2", "a1", "a1"], ""),
    "at both": (["b1", "b1", "a1", "a1", "a1"], ""),
    "at none": (["b1", "b1", "b1", "a1", "a1"], ""),
}


@paths
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("moved", MOVES)
def test_levels_that_reorder_their_rows_hand_each_expert_its_own(moved, grad, few_rows, monkeypatch):
    """Grouped experts run by class and by number of rows, though both levels' plans have one order."""
    monkeypatch.setattr(celmoe.rows.dispatch, "FEW_ROWS", few_rows)
    routes, others = MOVES[moved]
    lower = {name: ExpertConfig(name, parent=name[0]) for name in sorted(set(routes))}
    upper = {name: ExpertConfig(name) for name in sorted({name[0] for name in routes})}
    config = CELMoEConfig(WIDTH, [HierarchyLevelConfig("upper", upper), HierarchyLevelConfig("lower", lower)])
    model = HierarchicalCELMoE(
        config, lambda _, name, __: (Other if name in others else Linear)(WIDTH), engine="grouped"
    ).eval()
    plan = model.compile_routing({"lower": routes})
    assert plan.levels["lower"].follows_previous
    assert not plan.levels["lower"].is_sorted
    hidden = torch.randn(len(routes), WIDTH, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        found, wanted = model(hidden, plan), reference_forward(model, hidden, {"lower": routes})
    for name in ("upper", "lower"):
        torch.testing.assert_close(found.levels[name].hidden, wanted.levels[name].hidden)
    if grad:
        leaves = [hidden, *model.level_modules.parameters()]
        grads = [torch.autograd.grad(each.levels["lower"].hidden.square().sum(), leaves) for each in (found, wanted)]
        torch.testing.assert_close(*grads)


@paths
@orders
def test_work_in_place_on_a_block_reaches_nothing_else(routes, few_rows, monkeypatch):
    monkeypatch.setattr(celmoe.rows.dispatch, "FEW_ROWS", few_rows)
    rows = torch.randn(len(routes), WIDTH, requires_grad=True)
    before = rows.detach().clone()
    first, *others = dispatch(rows, plan_of(routes))
    squares = [block.square().sum() for block in others]
    first.mul_(3)
    assert torch.equal(rows, before)
    # The other blocks' tensors that autograd saved are unchanged.
    sum(squares, first.sum()).backward()
