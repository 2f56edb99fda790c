"""The setting that all tests share: one thread, and a number of hypothesis's examples.

The default profile draws few examples, and the same ones every time, so that a failure comes from a change. For a long
look before a release, or for a new engine, draw twenty times as many, others each time::

    HYPOTHESIS_PROFILE=thorough pytest tests/test_properties.py
    pytest tests/test_properties.py --hypothesis-profile=thorough

Tests with a number of examples of their own scale it by `examples`.

Two searches have commands of their own: random expert programs, and random lives of models::

    python -m tests.programs --count 20000 --seed 0 --workers 2
    python -m tests.lives --steps 10000 --seed 0 --workers 2
"""

from __future__ import annotations

import sys

from benchmarks.extras import missing_extra

if missing := missing_extra("test"):
    sys.exit(missing)

import gc
import logging
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import celmoe.routing.planner
import celmoe.rows.dispatch
from celmoe.torch_internals import tracer_missing
from tests.slow import mark_slow

pytest_plugins = ["tests.peer_report"]

torch.set_num_threads(1)
# The tracer composes thousands of records for each expert, unless its logger has no handler. pytest gives one to each
# logger that does not propagate.
_traces = logging.getLogger("torch.__trace")
_traces.handlers.clear()
_traces.propagate, _traces.disabled = True, True
# The tracer makes millions of small objects: a collection after each 700 of them takes a fifth of the suite's time.
gc.set_threshold(50_000, 20, 50)

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example, HealthCheck.filter_too_much]
settings.register_profile(
    "default", deadline=None, suppress_health_check=_SLOW, max_examples=100, database=None, derandomize=True
)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=2000, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow cases, and skip the tests of the grouped engine, by their names, if PyTorch can't capture experts."""
    mark_slow(items)
    if (missing := tracer_missing()) is not None:
        for item in items:
            if "grouped" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=f"experts run one by one: {missing}"))


@pytest.fixture(autouse=True, scope="module")
def _a_small_heap() -> Iterator[None]:
    """Free the tracer's memory of one file's experts before the next file.

    The present objects are frozen, for good: the next file's collection, and those of tests that look for freed ones,
    would go through all of them again.
    """
    gc.collect()
    gc.freeze()
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="module", params=["few", "many"])
def _as_few_and_as_many(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small batches as such, and then on the paths that large ones take."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "many":
            patch.setattr(celmoe.rows.dispatch, "FEW_ROWS", 0)
            patch.setattr(celmoe.routing.planner, "FEW_SAMPLES", 0)
        yield
