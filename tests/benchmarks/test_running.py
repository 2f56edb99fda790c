"""The suite's process: its start, its output, and the meaning of its end."""

import json
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest

import celmoe
from benchmarks.contenders.contender import AUTO
from benchmarks.harness import devices
from benchmarks.harness.devices import find_devices
from benchmarks.report import command
from benchmarks.report.command import DEFAULT_REPORT, main, parse_options
from benchmarks.report.running import BEGUN, DONE, FOUND, OUT_OF_TIME, STOPPED, Outcome, run_suite
from benchmarks.workloads.workload import Workload
from celmoe.devices import FAILS, MISSING, WORKS, DeviceReport
from tests.benchmarks.made_up import entry, paces, whole_run, write

# Plugins take most of a short run's time.
_PLUGINS = ("cacheprovider", "hypothesispytest", "xdist")
ARGUMENTS = ["--override-ini=addopts=", *(f"-pno:{plugin}" for plugin in _PLUGINS)]
SUITE = """
import os
import pytest

def test_good(): pass
def test_bad(): assert 1 + 1 == 3, "sums are off"
def test_missing(): pytest.skip("no such device")
"""
CRASH = """
def test_crash():
    os._exit(7)
"""


def run(folder, source, seconds=None, stopped=lambda: False):
    file = folder / "test_suite.py"
    file.write_text(source)
    heard = []
    outcome = run_suite(
        [str(file)], [*ARGUMENTS, f"--rootdir={folder}"], folder / "log", seconds, heard.append, stopped
    )
    return outcome, heard


def test_what_is_heard_of_a_run_that_crashes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")  # meant for who runs the tests
    outcome, heard = run(tmp_path, SUITE + CRASH)
    assert [news.kind for news in heard] == [FOUND, *[BEGUN, DONE] * 3, BEGUN]
    assert len(heard[0].names) == 4
    assert outcome.measured == 1
    (why,) = outcome.failed.values()
    assert why.startswith("AssertionError: sums are off")
    assert list(outcome.left_out.values()) == ["no such device"]
    assert outcome.crash.startswith("the suite's process ended with 7 during test_suite.py::test_crash; ")


def test_after_its_time_nothing_is_begun(tmp_path):
    outcome, _ = run(tmp_path, SUITE, seconds=-1.0)
    assert (outcome.measured, outcome.failed, outcome.crash) == (0, {}, "")
    assert list(outcome.left_out.values()) == [OUT_OF_TIME] * 3


def test_a_stop_lets_the_running_one_end(tmp_path):
    source = "import time\ndef test_long(): time.sleep(1.5)\ndef test_next(): pass\n"
    outcome, _ = run(tmp_path, source, stopped=lambda: True)
    # The machine's speed decides which benchmark the stop catches; that one ended, and the rest was left out.
    assert outcome.crash == ""
    assert set(outcome.left_out.values()) == {STOPPED}
    assert outcome.measured + len(outcome.left_out) == 2


REFUSALS = {
    ("--device", "gpu"): "'--device' must be one of cpu, cuda, directml (got 'gpu'; ",
    ("--device", "cpu", "cudo"): "'--device' must be one of cpu, cuda, directml (got 'cudo'; nearest: cuda",
    ("--device",): "'--device' must be followed by a value (got none)",
    ("--set", "fast"): "'--set' must be one of default, full, grid, grouped (got 'fast'; ",
    ("--seconds", "0"): "'--seconds' must be a number above 0 (got '0')",
    ("--seconds", "nan"): "'--seconds' must be a number above 0 (got 'nan')",
    ("--compare", "none.json"): (
        "'--compare' must be the benchmarks.json of another run (got 'none.json': No such file or directory)"
    ),
    ("--compare", __file__): f"'--compare' must be the benchmarks.json of another run (got {__file__!r}: not JSON)",
    ("--report", ""): "'--report' must be a folder that can be written to (got '')",
    ("--report", __file__): f"'--report' must be a folder that can be written to (got {__file__!r}: ",
    ("--devices", "cpu"): "'arguments' must be options that --help shows (got '--devices'; nearest: --device",
}


