"""Every refused expert result, to the letter; experts that raise; and results that are odd but legal."""

from __future__ import annotations

import copy
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
    ResultError,
    ResultTypeError,
    UnknownExpertError,
    UnknownLevelError,
)
from tests.refusals import GOOD, WIDTH, Counting, assert_error, assert_like_fresh, build, level, rows

WHO = "of expert 'fr' of level 'language'"


class Wrong(ExpertModule):
    """Returns a function's result for the batch."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, batch):
        return self.make(batch)


# The result of expert 'fr' for one sample -> the error, the builtin, and the message.
RESULTS = {
    "None": (
        lambda batch: None,
        (ResultTypeError, TypeError),
        f"'result' {WHO} must be an ExpertResult (got NoneType)",
    ),
    "aux": (
        lambda batch: ExpertResult(batch.hidden, {}, torch.ones(2)),
        (ResultTypeError, TypeError),
        f"'result.aux' {WHO} must be a mapping (got Tensor)",
    ),
    "tensor": (
        lambda batch: batch.hidden,
        (ResultTypeError, TypeError),
        f"'result' {WHO} must be an ExpertResult (got Tensor)",
    ),
    "tuple": (
        lambda batch: (batch.hidden, {}),
        (ResultTypeError, TypeError),
        f"'result' {WHO} must be an ExpertResult (got tuple)",
    ),
    "look-alike": (
        lambda batch: SimpleNamespace(hidden=batch.hidden, losses={}, aux={}),
        (ResultTypeError, TypeError),
        f"'result' {WHO} must be an ExpertResult (got SimpleNamespace)",
    ),
    "its own batch": (
        lambda batch: batch,
        (ResultTypeError, TypeError),
        f"'result' {WHO} must be an ExpertResult (got ExpertBatch)",
    ),
    "the class": (
        lambda batch: ExpertResult,
        (ResultTypeError, TypeError),
        f"'result' {WHO} must be an ExpertResult (got the class ExpertResult)",
    ),
    "hidden None": (
        lambda batch: ExpertResult(None),
        (ResultTypeError, TypeError),
        f"'result.hidden' {WHO} must be a tensor (got NoneType)",
    ),
    "hidden list": (
        lambda batch: ExpertResult(batch.hidden.tolist()),
        (ResultTypeError, TypeError),
        f"'result.hidden' {WHO} must be a tensor (got list)",
    ),
    "losses None": (
        lambda batch: ExpertResult(batch.hidden, None),
        (ResultTypeError, TypeError),
        f"'result.losses' {WHO} must be a mapping (got NoneType)",
    ),
    "losses a tensor": (
        lambda batch: ExpertResult(batch.hidden, batch.hidden.mean()),
        (ResultTypeError, TypeError),
        f"'result.losses' {WHO} must be a mapping (got Tensor)",
    ),
    "no rows": (
        lambda batch: ExpertResult(batch.hidden[:0]),
        (ResultError, ValueError),
        f"'result.hidden' {WHO} must have the shape of its input, (1, 4) (got (0, 4))",
    ),
    "rows twice": (
        lambda batch: ExpertResult(batch.hidden.repeat(2, 1)),
        (ResultError, ValueError),
        f"'result.hidden' {WHO} must have the shape of its input, (1, 4) (got (2, 4))",
    ),
    "pooled": (
        lambda batch: ExpertResult(batch.hidden.mean(0)),
        (ResultError, ValueError),
        f"'result.hidden' {WHO} must have the shape of its input, (1, 4) (got (4,))",
    ),
    "another width": (
        lambda batch: ExpertResult(batch.hidden[:, :3]),
        (ResultError, ValueError),
        f"'result.hidden' {WHO} must have the shape of its input, (1, 4) (got (1, 3))",
    ),
    "an axis more": (
        lambda batch: ExpertResult(batch.hidden[:, None]),
        (ResultError, ValueError),
        f"'result.hidden' {WHO} must have the shape of its input, (1, 4) (got (1, 1, 4))",
    ),
    "integers": (
        lambda batch: ExpertResult(batch.hidden.long()),
        (ResultError, ValueError),
        f"'result.hidden' {WHO} must have a floating-point dtype (got torch.int64)",
    ),
    "booleans": (
        lambda batch: ExpertResult(batch.hidden > 0),
        (ResultError, ValueError),
        f"'result.hidden' {WHO} must have a floating-point dtype (got torch.bool)",
    ),
    "another device": (
        lambda batch: ExpertResult(batch.hidden.to("meta")),
        (ResultError, ValueError),
        f"'result.hidden' {WHO} must be on cpu, where its input is (got meta)",
    ),
}


def model_with(make, *names):
    model = build()
    for name in names or ("fr",):
        model.level_modules["language"][name] = Wrong(make)
    return model


@pytest.mark.parametrize("case", RESULTS)
def test_results_that_are_refused(case):
    make, (kind, builtin), message = RESULTS[case]
    model = model_with(make)
    before = copy.deepcopy(model.state_dict())
    Counting.calls = 0
    hidden = rows().requires_grad_()
    with pytest.raises(kind) as caught:
        model(hidden, GOOD)
    assert_error(caught.value, kind, builtin, message)
    # 'de' ran before it, 'ru' after it in sorted order did not; above them, one expert for each of three families.
    assert Counting.calls == 4
    assert hidden.grad is None
    assert all(torch.equal(new, before[key]) for key, new in model.state_dict().items())
    model.level_modules["language"]["fr"] = build().level_modules["language"]["fr"]
    assert_like_fresh(model)


def test_two_errors_that_cancel():
    """One row too few from 'de', one too many from 'fr': together they are as many as there should be."""
    counts = {"de": 1, "fr": 3}
    model = model_with(lambda batch: ExpertResult(batch.hidden[:1].expand(counts[batch.state["expert"]], -1)), *counts)
    routing = {"family": "slavic", "language": ["de", "fr", "de", "fr"]}
    with pytest.raises(ResultError) as caught:
        model(rows(4), routing)
    message = "'result.hidden' of expert 'de' of level 'language' must have the shape of its input, (2, 4) (got (1, 4))"
    assert_error(caught.value, ResultError, ValueError, message)


def test_siblings_that_agree_on_a_wrong_shape():
    model = model_with(lambda batch: ExpertResult(batch.hidden[..., :2]), "ru", "de", "fr")
    with pytest.raises(
        ResultError, match=r"expert 'de' of level 'language' must have the shape of its input, \(1, 4\)"
    ):
        model(rows(), GOOD)


def test_one_sample_is_no_leave_to_broadcast():
    model = model_with(lambda batch: ExpertResult(batch.hidden.new_zeros(1, WIDTH)))
    with pytest.raises(ResultError, match=r"its input, \(2, 4\) \(got \(1, 4\)\)"):
        model(rows(), {"family": "slavic", "language": ["fr", "fr", "de"]})
    with pytest.raises(ResultError, match=r"its input, \(3, 4\) \(got \(1, 4\)\)"):
        model(rows(), {"family": "slavic", "language": "fr"})


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyError("key"), StopIteration("stop"), IndexError()])
def test_an_expert_that_raises_is_named_in_a_note(error):
    def fail(batch):
        raise error

    model = model_with(fail)
    with pytest.raises(type(error)) as caught:
        model(rows(), GOOD)
    assert caught.value is error
    assert caught.value.__notes__ == ["celmoe: raised by expert 'fr' of level 'language' on 1 samples"]
    model.level_modules["language"]["fr"] = build().level_modules["language"]["fr"]
    assert_like_fresh(model)


class Recasting(ExpertModule):
    """A layer whose rows come out in another dtype."""

    def __init__(self, dtype):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dtype = dtype

    def forward(self, batch):
        return ExpertResult(self.linear(batch.hidden).to(self.dtype))


@pytest.mark.parametrize("engine", ["looped", "grouped", "auto"])
@pytest.mark.parametrize(
    ("dtypes", "by"),
    [
        ({"b": torch.float64}, "torch.float64 by 'b'"),
        ({"a": torch.float16, "b": torch.float16, "c": torch.float16}, "torch.float16 by 'a', 'b', 'c'"),
        ({"a": torch.bfloat16, "c": torch.float64}, "torch.bfloat16 by 'a'; torch.float64 by 'c'"),
    ],
)
def test_experts_that_give_another_dtype_are_named_where_a_later_level_fails(engine, dtypes, by):
    def level_of(name, experts):
        return HierarchyLevelConfig(name, {each: ExpertConfig(each) for each in experts})

    config = CELMoEConfig(WIDTH, [level_of("upper", "abc"), level_of("middle", "m"), level_of("lower", "xy")])

    def make(level, name, _):
        if level == "middle":
            return Wrong(lambda batch: ExpertResult(batch.hidden))
        return Recasting(dtypes.get(name, torch.float32))

    model = HierarchicalCELMoE(config, make, engine=engine)
    with pytest.raises(RuntimeError, match="dtype") as caught:
        model(torch.randn(6, WIDTH), {"upper": list("abcabc"), "lower": list("xyxyxy")})
    note = f"celmoe: level 'upper' was given rows of torch.float32, and its experts gave {by}"
    assert caught.value.__notes__ == ["celmoe: raised by expert 'x' of level 'lower' on 3 samples", note]


def test_keyboard_interrupt_passes_untouched():
    def interrupt(batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        model_with(interrupt)(rows(), GOOD)
    assert not hasattr(caught.value, "__notes__")


def test_an_expert_without_a_forward_of_its_own():
    model = build()
    model.level_modules["language"]["fr"] = type("Unfinished", (ExpertModule,), {})()
    with pytest.raises(NotImplementedError, match=r"^Unfinished must define forward\(batch\) -> ExpertResult"):
        model(rows(), GOOD)


def test_an_expert_that_was_removed():
    model = build()
    del model.level_modules["language"]["fr"]
    Counting.calls = 0
    with pytest.raises(UnknownExpertError) as caught:
        model(rows(), GOOD)
    message = "\"level_modules['language']\" must hold the experts routed to (got no 'fr'; known: 'ru', 'pl', 'de')"
    assert_error(caught.value, UnknownExpertError, KeyError, message)
    assert Counting.calls == 0
    assert model(rows(), {"family": "slavic", "language": "ru"}).fused_hidden.shape == (3, WIDTH)


def test_experts_and_levels_that_were_removed_are_all_named():
    model = build()
    del model.level_modules["language"]["fr"], model.level_modules["language"]["ru"]
    with pytest.raises(UnknownExpertError, match=r"\(got no 'fr', 'ru'; known: 'pl', 'de'\)$"):
        model(rows(), GOOD)
    model.level_modules.clear()
    with pytest.raises(UnknownLevelError, match=r"\(got no 'family', 'language'; known: none\)$"):
        model(rows(), GOOD)


def test_a_level_that_was_removed():
    model = build()
    del model.level_modules["language"]
    Counting.calls = 0
    with pytest.raises(UnknownLevelError) as caught:
        model(rows(), GOOD)
    message = "'level_modules' must hold the model's levels (got no 'language'; known: 'family')"
    assert_error(caught.value, UnknownLevelError, KeyError, message)
    assert Counting.calls == 0


def test_a_level_may_be_replaced_by_a_module_dict_of_torchs():
    model = build()
    model.level_modules["language"] = nn.ModuleDict(dict(model.level_modules["language"].items()))
    assert model(rows(), GOOD).fused_hidden.shape == (3, WIDTH)
    del model.level_modules["language"]["fr"]
    with pytest.raises(UnknownExpertError, match="got no 'fr'"):
        model(rows(), GOOD)


# Legal results


@pytest.mark.parametrize("aux", [None, {}, (), [], ""])
def test_empty_aux_of_any_kind_is_no_aux(aux):
    output = model_with(lambda batch: ExpertResult(batch.hidden, {}, aux))(rows(), GOOD)
    assert output.levels["language"].aux == {}


def test_mappings_of_any_kind():
    losses = OrderedDict(a=torch.tensor(1.0))
    output = model_with(lambda batch: ExpertResult(batch.hidden, losses, {"n": 1}))(rows(), GOOD)
    assert output.levels["language"].losses["language.fr.a"] is losses["a"]
    assert output.levels["language"].aux == {"fr": {"n": 1}}


def test_subclasses_of_the_result():
    class Mine(ExpertResult):
        pass

    assert model_with(lambda batch: Mine(batch.hidden))(rows(), GOOD).fused_hidden.shape == (3, WIDTH)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_siblings_are_promoted(dtype):
    model = model_with(lambda batch: ExpertResult(batch.hidden.to(dtype)))
    model.fusion = nn.Module()
    model.fusion.forward = lambda hiddens: hiddens[-1]
    hidden = model(rows(), GOOD).levels["language"].hidden
    assert hidden.dtype == torch.promote_types(dtype, torch.float32)


def test_integer_rows_may_stay_integers():
    model = build(fusion_module=nn.Module())
    model.fusion.forward = lambda hiddens: hiddens[-1]
    for names in model.level_modules.values():
        for name in names:
            names[name] = Wrong(lambda batch: ExpertResult(batch.hidden + 1))
    output = model(torch.zeros(3, WIDTH, dtype=torch.long), GOOD)
    assert output.fused_hidden.tolist() == [[2] * WIDTH] * 3


def test_a_result_that_is_not_the_experts_own_memory():
    """A parameter, a buffer or a cache returned as rows is copied: the caller's writes must not reach it."""

    class Table(ExpertModule):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, WIDTH))
            self.cache = None

        def forward(self, batch):
            if self.cache is None:
                self.cache = self.table * 2
            return ExpertResult(self.table if batch.context == "table" else self.cache)

    for context in ("table", "cache"):
        model = build(fusion_module=nn.Identity())
        table = Table()
        model.level_modules["language"]["fr"] = table
        output = model(rows(), {"family": "slavic", "language": "fr"}, context)
        with torch.no_grad():
            output.levels["language"].hidden.zero_()
        assert table.table.sum() == 3 * WIDTH
        assert table.cache is None or table.cache.sum() == 6 * WIDTH


