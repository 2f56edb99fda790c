"""The job from the first word to the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

import celmoe
from benchmarks.multilingual import figures, report
from benchmarks.multilingual.batches import Batch, Collator, TrainingSteps, all_batches, training_batches
from benchmarks.multilingual.checkpoint import (
    CheckpointError,
    RunIdentity,
    identity_of,
    read_checkpoint,
    restore,
    save_checkpoint,
)
from benchmarks.multilingual.console import Reporter, step_figures
from benchmarks.multilingual.corpus import (
    FORMS_PER_LANGUAGE,
    TEST,
    TRAIN,
    VALIDATION,
    LanguageSample,
    build_missing,
    cache_path,
    known_languages,
    load_corpus,
)
from benchmarks.multilingual.evaluation import (
    IDENTITY_BASELINE,
    macro_mean,
    pick_examples,
    predict,
    rule_accuracy,
    score_languages,
)
from benchmarks.multilingual.interrupts import InterruptGuard
from benchmarks.multilingual.losses import Losses, LossWeights
from benchmarks.multilingual.network import LEVELS, UNIVERSAL, Lemmatizer, NetworkSettings, hierarchy_config
from benchmarks.multilingual.options import DEFAULT_BATCH_SIZE, DEFAULT_SEED, Options
from benchmarks.multilingual.training import Contender, CurvePoint, Deadline, Progress, Watchers, make_contender, train
from benchmarks.multilingual.words import Vocabulary, WordTable, build_table, build_vocabulary
from benchmarks.peers import cache_folder

EXPERTS = "experts"
# What two cores of an ordinary machine do with room to spare; the number of steps must not depend on timing noise.
STEPS_PER_MINUTE = 60
# No word is worth meeting more often than this, however many minutes there are.
MOST_EPOCHS = 40
VALIDATION_WORDS = 8_192
EVALUATION_BATCH = 8_192
EXAMPLES = 54
INTERRUPTED = 130


@dataclass(frozen=True, kw_only=True)
class Data:
    """The words of a run, ready for batches."""

    samples: list[LanguageSample]
    vocabulary: Vocabulary
    tables: dict[int, WordTable]


def prepare_data(languages: Sequence[str], reporter: Reporter, cap: int = FORMS_PER_LANGUAGE) -> Data:
    """Cached samples of these languages (drawn now where they are not), encoded."""
    folder = cache_folder() / "multilingual"
    missing = [each for each in languages if not cache_path(folder, each, cap).exists()]
    if missing:
        with reporter.bar("reading dictionaries", len(missing)) as bar:
            build_missing(languages, cap, folder, bar.advance)
    samples = load_corpus(languages, cap, folder)
    vocabulary = build_vocabulary(samples)
    tables = {split: build_table(samples, vocabulary, split) for split in (TRAIN, VALIDATION, TEST)}
    return Data(samples=samples, vocabulary=vocabulary, tables=tables)


def make_contenders(data: Data, options: Options, seed: int) -> list[Contender]:
    """The experts, and the same network with the universal expert alone, from one seed each."""
    settings = NetworkSettings()
    contenders = []
    for name, levels in ((EXPERTS, LEVELS), (UNIVERSAL, (UNIVERSAL,))):
        torch.manual_seed(seed)
        network = Lemmatizer(data.vocabulary, settings, levels=levels, engine=options.engine).to(options.device)
        contenders.append(make_contender(name, network, Losses(network, LossWeights())))
    return contenders


def make_compiler(data: Data) -> celmoe.RoutingCompiler:
    """Routes of a language's name to plans of all levels."""
    return celmoe.RoutingCompiler(hierarchy_config(celmoe, data.vocabulary.languages, LEVELS, NetworkSettings()))


def resolve_identity(options: Options, state: dict[str, Any] | None) -> RunIdentity:
    """What the run is made from: the options, or the checkpoint's where it goes on from one.

    Raises:
        CheckpointError: An option says another thing than the checkpoint.
    """
    asked = RunIdentity(
        languages=options.languages or tuple(known_languages()),
        batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        seed=DEFAULT_SEED if options.seed is None else options.seed,
    )
    if state is None:
        return asked
    found = identity_of(state)
    pairs = (
        ("--languages", options.languages, found.languages),
        ("--batch-size", options.batch_size, found.batch_size),
        ("--seed", options.seed, found.seed),
    )
    for option, wanted, saved in pairs:
        if wanted is not None and wanted != saved:
            shown, kept = (",".join(each) if isinstance(each, tuple) else each for each in (wanted, saved))
            raise CheckpointError(f"'{option}' must be what the checkpoint was trained with, {kept} (got {shown})")
    return found


def report_seconds(languages: int) -> float:
    """What the evaluation and the figures are given at the end of a run."""
    return 8 + languages * 0.5


