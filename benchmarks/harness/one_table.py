"""Commands that time one table on one thread: an amount of work for each line, and a folder for the figures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.harness.arguments import OptionError, above_zero, make_parser, read_arguments
from benchmarks.harness.setting import make_console, prepare_folder, read_setting

#: The exit code of a command whose arguments were refused.
REFUSED = 2


@dataclass(frozen=True)
class Asked:
    """What the command line asks for.

    Attributes:
        amount: The work for each line: seconds, or steps.
        report: The folder for the figures.
        console: Shows the table.
    """

    amount: float
    report: Path
    console: Console


def ask(
    command: str, description: str | None, arguments: Sequence[str] | None, *, amount: str, default: str, meaning: str
) -> Asked | None:
    """Read the command line, set one thread, and tell the machine.

    Args:
        command: The command's name in `commands.MEASUREMENTS`.
        description: Its description.
        arguments: Its arguments; those of the process by default.
        amount: The name of the option for the work of each line: ``"seconds"``.
        default: The option's default.
        meaning: The option in words.

    Returns:
        ``None`` if an argument was refused, which has been told then.
    """
    parser = make_parser(f"benchmarks {command}", description)
    parser.add_argument(f"--{amount}", default=default, help=f"{meaning} (default {default})")
    folder = f"celmoe-report/{command}"
    parser.add_argument("--report", default=folder, help=f"folder to write to (default {folder})")
    try:
        given = read_arguments(parser, sys.argv[1:] if arguments is None else arguments)
        asked = Asked(above_zero(f"--{amount}", getattr(given, amount)), Path(given.report), make_console())
        prepare_folder(asked.report)
    except OptionError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(str(error), markup=False)
        return None
    torch.set_num_threads(1)
    setting = read_setting(torch.device("cpu"), 1)
    asked.console.print(f"{setting}, commit {setting.commit}{' with changes' * setting.is_changed}", markup=False)
    return asked
