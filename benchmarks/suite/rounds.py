"""Contenders side by side in rounds: pytest-benchmark times one contender, and this module the others.

A round is one step of each contender. The others run as pytest-benchmark's setup, in an order drawn anew; our step is
the call that pytest-benchmark times. Other load on the machine therefore slows a whole round alike.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.contenders.contender import AUTO, OURS, AbsentError, Task, TaskMaker
from benchmarks.harness.equality import require_all_equal
from benchmarks.harness.interleaved import FEWEST_ROUNDS, MOST_ROUNDS, Timings

# A step of another contender may take so many times as long as ours, or so many seconds: it would leave few rounds.
MOST_TIMES, SLOW_STEP = 30, 0.2


@dataclass(frozen=True)
class Gathered:
    """Contenders that are proven equal, ours first; why others are absent; estimated seconds of a round."""

    tasks: Mapping[str, Task]
    absent: Mapping[str, str]
    round_seconds: float


def gather(makers: Mapping[str, TaskMaker], longest: float, most_times: float = MOST_TIMES) -> Gathered:
    """Make the contenders, leave out those whose steps take too long, and compare their results.

    Args:
        makers: The contenders by name; `AUTO` is one.
        longest: Seconds that a step of another contender may take.
        most_times: The same as a multiple of ours, above `SLOW_STEP`.

    Raises:
        UnequalError: A contender computes something else than ours.
    """
    tasks: dict[str, Task] = {}
    absent: dict[str, str] = {}
    # Models hold themselves in cycles, and the last workload's may be large.
    gc.collect()
    for name, make in makers.items():
        try:
            task = make()
        except AbsentError as error:
            absent[name] = str(error)
            continue
        if (took := _taken(task.step).own) > longest and name not in OURS:
            absent[name] = f"a step takes {took:.1f} s, and {longest:g} s are allowed (--longest SECONDS)"
            continue
        # The second call must not use results that the first call kept.
        task.between()
        tasks[name] = task
    require_all_equal(tasks, AUTO)
    warm = {name: _taken(task.step) for name, task in tasks.items()}
    ours = warm[AUTO].own
    for name, (_, took) in warm.items():
        if name not in OURS and took > max(SLOW_STEP, most_times * ours):
            absent[name] = f"a step takes {took:.1f} s, {took / ours:.0f} times ours, and would take all the time"
            del tasks[name]
    absent = {name: absent[name] for name in makers if name in absent}
    return Gathered(tasks, absent, sum(warm[name].passed for name in tasks))


def hold(benchmark: BenchmarkFixture, gathered: Gathered, seconds: float) -> Timings:
    """Hold the rounds.

    Args:
        benchmark: Times ours.
        gathered: The contenders.
        seconds: About how long to go on, the limits on rounds aside.

    Returns:
        Seconds of every contender by round; of one round, without ours, if pytest-benchmark is disabled.
    """
    ours = gathered.tasks[AUTO]
    others = [name for name in gathered.tasks if name != AUTO]
    found: dict[str, list[float]] = {name: [] for name in gathered.tasks}
    shuffle = random.Random(0).shuffle

    def others_first() -> None:
        shuffle(others)
        for name in others:
            task = gathered.tasks[name]
            task.between()
            found[name].append(_taken(task.step).passed)
        ours.between()
        gc.collect(0)

    rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, int(seconds / gathered.round_seconds)))
    with _without_collecting():
        benchmark.pedantic(ours.step, setup=others_first, rounds=rounds, iterations=1)
    if benchmark.stats is not None:
        found[AUTO] = list(benchmark.stats.stats.data)
    return Timings(found)


class _Seconds(NamedTuple):
    """Seconds that passed, and those that this process worked: only the second do not depend on other load."""

    passed: float
    own: float


def _taken(step: Callable[[], object]) -> _Seconds:
    own = time.process_time()
    start = time.perf_counter()
    step()
    passed = time.perf_counter() - start
    return _Seconds(passed, time.process_time() - own)


@contextmanager
def _without_collecting() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
