"""``--compare``: the same steps plain, stacked, compiled and with celmoe-vp 1.1.4, side by side.

*Plain* gives each expert parameters of its own, *stacked* is after `celmoe.stack_experts`, and *compiled* runs a
stacked hierarchy by ``torch.compile``. The reference loop takes a few of the steps; all others must equal it.

Every system has a network of its own, made from one seed, and takes the same steps on the same batches; the order
within a step rotates, so that none always runs on the caches that another one left. Ours are given plans that the
loader compiled. The peer is given strings, as its users do; the cost of compiling routes stands beside.

A step is all of a training step: forward, losses, backward, clipping, optimizer. The hierarchy's share is its forward
and backward pass, timed within the same steps by a `HierarchyClock`. Two rows are there to compare the others with:
all words through one expert of each level, and no hierarchy. This network has no dropout, so no way draws random
numbers and all of them compute the same. Rounding alone differs, and Adam enlarges the difference if a gradient is
almost zero.

The first steps of each system stand apart: they allocate, capture, verify and compile. A system that takes more than
its share of the time leaves the comparison.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from rich.table import Table

import celmoe
from benchmarks.harness.devices import finish
from benchmarks.harness.peers import PeerUnavailableError, load_peer
from benchmarks.harness.setting import prepare_folder
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.job import resolve_identity
from benchmarks.multilingual.learning.batches import Batch, Collator, TrainingSteps
from benchmarks.multilingual.learning.hierarchy import FAMILY, LANGUAGE, LEVELS, NetworkSettings, compiler_for
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.learning.schedule import Deadline
from benchmarks.multilingual.learning.training import Contender, make_contender, train_step
from benchmarks.multilingual.options import Options
from benchmarks.multilingual.results.facts import measurement_facts
from benchmarks.multilingual.results.tables import write_json
from benchmarks.multilingual.studies.hierarchy_clock import HierarchyClock
from benchmarks.multilingual.words.corpus import TRAIN
from benchmarks.multilingual.words.data import Data, prepare_data
from benchmarks.workloads.languages import FAMILY_OF
from celmoe.reference import reference_forward

PEER_VERSION = "1.1.4"
PLAIN, STACKED, COMPILED = "celmoe plain", "celmoe stacked", "celmoe compiled"
PEER = f"celmoe-vp {PEER_VERSION}"
REFERENCE = "celmoe.reference"
DENSE = "one expert a level"
BARE = "no hierarchy"
STEPS = 30
REFERENCE_STEPS = 5
# The first steps pay for allocation, warming up, an engine's proof and compiling; they train, but stand apart.
UNTIMED_STEPS = 2
RATE = 1e-3
# The figures of a system: heading and format in the table.
COLUMNS = {
    "steps": ("steps", "{}"),
    "first_seconds": (f"s of first {UNTIMED_STEPS}", "{:.1f}"),
    "milliseconds_a_step": ("ms a step", "{:.1f}"),
    "words_per_second": ("words/s", "{:,.0f}"),
    "hierarchy_milliseconds": ("ms of hierarchy", "{:.1f}"),
    "hierarchy_share": ("share", "{:.0%}"),
    "largest_parameter_difference": (f"difference from {PLAIN}", "{:.1e}"),
}


class StringRoutedLemmatizer(Lemmatizer):
    """Routes by strings at every level, since the peer takes nothing else."""

    def run_hierarchy(
        self, hidden: torch.Tensor, context: dict[str, torch.Tensor], batch: Batch
    ) -> celmoe.CELMoEOutput:
        """Hidden through the peer's experts."""
        families = [FAMILY_OF[language] for language in batch.languages]
        output: celmoe.CELMoEOutput = self.hierarchy(
            hidden, routing={FAMILY: families, LANGUAGE: batch.languages}, context=context
        )
        return output


class ReferenceLemmatizer(Lemmatizer):
    """Runs the experts by the library's own oracle."""

    def run_hierarchy(
        self, hidden: torch.Tensor, context: dict[str, torch.Tensor], batch: Batch
    ) -> celmoe.CELMoEOutput:
        """Hidden through plain Python loops."""
        return reference_forward(self.hierarchy, hidden, routing=batch.plan, context=context)


