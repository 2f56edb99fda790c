"""``index.html``: the whole report on one page, which reads alone in any browser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.harness.canvas import Drawing
from benchmarks.harness.noise import Noise, measure_noise
from benchmarks.multilingual.learning.training import CurvePoint
from benchmarks.multilingual.results.evaluation import Example, LanguageScore, macro_mean
from benchmarks.multilingual.results.html import row_of, table_of
from benchmarks.multilingual.results.newcomer_report import section
from benchmarks.multilingual.results.tables import COST_HEADINGS, PAGE, cost_rows
from benchmarks.workloads.languages import NAME_OF

EXPLAINED = {
    "experts": "celmoe's hierarchy: each word runs through a universal expert, its family's, and its language's",
    "universal": "every word runs through one expert, which computes as much for it as the experts do",
    "wide": "every word runs through one expert with as many parameters as all experts together; it takes fewer "
    "steps if they are much longer",
    "table": "looks up the most frequent rule for a word's beginning and ending; nothing is trained",
    "identity": "takes each word for its own lemma",
}

_INTRODUCTION = (
    "<p>A lemma is the form of a word that a dictionary lists: <i>go</i> for <i>went</i>. Systems learn to find it "
    "from dictionaries, and are tested on words whose lemmas they have not seen.</p>"
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
body { overflow-wrap: break-word }
p, dd { max-width: 50em } dt { font-weight: 600 } dd { margin: 0 0 .5em }
.wide { overflow-x: auto; margin: 1em 0 }
.notice { padding: .7em 1em; border-left: .4em solid #b3261e; background: #f6f6f6 }
table { border-collapse: collapse }
th, td { padding: .15em .7em; text-align: right; border-bottom: 1px solid #e5e5e5 }
th:first-child, td:first-child, td.text, th.text { text-align: left }
td.best { font-weight: 600 } tr.mean { background: #f6f6f6 }
img { max-width: 100%; min-width: 40em } .wrong { color: #b3261e } nav a { display: inline-block; margin-right: 1em }
"""


def write_page(
    folder: Path,
    scores: Sequence[LanguageScore],
    systems: Sequence[str],
    run: Mapping[str, Any],
    curve: Sequence[CurvePoint],
    errors: Sequence[Example],
    drawings: Sequence[Drawing],
) -> None:
    """Write the page beside the figures that it shows."""
    # A series for each system that is trained; its batches are of one size.
    speeds: dict[str, list[float]] = {}
    for point in curve:
        speeds.setdefault(point.contender, []).append(point.words_per_second)
    noise = measure_noise(speeds.values())
    title = f"Lemmatization of {len(scores)} language{'s' * (len(scores) != 1)}"
    sections = {
        "systems": _systems(systems),
        "result": _result(scores, systems, run),
        "curve": _curve(curve, run["ended"]),
        "languages": _languages(scores, systems),
        "figures": "".join(
            f"<h3>{escape(each.title)}</h3><p>{escape(each.caption)} "
            f'<a href="{each.name}.csv">Its numbers</a>.</p>'
            f'<div class=wide><img src="{each.name}.png" alt="{escape(f"{each.title}. {each.caption}")}"></div>'
            for each in drawings
        ),
        "errors": _errors(errors, systems),
        "run": _facts({**run, "noise": str(noise)}),
    }
    headings = {
        "systems": "Systems",
        "result": "Result",
        "curve": "By training step",
        "languages": "By language",
        "figures": "Figures",
        "errors": "Samples of errors",
        "run": "How it was measured",
    }
    added = section(folder, [language for language, _ in run["added"]])
    links = "".join(f'<a href="#{key}">{heading}</a>' for key, heading in headings.items())
    body = "".join(f'<h2 id="{key}">{headings[key]}</h2>{part}' for key, part in sections.items())
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{viewport}<title>{title}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{title}</h1>{_INTRODUCTION}{_notice(noise)}<nav>{links}</nav>"
        f"{body}{added}</body></html>\n"
    )
    (folder / PAGE).write_text(text, encoding="utf-8")


def _notice(noise: Noise) -> str:
    if not noise.is_noisy:
        return ""
    return (
        f'<p class=notice id="noise"><b>The machine was noisy.</b> {noise} A series is the words a second '
        "of a system, step by step. Seconds on this page are rough; accuracies hold for the steps that were taken.</p>"
    )


def _systems(systems: Sequence[str]) -> str:
    told = "".join(f"<dt>{escape(name)}</dt><dd>{escape(EXPLAINED[name])}</dd>" for name in systems)
    return f"<dl>{told}</dl>"


def _result(scores: Sequence[LanguageScore], systems: Sequence[str], run: Mapping[str, Any]) -> str:
    rows = [
        row_of([*map(escape, row)], kind="mean" if row[0] == "experts" else "")
        for row in cost_rows(scores, systems, run)
    ]
    words = sum(score.test_words for score in scores)
    return (
        f"<p>The share of lemmas that are right on {words:,} test words, as a mean over languages, and what that took. "
        "Seconds are those of training steps.</p>"
        f"{table_of(COST_HEADINGS, rows)}"
    )


def _curve(curve: Sequence[CurvePoint], ended: Sequence[int]) -> str:
    points = [point for point in curve if point.validation_accuracy is not None]
    names = list(dict.fromkeys(point.contender for point in points))
    found = {(point.step, point.contender): point.validation_accuracy for point in points}
    rows = [
        row_of([f"{step:,}", *(f"{found[step, name]:.1%}" if (step, name) in found else "" for name in names)])
        for step in sorted({point.step for point in points})
    ]
    went_on = "".join(f" The run went on at step {step:,}, by a new schedule." for step in ended)
    return (
        "<p>An edit rule makes a lemma of a word. Here is the share of validation words for which the right rule was "
        "chosen. The learning rate falls until the run ends, so a point in the middle is below what a run that ends "
        "there reaches. A run of more minutes also reads more words."
        f"{went_on}</p>"
        f"{table_of(['step', *names], rows)}"
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
    rows.append(row_of(["mean", "", "", "", "", "", *means], kind="mean"))
    headings = ["family", "language", "training words", "test words", "compounds", "reachable", *systems]
    return (
        "<p>The share of test words whose lemma is right; the best of a row is bold. <i>Compounds</i> are test lemmas "
        "that end in a training lemma. <i>Reachable</i> are words whose edit rule training has seen in the language. "
        f"A language's name leads to its errors.</p>{table_of(headings, rows, texts=2)}"
    )


def _errors(errors: Sequence[Example], systems: Sequence[str]) -> str:
    parts = []
    named = [system for system in systems if errors and system in errors[0].predicted]
    for language, members in groupby(errors, key=lambda each: each.language):
        rows = [
            row_of(
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
        table = table_of(["form", "lemma", *named], rows, texts=2 + len(named))
        parts.append(f'<h3 id="errors-{language}">{escape(NAME_OF.get(language, language))}</h3>{table}')
    return f"<p>Drawn at random from the test words that the experts got wrong.</p>{''.join(parts)}"


def _facts(run: Mapping[str, Any]) -> str:
    rows = [row_of([escape(name.replace("_", " ")), escape(_words(value))], texts=2) for name, value in run.items()]
    return table_of(["setting", "value"], rows, texts=2)


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name.replace('_', ' ')} {_words(each)}" for name, each in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, float):
        return f"{value:,.6g}"
    return "none" if value is None else str(value)