def test_an_expert_may_work_in_place_and_keep_what_it_was_given():
    kept = []

    def keep(batch):
        kept.append(batch.hidden)
        return ExpertResult(batch.hidden, aux={"kept": batch.hidden})

    model = build()
    for name in model.level_modules["family"]:
        model.level_modules["family"][name] = Wrong(keep)
    for name in model.level_modules["language"]:
        model.level_modules["language"][name] = Wrong(lambda batch: ExpertResult(batch.hidden.zero_()))
    same = {"family": ["slavic", "romance", "slavic"], "language": ["ru", "fr", "ru"]}
    for routing in (
        GOOD,
        same,
        {"family": "slavic", "language": "ru"},
        {"family": ["germanic", "slavic", "slavic"], "language": 0},
    ):
        if routing["language"] == 0:
            routing["language"] = ["de", "ru", "ru"]
        for needs_grad in (False, True):
            kept.clear()
            hidden = rows().requires_grad_(needs_grad)
            output = model(hidden, routing)
            assert torch.equal(hidden, rows())
            assert torch.equal(output.levels["family"].hidden, rows())
            assert torch.equal(torch.cat(kept).sum(), rows().sum()) or torch.allclose(
                torch.cat(kept).sum(), rows().sum()
            )
            assert torch.equal(output.levels["language"].hidden, torch.zeros(3, WIDTH))


