"""The page and the figures of a run that never ran."""

import csv
import itertools
import re
import statistics

import pytest

from benchmarks.contenders.contender import AUTO, LOOK_UPS, PEER, STACKED
from benchmarks.contenders.models import MODELS
from benchmarks.harness.canvas import _apart
from benchmarks.harness.wording import mebibytes_words, ms_words, times_words, workload_words
from benchmarks.report.bars import draw_speedups
from benchmarks.report.growth import draw_devices, draw_scaling
from benchmarks.report.page import Findings, write_page
from benchmarks.report.ratios import ratios
from benchmarks.report.reading import read_suite
from benchmarks.report.regressions import RULE, compare
from benchmarks.report.roster import CONTENDERS, WORKLOAD_MEANINGS
from benchmarks.suite.stages import WHOLE_STEP
from benchmarks.workloads.bodies import EXPERTS
from benchmarks.workloads.hierarchies import HIERARCHIES, TREE, UNIFORM
from benchmarks.workloads.points import ROUTES
from benchmarks.workloads.workload import Workload
from tests.benchmarks.made_up import MACHINE, entry, paces, whole_run, write


def slowed(entries):
    for each in entries:
        seconds = each["extra_info"]["seconds"]
        yield {**each, "extra_info": {**each["extra_info"], "seconds": {**seconds, **_slower(seconds)}}}


def _slower(seconds):
    return {AUTO: [1.5 * each for each in seconds[AUTO]]} if seconds else {}


def is_drawn(info):
    """A second device is drawn like the first: once is enough."""
    return info["device"] == "cpu" or info["stage"] == "whole_step"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    entries = [each for each in whole_run(["cpu", "cuda"]) if is_drawn(each["extra_info"])]
    old = read_suite(write(folder / "old.json", entries))
    new = read_suite(write(folder / "benchmarks.json", slowed(entries)))
    absent = {"directml": 'torch-directml is not installed: pip install -e ".[directml]"'}
    write_page(folder, Findings(new, MACHINE, absent, {"test_a": "left out"}, compare(old, new)))
    return folder


