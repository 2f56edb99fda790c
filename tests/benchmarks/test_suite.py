"""The suite's contenders are equal, or refused; and the record that a benchmark leaves."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.contenders import contender, models, planning
from benchmarks.contenders.contender import (
    AUTO,
    BARE,
    DENSE,
    GROUPED,
    LOOK_UPS,
    LOOPED,
    ORACLE,
    PEER,
    PEERS,
    PEFT,
    STACK,
    STACKED,
    TRANSFORMERS,
    VMAP,
    AbsentError,
    Task,
)
from benchmarks.harness.equality import UnequalError
from benchmarks.harness.peers import PeerUnavailableError
from benchmarks.suite import rounds, sets, stages
from benchmarks.suite.contest import Contest
from benchmarks.suite.record import from_json
from benchmarks.suite.rounds import gather
from benchmarks.suite.sets import FULL, GRID, takes_part
from benchmarks.suite.stages import (
    BACKWARD,
    DISPATCH,
    EXPERTS,
    FORWARD,
    INFERENCE,
    MEMORY,
    PLAN,
    ROUTING,
    WHOLE_STEP,
    tasks_of,
)
from benchmarks.workloads.bodies import LOW_RANK, PRODUCT, UNTOUCHED
from benchmarks.workloads.hierarchies import EVEN, ONE_LEVEL
from benchmarks.workloads.workload import Workload
from tests.benchmarks.wrong import with_another_input_gradient
from tests.features import needs_grouped_mm

CPU = torch.device("cpu")
OURS = {AUTO, STACKED, GROUPED, LOOPED}
# Slow enough to be loaded, or not to be had everywhere; each may be absent, with a reason.
FOREIGN = {*PEERS, TRANSFORMERS, PEFT}


def tiny(expert, stage=WHOLE_STEP, routes="uniform"):
    if expert == "job":
        return Workload("mlp", 8, 100, 54, routes, "job")
    hierarchy = ONE_LEVEL if stage in (DISPATCH, EXPERTS) else "tree"
    return Workload(expert, 8, 40, 6, routes, hierarchy)


CASES = [
    (WHOLE_STEP, "job", {ORACLE, DENSE, STACK}),
    (WHOLE_STEP, "linear", {ORACLE, DENSE, STACK, VMAP}),
    (WHOLE_STEP, "mlp", {ORACLE, DENSE, STACK, VMAP}),
    (WHOLE_STEP, "gru", {ORACLE, DENSE}),
    (FORWARD, "mlp", {ORACLE, DENSE, STACK, VMAP}),
    (BACKWARD, "linear", {ORACLE, DENSE, STACK, VMAP}),
    (INFERENCE, "masked-block", {ORACLE, DENSE}),
    (INFERENCE, LOW_RANK, {ORACLE, DENSE, VMAP}),
    (EXPERTS, "mlp", {ORACLE, DENSE, STACK, VMAP}),
    (EXPERTS, "two-widths", {ORACLE, DENSE}),
]


# Why a contender takes no part, as the contenders say it.
REASONS = (
    r" (is written by hand for|has products for) .+ experts only$|^it mixes .+ only$|^it would pad the rows to \d"
    r"|^vmap has no rule for|^weights of two widths can not|^the engine refuses these experts: ."
    r"|^it cuts no masks$|not installed \(to get it: .+\)$|could not be installed"
)


@pytest.mark.parametrize(
    ("stage", "expert", "others"),
    [pytest.param(*case, marks=needs_grouped_mm if STACK in case[2] else ()) for case in CASES],
)
def test_all_contenders_are_equal(stage, expert, others):
    gathered = gather(tasks_of(stage, tiny(expert, stage), CPU), 60.0)
    assert gathered.tasks.keys() - FOREIGN - {BARE} == OURS | others
    for name, why in gathered.absent.items():
        assert re.search(REASONS, why), (name, why)
    assert gathered.tasks.keys() | gathered.absent.keys() >= set(PEERS) | {TRANSFORMERS}


@pytest.mark.parametrize(
    ("stage", "expert", "others"),
    [
        (DISPATCH, UNTOUCHED, OURS | {ORACLE, DENSE, STACK, VMAP}),
        pytest.param(EXPERTS, PRODUCT, {AUTO, LOOPED, DENSE, STACK, VMAP}, marks=needs_grouped_mm),
        (PLAN, UNTOUCHED, {AUTO, LOOK_UPS}),
    ],
)
def test_contenders_of_a_part_are_equal(stage, expert, others):
    gathered = gather(tasks_of(stage, tiny(expert, stage), CPU), 60.0)
    assert gathered.tasks.keys() - FOREIGN == others


def test_the_contenders_of_a_grid(monkeypatch):
    held = contest(tiny("linear"), [], GRID)
    assert held.run(WHOLE_STEP).timings.seconds.keys() == {AUTO, LOOPED, BARE, PEER}
    named = {which: {name for name in models.MODELS if takes_part(name, which)} for which in (FULL, sets.GROUPED)}
    assert named == {FULL: set(models.MODELS) - {BARE}, sets.GROUPED: {AUTO, STACKED, PEER, STACK}}


def test_a_bare_step_that_does_less_is_refused(monkeypatch):
    right = models.MODELS[BARE]
    monkeypatch.setitem(models.MODELS, BARE, lambda terms: with_another_input_gradient(right(terms)))
    with pytest.raises(UnequalError, match="bare loop is not equal to what it must compute: the gradient of the input"):
        contest(tiny("linear"), [], GRID).run(WHOLE_STEP)


def test_both_libraries_route_alike(monkeypatch):
    planned = Workload(UNTOUCHED, 1, 40, 6, hierarchy=EVEN)
    assert gather(tasks_of(ROUTING, planned, CPU), 60.0).tasks.keys() == {AUTO, PEER}
    right = planning.routing_pass

    def elsewhere(package, *rest):
        task = right(package, *rest)
        shifted = lambda: {name: ids.roll(1) for name, ids in task.evidence().items()}  # noqa: E731
        return task if package is models.celmoe else dataclasses.replace(task, evidence=shifted)

    monkeypatch.setattr(planning, "routing_pass", elsewhere)
    with pytest.raises(UnequalError, match=r"celmoe-vp 1\.1\.4 is not equal to celmoe auto"):
        gather(tasks_of(ROUTING, planned, CPU), 60.0)


def test_too_much_padding_is_absent():
    skewed = Workload("linear", 8, 400, 64, "zipf")
    gathered = gather({name: tasks_of(EXPERTS, skewed, CPU)[name] for name in (AUTO, VMAP)}, 60.0)
    assert "pad the rows to" in gathered.absent[VMAP]


def evidence_of(**changes):
    found = {"output": torch.tensor([1.0, 2.0]), "gradient": torch.tensor([3.0])} | changes
    return lambda: {name: value for name, value in found.items() if value is not None}


def test_slow_contenders_are_left_out(monkeypatch):
    clock = iter([0.01, 3.0, 0.5, 0.01, 0.4])
    monkeypatch.setattr(rounds, "_taken", lambda _step: rounds._Seconds(9.0, next(clock)))
    task = Task(evidence_of(), step=lambda: None)
    gathered = gather({AUTO: lambda: task, ORACLE: lambda: task, STACK: lambda: task}, 2.0)
    assert list(gathered.tasks) == [AUTO]
    assert gathered.round_seconds == 9.0
    assert gathered.absent == {
        ORACLE: "a step takes 3.0 s, and 2 s are allowed (--longest SECONDS)",
        STACK: "a step takes 0.4 s, 40 times ours, and would take all the time",
    }


def test_a_contender_that_fails_on_an_accelerator_is_absent():
    def broken(_terms):
        raise RuntimeError("no kernel\nand many lines more")

    terms = models.Terms(tiny("linear"), torch.device("meta"))
    with pytest.raises(AbsentError, match=r"it fails on meta: no kernel$"):
        stages._task(WHOLE_STEP, STACK, broken, terms)
    with pytest.raises(RuntimeError, match="no kernel") as caught:
        stages._task(WHOLE_STEP, AUTO, broken, terms)
    assert not isinstance(caught.value, AbsentError)


class Clockwork:
    """pytest-benchmark's fixture as the suite uses it; the real one is disabled among parallel tests."""

    def __init__(self):
        self.stats, self.extra_info, self.group = None, {}, None

    def pedantic(self, target, setup, rounds, iterations):
        assert iterations == 1
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))
        for _ in range(rounds):
            setup()
            target()
            self.stats.stats.data.append(0.001)


