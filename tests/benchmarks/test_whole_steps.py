"""Whole steps: who is timed, that all of them compute the same, and that no row takes more than its time."""

import csv
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

import celmoe
from benchmarks.contenders import models
from benchmarks.harness.arguments import OptionError
from benchmarks.harness.interleaved import Timings
from benchmarks.harness.setting import Setting
from benchmarks.tables.whole_steps import command
from benchmarks.tables.whole_steps import row as rows
from benchmarks.tables.whole_steps.bounded import last_told
from benchmarks.tables.whole_steps.report import Block, draw_growth, mean_line, steps_table, write_steps
from benchmarks.tables.whole_steps.row import BY_HAND, COMPILED, MAKERS, PEER, PLAIN, STACKED, Row, measure
from benchmarks.workloads.points import NAMED
from benchmarks.workloads.workload import Workload
from tests.benchmarks import telling
from tests.benchmarks.clockwork import HIGH, LOW, RATIO, SECONDS
from tests.features import needs_grouped_mm

CPU = torch.device("cpu")
SMALL = Workload("linear", 16, 24, 9)


@pytest.fixture
def uncompiled(monkeypatch):
    """Compiling takes longer than all else: the model is given plans and runs as it is."""
    monkeypatch.setattr(torch, "compile", lambda model: model)


def measured(workload):
    told = []
    measure(workload, CPU, time.time(), told.append)
    return told


@needs_grouped_mm
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("workload", [SMALL, Workload("masked-block", 16, 12, 4)], ids=str)
def test_all_are_timed_first_without_what_is_compiled(workload):
    told = measured(workload)
    first, last = told[0], told[-1]
    others = MAKERS.keys() - {COMPILED} - ({BY_HAND} if workload.expert == "masked-block" else set())
    if PEER in first.absent:
        assert "could not be installed" in first.absent[PEER]
        others -= {PEER}
    assert first.timings.seconds.keys() == others
    assert last.timings.seconds.keys() == others | {COMPILED}
    assert last.first_seconds.keys() == last.timings.seconds.keys()
    assert min(last.first_seconds.values()) > 0
    assert not last.is_unequal
    if BY_HAND not in others:
        assert last.absent[BY_HAND] == "it is written by hand for linear and mlp experts only"


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("wrong", [STACKED, COMPILED])
def test_one_that_computes_something_else_is_not_timed(wrong, monkeypatch):
    def spoiled(terms):
        found = MAKERS[wrong](terms)
        next(found.module.level_modules["language"].parameters()).data.mul_(2)
        return found

    monkeypatch.setattr(rows, "MAKERS", {PLAIN: MAKERS[PLAIN], STACKED: MAKERS[STACKED], wrong: spoiled})
    row = measured(SMALL)[-1]
    assert row.is_unequal
    assert row.absent[wrong].startswith("it computes something else: the output differs")
    assert row.timings.seconds.keys() == {PLAIN, STACKED} - {wrong}


def test_a_gradient_of_another_expert_is_noticed(monkeypatch):
    def swapped(terms):
        found = MAKERS[STACKED](terms)
        first, second = (f"level_modules.family.family-0{place}.body.weight" for place in (0, 1))
        weights = {**found.weights, first: found.weights[second], second: found.weights[first]}
        return replace(found, weights=weights)

    monkeypatch.setattr(rows, "MAKERS", {PLAIN: MAKERS[PLAIN], STACKED: swapped})
    assert "the gradient of level_modules.family.family-00" in measured(SMALL)[-1].absent[STACKED]


def test_one_that_fails_is_told_and_the_others_go_on(monkeypatch):
    def broken(model):
        def call(*_args, **_options):
            raise RuntimeError("no kernel\nand many lines more")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    row = measured(SMALL)[-1]
    assert row.absent[COMPILED] == "it fails: RuntimeError: no kernel"
    assert {PLAIN, STACKED} <= row.timings.seconds.keys()
    assert not row.is_unequal


def test_the_compiled_model_is_stacked_and_given_plans(monkeypatch):
    seen = []

    def spy(model):
        def call(hidden, routing, **options):
            seen.append((model, routing))
            return model(hidden, routing, **options)

        return call

    monkeypatch.setattr(torch, "compile", spy)
    made = models.make_compiled(models.Terms(SMALL, CPU))
    made.forward(SMALL.hidden())
    ((model, routing),) = seen
    assert model is made.module
    assert isinstance(routing, celmoe.RoutingPlan)
    assert len(list(model.parameters())) < len(model.state_dict())


