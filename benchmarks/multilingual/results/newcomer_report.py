"""The results of a language that was added: a curve with its numbers, a table, and a section of the report's page."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.multilingual.results.figures import draw_newcomer
from benchmarks.multilingual.results.html import row_of, table_of
from benchmarks.multilingual.results.tables import PAGE, write_json
from benchmarks.workloads.languages import NAME_OF

_SECTION = re.compile(r'<section id="added">.*?</section>', re.DOTALL)
HEADINGS = ("system", "which is", "test words right")


@dataclass(frozen=True, kw_only=True)
class NewcomerResult:
    """A language that was added.

    ``curve`` has step, system, and the share of validation words whose rule is right. ``accuracy`` has by system the
    share of test words whose lemma is right; ``others_before`` and ``others_after`` are validation accuracies over all
    languages that were there.
    """

    language: str
    family: str
    warm_start: str | None
    frozen: bool
    train_words: int
    test_words: int
    batch_size: int
    seed: int
    curve: Sequence[tuple[int, str, float]]
    accuracy: dict[str, float]
    others_before: float
    others_after: float
    facts: dict[str, Any]

    @property
    def title(self) -> str:
        """One line that describes the training."""
        start = f"warm-started from {NAME_OF[self.warm_start]}" if self.warm_start else "without a warm start"
        others = "the others frozen" if self.frozen else "the others trained along"
        return f"{NAME_OF[self.language]} ({self.language}), {start}, {others}, {self.train_words:,} training words"

    @property
    def explained(self) -> dict[str, str]:
        """A line of explanation for each system."""
        return {
            "added": "the language added to the trained network",
            "scratch": "the same network for the language alone, on the same words, steps and schedule",
            "table": "the most frequent rule for known beginnings and endings; no training",
            "identity": "the word is its own lemma",
        }

    @property
    def kept(self) -> str:
        """The accuracy that the known languages lost or gained."""
        return (
            f"The languages that were there: {self.others_before:.1%} of validation words by the right rule before, "
            f"{self.others_after:.1%} after."
        )


def table(result: NewcomerResult) -> Table:
    """The accuracy of each system on test words."""
    found = Table(title=f"{result.title}\n{result.test_words:,} test words, whose lemmas no training has seen")
    for place, heading in enumerate(HEADINGS):
        found.add_column(heading, justify="right" if place == 2 else "left")
    for system, share in result.accuracy.items():
        found.add_row(system, result.explained[system], f"{share:.1%}")
    found.caption = result.kept
    return found


def write(folder: Path, result: NewcomerResult, added: Sequence[str]) -> None:
    """``added_xx.csv``, ``.png`` and ``.json``, and the page's section if there is a page.

    ``added`` are all languages that were added to the run, this one included.
    """
    name = f"added_{result.language}"
    draw_newcomer(result.language, result.title, result.curve, result.batch_size).save(folder)
    write_json(folder / f"{name}.json", asdict(result))
    page = folder / PAGE
    if page.exists():
        text = page.read_text(encoding="utf-8")
        page.write_text(_SECTION.sub(lambda _: section(folder, added), text, count=1), encoding="utf-8")


def section(folder: Path, added: Sequence[str]) -> str:
    """The page's section about the languages that were added; empty if none was."""
    parts = []
    # The folder may hold files about languages of an earlier run.
    for path in (folder / f"added_{language}.json" for language in added):
        if not path.exists():
            continue
        result = NewcomerResult(**json.loads(path.read_text(encoding="utf-8")))
        rows = [
            row_of([system, escape(told), f"{result.accuracy[system]:.1%}"], texts=2)
            for system, told in result.explained.items()
        ]
        parts.append(
            f"<h3>{escape(result.title)}</h3>{table_of(HEADINGS, rows, texts=2)}"
            f"<p>{escape(result.kept)}</p>"
            f'<div class=wide><img src="{path.stem}.png" alt="Accuracy by step: {escape(result.title)}"></div>'
            f'<p><a href="{path.stem}.csv">Its numbers</a></p>'
        )
    heading = "<h2>Languages that were added</h2>" if parts else ""
    return f'<section id="added">{heading}{"".join(parts)}</section>'
