"""The command line, checked: every refusal is one sentence."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.harness.arguments import (
    OptionError,
    above_zero,
    make_parser,
    nearest,
    one_of,
    read_arguments,
    whole_number,
)
from benchmarks.harness.devices import open_device
from benchmarks.multilingual.learning.ranks import LAYOUTS, launched_ranks
from benchmarks.multilingual.learning.schedule import MINUTES_OF_FEW_PAIRS, MOST_EPOCHS, MOST_PAIRS, WORDS_PER_MINUTE
from benchmarks.multilingual.words.corpus import FORMS_PER_LANGUAGE, known_languages
from celmoe.engines.registry import AUTO, ENGINES

MODULE = "benchmarks.multilingual"
DEFAULT_REPORT = Path("celmoe-report") / "multilingual"
DEFAULT_BATCH_SIZE = 4_096
# Words of an added language in a step, and the steps of its training.
ADDED_BATCH_SIZE = 512
ADDED_STEPS = 300
# Bounds the whole run, the report included, with a margin to the eight minutes that are promised.
DEFAULT_MINUTES = 7.3
DEFAULT_SEED = 0
# A batch is put together in a hundredth of a step, and a process of its own would copy the words.
DEFAULT_WORKERS = 0
DEFAULT_DEVICE = "cpu"
LARGEST_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line. ``None`` stands for an option that was not given and that a checkpoint may decide.

    ``device_name`` is ``device`` as it was asked for: DirectML's own name for a device can't be asked for. ``further``
    is true if a finished run is to go on, for the minutes or steps that were given.
    """

    engine: str
    device: torch.device
    device_name: str
    languages: tuple[str, ...] | None
    pairs: int | None
    batch_size: int | None
    minutes: float
    steps: int | None
    seed: int | None
    workers: int
    report: Path
    resume: bool
    compare: bool
    stacked: bool
    compile: bool
    parallel: str | None
    further: bool
    add: str | None
    warm_start: str | None
    freeze: bool
    words: int | None


def language_code(option: str, text: str) -> str:
    """The value of an option that names one language."""
    known = known_languages()
    if text not in known:
        raise OptionError(
            f"'{option}' must be the code of one of simplemma's {len(known)} languages (got {text!r}; "
            f"{nearest(text, known)})"
        )
    return text


