"""The commands by name; a command's packages are looked for before anything of it is imported."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.extras import missing_extra

REFUSED = 2


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: The module whose ``main`` takes the arguments, and returns the exit code.
        meaning: Its purpose in a few words.
        extras: Packages it needs: names of extras in ``pyproject.toml``.
        needs: A module that an older PyTorch can't import, and says so.
    """

    module: str
    meaning: str
    extras: tuple[str, ...] = ("bench",)
    needs: str = ""


MEASUREMENTS: Mapping[str, Command] = {
    "": Command("benchmarks.report.command", "the suite, and a page"),
    "whole-steps": Command(
        "benchmarks.tables.whole_steps.command", "whole steps plain, stacked, compiled, by hand and of celmoe-vp"
    ),
    "scaling": Command(
        "benchmarks.tables.scaling.command", "bytes between ranks, on paper and counted", needs="celmoe.distributed"
    ),
    "mixed-routes": Command("benchmarks.tables.mixed_routes", "steps with routes of several experts, or none"),
    "lora-languages": Command(
        "benchmarks.tables.lora_languages", "LoRA of many languages in one batch, beside PEFT", ("bench", "peers")
    ),
    "trainer-compile": Command(
        "benchmarks.tables.trainer_compile", "the Trainer of transformers, compiled and not", ("bench", "transformers")
    ),
}
JOB: Mapping[str, Command] = {
    "": Command("benchmarks.multilingual.cli", "train, evaluate and report"),
    "ablation": Command("benchmarks.multilingual.studies.ablation", "levels taken out, and families shuffled"),
    "lemmatize": Command("benchmarks.multilingual.lemmatize", "lemmas of words by a run's checkpoint"),
    "newcomers": Command("benchmarks.multilingual.studies.newcomers", "how much a warm start helps a new language"),
}


def run(program: str, commands: Mapping[str, Command], arguments: Sequence[str]) -> int | str:
    """Run the command that the first argument names; without a name, the one of the empty name.

    Returns:
        The exit code, or the sentence that refuses the command, as ``sys.exit`` takes it.
    """
    named = bool(arguments) and not arguments[0].startswith("-")
    name = arguments[0] if named else ""
    if name not in commands:
        near = difflib.get_close_matches(name, commands, 1, 0.0)
        known = ", ".join(filter(None, commands))
        return f"'{program}' must be given one of {known}, or options (got {name!r}; nearest: {near[0]})"
    command = commands[name]
    for extra in command.extras:
        if missing := missing_extra(extra):
            return missing
    if command.needs:
        try:
            importlib.import_module(command.needs)
        except ImportError as error:
            return str(error)
    if arguments and arguments[0] in ("-h", "--help"):
        lines = [f"  {each or '(no name)':16} {commands[each].meaning}" for each in commands]
        sys.stdout.write("\n".join([f"{program} [NAME] ..., each with --help:", *lines, "", ""]))
    code: int = importlib.import_module(command.module).main(arguments[named:])
    return code