@pytest.mark.parametrize(("arguments", "message"), list(REFUSALS.items()), ids=lambda value: " ".join(value)[:24])
def test_a_refusal_is_one_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(command, "run_suite", lambda *_: pytest.fail("something was run"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1


def test_devices_after_one_flag_or_many():
    both = ("cpu", "directml")
    assert parse_options(["--device", "cpu", "directml"]).device == both
    assert parse_options(["--device", "cpu", "--device", "directml", "cpu"]).device == both
    assert parse_options([]).device is None
    assert parse_options([]).report == DEFAULT_REPORT == Path("celmoe-report") / "benchmarks"


@pytest.fixture
def only_cpu(monkeypatch):
    states = {
        "cuda": DeviceReport("cuda", MISSING, "no CUDA device, or a torch built without CUDA"),
        "directml": DeviceReport("directml", FAILS, "no answer within 120 s"),
        "cpu": DeviceReport("cpu", WORKS, "agrees"),
    }
    monkeypatch.setattr(devices, "report", states.__getitem__)


def test_an_absent_device_is_told_with_how_to_get_it(only_cpu, capsys):
    present, absent = find_devices(["cpu", "directml"])
    assert present == ("cpu",)
    assert absent["directml"].startswith("is there and fails: no answer within 120 s (to get it: on Windows")
    assert 'pip install -e ".[directml]"' in absent["directml"]
    assert set(find_devices(None)[1]) == {"cuda", "directml"}
    assert main(["--device", "cuda"]) == 2
    assert capsys.readouterr().err.startswith(
        "'--device' must name a device that works here, as cpu does (got 'cuda': no CUDA device, or a torch built "
        "without CUDA (to get it: install a PyTorch build with CUDA"
    )


@pytest.fixture
def made_up_run(only_cpu, monkeypatch):
    """A command that runs nothing, and finds these entries and this outcome; its page is not drawn."""

    def prepare(entries, outcome):
        def pretend(targets, arguments, log, seconds, hear, stopped):
            results = next(each for each in arguments if each.startswith("--benchmark-json=")).partition("=")[2]
            write(Path(results), entries)
            return outcome

        monkeypatch.setattr(command, "run_suite", pretend)
        monkeypatch.setattr(command, "write_page", lambda folder, findings: folder / "index.html")

    return prepare


SMALL = Workload("linear", 64, 64, 4)


@pytest.mark.parametrize(
    ("slower_by", "outcome", "code"),
    [
        (1.0, Outcome(measured=1), 0),
        (1.5, Outcome(measured=1), 1),
        (0.5, Outcome(measured=1), 0),
        (1.0, Outcome(measured=1, failed={"a": "b"}), 1),
        (1.0, Outcome(measured=1, crash="ended with 7"), 1),
        (1.0, Outcome(measured=1, left_out={"a": OUT_OF_TIME}), 0),
        (1.0, Outcome(), 2),
    ],
)
def test_exit_codes(slower_by, outcome, code, made_up_run, tmp_path):
    now = paces(seed=1)
    old = write(tmp_path / "old.json", [entry(SMALL, paces(seed=2))])
    made_up_run([entry(SMALL, {**now, AUTO: [slower_by * each for each in now[AUTO]]})], outcome)
    assert main(["--report", str(tmp_path), "--compare", str(old)]) == code


def test_a_run_that_shares_nothing_can_not_be_compared_with(made_up_run, tmp_path, capsys):
    old = write(tmp_path / "old.json", [entry(Workload("gru", 64, 64, 4), paces())])
    made_up_run([entry(SMALL, paces())], Outcome(measured=1))
    assert main(["--report", str(tmp_path), "--compare", str(old)]) == 2
    assert (
        capsys.readouterr().err == "'--compare' must be a run that shares benchmarks with this one (got none of them)\n"
    )


def test_what_goes_wrong_later_is_one_line_too(made_up_run, tmp_path, monkeypatch, capsys):
    made_up_run([], Outcome(failed={"a": "sums are off", "b": "sums are off"}, crash="it ended with 7"))
    assert main(["--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "nothing was measured: sums are off; it ended with 7\n"
    for error, code, words in (
        (OSError(28, "No space left on device"), 2, "a file or folder could not be used: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, "stopped at once"),
    ):
        monkeypatch.setattr(command, "run_suite", Mock(side_effect=error))
        assert main(["--report", str(tmp_path)]) == code
        said = capsys.readouterr().err
        assert said.startswith(words)
        assert said.count("\n") == 1


def test_ctrl_c_leaves_a_report(made_up_run, tmp_path, monkeypatch):
    made_up_run(whole_run(), Outcome(measured=1, left_out={"a": STOPPED}))
    pretend = command.run_suite

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return pretend(*arguments)

    monkeypatch.setattr(command, "run_suite", interrupted)
    assert main(["--report", str(tmp_path), "--device", "cpu"]) == 130
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["versions"]["celmoe"] == celmoe.__version__
    assert machine["command"] == f"python -m benchmarks --report {tmp_path} --device cpu"