def test_rounds_are_told_as_they_come(monkeypatch):
    monkeypatch.setattr(rows, "MAKERS", {PLAIN: MAKERS[PLAIN]})
    monkeypatch.setattr(rows, "SECONDS_BETWEEN", 0.0)
    contest = rows._Contest(models.Terms(SMALL, CPU), (told := []).append)
    contest.add(PLAIN)
    contest.run(0.0)
    assert [row.timings.rounds for row in told] == [3, 4, 5, 5]


def test_work_that_takes_too_long_is_ended_and_what_it_told_is_kept():
    begun = time.monotonic()
    work = partial(telling.goes_on, ["little", "more"], 60.0)
    assert last_told(work, 3.0) == ("more", "it took more than 3 s")
    assert time.monotonic() - begun < 30
    assert last_told(partial(telling.goes_on, ["all"], 0.0), 60.0) == ("all", "")
    assert last_told(telling.dies, 60.0) == ("something", "its process ended with 7")


def test_a_row_is_measured_in_a_process_of_its_own(monkeypatch):
    # There, too, compiling would take longer than all else.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    row, why = last_told(partial(telling.hurried, partial(rows.run_row, SMALL, "cpu", 1)), 120.0)
    assert why == ""
    assert {PLAIN, STACKED, COMPILED} <= row.timings.seconds.keys()
    # Spawned processes don't import a package's `__main__`.
    assert rows.run_row.__module__ == "benchmarks.tables.whole_steps.row"


def a_row(workload, **seconds):
    timings = Timings(
        {name.replace("_", " ").replace("celmoe vp", PEER): SECONDS[key] for name, key in seconds.items()}
    )
    return Row(workload, timings, dict.fromkeys(timings.seconds, 1.5))


def test_what_a_run_leaves(tmp_path):
    few, many = (Workload("linear", 64, 4096, count) for count in (4, 256))
    found = [
        a_row(few, celmoe_vp="three", plain="one", stacked="one", by_hand="half"),
        a_row(many, celmoe_vp="three", plain="one", stacked="half").without(COMPILED, "it took more than 9 s"),
    ]
    write_steps(tmp_path / "steps.csv", found)
    with (tmp_path / "steps.csv").open() as file:
        lines = list(csv.DictReader(file))
    by_key = {(line["E"], line["contender"], line["against"]): line for line in lines}
    assert len(by_key) == len(lines)
    line = by_key["4", STACKED, PEER]
    assert [line[name] for name in ("ratio", "first_quartile", "third_quartile")] == [
        f"{each:.3f}" for each in (RATIO, LOW, HIGH)
    ]
    assert (line["ms"], line["rounds"], line["first_seconds"]) == ("1000.0000", "5", "1.50")
    assert by_key["4", STACKED, BY_HAND]["ratio"] == "0.500"
    assert by_key["256", COMPILED, ""]["absent"] == "it took more than 9 s"
    assert mean_line(found) == "stacked is 0.50 times as fast as by hand, geometric mean of 1 workloads"
    table = steps_table(found, {many: (5.5, 7.0)})
    cells = [list(column.cells) for column in table.columns]
    assert cells[3] == ["5000.00", "5000.00"]
    assert cells[5] == ["4.00 (3.00 to 4.50)", "8.00 (6.00 to 9.00)"]
    assert cells[-1] == ["", "5.5, aim 7"]
    without_peer = steps_table([a_row(few, plain="one")], {})
    assert [list(column.cells) for column in without_peer.columns][3:6] == [
        ["\N{EN DASH}"],
        ["1000.00"],
        ["\N{EN DASH}"],
    ]
    assert draw_growth(tmp_path / "growth.png", found, "a machine")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_growth(tmp_path / "none.png", found[:1], "a machine")


def test_the_workloads_that_figures_are_asked_of_are_in_their_set():
    assert len(command.GOALS) == len(NAMED) == len(command.SETS["named"])
    assert {each.num_experts for each in command.SETS["growth"]} == {4, 16, 64, 256, 1024}
    assert set(command.SETS["all"]) == {*NAMED, *command.GROWTH}


