"""The run in the terminal: a bar while it runs, a table in the end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.contenders.contender import AUTO, STACKED
from benchmarks.harness.wording import DEVICE_NAMES, times_words, workload_words
from benchmarks.report.ratios import headline
from benchmarks.report.reading import Suite
from benchmarks.report.regressions import SLOWER, Comparison
from benchmarks.report.roster import STAGE_NAMES, in_order
from benchmarks.report.running import BEGUN, DONE, FOUND, News, Outcome
from benchmarks.report.targets import Mark
from benchmarks.suite.stages import MEMORY


@contextmanager
def progress_bar(console: Console) -> Iterator[Listener]:
    """A bar that lives as long as the block; the news moves it."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Listener(progress)


class Listener:
    """Moves the bar by the suite's news, and prints the failures."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("benchmarks", total=None, now="looking for them")

    def __call__(self, news: News) -> None:
        """Take one piece of news."""
        if news.kind == FOUND:
            self._progress.update(self._task, total=len(news.names), now="")
        elif news.kind == BEGUN:
            self._progress.update(self._task, now=_short(news.name))
        elif news.kind == DONE:
            self._progress.update(self._task, advance=1)
            if news.failed:
                self._progress.console.print(f"failed: {news.name}: {news.outcome}", markup=False, soft_wrap=True)


def _short(name: str) -> str:
    return name.rpartition("::")[2]


def tell(
    console: Console, suite: Suite, outcome: Outcome, comparison: Comparison | None, marks: Sequence[Mark] = ()
) -> None:
    """Print means by stage and contender, targets, benchmarks without a result, and those that got slower."""
    table = Table(title="times as fast as each contender: geometric mean, least, greatest")
    for heading in ("stage", "device", "ours", "contender", "mean", "least", "greatest", "workloads"):
        table.add_column(heading, justify="right" if heading in ("mean", "least", "greatest", "workloads") else "left")
    timed = [each for each in suite.records if each.stage != MEMORY]
    groups = dict.fromkeys((each.stage, each.device, name) for each in timed for name in in_order(each.timings.seconds))
    for (stage, device, contender), ours in itertools.product(groups, (AUTO, STACKED)):
        if contender not in (AUTO, ours) and (found := headline(suite.of(stage, device), contender, ours)) is not None:
            mean, least, greatest, count = found
            numbers = (times_words(mean), times_words(least.ratio), times_words(greatest.ratio), str(count))
            table.add_row(STAGE_NAMES[stage], DEVICE_NAMES[device], ours, contender, *numbers)
    console.print(table)
    for mark in marks:
        console.print(
            f"{mark.verdict}: {mark.line}, {mark.measure}: {times_words(mark.measured)} (must {mark.goal.must:g}, aim "
            f"{mark.goal.aim:g}{'; less is better' * mark.less_is_better})",
            markup=False,
            soft_wrap=True,
        )
    for reason in dict.fromkeys(outcome.left_out.values()):
        count = list(outcome.left_out.values()).count(reason)
        console.print(f"{count} benchmarks without a result: {reason}", markup=False, soft_wrap=True)
    if outcome.crash:
        console.print(outcome.crash, markup=False, soft_wrap=True)
    for change in comparison.of(SLOWER) if comparison is not None else ():
        console.print(
            f"slower: {STAGE_NAMES[change.record.stage]}, {workload_words(change.record.workload)}, "
            f"{change.now.faster}: {times_words(change.then.ratio)} times as fast as {change.now.slower} then, "
            f"{times_words(change.now.ratio)} now ({change.factor - 1:+.0%})",
            markup=False,
            soft_wrap=True,
        )
