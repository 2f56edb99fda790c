"""What attached experts leave behind: after a run, in threads and copies, and in a model that they are taken from."""

from __future__ import annotations

import asyncio
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch

import celmoe
from tests.hosts import (
    CLASSES,
    ROUTES,
    WIDTH,
    Bottleneck,
    Encoder,
    Penalized,
    config,
    plan_of,
    tokens,
)
from tests.test_attached import PLACES, Twice, attached


def test_threads_have_plans_of_their_own():
    model, given = attached().eval(), tokens()
    plans = [plan_of(ROUTES), plan_of(ROUTES[::-1])]
    expected = [model(given, plan=plan).detach() for plan in plans]
    barrier, wrong = threading.Barrier(2, timeout=60), []

    def serve(number):
        with torch.no_grad(), celmoe.routed(model, plans[number]):
            for _ in range(20):
                barrier.wait()
                if not torch.equal(model(given), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    with pytest.raises(celmoe.MissingRouteError):
        model(given)


def test_tasks_of_one_thread_have_plans_of_their_own():
    """They take turns within their runs, in any order."""
    model, given = attached().eval(), tokens()
    plans = [plan_of(ROUTES), plan_of(ROUTES[::-1])]
    expected = [model(given, plan=plan) for plan in plans]

    async def serve(number):
        with celmoe.routed(model, plans[number]):
            await asyncio.sleep(0)
            first = model(given)
            await asyncio.sleep(0.01 * (1 - number))
            return first, model(given)

    async def all_of_them():
        served = await asyncio.gather(serve(0), serve(1))
        with celmoe.routed(model, plans[0]), pytest.raises(celmoe.MissingRouteError):
            await asyncio.gather(asyncio.to_thread(model, given))
        return served

    for outputs, wanted in zip(asyncio.run(all_of_them()), expected, strict=True):
        assert all(torch.equal(output, wanted) for output in outputs)
    with pytest.raises(celmoe.MissingRouteError):
        model(given)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_no_plan(error):
    model = attached()

    def fail(*_):
        raise error

    handle = model.head.register_forward_hook(fail)
    for call in (lambda: model(tokens(), plan=plan_of(ROUTES)), lambda: _within(model)):
        with pytest.raises(error):
            call()
        handle.remove()
        with pytest.raises(celmoe.MissingRouteError):
            model(tokens())
        handle = model.head.register_forward_hook(fail)


def _within(model):
    with celmoe.routed(model, plan_of(ROUTES)):
        model(tokens())


def test_a_call_that_failed_adds_nothing_to_the_next():
    torch.manual_seed(0)
    model, hidden = Twice(), torch.randn(6, WIDTH)
    celmoe.attach(model, config(), lambda *_: Penalized(), "block")
    with celmoe.routed(model, plan_of(ROUTES)) as run:
        model(hidden)
        expected = {key: loss.item() for key, loss in run.losses.items()}
        for error in (ValueError, KeyboardInterrupt):
            handle = model.block.register_forward_hook(_raising(error))
            with pytest.raises(error):
                model(hidden)
            handle.remove()
            model(hidden)
            assert {key: loss.item() for key, loss in run.losses.items()} == expected


def _raising(error):
    def raise_it(*_):
        raise error

    return raise_it


def test_copies_and_pickles_work_on_their_own():
    model, given, plan = attached(), tokens(), plan_of(ROUTES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(given, plan=plan), model(given, plan=plan))
        with celmoe.routed(model, plan), pytest.raises(celmoe.MissingRouteError):
            other(given)
        celmoe.detach(other)
        other(given)
    part = copy.deepcopy(model.blocks[1])
    with celmoe.routed(part, plan):
        assert part(torch.randn(6, 5, WIDTH)).shape == (6, 5, WIDTH)


def test_detached_a_model_is_as_before():
    torch.manual_seed(0)
    plain = Encoder()
    model = attached()
    assert celmoe.detach(model) is model
    assert {*model.state_dict()} == {*plain.state_dict()}
    assert torch.equal(model(tokens()), plain(tokens()))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert vars(model).keys() == vars(plain).keys()
    celmoe.attach(model, config(), lambda *_: Bottleneck(), PLACES)
    model(tokens(), plan=plan_of(ROUTES))


def test_a_part_can_be_detached():
    model = attached()
    celmoe.detach(model.blocks[0])
    assert [*celmoe.adapters(model)] == ["blocks.1"]
    assert model(tokens(), plan=plan_of(ROUTES)).shape == (6, 5, CLASSES)
    celmoe.detach(model.blocks)
    model(tokens())
    with pytest.raises(celmoe.ConfigError, match="'plan' must be left out of a model without attached experts"):
        model(tokens(), plan=plan_of(ROUTES))


def test_a_run_is_not_kept_alive_by_its_thread_for_ever():
    model = attached()
    with celmoe.routed(model, plan_of(ROUTES)) as run:
        model(tokens())
    watched = weakref.ref(run.plan)
    del run
    for _ in range(70):
        with celmoe.routed(model, plan_of(ROUTES)):
            model(tokens())
    gc.collect()
    assert watched() is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keyword", [False, True])
def test_a_pass_without_gradients_keeps_nothing(mode, keyword):
    """Nothing of it is recomputed: 64 batches' contexts are much memory."""
    model, plan, context = attached(), plan_of(ROUTES), torch.zeros(6, 1000)
    watched = weakref.ref(plan), weakref.ref(context)
    with mode():
        if keyword:
            model(tokens(), plan=plan)
        with celmoe.routed(model, plan, context={"images": context}):
            model(tokens())
            model.blocks[0](torch.randn(6, 5, WIDTH))
    del plan, context
    gc.collect()
    assert [each() for each in watched] == [None, None]


def test_losses_go_with_their_run():
    """Their graph holds the forward pass."""
    model = attached(kind=Penalized)
    with celmoe.routed(model, plan_of(ROUTES)) as run:
        model(tokens())
    watched = [weakref.ref(each) for each in run.losses.values()]
    del run
    gc.collect()
    assert not any(each() is not None for each in watched)


@pytest.mark.parametrize("is_part", [False, True])
def test_a_run_waits_for_many_passes_of_others(is_part):
    model, other, plan = attached(), attached(), plan_of(ROUTES)
    expected = model(tokens(), plan=plan)
    with celmoe.routed(model, plan):
        for _ in range(70):
            other(tokens(), plan=plan)
        if is_part:
            model.blocks[0](torch.randn(6, 5, WIDTH))
        assert torch.equal(model(tokens()), expected)
