"""The report folder: the table as CSV and JSON, decoded examples, and the data of the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.harness.tables import write_rows
from benchmarks.multilingual.results.evaluation import Example, LanguageScore, macro_mean

RUN_FILE = "accuracy.json"
PAGE = "index.html"


def write_json(path: Path, content: object) -> None:
    """One value as a readable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def accuracy_table(scores: Sequence[LanguageScore], systems: Sequence[str]) -> Table:
    """Test accuracy by family and language, every system in a column, the best of a row in bold."""
    table = Table(title="Lemmas right, in percent of test words (no test lemma was seen in training)")
    for heading in ("family", "language", "code"):
        table.add_column(heading, no_wrap=True)
    for heading in ("test words", "compounds", "reachable", *systems):
        table.add_column(heading, justify="right", no_wrap=True)
    for family, members in groupby(scores, key=lambda score: score.family):
        rows = list(members)
        for place, score in enumerate(rows):
            names = (family if place == 0 else "", score.name, score.language)
            table.add_row(
                *names,
                f"{score.test_words:,}",
                f"{score.compounds:.0%}",
                f"{score.coverage:.1%}",
                *_marked([score.accuracy[system] for system in systems]),
                end_section=place + 1 == len(rows) == 1,
            )
        if len(rows) > 1:
            means = [macro_mean(rows, system) for system in systems]
            table.add_row("", "mean of family", "", "", "", "", *_marked(means), style="dim", end_section=True)
    means = [macro_mean(scores, system) for system in systems]
    words = sum(score.test_words for score in scores)
    table.add_row("all", "mean over languages", "", f"{words:,}", "", "", *_marked(means))
    return table


COST_HEADINGS = ("system", "mean", "parameters", "multiply-adds a word", "seconds", "words seen")
_COSTS = ("parameters", "multiply_adds", "training_seconds", "words_trained")


def cost_rows(scores: Sequence[LanguageScore], systems: Sequence[str], run: Mapping[str, Any]) -> list[list[str]]:
    """Under `COST_HEADINGS`, each system's mean accuracy beside its cost; a baseline without training has none."""
    return [
        [
            system,
            f"{macro_mean(scores, system):.1%}",
            *(f"{round(run[cost][system]):,}" if system in run[cost] else "" for cost in _COSTS),
        ]
        for system in systems
    ]


def write_costs(folder: Path, scores: Sequence[LanguageScore], systems: Sequence[str], run: Mapping[str, Any]) -> None:
    """``costs.csv``: each system's mean accuracy beside its cost."""
    rows = [
        {"system": system, "mean": macro_mean(scores, system)} | {cost: run[cost].get(system) for cost in _COSTS}
        for system in systems
    ]
    write_rows(folder / "costs.csv", rows)


def cost_table(scores: Sequence[LanguageScore], systems: Sequence[str], run: Mapping[str, Any]) -> Table:
    """The cost of each system's accuracy."""
    table = Table(title="Mean over the languages, and what it took")
    for heading in COST_HEADINGS:
        table.add_column(heading, justify="left" if heading == "system" else "right", no_wrap=True)
    for row in cost_rows(scores, systems, run):
        table.add_row(*row)
    return table


def _marked(values: Sequence[float]) -> list[str]:
    best = max(values)
    return [f"[bold]{value:.1%}[/bold]" if value == best else f"{value:.1%}" for value in values]


def write_scores(folder: Path, scores: Sequence[LanguageScore], systems: Sequence[str]) -> None:
    """``accuracy.csv``: the table without its means."""
    rows = [
        {
            "family": score.family,
            "language": score.language,
            "name": score.name,
            "train_words": score.train_words,
            "test_words": score.test_words,
            "compounds": f"{score.compounds:.4f}",
            "coverage": f"{score.coverage:.4f}",
            **{system: f"{score.accuracy[system]:.4f}" for system in systems},
        }
        for score in scores
    ]
    write_rows(folder / "accuracy.csv", rows)


def write_run(folder: Path, scores: Sequence[LanguageScore], systems: Sequence[str], run: Mapping[str, Any]) -> None:
    """``accuracy.json``: how the run was made, and the table."""
    content = {
        "run": run,
        "macro_mean": {system: macro_mean(scores, system) for system in systems},
        "languages": [asdict(score) for score in scores],
    }
    write_json(folder / RUN_FILE, content)


def read_run(folder: Path) -> dict[str, Any]:
    """The settings of the run that the folder's report is about; empty if there is no report that can be read."""
    try:
        run: dict[str, Any] = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return run


def write_examples(folder: Path, name: str, examples: Sequence[Example]) -> None:
    """A table of form, true lemma, and each system's lemma."""
    rows = [
        {"language": each.language, "form": each.form, "true_lemma": each.lemma, **each.predicted} for each in examples
    ]
    write_rows(folder / f"{name}.csv", rows)
