"""From a file to records, ratios and verdicts, on runs that never ran."""

import pytest

from benchmarks.contenders.contender import AUTO, DENSE, PEER
from benchmarks.report.crossover import crossovers
from benchmarks.report.ratios import ratio_of, ratios
from benchmarks.report.reading import ReadError, read_suite
from benchmarks.report.regressions import FASTER, SAME, SLOWER, compare
from benchmarks.report.roster import in_order
from benchmarks.suite.stages import MEMORY, WHOLE_STEP
from benchmarks.workloads.workload import Workload
from tests.benchmarks.made_up import entry, paces, whole_run, write

SMALL = Workload("linear", 64, 64, 4)


def suite_of(tmp_path, *entries):
    return read_suite(write(tmp_path / "benchmarks.json", entries))


def test_what_a_file_holds(tmp_path):
    suite = suite_of(tmp_path, *whole_run(["cpu", "cuda"]))
    assert suite.devices == ["cpu", "cuda"]
    assert suite.processor == "Slide Rule 9000"
    assert [each.device for each in suite.of(WHOLE_STEP)] == ["cpu", "cuda"] * 4
    assert [each.device for each in suite.of(WHOLE_STEP, "cuda")] == ["cuda"] * 4
    assert {each.stage for each in suite.of(WHOLE_STEP)} == {WHOLE_STEP}
    first = suite.of(WHOLE_STEP)[0]
    assert (first.workload, first.workload.positions, first.threads) == (SMALL, None, 1)
    assert in_order(first.timings.seconds)[0] == PEER
    assert in_order(first.timings.seconds)[-1] == AUTO
    assert suite.of(MEMORY)[0].timings.seconds == {}


def test_ratios_are_formed_within_rounds(tmp_path):
    """Rounds that a busy machine made three times as long change no ratio."""
    seconds = {AUTO: [1.0, 3.0, 1.0, 1.0], PEER: [2.0, 6.0, 2.0, 2.2]}
    (record,) = suite_of(tmp_path, entry(SMALL, seconds)).records
    found = ratio_of(record, PEER, AUTO)
    assert (found.ratio, found.low, found.record.timings.rounds) == (2.0, 2.0, 4)
    assert found.high > 2.0
    assert found.verdict == "faster"
    assert ratio_of(record, DENSE, AUTO) is None
    assert [each.slower for each in ratios([record])] == [PEER]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("no json", "not JSON"),
        ("[]", "no list of 'benchmarks'"),
        ('{"benchmarks": [{"name": "a"}]}', "benchmark 'a' has no usable 'stage' (got None)"),
    ],
)
def test_a_strange_file_is_refused(tmp_path, content, why):
    path = tmp_path / "old.json"
    path.write_text(content)
    with pytest.raises(ReadError) as error:
        read_suite(path)
    assert str(error.value) == f"{str(path)!r}: {why}"


def test_no_file_is_refused(tmp_path):
    with pytest.raises(ReadError, match="No such file"):
        read_suite(tmp_path / "none.json")


def test_rounds_that_do_not_belong_together_are_refused(tmp_path):
    with pytest.raises(ReadError, match=r"has other than two or more rounds of every contender \(got "):
        suite_of(tmp_path, entry(SMALL, {AUTO: [1.0, 1.0], PEER: [1.0]}))


def changed(seconds, factor):
    return {**seconds, AUTO: [factor * each for each in seconds[AUTO]]}


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [
        (1.0, 0.05, SAME),
        (1.05, 0.001, SAME),  # beyond noise, below the threshold
        (1.15, 0.5, SAME),  # beyond the threshold, within noise
        (1.3, 0.02, SLOWER),
        (0.7, 0.02, FASTER),
    ],
)
def test_what_is_beyond_noise(tmp_path, factor, noise, verdict):
    then = suite_of(tmp_path, entry(SMALL, paces(noise=noise, seed=1)))
    # On a machine that is four times as fast.
    now = suite_of(tmp_path, entry(SMALL, changed(paces(0.25, noise=noise, seed=2), factor)))
    by_engine = {change.now.faster: change for change in compare(then, now).changes}
    assert by_engine[AUTO].verdict == verdict
    assert by_engine["celmoe looped"].verdict == SAME
    assert by_engine[AUTO].now.slower == PEER


def test_memory_that_grew_is_a_regression(tmp_path):
    then, now = (suite_of(tmp_path, entry(SMALL, {}, MEMORY, bytes={AUTO: size, DENSE: 1000})) for size in (1000, 1200))
    assert [change.verdict for change in compare(then, now).changes] == [SLOWER]
    assert [change.verdict for change in compare(then, then).changes] == [SAME]


def test_what_only_one_run_has_is_told(tmp_path):
    other = Workload("linear", 64, 512, 4)
    then, now = (suite_of(tmp_path, entry(each, paces())) for each in (SMALL, other))
    found = compare(then, now)
    assert (found.changes, [each.workload for each in found.only_old]) == ([], [SMALL])
    assert [each.workload for each in found.only_new] == [other]


@pytest.mark.parametrize(
    ("on_device", "from_size", "words"),
    [
        ({16: 2.0, 64: 1.0, 512: 0.5}, 512, "from 512 on"),
        ({16: 0.5, 64: 1.5, 512: 0.5}, 512, "from 512 on"),  # a win below a loss is none
        ({16: 2.0, 64: 2.0, 512: 2.0}, None, "not up to 512"),
        ({16: 0.5, 64: 0.5, 512: 0.5}, 16, "from 16 or fewer on"),
    ],
)
def test_from_which_batch_on_a_device_wins(tmp_path, on_device, from_size, words):
    entries = [
        entry(Workload("linear", 64, size, 4), {AUTO: [seconds] * 3}, device=device)
        for device, by_size in (("cpu", dict.fromkeys(on_device, 1.0)), ("cuda", on_device))
        for size, seconds in by_size.items()
    ]
    (found,) = crossovers(suite_of(tmp_path, *entries))
    assert (found.batch_size, str(found)) == (from_size, words)
    assert found.record.device == "cuda"


def test_one_device_has_no_crossover(tmp_path):
    assert crossovers(suite_of(tmp_path, *whole_run())) == []
