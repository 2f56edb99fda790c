"""Experts' losses averaged over samples: the total is the mean over the batch, whichever experts it meets."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import celmoe
from celmoe import (
    CELMoELossAPI,
    CELMoEOutput,
    ConfigError,
    EngineRefusedError,
    ExpertResult,
    HierarchicalCELMoE,
    InputError,
    LevelOutput,
)
from celmoe.engines.registry import ENGINES
from celmoe.names import name_key
from celmoe.reference import reference_forward
from tests.compiled import WIDTH, Dense, built, routed
from tests.experts import KINDS
from tests.parity import Closeness, equal
from tests.slow import slow_after
from tests.strategies import IRREGULAR, Case, cases, examples, of_siblings
from tests.test_compiled_changes import Lossy
from tests.test_exported import exported
from tests.test_losses import Reads

KINDS_WITH_LOSSES = ("losses", "row_losses", "masked_losses", "mean_losses")


def total_of(output: CELMoEOutput) -> torch.Tensor:
    return CELMoELossAPI(normalize="samples").compute(output).total


def naive_total(model: HierarchicalCELMoE, output: CELMoEOutput) -> torch.Tensor:
    """Sample by sample: the losses of each sample's expert, each over the number of samples."""
    total = torch.zeros((), dtype=torch.float64)
    for config in model.levels:
        level = output.levels[config.name]
        for route in level.routes:
            start = f"{name_key(config.name)}.{name_key(route)}."
            for key, value in level.losses.items():
                if key.startswith(start):
                    total = total + config.experts[route].loss_weight * value / len(level.routes)
    return total


@st.composite
def cases_with_losses(draw: st.DrawFn) -> Case:
    case = draw(cases(stochastic=False).filter(lambda case: not case.draws_integers))
    kinds = st.sampled_from(KINDS_WITH_LOSSES if case.trailing and 0 not in case.trailing else KINDS_WITH_LOSSES[:3])
    levels = tuple(
        replace(level, experts=tuple(replace(each, kind=kind) for each in level.experts))
        for level in case.levels
        for kind in [draw(kinds)]
    )
    return replace(case, levels=levels, dtype=torch.float64)


def assert_mean_over_samples(case: Case, engine: str, *, is_stacked: bool) -> None:
    """Totals and gradients equal those of the oracle, averaged sample by sample."""
    model, oracle = case.model(engine), case.model()
    if is_stacked:
        for each in (model, oracle):
            celmoe.stack_experts(each)
    given, wanted = case.inputs(), case.inputs()
    try:
        output = model(given.hidden, given.routing, given.context, given.mask)
    except EngineRefusedError:
        assert case.context in IRREGULAR or any(KINDS[kind].is_refused for kind in case.kinds)
        return
    expected = reference_forward(oracle, wanted.hidden, wanted.routing, wanted.context, wanted.mask)
    for where, mine, theirs in (
        ("output", output, expected),
        *zip(output.levels, output.levels.values(), expected.levels.values(), strict=True),
    ):
        equal(f"{where}.loss_shares", mine.loss_shares, theirs.loss_shares)
        equal(f"{where}.losses", list(mine.loss_shares), list(mine.losses))
    found, total = total_of(output), naive_total(oracle, expected)
    close = Closeness()
    close("total", found.detach().double(), total.detach(), layout=False)
    if not total.requires_grad:
        return
    found.backward()
    total.backward()
    parameters = dict(oracle.named_parameters())
    pairs = [(key, value, parameters[key]) for key, value in model.named_parameters()]
    pairs += [(key, leaf, wanted.leaves[key]) for key, leaf in given.leaves.items()]
    for where, mine, theirs in pairs:
        equal(f"gradient of {where}", mine.grad is None, theirs.grad is None)
        if theirs.grad is not None:
            close(f"gradient of {where}", mine.grad, theirs.grad, layout=False)