def language_codes(text: str) -> tuple[str, ...]:
    """The value of ``--languages``: codes separated by commas, sorted."""
    known = known_languages()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise OptionError(
                f"'--languages' must be codes of simplemma's {len(known)} languages, separated by commas "
                f"(got {name!r}; {nearest(name, known)})"
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise OptionError(f"'--languages' must name each language once (got {twice[0]!r} more than once)")
    return tuple(sorted(names))


def _parallel(text: str | None) -> str | None:
    known = ", ".join(LAYOUTS)
    num_ranks = launched_ranks()
    if text is None and num_ranks is not None:
        raise OptionError(
            f"'--parallel' must be given under torchrun, as one of {known} (got none: each of the ranks, {num_ranks}, "
            "would run a job of its own)"
        )
    if text is not None:
        one_of("--parallel", text, LAYOUTS)
    if text is not None and num_ranks is None:
        raise OptionError(
            f"'--parallel' must stand under torchrun (got {text!r} in a process that was started alone: "
            f"torchrun --nproc-per-node 2 -m {MODULE} --parallel {text})"
        )
    return text


def _parser() -> argparse.ArgumentParser:
    description = "Train experts for lemmatization on simplemma's languages and report how they do."
    parser = make_parser(MODULE, description)
    add = parser.add_argument
    add("--engine", default=AUTO, help=f"how a level's experts run: {', '.join(ENGINES)} (default {AUTO})")
    add("--device", default=DEFAULT_DEVICE, help=f"cpu, cuda, cuda:1, directml, ... (default {DEFAULT_DEVICE})")
    add("--languages", help="language codes separated by commas (default: all that simplemma has)")
    add(
        "--pairs",
        help=f"pairs drawn from each dictionary (default {FORMS_PER_LANGUAGE:,}, and as many more for each "
        f"{MINUTES_OF_FEW_PAIRS} of --minutes, up to {MOST_PAIRS} times)",
    )
    add(
        "--batch-size",
        help=f"words a step (default {DEFAULT_BATCH_SIZE}; with --add {ADDED_BATCH_SIZE}, of the language)",
    )
    add("--minutes", help=f"bound on the whole run (default {DEFAULT_MINUTES})")
    add(
        "--steps",
        help=f"training steps; the clock then has no say (default: {WORDS_PER_MINUTE:,} words for each of --minutes, "
        f"at most {MOST_EPOCHS} times each word, fewer where the machine turns out too slow; with --add {ADDED_STEPS})",
    )
    add("--seed", help=f"decides initial parameters and the order of the words (default {DEFAULT_SEED})")
    add("--workers", default=str(DEFAULT_WORKERS), help=f"loader processes, 0 for none (default {DEFAULT_WORKERS})")
    add("--report", default=str(DEFAULT_REPORT), help=f"folder to write to (default {DEFAULT_REPORT})")
    add(
        "--resume",
        action="store_true",
        help="go on from the checkpoint in the report folder; a finished run for the --minutes or --steps given",
    )
    add(
        "--add", help="code of a language that a finished run's checkpoint, in the report folder, has not seen and gets"
    )
    add("--warm-start", help="with --add: the language of the checkpoint that the new one begins like")
    add("--freeze", action="store_true", help="with --add: train nothing that was there before")
    add("--words", help="with --add: training words of the new language (default: all)")
    add("--compare", action="store_true", help="time the same steps plain, stacked, compiled and with celmoe-vp 1.1.4")
    add(
        "--stacked",
        action=argparse.BooleanOptionalAction,
        help="train alike experts as one parameter a tensor (default: yes, but without it under --parallel)",
    )
    add("--compile", action="store_true", help="run the hierarchy by torch.compile; compiling is timed by itself")
    add("--parallel", help=f"under torchrun, how ranks share the training: {', '.join(LAYOUTS)}")
    return parser


def _check_adding(given: argparse.Namespace) -> None:
    """Refuse options that can't stand with ``--add``, or not without it."""
    others = {
        "--resume": given.resume,
        "--compare": given.compare,
        "--compile": given.compile,
        "--parallel": given.parallel,
        "--languages": given.languages,
        "--pairs": given.pairs,
        "--workers": given.workers != str(DEFAULT_WORKERS),
    }
    own = {"--warm-start": given.warm_start, "--freeze": given.freeze, "--words": given.words}
    if given.add is None:
        if alone := [option for option, value in own.items() if value]:
            raise OptionError(f"'{alone[0]}' must stand with '--add' (got it alone: no language is added)")
        return
    if together := [option for option, value in others.items() if value]:
        raise OptionError(f"'--add' must stand without {together[0]!r} (got both: the checkpoint knows the rest)")
    language_code("--add", given.add)


def parse_options(arguments: Sequence[str]) -> Options:
    """The options that these arguments mean.

    Raises:
        OptionError: An argument is unknown or out of its range.
    """
    given = read_arguments(_parser(), arguments)
    if not given.report:
        raise OptionError("'--report' must be a folder that can be written to (got '')")
    if given.resume and given.compare:
        raise OptionError("'--resume' and '--compare' must not stand together (got both: a comparison has none)")
    parallel = _parallel(given.parallel)
    if parallel is not None and given.compare:
        raise OptionError("'--parallel' and '--compare' must not stand together (got both: one process is compared)")
    if given.compare and (given.compile or given.stacked is not None):
        raise OptionError(
            "'--compare' must stand without '--compile' and '--stacked' (got one of them: a comparison has each way)"
        )
    if parallel is not None and (given.compile or given.stacked):
        raise OptionError(
            "'--parallel' must stand without '--compile' and '--stacked' (got one of them: ranks share experts' own "
            "parameters)"
        )
    _check_adding(given)
    device = open_device(given.device)
    if parallel is not None and device.type != "cpu":
        raise OptionError(f"'--device' must be cpu where '--parallel' is given (got {given.device!r})")
    return Options(
        engine=one_of("--engine", given.engine, list(ENGINES)),
        device=device,
        device_name=given.device,
        languages=None if given.languages is None else language_codes(given.languages),
        pairs=None if given.pairs is None else whole_number("--pairs", given.pairs, 1),
        batch_size=None if given.batch_size is None else whole_number("--batch-size", given.batch_size, 1),
        minutes=DEFAULT_MINUTES if given.minutes is None else above_zero("--minutes", given.minutes),
        steps=None if given.steps is None else whole_number("--steps", given.steps, 1),
        seed=None if given.seed is None else whole_number("--seed", given.seed, 0, LARGEST_SEED),
        workers=whole_number("--workers", given.workers, 0, 64),
        report=Path(given.report),
        resume=given.resume,
        compare=given.compare,
        stacked=parallel is None if given.stacked is None else given.stacked,
        compile=given.compile,
        parallel=parallel,
        further=given.resume and (given.minutes is not None or given.steps is not None),
        add=given.add,
        warm_start=given.warm_start,
        freeze=given.freeze,
        words=None if given.words is None else whole_number("--words", given.words, 1),
    )


def resume_command(options: Options) -> str:
    """The command that goes on with this run: the checkpoint knows the rest."""
    start = ["python"]
    if options.parallel is not None:
        start = ["torchrun", "--nproc-per-node", str(launched_ranks())]
    words = [*start, "-m", MODULE, "--resume", "--report", str(options.report)]
    for option, value, default in (
        ("--engine", options.engine, AUTO),
        ("--device", options.device_name, DEFAULT_DEVICE),
        ("--workers", options.workers, DEFAULT_WORKERS),
        ("--minutes", options.minutes, DEFAULT_MINUTES),
        ("--parallel", options.parallel, None),
    ):
        if value != default:
            words += [option, str(value)]
    words += ["--no-stacked"] if options.parallel is None and not options.stacked else []
    words += ["--compile"] if options.compile else []
    return shlex.join(words)