def run(options: Options, reporter: Reporter) -> int:
    """Train, evaluate and report; returns the exit code."""
    begun = time.monotonic()
    state = read_checkpoint(options.report) if options.resume else None
    identity = resolve_identity(options, state)
    reporter.say(
        f"{len(identity.languages)} languages, batches of {identity.batch_size:,} words, seed {identity.seed}, "
        f"engine {options.engine}, device {options.device}, {torch.get_num_threads()} threads"
    )
    data = prepare_data(identity.languages, reporter)
    contenders = make_contenders(data, options, identity.seed)
    steps = TrainingSteps(len(data.tables[TRAIN]), identity.batch_size, identity.seed)
    if state is None:
        # Dropout and whatever else draws numbers in training follows the seed, not the networks' sizes.
        torch.manual_seed(identity.seed)
        most = steps.steps_per_epoch * MOST_EPOCHS
        planned = options.steps or max(1, min(round(STEPS_PER_MINUTE * options.minutes), most))
        progress = Progress(planned_steps=planned, total_steps=planned, clocked=options.steps is None)
    else:
        progress = restore(state, data.vocabulary, contenders)
        reporter.say(f"resumed at step {progress.step} of {progress.total_steps}")
    seconds = options.minutes * 60
    ends_at = begun + seconds - report_seconds(len(identity.languages))
    # However long the dictionaries took, a quarter of the time is for training.
    deadline = Deadline(max(ends_at, time.monotonic() + seconds / 4)) if progress.clocked else None
    finished = _train(options, reporter, data, contenders, steps, progress, deadline)
    save_checkpoint(options.report, identity, data.vocabulary, contenders, progress)
    if not finished:
        reporter.say(
            f"stopped at step {progress.step} of {progress.total_steps}; go on with: python -m benchmarks.multilingual "
            f"--resume --report {options.report}"
        )
        return INTERRUPTED
    _evaluate(options, reporter, data, contenders, progress, identity, steps.batch_size)
    reporter.say(f"report in {options.report}, {time.monotonic() - begun:.0f} s in all")
    return 0


def _train(
    options: Options,
    reporter: Reporter,
    data: Data,
    contenders: list[Contender],
    steps: TrainingSteps,
    progress: Progress,
    deadline: Deadline | None,
) -> bool:
    collator = Collator(data.tables[TRAIN].share_memory(), data.vocabulary.languages, make_compiler(data))
    batches = training_batches(steps, collator, progress.step, progress.planned_steps, options.workers, options.device)
    checks = _validation_batches(data, options.device)

    def say_validated(point: CurvePoint) -> None:
        reporter.say(
            f"step {point.step:>5} of {progress.total_steps}, {point.contender:<9}: "
            f"loss {point.terms['global.rule']:.3f}, accuracy {point.accuracy:.1%} on the batch"
            f", {point.validation_accuracy or 0:.1%} on unseen lemmas, "
            f"{point.words_per_second:,.0f} words/s"
        )

    reporter.say(
        f"training {progress.planned_steps - progress.step:,} steps, experts beside the universal expert alone"
    )
    with InterruptGuard() as guard, reporter.bar("training", progress.total_steps) as bar:
        watchers = Watchers(
            on_step=lambda step, results, speeds: bar.move_to(
                step, progress.total_steps, step_figures(results, speeds) if results else None
            ),
            validate=lambda contender: rule_accuracy(contender.network, iter(checks)),
            on_validated=say_validated,
            stop_requested=guard.requested,
        )
        try:
            return train(contenders, batches, progress, deadline, watchers)
        finally:
            batches.close()


def _validation_batches(data: Data, device: torch.device) -> list[Batch]:
    """The same few thousand words of all languages at every check."""
    table = data.tables[VALIDATION]
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(table))[:VALIDATION_WORDS])
    collator = Collator(table, data.vocabulary.languages, make_compiler(data))
    return [collator(rows).to(device) for rows in chosen.split(DEFAULT_BATCH_SIZE)]


def _evaluate(
    options: Options,
    reporter: Reporter,
    data: Data,
    contenders: list[Contender],
    progress: Progress,
    identity: RunIdentity,
    batch_size: int,
) -> None:
    table = data.tables[TEST]
    collator = Collator(table, data.vocabulary.languages, make_compiler(data))
    predictions = {
        each.name: predict(each.network, all_batches(table, collator, EVALUATION_BATCH, options.device))
        for each in contenders
    }
    train_counts = np.bincount(data.tables[TRAIN].language_ids.numpy(), minlength=len(data.samples)).tolist()
    scores = score_languages(data.samples, table, data.vocabulary, predictions, train_counts)
    systems = [*predictions, IDENTITY_BASELINE]
    folder = options.report
    words = progress.step * batch_size
    run_facts = {
        **asdict(identity),
        "engine": options.engine,
        "device": str(options.device),
        "threads": torch.get_num_threads(),
        "steps": progress.step,
        "words_trained": words,
        "words_per_second": {each.name: words / max(each.seconds, 1e-9) for each in contenders},
        "training_seconds": {each.name: each.seconds for each in contenders},
        "parameters": {each.name: sum(p.numel() for p in each.network.parameters()) for each in contenders},
    }
    report.write_scores(folder, scores, systems, run_facts)
    examples = pick_examples(data.samples, table, data.vocabulary, predictions, EXAMPLES, identity.seed)
    report.write_examples(folder, examples, list(predictions))
    figures.draw_training_curves(folder, progress.curve)
    figures.draw_accuracy(folder, scores, systems)
    figures.draw_samples(folder, scores, {each.language: each.dictionary_size for each in data.samples})
    figures.draw_expert_load(folder, progress.expert_load, progress.step)
    reporter.say(report.accuracy_table(scores, systems))
    means = ", ".join(f"{system} {macro_mean(scores, system):.1%}" for system in systems)
    beaten = all(macro_mean(scores, EXPERTS) > macro_mean(scores, other) for other in systems if other != EXPERTS)
    verdict = "the experts beat both baselines" if beaten else "the experts do NOT beat both baselines"
    reporter.say(f"mean over {len(scores)} languages: {means}: {verdict}")
