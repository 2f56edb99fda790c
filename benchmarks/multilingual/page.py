"""``index.html``: the whole report on one page, which reads alone in any browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.multilingual.evaluation import Example, LanguageScore, macro_mean
from benchmarks.multilingual.languages import NAME_OF
from benchmarks.multilingual.newcomer_report import section
from benchmarks.multilingual.report import COST_HEADINGS, PAGE, cost_rows
from benchmarks.multilingual.training import CurvePoint

FIGURES = (
    ("training_curves", "Loss and accuracy on the way"),
    ("accuracy_by_language", "Accuracy by language"),
    ("samples_by_language", "Samples by language"),
    ("expert_load", "Words that each expert was given"),
)
EXPLAINED = {
    "experts": "a universal expert, an expert for each family, and one for each language",
    "universal": "one universal expert that computes as much for a word as the experts",
    "wide": "one universal expert with as many parameters as all experts together; it takes fewer steps, for as long",
    "table": "the most frequent rule for known beginnings and endings; no training",
    "identity": "the word is its own lemma",
}

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #e5e5e5 }
th:first-child, td:first-child, td.text, th.text { text-align: left }
td.best { font-weight: 600 } tr.mean { background: #f6f6f6 }
img { max-width: 100% } .wrong { color: #b3261e } nav a { margin-right: 1em }
"""


def write_page(
    folder: Path,
    scores: Sequence[LanguageScore],
    systems: Sequence[str],
    run: Mapping[str, Any],
    curve: Sequence[CurvePoint],
    errors: Sequence[Example],
) -> None:
    """Write the page beside the figures that it shows."""
    title = f"Lemmatization of {len(scores)} language{'s' * (len(scores) != 1)}"
    sections = {
        "result": _result(scores, systems, run),
        "curve": _curve(curve, run["ended"]),
        "languages": _languages(scores, systems),
        "figures": "".join(
            f'<h3>{escape(caption)}</h3><p><img src="{name}.png" alt="{escape(caption)}"> '
            f'<a href="{name}.csv">its numbers</a></p>'
            for name, caption in FIGURES
        ),
        "errors": _errors(errors, systems),
        "run": _facts(run),
    }
    headings = {
        "result": "Result",
        "curve": "Longer runs",
        "languages": "By language",
        "figures": "Figures",
        "errors": "Samples of errors",
        "run": "How it was measured",
    }
    added = section(folder, [language for language, _ in run["added"]])
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading in headings.items())
    body = "".join(f'<h2 id="{key}">{headings[key]}</h2>{part}' for key, part in sections.items())
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1><nav>{links}</nav>{body}{added}</body></html>\n"
    )
    (folder / PAGE).write_text(text, encoding="utf-8")


def _table(headings: Sequence[str], rows: Sequence[str], texts: int = 1) -> str:
    cells = "".join(
        f"<th{' class=text' * (place < texts)}>{escape(heading)}</th>" for place, heading in enumerate(headings)
    )
    return f"<table><tr>{cells}</tr>{''.join(rows)}</table>"


def _row(cells: Sequence[str], texts: int = 1, kind: str = "") -> str:
    told = "".join(f"<td{' class=text' * (place < texts)}>{cell}</td>" for place, cell in enumerate(cells))
    return f"<tr{f' class={kind}' if kind else ''}>{told}</tr>"


def _result(scores: Sequence[LanguageScore], systems: Sequence[str], run: Mapping[str, Any]) -> str:
    rows = [
        _row([*map(escape, row), escape(EXPLAINED.get(row[0], ""))], kind="mean" if row[0] == "experts" else "")
        for row in cost_rows(scores, systems, run)
    ]
    words = sum(score.test_words for score in scores)
    return (
        f"<p>Lemmas right on {words:,} words whose lemmas training has not seen, as a mean over languages.</p>"
        f"{_table([*COST_HEADINGS, 'which is'], rows)}"
    )


def _curve(curve: Sequence[CurvePoint], ended: Sequence[int]) -> str:
    points = [point for point in curve if point.validation_accuracy is not None]
    names = list(dict.fromkeys(point.contender for point in points))
    found = {(point.step, point.contender): point.validation_accuracy for point in points}
    rows = [
        _row([f"{step:,}", *(f"{found[step, name]:.1%}" if (step, name) in found else "" for name in names)])
        for step in sorted({point.step for point in points})
    ]
    went_on = "".join(f" The run went on at step {step:,}, by a new schedule." for step in ended)
    return (
        "<p>Accuracy on validation words by step. The learning rate falls to its end with the time given, so the "
        "points before the last are below what a run of that length reaches. More minutes also read more words."
        f"{went_on}</p>"
        f"{_table(['step', *names], rows)}"
    )


def _languages(scores: Sequence[LanguageScore], systems: Sequence[str]) -> str:
    rows = []
    for family, members in groupby(scores, key=lambda score: score.family):
        for place, score in enumerate(members):
            best = max(score.accuracy[system] for system in systems)
            cells = "".join(
                f"<td{' class=best' * (score.accuracy[system] == best)}>{score.accuracy[system]:.1%}</td>"
                for system in systems
            )
            name = f'<a href="#errors-{score.language}">{escape(score.name)}</a>'
            rows.append(
                f"<tr><td>{escape(family) if place == 0 else ''}</td><td class=text>{name}</td>"
                f"<td>{score.train_words:,}</td><td>{score.test_words:,}</td><td>{score.compounds:.0%}</td>"
                f"<td>{score.coverage:.1%}</td>{cells}</tr>"
            )
    means = [f"{macro_mean(scores, system):.1%}" for system in systems]
    rows.append(_row(["mean", "", "", "", "", "", *means], kind="mean"))
    headings = ["family", "language", "training words", "test words", "compounds", "reachable", *systems]
    return (
        "<p><i>Compounds</i> are test lemmas that end in a training lemma; <i>reachable</i> are words whose rule "
        f"training has seen in the language.</p>{_table(headings, rows, texts=2)}"
    )


def _errors(errors: Sequence[Example], systems: Sequence[str]) -> str:
    parts = []
    named = [system for system in systems if errors and system in errors[0].predicted]
    for language, members in groupby(errors, key=lambda each: each.language):
        rows = [
            _row(
                [
                    escape(each.form),
                    escape(each.lemma),
                    *(
                        f"<span{' class=wrong' * (each.predicted[name] != each.lemma)}>"
                        f"{escape(each.predicted[name])}</span>"
                        for name in named
                    ),
                ],
                texts=2 + len(named),
            )
            for each in members
        ]
        table = _table(["form", "lemma", *named], rows, texts=2 + len(named))
        parts.append(f'<h3 id="errors-{language}">{escape(NAME_OF.get(language, language))}</h3>{table}')
    return f"<p>Drawn at random from the test words that the experts got wrong.</p>{''.join(parts)}"


def _facts(run: Mapping[str, Any]) -> str:
    rows = [
        _row([escape(name), escape(", ".join(map(str, value)) if isinstance(value, list) else str(value))], texts=2)
        for name, value in run.items()
    ]
    return _table(["", ""], rows, texts=2)