def test_the_page_stands_alone(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script|https?://|<link|@import|url\(", page)
    assert page.count('src="data:image/png;base64,') == len(list(report.glob("*.png"))) == page.count("<img")


def test_the_page_holds_what_was_found(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    for words in (
        "Slide Rule &lt;9000&gt;",
        "1 thread",
        "geometric mean",
        "pip install -e &#34;.[directml]&#34;",
        "celmoe-vp==3.0.0 could not be installed: no network",
        "From which batch size on the device wins against the CPU",
        "The parts of a step&#39;s time",
        "held against celmoe-vp 1.1.4",
        "not installed",
        "left out",
    ):
        assert words in page, words
    assert RULE.replace("'", "&#39;") in page


def test_every_figure_has_its_numbers(report):
    figures = {path.stem for path in report.glob("*.png")}
    both = {f"{name}_{device}" for name in ("speedup_whole_step", "stages", "scaling") for device in ("cpu", "cuda")}
    assert figures == both | {"speedup_inference_cpu", "memory_cpu", "devices"}
    assert {path.stem for path in report.glob("*.csv")} == figures | {"ratios", "plans"}
    with (report / "speedup_whole_step_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 6
    suite = read_suite(report / "benchmarks.json")
    for row, found in zip(rows, ratios(suite.of(WHOLE_STEP, "cpu")), strict=True):
        workload = found.workload
        columns = (workload.expert, workload.hidden_size, workload.batch_size, workload.num_experts, found.slower)
        assert [row[name] for name in ("experts", "H", "B", "E", "contender")] == [str(each) for each in columns]
        # Theirs by ours, in each round.
        ours, theirs = (found.record.timings.seconds[name] for name in (AUTO, found.slower))
        low, ratio, high = statistics.quantiles([b / a for a, b in zip(ours, theirs, strict=True)], n=4)
        wanted = (low, ratio, high, 1e3 * statistics.median(theirs), 1e3 * statistics.median(ours))
        names = ("first_quartile", "ratio", "third_quartile", "ms", "celmoe_ms")
        assert [float(row[name]) for name in names] == pytest.approx(wanted, abs=1e-3)


def test_growth_shows_the_middle_half_of_the_rounds(report):
    """In the CSV as in the figure: a band for every line."""
    suite = read_suite(report / "benchmarks.json")
    for name in ("scaling_cpu", "devices"):
        with (report / f"{name}.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert rows
        for row in rows:
            seconds = _seconds_of(suite, row)
            wanted = [1e3 * each for each in statistics.quantiles(seconds, n=4)]
            names = ("first_quartile_ms", "ms", "third_quartile_ms")
            assert [float(row[name]) for name in names] == pytest.approx(wanted, abs=1e-4)
    drawing = draw_scaling(suite.of(WHOLE_STEP, "cpu"))
    for axes in drawing.figure.axes:
        bands = [each.get_paths()[0].vertices[:, 1] for each in axes.collections]
        lines = [line.get_ydata() for line in axes.lines]
        assert len(bands) == len(lines) == 5
        for band, line in zip(bands, lines, strict=True):
            assert band.min() < min(line) <= max(line) < band.max()


def _seconds_of(suite, row):
    (record,) = (
        each
        for each in suite.of(WHOLE_STEP, row["device"])
        if [str(each.workload.batch_size), str(each.workload.num_experts)] == [row["B"], row["E"]]
    )
    return record.timings.seconds[row["contender"]]


def test_contenders_and_workloads_are_defined_before_any_figure_or_table(report):
    page = (report / "index.html").read_text(encoding="utf-8")
    definitions = page.index("<dl>", page.index('<h2 id="contenders">'))
    assert definitions < min(page.index(each) for each in ("<table", "<img", 'class="tile"', "times as fast"))
    suite = read_suite(report / "benchmarks.json")
    timed = {name for record in suite.records for name in record.timings.seconds}
    defined = set(re.findall("<dt>(.*?)</dt><dd>.", page[definitions : page.index('<h2 id="short">')]))
    assert defined == timed | {"celmoe-vp 3.0.0", "linear"}


def test_every_contender_and_workload_has_a_meaning():
    assert CONTENDERS.keys() == {*MODELS, LOOK_UPS}
    # A tree and equal shares are what every other workload has, and told in a sentence.
    assert WORKLOAD_MEANINGS.keys() == {*EXPERTS, *HIERARCHIES, *ROUTES} - {TREE, UNIFORM}


def test_all_fits_a_page_of_1280_pixels(report):
    """Figures are narrower than the page; they and the tables stand in boxes that scroll where a screen is smaller."""
    page = (report / "index.html").read_text(encoding="utf-8")
    widths = [int(each) for each in re.findall('<img [^>]*width="([0-9]+)"', page)]
    assert len(widths) == page.count("<img")
    assert max(widths) <= 1152
    for element in ("table", "img"):
        assert page.count(f"<{element}") == len(re.findall(rf'<div class="wide">\s*<{element}', page)), element
    levels = [int(each) for each in re.findall("<h([1-6])", page)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert not re.search('<img (?![^>]*alt="[^"]{20,}")', page)


def test_many_kinds_and_contenders_make_no_wider_figures(tmp_path):
    kinds = ("linear", "mlp", "block", "gru")
    names = (
        PEER,
        "celmoe-vp 3.0.0",
        "oracle",
        "transformers",
        "stack",
        "vmap",
        "dense",
        "celmoe looped",
        STACKED,
        AUTO,
    )
    rounds = {name: [1.0 + place, 1.1 + place] for place, name in enumerate(names)}
    entries = [
        entry(Workload(kind, 64, batch, count), rounds, device=device)
        for kind, batch, count, device in itertools.product(kinds, (64, 512), (4, 32), ("cpu", "cuda"))
    ]
    suite = read_suite(write(tmp_path / "benchmarks.json", entries))
    records = suite.of(WHOLE_STEP, "cpu")
    for drawing in (draw_scaling(records), draw_speedups(records), draw_devices(suite)):
        assert 96 * drawing.figure.get_figwidth() <= 1152, drawing.name


@pytest.mark.parametrize(("noise", "is_told"), [(0.3, True), (0.01, False)])
def test_the_page_says_when_the_machine_was_noisy(tmp_path, noise, is_told):
    suite = read_suite(write(tmp_path / "benchmarks.json", [entry(Workload("gru", 8, 4, 2), paces(noise=noise))]))
    page = write_page(tmp_path, Findings(suite, MACHINE)).read_text(encoding="utf-8")
    assert ("The machine was noisy." in page) == is_told
    restless = 7 if is_told else 0
    # The numbers are told in any case, and a notice comes before all else that was measured.
    told = f"In {restless} of 7 series of timings, the middle half is wider than 10% of the median."
    assert page.count(told) == 1 + is_told
    assert not is_told or page.index(told) < page.index("<h2")


def test_a_page_of_little(tmp_path):
    """One benchmark without a rival: no figure has anything to show."""
    suite = read_suite(write(tmp_path / "benchmarks.json", [entry(Workload("gru", 8, 4, 2), paces(names=[AUTO]))]))
    page = write_page(tmp_path, Findings(suite, MACHINE)).read_text(encoding="utf-8")
    assert "1 benchmarks; no whole step was timed beside celmoe-vp 1.1.4&#39;s" in page
    assert "Nothing: all contenders and all devices were there." in page
    assert not list(tmp_path.glob("*.png"))


def test_labels_keep_apart_and_below_the_top():
    assert _apart([1.0, 1.1, 8.0], 2.0, 100.0) == [1.0, 2.0, 8.0]
    assert _apart([7.0, 7.5, 8.0], 2.0, 8.0) == [2.0, 4.0, 8.0]
    assert _apart([], 2.0, 8.0) == []


def test_numbers_in_words():
    assert [ms_words(each) for each in (0.0123, 0.5, 2.5, 1234.5)] == ["12.3 µs", "0.500 ms", "2.50 ms", "1,234 ms"]
    assert [times_words(each) for each in (0.987, 9.99, 12.34, 138.4)] == ["0.99", "9.99", "12.3", "138"]
    assert mebibytes_words(3 * 2**20) == "3.00"
    assert workload_words(Workload("gru", 64, 4096, 8, "zipf")) == "gru, H 64, B 4,096, E 8, zipf routes"
