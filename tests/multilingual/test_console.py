from io import StringIO

import pytest
from rich.console import Console
from rich.table import Table

from benchmarks.multilingual.console import Reporter, step_figures
from benchmarks.multilingual.learning.training import StepResult

FIGURES = "loss 1.235  61.2%  128,100 words/s"


def test_the_figures_of_a_step_are_brief() -> None:
    assert step_figures(StepResult(9.0, {"global.rule": 1.2346}, 0.6123), 128_100.4) == FIGURES


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_bar_and_its_figures_fit_a_narrow_terminal(width: int) -> None:
    screen = StringIO()
    reporter = Reporter(Console(file=screen, width=width, force_terminal=True, color_system=None, legacy_windows=False))
    with reporter.bar("training", 7_008) as bar:
        bar.move_to(7_008, figures=FIGURES)
    last = next(line for line in reversed(screen.getvalue().splitlines()) if "training" in line)
    assert FIGURES in last
    assert "7008/7008" in last
    assert "━━━━━━" in last
    assert "…" not in screen.getvalue()


def test_a_line_is_not_broken() -> None:
    screen = StringIO()
    Reporter(Console(file=screen, width=80)).say("go on with: " + "x " * 100)
    assert screen.getvalue().count("\n") == 1


def test_a_table_may_have_marks_and_a_line_has_none() -> None:
    screen = StringIO()
    table = Table("a")
    table.add_row("[bold]marked[/bold]")
    Reporter(Console(file=screen, width=80)).say(table)
    assert "[bold]" not in screen.getvalue()
    Reporter(Console(file=screen, width=80)).say("[bold]")
    assert "[bold]" in screen.getvalue()