@pytest.mark.parametrize("is_stacked", [False, True], ids=["plain", "stacked"])
@pytest.mark.parametrize("engine", ENGINES)
@examples(8)
@given(case=st.one_of(cases_with_losses(), cases_with_losses().map(of_siblings)))
def test_the_total_is_the_mean_over_samples(engine: str, is_stacked: bool, case: Case):
    assert_mean_over_samples(case, engine, is_stacked=is_stacked)


class Alike(Dense):
    """One loss a sample, of which it returns the mean."""

    def forward(self, batch: celmoe.ExpertBatch) -> ExpertResult:
        hidden = super().forward(batch).hidden
        return ExpertResult(hidden, {"size": hidden.square().mean()})


def alike() -> HierarchicalCELMoE:
    """A model whose experts of each level are the same."""
    model = built(lambda _: Alike(), universal=Alike)
    for level in model.levels:
        first, *others = model.level_modules[level.name].values()
        for each in others:
            each.load_state_dict(first.state_dict())
    return model


def rows(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, WIDTH, generator=generator, dtype=torch.float64)


ROUTES = {
    "one": ["e0"] * 6,
    "two, uneven": ["e0"] + ["e5"] * 5,
    "two, even": ["e0", "e5"] * 3,
    "all": ["e4", "e1", "e0", "e5", "e3", "e2"],
}


@pytest.mark.parametrize("is_stacked", [False, True], ids=["plain", "stacked"])
def test_the_total_does_not_depend_on_how_many_experts_a_batch_meets(is_stacked: bool) -> None:
    model = alike()
    if is_stacked:
        celmoe.stack_experts(model)
    outputs = {name: model(rows(6), {"language": routes}) for name, routes in ROUTES.items()}
    totals = {name: total_of(output).item() for name, output in outputs.items()}
    expected = sum(level.hidden.square().mean().item() for level in outputs["one"].levels.values())
    assert totals == pytest.approx(dict.fromkeys(ROUTES, expected), rel=1e-12)
    # The sum over experts does.
    sums = {name: CELMoELossAPI().compute(output).total.item() for name, output in outputs.items()}
    assert sums["all"] > 3 * sums["one"] / 2
    assert sums == {name: CELMoELossAPI(normalize=None).compute(each).total.item() for name, each in outputs.items()}


def test_weights_of_terms_by_hand() -> None:
    model = alike()
    model.levels[1].experts["e1"].loss_weight = 3.0
    output = model(rows(8), {"language": ["e1", "e0", "e1", "e5", "e1", "e1", "e5", "e0"]})
    bundle = CELMoELossAPI(normalize="samples").compute(output)
    assert {term.name: term.weight for term in bundle.terms} == {
        "universal.all.size": 1.0,
        "language.e0.size": 2 / 8,
        "language.e1.size": 3.0 * 4 / 8,
        "language.e5.size": 2 / 8,
    }
    # Displayed values and those of an output stay as the experts returned them.
    assert bundle.as_dict() == {name: value.item() for name, value in output.losses.items()}
    assert output.loss_weights["language.e1.size"] == 3.0
    assert output.loss_shares == {
        "universal.all.size": 1.0,
        "language.e0.size": 0.25,
        "language.e1.size": 0.5,
        "language.e5.size": 0.25,
    }
    assert output.levels["language"].loss_shares == {
        name: share for name, share in output.loss_shares.items() if name.startswith("language")
    }


def test_other_scopes_keep_their_weights() -> None:
    output = alike()(rows(4), {"language": ["e0", "e1", "e2", "e3"]})
    learned = torch.tensor(2.0)
    for normalize in ("samples", None):
        api = CELMoELossAPI(normalize=normalize)
        api.add_global("g", lambda *_: torch.tensor(1.0), 5.0)
        api.add_level("language", "l", lambda *_: torch.tensor(1.0), learned)
        api.add_bridge("universal", "language", "b", lambda *_: torch.tensor(1.0))
        assert [term.weight for term in api.compute(output).terms[-3:]] == [5.0, learned, 1.0]