class DenseLemmatizer(Lemmatizer):
    """Sends every word through the same expert of each level: as much to compute as routed, and nothing to route."""

    def run_hierarchy(
        self, hidden: torch.Tensor, context: dict[str, torch.Tensor], batch: Batch
    ) -> celmoe.CELMoEOutput:
        """Hidden through the first language's experts."""
        del batch  # which has other routes
        language = next(iter(self.head.languages))
        output: celmoe.CELMoEOutput = self.hierarchy(hidden, routing={LANGUAGE: language}, context=context)
        return output


class BareLemmatizer(Lemmatizer):
    """Leaves the hierarchy out: no engine can shorten the rest of a step."""

    def run_hierarchy(
        self, hidden: torch.Tensor, context: dict[str, torch.Tensor], batch: Batch
    ) -> celmoe.CELMoEOutput:
        """Hidden as it is."""
        del context  # for experts alone
        levels = {level: celmoe.LevelOutput(level, hidden, batch.languages) for level in LEVELS}
        return celmoe.CELMoEOutput(levels, hidden)


@dataclass
class Timed:
    """One system: its training, its step times in seconds, and for how many steps it takes part.

    ``clock`` has the hierarchy's part of them, if there is a hierarchy.
    """

    contender: Contender
    most_steps: int
    clock: HierarchyClock | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The system's name."""
        return self.contender.name

    @property
    def first_seconds(self) -> float:
        """Sum over the first steps, which stand apart."""
        return sum(self.seconds[:UNTIMED_STEPS])

    @property
    def step_seconds(self) -> float | None:
        """Median over the timed steps, if there were any."""
        return _timed(self.seconds)

    @property
    def hierarchy_seconds(self) -> float | None:
        """The hierarchy's share of those seconds."""
        return None if self.clock is None else _timed(self.clock.seconds)

    @property
    def hierarchy_share(self) -> float | None:
        """The median of the hierarchy's share of a step."""
        if self.clock is None:
            return None
        return _timed([part / whole for part, whole in zip(self.clock.seconds, self.seconds, strict=True)])


def _timed(values: list[float]) -> float | None:
    return median(values[UNTIMED_STEPS:]) if len(values) > UNTIMED_STEPS else None


def _systems(data: Data, options: Options, seed: int, steps: int, reporter: Reporter) -> list[Timed]:
    settings = NetworkSettings()
    timed: list[Timed] = []

    def add(name: str, network: Lemmatizer, losses: Losses, most_steps: int) -> None:
        network.to(options.device)
        clock = None if isinstance(network, BareLemmatizer) else HierarchyClock(network)
        timed.append(Timed(make_contender(name, network, losses), most_steps, clock))

    for name in (PLAIN, STACKED, COMPILED):
        torch.manual_seed(seed)
        network = Lemmatizer(data.vocabulary, settings, engine=options.engine)
        if name != PLAIN:
            celmoe.stack_experts(network.hierarchy)
        if name == COMPILED:
            network.hierarchy.compile()
        add(name, network, Losses(network, LossWeights()), steps)
    try:
        peer = load_peer(PEER_VERSION)
    except PeerUnavailableError as error:
        reporter.fail(f"WITHOUT THE PEER, which is what this comparison is for: {error}")
    else:
        torch.manual_seed(seed)
        routed = StringRoutedLemmatizer(data.vocabulary, settings, library=peer)
        add(PEER, routed, Losses(routed, LossWeights(), library=peer), steps)
    others: list[tuple[str, type[Lemmatizer], int]] = [
        (REFERENCE, ReferenceLemmatizer, REFERENCE_STEPS),
        (DENSE, DenseLemmatizer, steps),
        (BARE, BareLemmatizer, steps),
    ]
    for name, kind, most in others:
        torch.manual_seed(seed)
        other = kind(data.vocabulary, settings)
        add(name, other, Losses(other, LossWeights()), min(most, steps))
    return timed


