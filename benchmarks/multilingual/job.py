"""The job from the first word to the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import celmoe
from benchmarks.harness.arguments import OptionError
from benchmarks.harness.interrupts import InterruptGuard
from benchmarks.harness.setting import prepare_folder
from benchmarks.multilingual.console import Reporter, step_figures
from benchmarks.multilingual.further import check_steps, go_on, nothing_left, reading_more
from benchmarks.multilingual.learning.batches import Batch, Collator, TrainingSteps, all_batches, training_batches
from benchmarks.multilingual.learning.checkpoint import (
    CheckpointError,
    RunIdentity,
    identity_of,
    read_checkpoint,
    restore,
    save_checkpoint,
    vocabulary_of,
)
from benchmarks.multilingual.learning.growth import relearn
from benchmarks.multilingual.learning.hierarchy import LEVELS, UNIVERSAL, NetworkSettings
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer, expert_size, parameter_count
from benchmarks.multilingual.learning.ranks import ALONE, RankLostError, Ranks
from benchmarks.multilingual.learning.schedule import Deadline, plan_pairs, plan_steps
from benchmarks.multilingual.learning.serving import EXPERTS
from benchmarks.multilingual.learning.training import (
    Contender,
    CurvePoint,
    Progress,
    Watchers,
    make_contender,
    seconds_to_compile,
    train,
)
from benchmarks.multilingual.options import DEFAULT_BATCH_SIZE, DEFAULT_SEED, Options, resume_command
from benchmarks.multilingual.results import figures, page
from benchmarks.multilingual.results import tables as report
from benchmarks.multilingual.results.evaluation import (
    IDENTITY_BASELINE,
    LanguageScore,
    examples_of,
    lemmas_of,
    macro_mean,
    pick_rows,
    predict,
    rule_accuracy,
    score_languages,
    table_lemmas,
)
from benchmarks.multilingual.results.facts import engines_by_level, measurement_facts
from benchmarks.multilingual.words.corpus import TEST, TRAIN, VALIDATION, known_languages
from benchmarks.multilingual.words.data import Data, prepare_data
from benchmarks.multilingual.words.vocabulary import Vocabulary

WIDE = "wide"
TABLE = "table"
VALIDATION_WORDS = 8_192
EVALUATION_BATCH = 8_192
# Of each language.
EXAMPLES = 3
ERRORS = 8
INTERRUPTED = 130
# A run that has less than this share of its time to train says so.
LITTLE = 0.25


@dataclass(kw_only=True)
class Run:
    """All the parts of a run.

    ``saved_step`` is the step of its checkpoint, if there is one; ``compile_seconds`` are the seconds of compiling.
    """

    options: Options
    reporter: Reporter
    identity: RunIdentity
    data: Data
    contenders: list[Contender]
    steps: TrainingSteps
    progress: Progress
    ranks: Ranks = ALONE
    saved_step: int | None = None
    compile_seconds: float | None = None

    def save(self) -> None:
        """Write the checkpoint: that of one process, which the first rank writes. All must ask."""
        wholes = [each.whole() for each in self.contenders]
        if self.ranks.is_first:
            save_checkpoint(self.options.report, self.identity, self.data.vocabulary, wholes, self.progress)
        # None goes on, or says that it is written, before it is.
        self.ranks.any(False)
        self.saved_step = self.progress.step


def make_contenders(data: Data, options: Options, seed: int) -> list[Contender]:
    """The experts, and two networks with the universal expert alone, from one seed each.

    One of the two computes as much for a word as the experts do. The other has as many parameters in all, and takes
    fewer steps, so that it trains for as long.
    """
    vocabulary, settings = data.vocabulary, NetworkSettings()

    def contender(name: str, sizes: NetworkSettings, levels: tuple[str, ...]) -> Contender:
        torch.manual_seed(seed)
        network = Lemmatizer(vocabulary, sizes, levels=levels, engine=options.engine).to(options.device)
        if options.stacked:
            celmoe.stack_experts(network.hierarchy)
        if options.compile and levels == LEVELS:
            network.hierarchy.compile()
        return make_contender(name, network, Losses(network, LossWeights()))

    experts = contender(EXPERTS, settings, LEVELS)
    alone = settings.universal_alone()
    universal = contender(UNIVERSAL, alone, (UNIVERSAL,))
    # Languages that came later make the first ones' networks no wider.
    later = sum(number * expert_size(settings, level) for level, number in vocabulary.later_experts.items())
    missing = parameter_count(experts.network) - parameter_count(universal.network) - later
    # One more of the inner width is a row of each of two matrices, and a bias.
    wide = replace(alone, universal_width=alone.universal_width + max(0, missing) // (2 * alone.width + 1))
    largest = contender(WIDE, wide, (UNIVERSAL,))
    largest.stride = max(1, round(largest.network.multiply_adds / experts.network.multiply_adds))
    return [experts, universal, largest]


def resolve_identity(options: Options, state: dict[str, Any] | None) -> RunIdentity:
    """The run's sources: the options, or the checkpoint's if the run goes on from one.

    Raises:
        CheckpointError: An option contradicts the checkpoint.
    """
    asked = RunIdentity(
        languages=options.languages or tuple(known_languages()),
        pairs=options.pairs or plan_pairs(options.minutes),
        batch_size=options.batch_size or DEFAULT_BATCH_SIZE,
        seed=DEFAULT_SEED if options.seed is None else options.seed,
    )
    if state is None:
        return asked
    found = identity_of(state)
    more_pairs = options.further and Progress.from_state(state["progress"]).finished
    pairs = (
        ("--languages", options.languages, tuple(sorted(found.languages))),
        ("--pairs", None if more_pairs else options.pairs, found.pairs),
        ("--batch-size", options.batch_size, found.batch_size),
        ("--seed", options.seed, found.seed),
    )
    for option, wanted, saved in pairs:
        if wanted is not None and wanted != saved:
            shown, kept = (",".join(each) if isinstance(each, tuple) else each for each in (wanted, saved))
            raise CheckpointError(f"'{option}' must be what the checkpoint was trained with, {kept} (got {shown})")
    return found


def report_seconds(languages: int) -> float:
    """The seconds set aside for the evaluation and the figures at the end of a run."""
    return 8 + languages * 0.5


def run(options: Options, reporter: Reporter, ranks: Ranks = ALONE) -> int:
    """Train, evaluate and report; returns the exit code.

    Raises:
        OptionError: A batch has fewer words than there are ranks, or the report's folder can't be written to.
        CheckpointError: The checkpoint to go on from can't be read, or is another run's.
        RankLostError: Another rank is gone.
    """
    begun = time.monotonic()
    state = read_checkpoint(options.report) if options.resume else None
    identity = resolve_identity(options, state)
    if identity.batch_size < ranks.size:
        raise OptionError(
            f"'--batch-size' must be at least the number of ranks, {ranks.size} (got {identity.batch_size})"
        )
    goes_on = False
    if state is not None:
        check_steps(Progress.from_state(state["progress"]), options)
        goes_on = is_reported(state, identity, options.report)
        if goes_on and not options.further:
            return nothing_left(options, reporter)
        if goes_on:
            identity = reading_more(identity, options)
    prepare_folder(options.report)
    where = f"{ranks.size} ranks ({options.parallel}) of " if options.parallel else ""
    ways = (", stacked" if options.stacked else "") + (", compiled" if options.compile else "")
    reporter.say(
        f"{len(identity.languages)} languages of {identity.pairs:,} pairs, batches of {identity.batch_size:,} words, "
        f"seed {identity.seed}, engine {options.engine}{ways}, device {options.device}, "
        f"{where}{torch.get_num_threads()} threads"
    )
    with ranks.watched():
        job = _prepare(options, reporter, identity, state, ranks)
    if goes_on and not go_on(job.progress, options, job.steps, reporter):
        return nothing_left(options, reporter)
    if options.further and job.progress.finished:
        reporter.say("the run is finished and has no report yet, which comes first; call again to train further")
    try:
        with ranks.watched():
            return _carry_out(job, begun)
    except KeyboardInterrupt:
        # A second Ctrl-C while training, or one in the evaluation: all steps since the last checkpoint are lost.
        reporter.fail(f"stopped{_kept(job)}")
        return INTERRUPTED
    except RankLostError as error:
        raise RankLostError(f"{error}{_kept(job)}") from error


def _carry_out(job: Run, begun: float) -> int:
    if not job.progress.finished:
        finished = _train(job, begun)
        job.save()
        if not finished:
            job.reporter.say(
                f"stopped at step {job.progress.step} of {job.progress.total_steps}; go on with: "
                f"{resume_command(job.options)}"
            )
            return INTERRUPTED
    _evaluate(job)
    job.reporter.say(f"report in {job.options.report}, {time.monotonic() - begun:.0f} s in all")
    return 0


def _kept(job: Run) -> str:
    """The rest of a run that ended in the midst."""
    if job.saved_step is None:
        return " before the first checkpoint; the dictionaries that were read are kept"
    return f"; the checkpoint of step {job.saved_step} is kept: {resume_command(job.options)}"


def is_reported(state: Mapping[str, Any], identity: RunIdentity, folder: Path) -> bool:
    """True if the checkpoint's run has trained all its steps and the folder's report is about them.

    A language that was added since has a report of its own.
    """
    progress = Progress.from_state(state["progress"])
    told = report.read_run(folder)
    facts = _identity_facts(identity, progress)
    later = len(identity.languages) - len(told.get("languages", ()))
    if 0 < later <= len(identity.added):
        facts |= {"languages": facts["languages"][:-later], "added": facts["added"][:-later]}
    # A report from before languages could be added tells of none.
    return progress.finished and {"added": [], **told} == {**told, **facts}


def _identity_facts(identity: RunIdentity, progress: Progress) -> dict[str, Any]:
    facts = asdict(identity)
    # Lists, as a file has them.
    return {
        **facts,
        "languages": list(identity.languages),
        "added": [*map(list, identity.added)],
        "steps": progress.step,
    }


def _prepare(
    options: Options, reporter: Reporter, identity: RunIdentity, state: dict[str, Any] | None, ranks: Ranks
) -> Run:
    with ranks.first_goes_ahead():
        data = prepare_data(identity.languages, reporter, identity.pairs, identity.added)
    # A run that goes on may read more words than its networks know.
    known = data.vocabulary
    if state is not None and identity_of(state).pairs != identity.pairs:
        known = vocabulary_of(state)
    contenders = make_contenders(replace(data, vocabulary=known), options, identity.seed)
    steps = TrainingSteps(len(data.tables[TRAIN]), identity.batch_size, identity.seed)
    if state is None:
        # The seed decides the random numbers of training, and the networks' sizes don't.
        torch.manual_seed(identity.seed)
        planned = options.steps or plan_steps(options.minutes, steps.batch_size, steps.steps_per_epoch)
        progress = Progress(planned_steps=planned, total_steps=planned, clocked=options.steps is None)
    else:
        progress = restore(state, known, contenders)
        for each in contenders if known is not data.vocabulary else ():
            relearn(each, known, data.vocabulary)
        reporter.say(f"resumed at step {progress.step} of {progress.total_steps}")
    if options.parallel is not None:
        from benchmarks.multilingual.learning.layouts import spread  # noqa: PLC0415  # one process needs no such PyTorch

        contenders = [spread(options.parallel, each, ranks, options.report) for each in contenders]
    return Run(
        options=options,
        reporter=reporter,
        identity=identity,
        data=data,
        contenders=contenders,
        steps=steps,
        progress=progress,
        ranks=ranks,
        saved_step=None if state is None else progress.step,
    )


def _deadline(job: Run, begun: float) -> Deadline | None:
    if not job.progress.clocked:
        return None
    seconds = job.options.minutes * 60
    ends_at = begun + seconds - report_seconds(len(job.identity.languages))
    now = time.monotonic()
    left = max(0.0, ends_at - now)
    if left < LITTLE * seconds:
        job.reporter.say(
            f"{now - begun:.0f} s of {seconds:,.0f} are over before the training, which has {left:.0f} s, "
            "and one step at least; dictionaries that were read are kept, so that the next run has more"
        )
    return Deadline(ends_at, ranks=job.ranks)


def _train(job: Run, begun: float) -> bool:
    """Train to the end; returns False if the user asked to stop before the end."""
    options, reporter, data, progress = job.options, job.reporter, job.data, job.progress
    deadline = _deadline(job, begun)
    collator = Collator(
        data.tables[TRAIN].share_memory() if options.workers else data.tables[TRAIN],
        data.vocabulary,
        rank=job.ranks.rank,
        num_ranks=job.ranks.size,
    )
    batches = training_batches(
        job.steps, collator, progress.step, progress.planned_steps, options.workers, options.device, job.ranks
    )
    checks = validation_batches(data, options.device)

    def say_validated(point: CurvePoint) -> None:
        reporter.say(
            f"step {point.step:>5} of {progress.total_steps}, {point.contender:<9}: "
            f"loss {point.terms['global.rule']:.3f}, accuracy {point.accuracy:.1%} on the batch"
            f", {point.validation_accuracy or 0:.1%} on unseen lemmas, "
            f"{point.words_per_second:,.0f} words/s"
        )

    def validate(contender: Contender) -> float:
        network = contender.whole().network
        # The first rank's curve is the one that is kept.
        return rule_accuracy(network, iter(checks)) if job.ranks.is_first else 0.0

    if options.compile:
        batch = collator(job.steps[progress.step]).to(options.device)
        job.compile_seconds = seconds_to_compile(job.contenders[0], batch)
        reporter.say(f"compiled in {job.compile_seconds:.1f} s, with a step that trains nothing")
    left = progress.planned_steps - progress.step
    with InterruptGuard() as guard, reporter.bar("training", progress.total_steps) as bar:
        # Said under guard: from this line on Ctrl-C saves.
        reporter.say(
            f"training {left:,} steps of {job.steps.batch_size:,} words, {left * job.steps.batch_size:,} words in all, "
            "experts beside networks with the universal expert alone"
        )
        watchers = Watchers(
            on_step=lambda step, results, speeds: bar.move_to(
                step,
                progress.total_steps,
                step_figures(results[EXPERTS], speeds[EXPERTS]) if EXPERTS in results else None,
            ),
            validate=validate,
            on_validated=say_validated,
            on_milestone=job.save,
            stop_requested=lambda: job.ranks.any(guard.requested()),
        )
        try:
            return train(job.contenders, batches, progress, deadline, watchers)
        finally:
            batches.close()


def validation_batches(data: Data, device: torch.device, vocabulary: Vocabulary | None = None) -> list[Batch]:
    """The same few thousand words of all languages at every check.

    They are for a network of the data's vocabulary, or of a ``vocabulary`` that has grown from it.
    """
    vocabulary = vocabulary or data.vocabulary
    table = data.tables[VALIDATION]
    chosen = torch.from_numpy(np.random.default_rng(0).permutation(len(table))[:VALIDATION_WORDS])
    collator = Collator(table, vocabulary)
    return [collator(rows).to(device) for rows in chosen.split(DEFAULT_BATCH_SIZE)]


def verdict_on(scores: Sequence[LanguageScore], systems: Sequence[str]) -> str:
    """In how many languages the experts are ahead of every other system, and whether they are so in the mean."""
    others = [each for each in systems if each != EXPERTS]
    beaten = all(macro_mean(scores, EXPERTS) > macro_mean(scores, other) for other in others)
    ahead = ", ".join(
        f"{other} in {sum(score.accuracy[EXPERTS] > score.accuracy[other] for score in scores)}" for other in others
    )
    return f"the experts {'beat all' if beaten else 'do NOT beat all'} baselines; they are ahead of {ahead}"


def _evaluate(job: Run) -> None:
    options, reporter, data, progress = job.options, job.reporter, job.data, job.progress
    contenders = [each.whole() for each in job.contenders]
    if not job.ranks.is_first:
        return
    table = data.tables[TEST]
    collator = Collator(table, data.vocabulary)
    lemmas = {
        each.name: lemmas_of(
            data.samples,
            table,
            data.vocabulary,
            predict(each.network, all_batches(table, collator, EVALUATION_BATCH, options.device)),
        )
        for each in contenders
    }
    lemmas[TABLE] = table_lemmas(data.samples, table, data.table_rules)
    scores = score_languages(data.samples, table, lemmas)
    systems = [*lemmas, IDENTITY_BASELINE]
    folder = options.report
    experts = next(each for each in contenders if each.name == EXPERTS)
    engines = engines_by_level(experts.network.hierarchy)
    run_facts = {
        **_identity_facts(job.identity, progress),
        "ended": progress.ended,
        **measurement_facts(options, NetworkSettings(), LossWeights()),
        "engines": engines,
        "compile_seconds": job.compile_seconds,
        "words_trained": {each.name: each.words for each in contenders},
        "words_per_second": {each.name: each.words / max(each.seconds, 1e-9) for each in contenders},
        "training_seconds": {each.name: each.seconds for each in contenders},
        "parameters": {each.name: parameter_count(each.network) for each in contenders},
        "multiply_adds": {each.name: each.network.multiply_adds for each in contenders},
    }
    report.write_scores(folder, scores, systems)
    examples = examples_of(data.samples, table, lemmas, pick_rows(table, EXAMPLES, job.identity.seed))
    report.write_examples(folder, "examples", examples)
    everything = examples_of(data.samples, table, {EXPERTS: lemmas[EXPERTS]}, range(len(table)))
    wrong = [each.predicted[EXPERTS] != each.lemma for each in everything]
    errors = examples_of(data.samples, table, lemmas, pick_rows(table, ERRORS, job.identity.seed, wrong))
    report.write_examples(folder, "errors", errors)
    drawings = [
        figures.draw_training_curves(progress.curve, progress.ended),
        figures.draw_accuracy(scores, systems),
        figures.draw_samples(scores, {each.language: each.dictionary_size for each in data.samples}),
        figures.draw_expert_load(progress.expert_load, progress.step),
    ]
    for drawing in drawings:
        drawing.save(folder)
    report.write_costs(folder, scores, systems, run_facts)
    # The last files, which tell that the others are there.
    report.write_run(folder, scores, systems, run_facts)
    page.write_page(folder, scores, systems, run_facts, progress.curve, errors, drawings)
    reporter.say(report.accuracy_table(scores, systems))
    reporter.say(report.cost_table(scores, systems, run_facts))
    means = ", ".join(f"{system} {macro_mean(scores, system):.1%}" for system in systems)
    ran = ", ".join(f"{level} {engine}" for level, engine in engines.items())
    reporter.say(f"levels by engine {options.engine}: {ran}; the experts' steps took {experts.seconds:.0f} s")
    reporter.say(f"mean over {len(scores)} languages: {means}: {verdict_on(scores, systems)}")
