"""The message tests' own helper can fail: each kind of trace that a refused call may leave is seen."""

from __future__ import annotations

import pytest
import torch

from celmoe import RouteTypeError, UnknownLevelError
from tests.refusals import GOOD, assert_refused, build, rows


def refuse(before=lambda model, routing: None, message="no", kind=RouteTypeError):
    model = build()
    routing = {"language": ["ru"]}

    def call():
        before(model, routing)
        raise kind(message)

    assert_refused(model, call, RouteTypeError, TypeError, "no", routing)


def test_a_clean_refusal_passes():
    refuse()


TRACES = {
    "an expert ran": lambda model, routing: model.eval()(rows(), GOOD),
    "random numbers drawn": lambda model, routing: torch.rand(1),
    "config changed": lambda model, routing: setattr(model.config.levels[0], "fallback_expert", "slavic"),
    "routing changed": lambda model, routing: routing.clear(),
    "routes changed": lambda model, routing: routing["language"].append("ru"),
    "weights changed": lambda model, routing: next(model.parameters()).data.add_(1),
    "gradients left": lambda model, routing: setattr(next(model.parameters()), "grad", torch.zeros(4, 4)),
    "mode changed": lambda model, routing: model.eval(),
}


@pytest.mark.parametrize("trace", TRACES)
def test_every_trace_is_seen(trace):
    with pytest.raises(AssertionError):
        refuse(TRACES[trace])


def test_other_words_and_classes_are_seen():
    with pytest.raises(AssertionError):
        refuse(message="no!")
    with pytest.raises(AssertionError):
        refuse(kind=UnknownLevelError)
    with pytest.raises(pytest.fail.Exception):
        assert_refused(build(), lambda: None, RouteTypeError, TypeError, "no")