# Every engine names the expert and the value that it returned.


class Later(ExpertModule):
    """A linear expert whose result a function spoils, from some moment on."""

    spoil = None

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        result = ExpertResult(self.linear(batch.hidden), {"size": batch.hidden.pow(2).mean()})
        return result if Later.spoil is None else Later.spoil(result)


SPOILED = {
    "None": (lambda result: None, "'result'", "an ExpertResult (got NoneType)"),
    "tuple": (lambda result: (result.hidden, {}), "'result'", "an ExpertResult (got tuple)"),
    "tensor": (lambda result: result.hidden, "'result'", "an ExpertResult (got Tensor)"),
    "dict": (vars, "'result'", "an ExpertResult (got dict)"),
    "the class": (lambda result: ExpertResult, "'result'", "an ExpertResult (got the class ExpertResult)"),
    "no rows": (lambda result: ExpertResult(None), "'result.hidden'", "a tensor (got NoneType)"),
    "a list of rows": (lambda result: ExpertResult([result.hidden]), "'result.hidden'", "a tensor (got list)"),
    "a loss alone": (
        lambda result: ExpertResult(result.hidden, result.losses["size"]),
        "'result.losses'",
        "a mapping (got Tensor)",
    ),
    "no losses": (lambda result: ExpertResult(result.hidden, None), "'result.losses'", "a mapping (got NoneType)"),
    "a loss in words": (
        lambda result: ExpertResult(result.hidden, {**result.losses, "n": "x"}),
        "\"result.losses['n']\"",
        "a tensor (got str)",
    ),
    "a loss that is None": (
        lambda result: ExpertResult(result.hidden, {"n": None}),
        "\"result.losses['n']\"",
        "a tensor (got NoneType)",
    ),
    "a list for aux": (lambda result: ExpertResult(result.hidden, {}, [1]), "'result.aux'", "a mapping (got list)"),
    "pairs for aux": (
        lambda result: ExpertResult(result.hidden, {}, [("n", 1)]),
        "'result.aux'",
        "a mapping (got list)",
    ),
    "a number for aux": (lambda result: ExpertResult(result.hidden, {}, 3), "'result.aux'", "a mapping (got int)"),
}


