"""The page of a run that never ran: who reads it learns first who takes part, on any screen."""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.harness.canvas import Drawing
from benchmarks.multilingual.learning.training import CurvePoint
from benchmarks.multilingual.results import newcomer_report
from benchmarks.multilingual.results.evaluation import Example, LanguageScore
from benchmarks.multilingual.results.newcomer_report import NewcomerResult
from benchmarks.multilingual.results.page import EXPLAINED, write_page

SYSTEMS = list(EXPLAINED)
TRAINED = SYSTEMS[:3]
RUN: dict[str, Any] = {
    "ended": [],
    "added": [("ms", 5)],
    "date": "2026-01-02",
    "accelerator": None,
    "versions": {"python": "3.11", "torch": "2.13.0"},
    "minutes": 1.0,
    **{
        name: dict.fromkeys(TRAINED, 1.0)
        for name in ("parameters", "multiply_adds", "training_seconds", "words_trained")
    },
}
DRAWINGS = [Drawing(name, f"Figure {name}", "All its lines.", Figure(), []) for name in "abcd"]
CALM = [1000.0, 1010.0, 1020.0, 1030.0, 1040.0]


def curve(*, restless: int) -> list[CurvePoint]:
    """Words a second of every trained system, of which so many are restless."""
    speeds = {
        system: [each * (1 + place % 2) if number < restless else each for place, each in enumerate(CALM)]
        for number, system in enumerate(TRAINED)
    }
    return [
        CurvePoint(step, system, loss=1.0, accuracy=0.5, words_per_second=speed, validation_accuracy=0.5)
        for system, of in speeds.items()
        for step, speed in enumerate(of)
    ]


def page_of(folder: Path, points: list[CurvePoint]) -> str:
    score = LanguageScore(
        language="id",
        name="Indonesian",
        family="austronesian",
        test_words=100,
        train_words=400,
        coverage=0.9,
        compounds=0.1,
        accuracy=dict.fromkeys(SYSTEMS, 0.5),
    )
    error = Example(language="id", form="rumahnya", lemma="rumah", predicted=dict.fromkeys(SYSTEMS, "rumahnya"))
    write_page(folder, [score, replace(score, language="ms", name="Malay")], SYSTEMS, RUN, points, [error], DRAWINGS)
    newcomer = NewcomerResult(
        language="ms", family="austronesian", warm_start="id", frozen=False, train_words=400, test_words=100,
        batch_size=64, seed=0, curve=[(0, "added", 0.1), (1, "added", 0.2)],
        accuracy=dict.fromkeys(("added", "scratch", "table", "identity"), 0.5), others_before=0.5, others_after=0.5,
        facts={},
    )  # fmt: skip
    newcomer_report.write(folder, newcomer, ["ms"])
    return (folder / "index.html").read_text(encoding="utf-8")


def test_systems_are_defined_before_any_number(tmp_path: Path) -> None:
    _, _, page = page_of(tmp_path, curve(restless=0)).partition("<body>")
    assert re.findall("<dt>(.*?)</dt><dd>.", page) == SYSTEMS
    assert page.index("</dl>") < min(page.index(each) for each in ("<table", "<img", "%"))


def test_all_that_is_wide_scrolls_in_a_box(tmp_path: Path) -> None:
    page = page_of(tmp_path, curve(restless=0))
    assert "Languages that were added" in page
    for element in ("table", "img"):
        assert page.count(f"<{element}") == page.count(f"<div class=wide><{element}") > 4, element
    assert '<meta name="viewport"' in page
    assert not re.search('<img (?![^>]*alt="[^"]{20,}")', page)
    levels = [int(each) for each in re.findall("<h([1-6])", page)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_settings_are_told_in_words(tmp_path: Path) -> None:
    page = page_of(tmp_path, curve(restless=0))
    assert "<td class=text>versions</td><td class=text>python 3.11, torch 2.13.0</td>" in page
    assert "<td class=text>accelerator</td><td class=text>none</td>" in page
    assert "{" not in page.partition("</style>")[2]


@pytest.mark.parametrize(("restless", "is_told"), [(0, False), (1, True), (3, True)])
def test_the_page_says_when_the_machine_was_noisy(tmp_path: Path, restless: int, is_told: bool) -> None:
    page = page_of(tmp_path, curve(restless=restless))
    assert ("The machine was noisy." in page) == is_told
    told = f"In {restless} of 3 series of timings, the middle half is wider than 10% of the median."
    assert page.count(told) == 1 + is_told
    assert not is_told or page.index(told) < page.index("<h2")