def test_names_that_are_escaped_have_their_shares() -> None:
    config = celmoe.CELMoEConfig.from_tree(["zh.Hant", "to", "zh%2EHant"], ("a.b",), WIDTH)
    model = HierarchicalCELMoE(config, lambda *_: Lossy())
    output = model(torch.randn(4, WIDTH), {"a.b": ["zh.Hant", "to", "zh%2EHant", "to"]})
    assert output.loss_shares == {
        ".a%2Eb..zh%2EHant.size": 0.25,
        ".a%2Eb..%74o.size": 0.5,
        ".a%2Eb.zh%2EHant.size": 0.25,
    }


def test_a_weight_of_zero_and_a_learned_weight() -> None:
    output = alike()(rows(4), {"language": ["e0", "e0", "e0", "e1"]})
    learned = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    output.loss_weights |= {"language.e0.size": 0.0, "language.e1.size": learned}
    total = total_of(output)
    value = output.losses["language.e1.size"]
    assert total.item() == pytest.approx((output.losses["universal.all.size"] + 2 * value / 4).item(), rel=1e-12)
    total.backward()
    assert learned.grad is not None
    assert learned.grad.item() == pytest.approx(value.item() / 4, rel=1e-12)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", ["experts", "sample", "", True, 1, b"samples"])
def test_another_word_is_refused(normalize: Any) -> None:
    with pytest.raises(ConfigError) as error:
        CELMoELossAPI(normalize=normalize)
    assert str(error.value) == f"'normalize' must be None or 'samples' (got {normalize!r})"


def test_the_word_is_fixed() -> None:
    api: Any = CELMoELossAPI(normalize="samples")
    assert api.normalize == "samples"
    assert CELMoELossAPI().normalize is None
    assert copy.deepcopy(api).normalize == pickle.loads(pickle.dumps(api)).normalize == "samples"
    with pytest.raises(AttributeError):
        api.normalize = "experts"


def test_a_loss_without_a_share_is_refused_before_any_loss_runs() -> None:
    output = alike()(rows(2), {"language": "e0"})
    output.losses["mine"] = torch.tensor(1.0, dtype=torch.float64)
    calls: list[Any] = []
    api = CELMoELossAPI(normalize="samples")
    api.add_global("g", lambda *given: calls.append(given) or torch.tensor(1.0))
    with pytest.raises(InputError) as error:
        api.compute(output)
    assert str(error.value) == (
        "'output.loss_shares' must have all of 'output.losses' for normalize='samples' (got none for 'mine'; set the "
        "share of the batch's samples that each is of)"
    )
    assert not calls
    output.loss_shares["mine"] = 0.5
    assert api.compute(output).terms[2].weight == 0.5
    assert len(calls) == 1


def test_an_output_made_by_hand_needs_its_shares() -> None:
    level = LevelOutput("l", torch.zeros(1, 4), ["a"], {"l.a.x": torch.tensor(2.0)})
    output = CELMoEOutput({"l": level}, torch.zeros(1, 4), dict(level.losses))
    with pytest.raises(InputError, match=r"got none for 'l\.a\.x'"):
        total_of(output)
    output.loss_shares = {"l.a.x": 0.25}
    assert total_of(output) == 0.5


# --- batches without losses -------------------------------------------------------------------------------------------


def test_no_samples_total_zero_and_run_backward() -> None:
    model, encoder = alike(), nn.Linear(WIDTH, WIDTH).double()
    output = model(encoder(rows(0)), {"language": []})
    assert output.loss_shares == {}
    total = total_of(output)
    assert total.item() == 0.0
    total.backward()
    assert all(each.grad is not None and not each.grad.any() for each in encoder.parameters())
    assert all(each.grad is None for each in model.parameters())


@pytest.mark.parametrize("is_finite", [True, False])
def test_samples_without_losses_total_zero_and_run_backward(is_finite: bool) -> None:
    """A batch may meet only experts that return no losses; a rank's objective must not end in an error for that."""
    model, encoder = built(lambda _: Dense()), nn.Linear(WIDTH, WIDTH).double()
    given = rows(3)
    if not is_finite:
        given[0] = float("inf")
    total = total_of(model(encoder(given), {"language": ["e0", "e1", "e1"]}))
    assert total.item() == 0.0
    total.backward()
    assert all(each.grad is not None and not each.grad.any() for each in encoder.parameters()) or not is_finite


