"""Command lines, refused in one sentence: ``'--option' must be ... (got ...)``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from difflib import get_close_matches


class OptionError(Exception):
    """The command line asks for something that can't be done; the message is the whole story."""


def make_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser for ``python -m module`` that `read_arguments` understands."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=description, allow_abbrev=False, exit_on_error=False
    )


def read_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """Read the arguments that a command was given.

    Raises:
        OptionError: One of them is unknown, lacks its value, or has one that it does not take.
    """
    try:
        given, unknown = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise OptionError(_in_our_words(error, arguments)) from None
    if unknown:
        known = [f"--{name.replace('_', '-')}" for name in vars(given)]
        raise OptionError(
            f"'arguments' must be options that --help shows (got {unknown[0]!r}; {nearest(unknown[0], known)})"
        )
    return given


def _in_our_words(error: argparse.ArgumentError, arguments: Sequence[str]) -> str:
    name = error.argument_name
    for argument in arguments:
        option, equals, value = argument.partition("=")
        # An option that can be negated is named with its negation: ``--stacked/--no-stacked``.
        if equals and option in str(name).split("/"):
            return f"'{option}' must stand without a value (got {value!r})"
    return f"'{name}' must be followed by a value (got none)"


def nearest(name: str, known: Sequence[str]) -> str:
    """The known names that are near to `name`; all known names if none is near."""
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"


def one_of(option: str, text: str, known: Sequence[str]) -> str:
    """The value of ``option``, one of those known."""
    if text not in known:
        raise OptionError(f"'{option}' must be one of {', '.join(known)} (got {text!r}; {nearest(text, known)})")
    return text


def whole_number(option: str, text: str, least: int, most: int | None = None) -> int:
    """The value of ``option``, a whole number in this range."""
    rule = f"a whole number, at least {least}" if most is None else f"a whole number from {least} to {most}"
    try:
        value = int(text)
    except ValueError:
        raise OptionError(f"'{option}' must be {rule} (got {text!r})") from None
    if value < least or (most is not None and value > most):
        raise OptionError(f"'{option}' must be {rule} (got {text!r})")
    return value


def above_zero(option: str, text: str) -> float:
    """The value of ``option``, a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"'{option}' must be a number above 0 (got {text!r})")
    return value
