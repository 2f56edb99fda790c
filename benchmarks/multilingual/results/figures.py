"""The figures of a report, each with its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.harness.canvas import Drawing, new_panels
from benchmarks.multilingual.learning.hierarchy import LEVELS
from benchmarks.multilingual.learning.training import CurvePoint
from benchmarks.multilingual.results.evaluation import IDENTITY_BASELINE, LanguageScore, macro_mean
from benchmarks.workloads.languages import NAME_OF

# A palette that stays apart in grey and for colour-blind readers.
COLOURS = {
    "experts": "#0b6e99",
    "universal": "#e08214",
    "added": "#0b6e99",
    "scratch": "#e08214",
    "wide": "#7b3294",
    "table": "#1b7837",
    IDENTITY_BASELINE: "#8c8c8c",
}
ROW_HEIGHT = 0.21


def _colour(system: str) -> str:
    return COLOURS.get(system, "#444444")


def draw_training_curves(curve: Sequence[CurvePoint], ended: Sequence[int] = ()) -> Drawing:
    """Loss and accuracy by step, of every contender; a line at each step at which a plan ``ended`` and one began."""
    figure, [[loss, accuracy]] = new_panels(11, 4.2, 1, 2)
    for name in dict.fromkeys(point.contender for point in curve):
        points = [point for point in curve if point.contender == name]
        steps = [point.step for point in points]
        losses = [point.terms.get("global.rule", point.loss) for point in points]
        loss.plot(steps, losses, color=_colour(name), linewidth=1.2, label=name)
        percent = [100 * point.accuracy for point in points]
        accuracy.plot(steps, percent, color=_colour(name), linewidth=0.8, alpha=0.45, label=f"{name}, training batches")
        checks = [(point.step, 100 * value) for point in points if (value := point.validation_accuracy) is not None]
        if checks:
            at, shares = [step for step, _ in checks], [share for _, share in checks]
            line = accuracy.plot(at, shares, color=_colour(name), marker="o", markersize=4, linewidth=1.4)
            line[0].set_label(f"{name}, unseen lemmas")
    loss.set(title="Cross entropy of the edit rule", xlabel="step", ylabel="nats a word", yscale="log")
    loss.yaxis.set_major_formatter("{x:g}")
    loss.yaxis.set_minor_formatter("{x:g}")
    loss.tick_params(axis="y", which="minor", labelsize=7)
    accuracy.set(title="Edit rule right", xlabel="step", ylabel="percent of words", ylim=(0, 100))
    for each in (loss, accuracy):
        for step in ended:
            each.axvline(step, color="#bbbbbb", linewidth=0.8, linestyle=":")
        each.legend(frameon=False, fontsize=8)
    rows = [
        {
            "step": point.step,
            "contender": point.contender,
            "loss": point.loss,
            "rule_loss": point.terms.get("global.rule"),
            "accuracy": point.accuracy,
            "validation_accuracy": point.validation_accuracy,
            "words_per_second": point.words_per_second,
        }
        for point in curve
    ]
    caption = "By training step, of every system that is trained."
    return Drawing("training_curves", "Loss and accuracy on the way", caption, figure, rows)


def draw_newcomer(language: str, title: str, curve: Sequence[tuple[int, str, float]], batch_size: int) -> Drawing:
    """Accuracy by step of a language that was added, beside training it from scratch."""
    figure, [[axes]] = new_panels(7.0, 4.0, 1, 1)
    for name in dict.fromkeys(system for _, system, _ in curve):
        points = [(step, 100 * share) for step, system, share in curve if system == name]
        axes.plot(*zip(*points, strict=True), color=_colour(name), marker="o", markersize=4, linewidth=1.4, label=name)
    # The step before the first one has its place on the axis, too.
    axes.set_xscale("symlog", linthresh=5)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(title=title, xlabel="step", ylabel="edit rule right, percent of validation words", ylim=(0, 100))
    axes.title.set_fontsize(8)
    axes.legend(frameon=False, fontsize=8)
    rows = [
        {"step": step, "words_seen": step * batch_size, "system": system, "validation_accuracy": f"{share:.4f}"}
        for step, system, share in curve
    ]
    return Drawing(f"added_{language}", title, "Accuracy by step.", figure, rows)


def draw_newcomers(rows: Sequence[Mapping[str, Any]], steps: int) -> Drawing:
    """A panel for each held-back language: test accuracy by training words, of every way to learn it."""
    ends = [row for row in rows if row["step"] == steps]
    languages = list(dict.fromkeys((row["language"], row["neighbour"]) for row in ends))
    figure, [panels] = new_panels(2.6 * len(languages) + 0.6, 3.4, 1, len(languages))
    for axes, (language, neighbour) in zip(panels, languages, strict=True):
        for number, system in enumerate(dict.fromkeys(row["system"] for row in ends)):
            points = [
                (row["words"], 100 * row["test_accuracy"])
                for row in ends
                if (row["language"], row["system"]) == (language, system)
            ]
            axes.plot(*zip(*points, strict=True), f"C{number}o-", markersize=3, linewidth=1.2, label=system)
        axes.set(title=f"{NAME_OF[language]}, from {NAME_OF[neighbour]}", xlabel="training words", xscale="log")
        axes.title.set_fontsize(8)
    panels[0].set(ylabel="lemmas right, percent of test words")
    panels[0].legend(frameon=False, fontsize=7)
    return Drawing("newcomers", "New languages", "Test accuracy by training words.", figure, rows)


def _label(score: LanguageScore) -> str:
    return f"{score.name} ({score.language})"


def draw_accuracy(scores: Sequence[LanguageScore], systems: Sequence[str]) -> Drawing:
    """Draw a row for every language, sorted by the first system's accuracy; a dot a system, and the reachable share."""
    ranked = sorted(scores, key=lambda score: score.accuracy[systems[0]])
    figure, [[axes]] = new_panels(8.2, 1.7 + ROW_HEIGHT * len(ranked), 1, 1)
    rows = range(len(ranked))
    low = [min(score.accuracy.values()) * 100 for score in ranked]
    axes.hlines(rows, low, [100 * score.coverage for score in ranked], color="#d9d9d9", linewidth=2)
    reachable = [100 * score.coverage for score in ranked]
    axes.scatter(reachable, rows, marker="|", s=60, color="#222222", label="reachable with the rules", zorder=3)
    for system in reversed(systems):
        label = f"{system} (mean {macro_mean(scores, system):.1%})"
        axes.scatter(
            [100 * score.accuracy[system] for score in ranked], rows, s=26, color=_colour(system), label=label, zorder=3
        )
    axes.set_yticks(list(rows), [_label(score) for score in ranked], fontsize=8)
    axes.set(xlim=(0, 101), ylim=(-0.8, len(ranked) - 0.2), xlabel="lemmas right, percent of test words")
    figure.suptitle("Accuracy by language, on lemmas that training has not seen", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    numbers = [
        {"language": score.language, "name": score.name, "reachable": score.coverage}
        | {system: score.accuracy[system] for system in systems}
        for score in reversed(ranked)
    ]
    caption = "A row for each language, a dot for each system."
    return Drawing("accuracy_by_language", "Accuracy by language", caption, figure, numbers)


def draw_samples(scores: Sequence[LanguageScore], dictionary_sizes: Mapping[str, int]) -> Drawing:
    """Draw the sizes of dictionaries, of training words and of test words, on a logarithmic axis."""
    ranked = sorted(scores, key=lambda score: dictionary_sizes[score.language])
    figure, [[axes]] = new_panels(8.2, 1.5 + ROW_HEIGHT * len(ranked), 1, 1)
    rows = range(len(ranked))
    axes.hlines(rows, [score.test_words for score in ranked], [dictionary_sizes[each.language] for each in ranked],
                color="#e5e5e5", linewidth=2)  # fmt: skip
    series = (
        ("whole dictionary", [dictionary_sizes[score.language] for score in ranked], "#8c8c8c"),
        ("training words drawn", [score.train_words for score in ranked], COLOURS["experts"]),
        ("test words drawn", [score.test_words for score in ranked], COLOURS["universal"]),
    )
    for label, counts, colour in series:
        axes.scatter(counts, rows, s=24, color=colour, label=label, zorder=3)
    axes.set_yticks(list(rows), [_label(score) for score in ranked], fontsize=8)
    axes.set(xscale="log", ylim=(-0.8, len(ranked) - 0.2), xlabel="form-lemma pairs")
    figure.suptitle("Samples by language", fontsize=11)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    numbers = [
        {
            "language": score.language,
            "name": score.name,
            "dictionary": dictionary_sizes[score.language],
            "train_words": score.train_words,
            "test_words": score.test_words,
        }
        for score in reversed(ranked)
    ]
    caption = "How many words the dictionary has, and how many were drawn."
    return Drawing("samples_by_language", "Samples by language", caption, figure, numbers)


def draw_expert_load(load: Mapping[str, int], steps: int) -> Drawing:
    """Words a step that each expert was given, one panel a level."""
    by_level: dict[str, list[tuple[str, float]]] = {level: [] for level in LEVELS}
    for key, words in load.items():
        level, expert = key.split("/", 1)
        by_level[level].append((expert, words / max(1, steps)))
    panels = {level: sorted(experts, key=lambda item: (item[1], item[0])) for level, experts in by_level.items()}
    tallest = max(len(experts) for experts in panels.values())
    figure, [axes] = new_panels(4.2 * len(panels), 1.6 + 0.19 * tallest, 1, len(panels))
    for each, (level, experts) in zip(axes, panels.items(), strict=True):
        names = [f"{NAME_OF[name]} ({name})" if name in NAME_OF else name for name, _ in experts]
        loads = [count for _, count in experts]
        bars = each.barh(names, loads, color=COLOURS["experts"], height=0.72)
        each.bar_label(bars, labels=[f"{count:,.0f}" for count in loads], padding=2, fontsize=7)
        each.tick_params(axis="y", labelsize=8)
        each.set(title=f"{level}: {len(names)} expert{'s' * (len(names) > 1)}", xlabel="words a step")
        # A bar is as thick as in the panel beside, and the largest stand in one line at the top.
        each.set_ylim(len(names) - tallest - 0.6, len(names) - 0.4)
        each.margins(x=0.16)
    figure.suptitle("Expert load, mean over the training steps", fontsize=11)
    rows = [
        {"level": level, "expert": name, "words_per_step": count}
        for level, experts in panels.items()
        for name, count in reversed(experts)
    ]
    caption = "A bar for each expert, as a mean over the training steps."
    return Drawing("expert_load", "Words that each expert was given", caption, figure, rows)