@pytest.mark.parametrize("case", SPOILED)
@pytest.mark.parametrize("engine", ["looped", "auto", "grouped"])
@pytest.mark.parametrize("num_present", [1, 40])
@pytest.mark.parametrize("later", [False, True])
def test_every_engine_names_the_expert_that_returned_no_result(case, engine, num_present, later, monkeypatch):
    spoil, what, rule = SPOILED[case]
    experts = tuple(f"e{number:02}" for number in range(40))
    torch.manual_seed(0)
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level("l", experts)]), lambda *_: Later(), engine=engine)
    routing = {"l": [number % num_present for number in range(80)]}
    model.fusion.eval()
    if later:
        good = [model(rows(80), routing).fused_hidden for _ in range(2)]
    monkeypatch.setattr(Later, "spoil", staticmethod(spoil))
    for _ in range(2):
        with pytest.raises(ResultTypeError) as caught:
            model(rows(80), routing)
        assert str(caught.value) == f"{what} of expert 'e00' of level 'l' must be {rule}"
    monkeypatch.setattr(Later, "spoil", None)
    if later:
        torch.testing.assert_close(model(rows(80), routing).fused_hidden, good[0])


@pytest.mark.parametrize("engine", ["looped", "auto", "grouped"])
def test_every_engine_names_the_expert_that_returned_another_width(engine, monkeypatch):
    experts = tuple(f"e{number:02}" for number in range(40))
    model = HierarchicalCELMoE(CELMoEConfig(WIDTH, [level("l", experts)]), lambda *_: Later(), engine=engine)
    monkeypatch.setattr(Later, "spoil", staticmethod(lambda result: ExpertResult(result.hidden[..., :2])))
    with pytest.raises(ResultError, match=r"expert 'e00' of level 'l' must have the shape of its input, \(2, 4\)"):
        model(rows(80), {"l": [number % 40 for number in range(80)]})