def contest(workload, lines, which=FULL):
    return Contest(Clockwork(), workload, "cpu", CPU, 0.0, 60.0, which, lines.append)


def test_a_benchmark_leaves_the_whole_record():
    lines = []
    held = contest(tiny("mlp", routes="zipf"), lines)
    record = held.run(WHOLE_STEP)
    found = json.loads(json.dumps(held.benchmark.extra_info))
    assert from_json(found) == record
    assert record.workload == tiny("mlp", routes="zipf")
    assert found["workload"] == "mlp H=8 B=40 E=6 zipf"
    assert (record.device, record.threads, record.contender) == ("cpu", torch.get_num_threads(), AUTO)
    assert {len(seconds) for seconds in found["seconds"].values()} == {5}
    assert found["seconds"].keys() >= OURS | {ORACLE, DENSE, STACK}
    assert not found["seconds"].keys() & found["absent"].keys()
    assert sum(found["parts_ms"].values()) > 0
    assert found["bytes"] == {}
    assert lines[0].startswith("whole_step mlp H=8 B=40 E=6 zipf on cpu: celmoe auto ")
    assert [line.split("without ")[1].split(":")[0] for line in lines[1:]] == list(found["absent"])


def test_where_benchmarks_are_disabled_contenders_are_still_compared(monkeypatch):
    held = contest(tiny(UNTOUCHED), lines := [])
    monkeypatch.setattr(held.benchmark, "pedantic", lambda *_args, **_kwargs: None)
    assert held.run(PLAN).timings.seconds == {AUTO: []}
    assert lines[0].endswith("on cpu: equal, and not timed")


