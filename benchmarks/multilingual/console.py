"""The one place that writes to the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column

from benchmarks.multilingual.learning.training import StepResult


class Bar:
    """A live progress bar with a line of figures behind it."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def move_to(self, done: int, total: int | None = None, figures: str | None = None) -> None:
        """Move the bar; ``total`` and ``figures`` stay as they were unless they are given."""
        self._progress.update(self._task, completed=done)
        if total is not None:
            self._progress.update(self._task, total=total)
        if figures is not None:
            self._progress.update(self._task, figures=figures)

    def advance(self, figures: str = "") -> None:
        """One more is done."""
        self._progress.update(self._task, advance=1, figures=figures)


class Reporter:
    """Lines, tables and bars for the reader; errors go to the other stream.

    Only the first of several ranks prints lines. The others print errors alone, with the rank's number.
    """

    def __init__(self, console: Console | None = None, rank: int = 0) -> None:
        if rank:
            console = Console(quiet=True)
        self._rank = rank
        # Outside a terminal a table must not be cut to eighty columns.
        self._console = console or Console(highlight=False)
        if console is None and not self._console.is_terminal:
            self._console = Console(highlight=False, width=120)
        self._errors = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, text: str | RenderableType) -> None:
        """One line, or one table."""
        if isinstance(text, str):
            # Not broken, so that a command in it can be copied.
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            self._console.print(text)

    def fail(self, text: str) -> None:
        """Print one line about an error."""
        self._errors.print(" ".join(text.split()), markup=False)

    def refuse(self, text: str) -> None:
        """Print one line about a refusal that all ranks share."""
        if not self._rank:
            self.fail(text)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Bar]:
        """A bar that lives as long as the block."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=12),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            yield Bar(progress, progress.add_task(title, total=total, figures=""))


def step_figures(result: StepResult, words_per_second: float) -> str:
    """``loss 1.234  61.2%  8,100 words/s``: short, since it shares a line of eighty columns with the bar."""
    return f"loss {result.terms['global.rule']:.3f}  {result.accuracy:.1%}  {words_per_second:,.0f} words/s"