def test_the_command_measures_here(tmp_path, monkeypatch, capsys):
    """The command runs at a small size; compiled contenders run out of time."""
    monkeypatch.setitem(command.SETS, "growth", [Workload("linear", 8, 12, count) for count in (2, 3)])
    limits = []

    def bounded(work, seconds):
        limits.append(seconds)
        told = []
        monkeypatch.setattr(torch, "compile", lambda model: None)
        work(time.time(), told.append)
        return told[0], f"it took more than {seconds:.0f} s"

    monkeypatch.setattr(command, "last_told", bounded)
    threads = torch.get_num_threads()
    try:
        assert command.main(["--set", "growth", "--minutes", "2", "--report", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
    # The first of two has three quarters; the other one all that is left, as its stand-in took next to nothing.
    assert 80 < limits[0] <= 90 < limits[1] <= 120
    said = capsys.readouterr().out
    assert f"1 thread, float32, torch {torch.__version__}, commit " in said
    assert "without compiled: it took more than" in said
    assert {path.name for path in tmp_path.iterdir()} == {"whole_steps.csv", "whole_steps.png", "setting.txt"}


def test_a_run_replaces_the_block_of_its_device_in_notes(tmp_path):
    path = tmp_path / "notes.md"
    (tmp_path / "figures").mkdir()
    frame = "before\n<!-- whole steps, cpu: begin -->\n{}<!-- whole steps, cpu: end -->\nafter\n"
    path.write_text(frame.format("old\n"))
    workload = NAMED[1]
    found = [a_row(workload, celmoe_vp="three", plain="one", stacked="one", by_hand="half")]
    for _ in range(2):
        Block(path, "cpu").fill(found, {workload: (3.3, 4.0)}, Setting("a machine", 1, "1234567", is_changed=True))
    text = path.read_text()
    assert text.startswith("before\n<!-- whole steps, cpu: begin -->\nMeasured on ")
    assert text.endswith("against=by hand -->\n<!-- whole steps, cpu: end -->\nafter\n")
    assert "at commit `1234567` with changes; a machine, 1 thread, float32, torch" in text
    ratio = "4.00 (3.00 to 4.50)"
    cells = ["linear, H = 64, zipf routes", "512", "256", "5000.00", ratio, ratio, "8.00 (6.00 to 9.00)", "\N{EN DASH}"]
    assert f"| {' | '.join([*cells, '3.3, aim 4'])} |" in text.splitlines()
    assert "Stacked is 0.50 times as fast as by hand" in text
    assert "<!-- whole_steps_cpu.csv: 0.50 = gmean ratio where contender=stacked, against=by hand -->" in text
    assert (tmp_path / "figures" / "whole_steps_cpu.csv").is_file()
    with pytest.raises(
        OptionError, match=r"^'--notes' must be a file with the lines .*cuda: begin.* \(got '.*notes.md'\)$"
    ):
        Block(path, "cuda")


def test_a_run_that_times_nothing_has_failed(tmp_path, monkeypatch):
    monkeypatch.setitem(command.SETS, "growth", [SMALL])
    monkeypatch.setattr(command, "last_told", lambda _work, _seconds: (None, "its process ended with -11"))
    assert command.main(["--set", "growth", "--report", str(tmp_path)]) == 1
    with (tmp_path / "whole_steps.csv").open() as file:
        assert {line["absent"] for line in csv.DictReader(file)} == {"its process ended with -11"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "nam"], "'--set' must be one of named, growth, all (got 'nam'; nearest: named"),
        (
            ["--device", "meta"],
            "'--device' must be a device that works here, such as cpu, cuda or directml (got 'meta'",
        ),
        (["--minutes", "0"], "'--minutes' must be a number above 0 (got '0')"),
        (
            ["--notes", "README.md"],
            "'--notes' must be a file with the lines '<!-- whole steps, cpu: begin -->' and '<!-- ",
        ),
        (["--threads", "0"], "'--threads' must be a whole number, at least 1 (got '0')"),
    ],
)
def test_a_refusal_is_one_sentence(arguments, message, capsys):
    assert command.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1