def test_memory_is_in_its_record(monkeypatch):
    monkeypatch.setattr(stages, "MODELS", {name: models.MODELS[name] for name in OURS})
    held = contest(tiny("linear"), lines := [])
    record = held.run(MEMORY)
    assert record.bytes.keys() == record.timings.seconds.keys() == OURS
    assert "grouped by looped" in lines[1]


def test_the_weights_are_in_the_memory_of_a_step(monkeypatch):
    monkeypatch.setattr(stages, "MODELS", {name: models.MODELS[name] for name in OURS})
    # With one sample most experts are absent, and their weights are most of the memory.
    workload = Workload("linear", 64, 1, 64)
    weights = sum(each.nbytes for each in workload.build(models.celmoe).parameters())
    for name, found in contest(workload, []).run(MEMORY).bytes.items():
        # A stack's gradient is of all its members.
        assert weights < found < (2.1 if name == STACKED else 1.5) * weights, name


def test_a_step_is_measured_from_cleared_gradients():
    ran = []
    task = Task(dict, step=lambda: ran.append("step"), weight_bytes=7, clear=lambda: ran.append("clear"))
    peaks = contest(tiny("linear"), [])._peaks(rounds.Gathered({AUTO: task, LOOPED: task}, {}, 1.0))
    assert ran == ["clear", "step"] * 2
    assert all(7 <= each < 10_000 for each in peaks.values())


def test_an_absent_peer_is_a_line(monkeypatch):
    def unavailable(version):
        raise PeerUnavailableError(f"celmoe-vp=={version} could not be installed: no index")

    monkeypatch.setattr(contender, "load_peer", unavailable)
    monkeypatch.setattr(models, "find_spec", lambda _name: None)
    for stage, expert in ((DISPATCH, UNTOUCHED), (INFERENCE, LOW_RANK), (INFERENCE, "mlp")):
        held = contest(tiny(expert, stage), lines := [])
        absent = held.run(stage).absent
        assert absent["celmoe-vp 3.0.0"].startswith("celmoe-vp==3.0.0 could not be installed: no index (to get it: ")
        if stage == INFERENCE:
            package = PEFT if expert == LOW_RANK else TRANSFORMERS
            assert absent[package] == f'{package} is not installed (to get it: pip install -e ".[peers]")'
        for name, why in absent.items():
            assert any(line.endswith(f"without {name}: {why}") for line in lines)


def test_experts_that_are_refused_leave_the_grouped_engine_out(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise models.celmoe.EngineRefusedError("no")

    monkeypatch.setattr(models, "routed", lambda *_args, **_kwargs: refuse)
    with pytest.raises(AbsentError, match="the engine refuses these experts: no"):
        models.MODELS[GROUPED](models.Terms(tiny("linear"), CPU))


def test_the_command(tmp_path):
    root = Path(stages.__file__).parents[2]
    report = tmp_path / "report.json"
    point = "untouched H=1 B=64 E=32 uniform"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--seconds", "0"]
    command += ["--device", "cpu", "--device", "directml", "--benchmark-json", str(report)]
    command.append(f"benchmarks/suite/test_plan.py::test_plan[cpu-{point}]")
    # A worker of the tests would have it believe that it is one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "celmoe: set default, 1 thread, torch" in done.stdout
    assert "device directml is absent: torch-directml is not installed" in done.stdout or "cpu, directml" in done.stdout
    assert f"plan {point} on cpu: {AUTO}" in done.stdout
    (found,) = json.loads(report.read_text())["benchmarks"]
    assert found["extra_info"]["seconds"][AUTO] == found["stats"]["data"]
    assert (found["extra_info"]["stage"], found["group"]) == (PLAN, PLAN)