# --- passes of other kinds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lossy", slow_after(1, ["both", "universal", "language"]))
def test_compiled(lossy: str) -> None:
    """A level's only expert is in the graph, with its losses; others with losses run beside it."""
    torch._dynamo.reset()
    model = built(
        lambda _: Dense() if lossy == "universal" else Lossy(), universal=Dense if lossy == "language" else Lossy
    )
    if lossy == "universal":
        celmoe.stack_experts(model)
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=lossy == "universal")
    for seed, size in enumerate((16, 24, 9)):
        plan = routed(model, size, seed)
        found, wanted = compiled(rows(size), plan), model(rows(size), plan)
        assert found.loss_shares == wanted.loss_shares
        assert found.loss_shares.keys() == found.losses.keys() != set()
        assert all(type(each) is float for each in found.loss_shares.values())
        gradients = [
            torch.autograd.grad(total_of(each), [*model.parameters()], allow_unused=True) for each in (found, wanted)
        ]
        for mine, theirs, parameter in zip(*gradients, model.parameters(), strict=True):
            # A graph gives zeros to parameters that it holds and no loss reaches.
            nothing = torch.zeros_like(parameter)
            torch.testing.assert_close(nothing if mine is None else mine, nothing if theirs is None else theirs)


def test_exported() -> None:
    model = built(lambda _: Dense(), universal=Lossy)
    plan = routed(model, 16)
    program = exported(model, rows(16), plan)
    for seed, size in enumerate((9, 33)):
        plan = routed(model, size, seed)
        found, wanted = program(hidden=rows(size), routing=plan), model(rows(size), plan)
        assert found.loss_shares == wanted.loss_shares == {"universal.all.size": 1.0}
        assert found.levels["universal"].loss_shares == wanted.loss_shares
        torch.testing.assert_close(total_of(found), total_of(wanted))


@pytest.mark.parametrize("engine", ENGINES)
def test_checkpointed(engine: str) -> None:
    """A recomputation gives no other shares, and the gradients of the pass without it."""
    model = alike()
    model.engine = engine
    plan = routed(model, 12)
    found = []
    for run in (model, lambda *given: checkpoint(model, *given, use_reentrant=False)):
        model.zero_grad()
        output = run(rows(12).requires_grad_(), plan)
        total_of(output).backward()
        found.append((output.loss_shares, [each.grad for each in model.parameters()]))
    assert found[0][0] == found[1][0]
    for mine, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, theirs)


def test_trees_keep_shares_and_batches_have_one_structure() -> None:
    model = alike()
    outputs = [model(rows(4), {"language": routes}) for routes in (["e0"] * 3 + ["e1"], ["e0"] + ["e1"] * 3)]
    (leaves, first), (_, second) = map(pytree.tree_flatten, outputs)
    assert first == second
    again = pytree.tree_unflatten(leaves, first)
    assert again.loss_shares == outputs[0].loss_shares
    assert again.levels["language"].loss_shares == outputs[0].levels["language"].loss_shares
    for each, other in ((again, outputs[0]), (again.levels["language"], outputs[0].levels["language"])):
        each.loss_shares.clear()
        assert other.loss_shares
    for made in (copy.copy(outputs[0]), pytree.tree_map(torch.clone, outputs[0])):
        assert total_of(made).item() == total_of(outputs[0]).item()


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_read_and_no_name_is_built(engine: str) -> None:
    model = alike()
    model.engine = engine
    plan, hidden = routed(model, 12), rows(12)
    with Reads() as reads:
        output = model(hidden, plan)
        total_of(output)
    assert not reads.names
    assert all("routes" not in level.__dict__ for level in output.levels.values())
    assert all(type(share) is float for share in output.loss_shares.values())