def _parameters(timed: Timed) -> dict[str, torch.Tensor]:
    # By the experts' own names, stacked or not.
    return {name: value.clone() for name, value in timed.contender.network.state_dict().items()}


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Over all parameters, absolute; both must have the same names."""
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def _take_steps(
    systems: Sequence[Timed],
    batches: Sequence[Batch],
    seed: int,
    deadline: Deadline,
    most_seconds: float,
    reporter: Reporter,
) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """Train all systems, each until it has taken ``most_seconds``.

    Returns:
        The parameters of each after the reference's last step and after its own last one.
    """
    after: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    device = next(systems[0].contender.network.parameters()).device
    with reporter.bar("comparing", len(batches)) as bar:
        for step, batch in enumerate(batches):
            if deadline.passed() and step > REFERENCE_STEPS:
                break
            for place in range(len(systems)):
                timed = systems[(step + place) % len(systems)]
                if len(timed.seconds) < step or step >= timed.most_steps:
                    continue
                if sum(timed.seconds) > most_seconds:
                    reporter.say(f"{timed.name} leaves after {sum(timed.seconds):.0f} s, at step {step}")
                    timed.most_steps = step
                    continue
                # The same random numbers for each, should anything draw them.
                torch.manual_seed(seed + step)
                finish(device)
                started = time.perf_counter()
                train_step(timed.contender, batch, RATE, done=0.0, read=False)
                finish(device)
                timed.seconds.append(time.perf_counter() - started)
            if step + 1 == min(REFERENCE_STEPS, len(batches)):
                after |= {(each.name, step + 1): _parameters(each) for each in systems if len(each.seconds) > step}
            bar.move_to(step + 1)
    return after | {(timed.name, len(timed.seconds)): _parameters(timed) for timed in systems}


def compare(options: Options, reporter: Reporter) -> int:
    """Print the comparison and write it to ``comparison.json``; returns the exit code."""
    deadline = Deadline(time.monotonic() + options.minutes * 60)
    prepare_folder(options.report)
    identity = resolve_identity(options, None)
    data = prepare_data(identity.languages, reporter, identity.pairs)
    compiler = compiler_for(data.vocabulary)
    collator = Collator(data.tables[TRAIN], data.vocabulary, compiler)
    rows = TrainingSteps(len(data.tables[TRAIN]), identity.batch_size, identity.seed)
    count = options.steps or STEPS
    batches = [collator(rows[step]).to(options.device) for step in range(count)]
    plan_seconds = _time_planning(compiler, batches)
    systems = _systems(data, options, identity.seed, count, reporter)
    after = _take_steps(systems, batches, identity.seed, deadline, options.minutes * 60 / len(systems), reporter)
    base = systems[0]
    table = Table(title=f"Training steps of {rows.batch_size:,} words, {len(identity.languages)} languages")
    for heading in ("system", *(heading for heading, _ in COLUMNS.values())):
        table.add_column(heading, justify="left" if heading == "system" else "right")
    facts = []
    for timed in systems:
        steps, whole, part = len(timed.seconds), timed.step_seconds, timed.hierarchy_seconds
        # Networks that train other experts than the routes', or none, have parameters that say nothing.
        known = timed is not base and timed.name not in {DENSE, BARE} and (base.name, steps) in after
        figures = {
            "steps": steps,
            "first_seconds": timed.first_seconds,
            "milliseconds_a_step": None if whole is None else 1000 * whole,
            "words_per_second": None if whole is None else rows.batch_size / whole,
            "hierarchy_milliseconds": None if part is None else 1000 * part,
            "hierarchy_share": timed.hierarchy_share,
            "largest_parameter_difference": largest_difference(after[base.name, steps], after[timed.name, steps])
            if known
            else None,
        }
        told = zip(figures.values(), COLUMNS.values(), strict=True)
        table.add_row(timed.name, *("" if value is None else form.format(value) for value, (_, form) in told))
        facts.append({"system": timed.name, **figures})
    reporter.say(table)
    reporter.say(
        f"medians of interleaved steps, {torch.get_num_threads()} threads, {options.device}; compiling a batch's plan "
        f"takes {1000 * plan_seconds:.2f} ms, in the loader"
    )
    content = {
        **measurement_facts(options, NetworkSettings(), LossWeights()),
        "languages": identity.languages,
        "batch_size": rows.batch_size,
        "seed": identity.seed,
        "plan_milliseconds": 1000 * plan_seconds,
        "systems": facts,
    }
    write_json(options.report / "comparison.json", content)
    return 0


def _time_planning(compiler: celmoe.RoutingCompiler, batches: Sequence[Batch]) -> float:
    seconds = []
    for batch in batches:
        started = time.perf_counter()
        compiler({LANGUAGE: batch.languages})
        seconds.append(time.perf_counter() - started)
    return median(seconds)
