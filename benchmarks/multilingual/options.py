"""What the command line says, checked: every refusal is one sentence."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.multilingual.corpus import known_languages
from celmoe.engines import AUTO, ENGINES

DEFAULT_REPORT = Path("celmoe-report") / "multilingual"
DEFAULT_BATCH_SIZE = 4_096
# Bounds the whole run, the report included, with a margin to the eight minutes that are promised.
DEFAULT_MINUTES = 7.3
DEFAULT_SEED = 0
DEFAULT_WORKERS = 1
DIRECTML = "directml"
LARGEST_SEED = 2**63 - 1


class OptionError(Exception):
    """The command line asks for something that can't be done; the message is the whole story."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line. ``None`` where it says nothing and a checkpoint may know better."""

    engine: str
    device: torch.device
    languages: tuple[str, ...] | None
    batch_size: int | None
    minutes: float
    steps: int | None
    seed: int | None
    workers: int
    report: Path
    resume: bool
    compare: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(message)


def _nearest(name: str, known: Sequence[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.4)
    return f"nearest: {', '.join(close)}" if close else f"known: {', '.join(known)}"


def _languages(text: str) -> tuple[str, ...]:
    known = known_languages()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise OptionError(
                f"'--languages' must be codes of simplemma's {len(known)} languages, separated by commas "
                f"(got {name!r}; {_nearest(name, known)})"
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"'--languages' must name each language once (got {twice[0]!r} more than once)")
    return tuple(sorted(names))


def _whole(option: str, text: str, least: int, most: int | None = None) -> int:
    rule = f"a whole number, at least {least}" if most is None else f"a whole number from {least} to {most}"
    try:
        value = int(text)
    except ValueError:
        raise OptionError(f"'{option}' must be {rule} (got {text!r})") from None
    if value < least or (most is not None and value > most):
        raise OptionError(f"'{option}' must be {rule} (got {text!r})")
    return value


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise OptionError(f"'--minutes' must be a number above 0 (got {text!r})")
    return value


def _device(text: str) -> torch.device:
    if text == DIRECTML:
        try:
            directml: Any = import_module("torch_directml")
        except ImportError:
            raise OptionError(
                "'--device' must be cpu or cuda where torch-directml is missing (got 'directml')"
            ) from None
        device: torch.device = directml.device()
        return device
    try:
        device = torch.device(text)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise OptionError(
            f"'--device' must be a device that works here, such as cpu, cuda or directml (got {text!r}: {reason})"
        ) from None
    return device


def _engine(text: str) -> str:
    known = [AUTO, *ENGINES]
    if text not in known:
        raise OptionError(f"'--engine' must be one of {', '.join(known)} (got {text!r}; {_nearest(text, known)})")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m benchmarks.multilingual",
        description="Train experts for lemmatization on simplemma's languages and report how they do.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--engine", default=AUTO, help=f"how a level's experts run: {', '.join([AUTO, *ENGINES])} (default {AUTO})")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, directml, ... (default cpu)")
    add("--languages", help="language codes separated by commas (default: all that simplemma has)")
    add("--batch-size", help=f"words a step (default {DEFAULT_BATCH_SIZE})")
    add("--minutes", default=str(DEFAULT_MINUTES), help=f"bound on the whole run (default {DEFAULT_MINUTES})")
    add("--steps", help="training steps; the clock then has no say (default: what fits --minutes)")
    add("--seed", help=f"decides initial parameters and the order of the words (default {DEFAULT_SEED})")
    add("--workers", default=str(DEFAULT_WORKERS), help=f"loader processes, 0 for none (default {DEFAULT_WORKERS})")
    add("--report", default=str(DEFAULT_REPORT), help=f"folder to write to (default {DEFAULT_REPORT})")
    add("--resume", action="store_true", help="go on from the checkpoint in the report folder")
    add("--compare", action="store_true", help="time the same steps with celmoe-vp 1.1.4 and with the reference loop")
    return parser


def parse_options(arguments: Sequence[str]) -> Options:
    """The options that these arguments mean.

    Raises:
        OptionError: An argument is unknown or out of its range.
    """
    given = _parser().parse_args(arguments)
    report = Path(given.report)
    if report.exists() and not report.is_dir():
        raise OptionError(f"'--report' must be a folder (got {given.report!r}, which is a file)")
    if given.resume and given.compare:
        raise OptionError("'--resume' and '--compare' must not stand together (a comparison has no checkpoint)")
    if given.resume and given.steps is not None:
        raise OptionError("'--resume' and '--steps' must not stand together (the checkpoint knows how many are left)")
    return Options(
        engine=_engine(given.engine),
        device=_device(given.device),
        languages=None if given.languages is None else _languages(given.languages),
        batch_size=None if given.batch_size is None else _whole("--batch-size", given.batch_size, 1),
        minutes=_minutes(given.minutes),
        steps=None if given.steps is None else _whole("--steps", given.steps, 1),
        seed=None if given.seed is None else _whole("--seed", given.seed, 0, LARGEST_SEED),
        workers=_whole("--workers", given.workers, 0, 64),
        report=report,
        resume=given.resume,
        compare=given.compare,
    )
