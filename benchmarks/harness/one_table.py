"""The frame of the commands that have a table of their own: options, the machine in one line, lines as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness.arguments import OptionError, above_zero, make_parser, one_of, read_arguments, whole_number
from benchmarks.harness.devices import open_device
from benchmarks.harness.setting import Setting, make_console, prepare_folder, read_setting
from benchmarks.harness.tables import write_rows

#: The exit codes of a command that found something else than it should, and of one whose arguments were refused.
BAD, REFUSED = 1, 2

T = TypeVar("T")


@dataclass(frozen=True)
class Option(Generic[T]):
    """An option with a value, or several, joined by blanks; ``read`` takes the option's name and the value."""

    name: str
    default: str
    meaning: str
    read: Callable[[str, str], T]
    is_list: bool = False


def amount(name: str, default: str, meaning: str) -> Option[float]:
    """An option that is a number above 0."""
    return Option(name, default, meaning, above_zero)


def count(name: str, default: str, meaning: str, least: int) -> Option[int]:
    """An option that is a whole number."""
    return Option(name, default, meaning, partial(whole_number, least=least))


def choice(name: str, default: str, meaning: str, known: Sequence[str]) -> Option[str]:
    """An option that is one of the names known."""
    return Option(name, default, f"{meaning}: {', '.join(known)}", partial(one_of, known=known))


def _working(_option: str, text: str) -> str:
    open_device(text)
    return text


DEVICE = Option("device", "cpu", "cpu, cuda or cuda:0", _working)
THREADS = count("threads", "1", "threads of the CPU", 1)


@dataclass(frozen=True)
class Asked:
    """What the command line asks for, and the machine.

    Attributes:
        values: By option.
        report: The folder for the figures.
        console: Shows the table.
        setting: The machine.
    """

    values: Mapping[str, Any]
    report: Path
    console: Console
    setting: Setting

    def __getitem__(self, option: Option[T]) -> T:
        found: T = self.values[option.name]
        return found

    @property
    def told(self) -> str:
        """The machine and the commit in one line."""
        return f"{self.setting}, commit {self.setting.commit}{' with changes' * self.setting.is_changed}"

    def start(self) -> None:
        """Set the threads, and tell the machine."""
        torch.set_num_threads(self.setting.threads)
        self.console.print(self.told, markup=False)


def ask(command: str, description: str | None, arguments: Sequence[str], *options: Option[Any]) -> Asked:
    """Read the command line.

    Args:
        command: The command's name in `commands.MEASUREMENTS`.
        description: Its description.
        arguments: Its arguments.
        *options: Its options, besides the report's folder.

    Raises:
        OptionError: An argument is refused.
    """
    parser = make_parser(f"benchmarks {command}", description)
    folder = Option("report", f"celmoe-report/{command}", "folder to write to", lambda _, text: Path(text))
    for each in (*options, folder):
        default = f" (default {each.default})" if each.default else ""
        several: dict[str, Any] = {"nargs": "+", "metavar": each.name.upper()} if each.is_list else {}
        parser.add_argument(f"--{each.name}", default=each.default, help=f"{each.meaning}{default}", **several)
    given = read_arguments(parser, arguments)
    texts = {name: " ".join(text) if isinstance(text, list) else text for name, text in vars(given).items()}
    values = {each.name: each.read(f"--{each.name}", texts[each.name]) for each in (*options, folder)}
    prepare_folder(values[folder.name])
    threads = values.get(THREADS.name, 1)
    device = torch.device(values[DEVICE.name] if values.get(DEVICE.name, "").startswith("cuda") else "cpu")
    return Asked(values, values[folder.name], make_console(), read_setting(device, threads))


def refusing(measure: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Make a command that tells a refused argument in one sentence, and returns `REFUSED` then."""

    @wraps(measure)
    def main(arguments: Sequence[str]) -> int:
        try:
            return measure(arguments)
        except OptionError as error:
            Console(stderr=True, highlight=False, soft_wrap=True).print(str(error), markup=False)
            return REFUSED

    return main


class Lines:
    """A table for the console and its CSV file; what is measured when a run is broken off stays in the file.

    Args:
        asked: Gives folder and console.
        name: The file's name without its ending.
        title: The table's title.
        headings: Its columns.
    """

    def __init__(self, asked: Asked, name: str, title: str, headings: Iterable[str]) -> None:
        self._console, self._path = asked.console, asked.report / f"{name}.csv"
        self._table = Table(title=title)
        for heading in headings:
            self._table.add_column(heading)
        self._rows: list[Mapping[str, object]] = []

    def over(self, points: Sequence[T]) -> Iterable[T]:
        """The points with their progress; after the last one the table is shown."""
        yield from track(points, "timing", console=self._console)
        self._console.print(self._table)

    def add(self, columns: Mapping[str, object], *cells: str) -> None:
        """A line of the file, and its cells on the console."""
        self._rows.append(columns)
        self._table.add_row(*cells)
        write_rows(self._path, self._rows)


def ratio_words(ratio: Mapping[str, str | float]) -> str:
    """``2.20 (2.10 to 2.31)``, of the columns of a ratio."""
    median, low, high = (float(ratio[name]) for name in ("ratio", "first_quartile", "third_quartile"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"
