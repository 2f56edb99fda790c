"""The page that a run leaves: one file, figures within, that needs neither network nor scripts."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.contenders.contender import AUTO, OURS, PEER, STACKED
from benchmarks.harness.canvas import Drawing
from benchmarks.harness.noise import measure_noise
from benchmarks.harness.tables import write_rows
from benchmarks.harness.wording import DEVICE_NAMES, times_words, workload_words
from benchmarks.report.bars import draw_memory, draw_speedups, draw_stages
from benchmarks.report.crossover import crossovers
from benchmarks.report.growth import draw_devices, draw_scaling
from benchmarks.report.panels import draw_panels
from benchmarks.report.ratios import headline, ratios
from benchmarks.report.reading import Suite
from benchmarks.report.regressions import FASTER, RULE, SAME, SLOWER, Comparison
from benchmarks.report.roster import CONTENDERS, STAGE_MEANINGS, STAGE_NAMES, WORKLOAD_MEANINGS
from benchmarks.report.tables import Table, absences, changes_table, crossover_table, memory_table, speed_table
from benchmarks.report.targets import Mark, draw_marks, marks_table, operations_rows, operations_table, plan_rows
from benchmarks.suite.operations import OperationCount
from benchmarks.suite.record import Record
from benchmarks.suite.stages import BACKWARD, DISPATCH, EXPERTS, FORWARD, INFERENCE, MEMORY, PLAN, ROUTING, WHOLE_STEP

PAGE = "index.html"
_TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Part:
    """A figure, a table, or both, under a title."""

    title: str = ""
    drawing: Drawing | None = None
    table: Table | None = None


@dataclass(frozen=True)
class Section:
    """A heading, a sentence or two, and the parts below."""

    anchor: str
    title: str
    text: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Findings:
    """The content of a page.

    Attributes:
        suite: The measured benchmarks.
        machine: The facts of `machine_facts`.
        absent_devices: By name, the reason why a device was not measured, and the cure.
        unfinished: By name, the reason why a benchmark has no result.
        comparison: The comparison with another run, if one was given.
        marks: The figures with targets, in a set that has some.
        counts: Counted operations, in a set that counts them.
    """

    suite: Suite
    machine: Mapping[str, Any]
    absent_devices: Mapping[str, str] = field(default_factory=dict)
    unfinished: Mapping[str, str] = field(default_factory=dict)
    comparison: Comparison | None = None
    marks: Sequence[Mark] = ()
    counts: Sequence[OperationCount] = ()


def write_page(folder: Path, findings: Findings) -> Path:
    """Write the page, and each of its figures as PNG and CSV beside it; returns the page's path."""
    sections = [section for section in _sections(findings) if section.parts]
    drawings = [part.drawing for section in sections for part in section.parts if part.drawing is not None]
    pictures = {drawing.name: _data_uri(drawing.save(folder)) for drawing in drawings}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    suite = findings.suite
    named = {name for each in suite.records for name in (*each.timings.seconds, *each.bytes, *each.absent)}
    loads = [record.workload for record in suite.records]
    used = {word for each in loads for word in (each.expert, each.routes, each.hierarchy)}
    html = environment.get_template(_TEMPLATE).render(
        lead=_lead(suite),
        machine=findings.machine,
        date=str(findings.machine["date"]).replace("T", " ").replace("+00:00", " UTC"),
        threads=_listed(f"{record.threads} thread{'s' * (record.threads > 1)}" for record in suite.records),
        dtypes=_listed(record.dtype for record in suite.records),
        tiles=_tiles(suite),
        sections=sections,
        picture=lambda drawing: pictures[drawing.name],
        absent=absences(suite.records, findings.absent_devices),
        unfinished=_unfinished(findings.unfinished),
        comparison=_comparison(findings.comparison),
        contenders=[(name, CONTENDERS[name].meaning) for name in dict.fromkeys([*OURS, *CONTENDERS]) if name in named],
        workloads=[(word, meaning) for word, meaning in WORKLOAD_MEANINGS.items() if word in used],
        noise=measure_noise(seconds for record in suite.records for seconds in record.timings.seconds.values()),
    )
    tables = {
        "ratios": [each.columns() for each in ratios(suite.records)],
        "plans": plan_rows(suite),
        "operations": operations_rows(findings.counts),
    }
    for name, rows in tables.items():
        if rows:
            write_rows(folder / f"{name}.csv", rows)
    path = folder / PAGE
    path.write_text(html, encoding="utf-8")
    return path


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _listed(words: Iterable[str]) -> str:
    return " and ".join(sorted(set(words)))


def _lead(suite: Suite) -> str:
    device = suite.devices[0]
    records = suite.of(WHOLE_STEP, device)
    found = headline(records, PEER, AUTO)
    if found is None:
        return f"{len(suite.records)} benchmarks; no whole step was timed beside {PEER}'s."
    mean, least, greatest, count = found
    stacked = headline(records, PEER, STACKED)
    return (
        f"Whole training steps are {times_words(mean)} times as fast as those of {PEER} in the geometric mean over "
        f"{count} workloads on {DEVICE_NAMES[device]}: from {times_words(least.ratio)} "
        f"({workload_words(least.workload)}) to {times_words(greatest.ratio)} ({workload_words(greatest.workload)})."
        + ("" if stacked is None else f" Stacked, they are {times_words(stacked[0])} times as fast.")
    )


def _tiles(suite: Suite) -> list[dict[str, str]]:
    tiles = []
    for stage, contender in ((WHOLE_STEP, AUTO), (WHOLE_STEP, STACKED), (INFERENCE, AUTO), (PLAN, AUTO)):
        for device in suite.devices:
            if (found := headline(suite.of(stage, device), PEER, contender)) is None:
                continue
            mean, least, greatest, count = found
            way = ", stacked" if contender == STACKED else ""
            tiles.append(
                {
                    "figure": f"{times_words(mean)}\N{MULTIPLICATION SIGN}",
                    "meaning": f"{STAGE_NAMES[stage]}{way}, {DEVICE_NAMES[device]}",
                    "detail": f"as fast as {PEER}; {count} workloads, {times_words(least.ratio)} to "
                    f"{times_words(greatest.ratio)}",
                }
            )
    return tiles


def _sections(findings: Findings) -> list[Section]:
    suite = findings.suite
    steps = [suite.of(WHOLE_STEP, device) for device in suite.devices]
    targets = []
    if findings.marks:
        targets.append(Part(drawing=draw_marks(findings.marks), table=marks_table(findings.marks)))
    if findings.counts:
        words = "ATen operations of both passes, views not counted"
        targets.append(Part(words, table=operations_table(findings.counts)))
    stages = _drawn(map(draw_stages, steps))
    for stage in (FORWARD, BACKWARD, PLAN, ROUTING, DISPATCH, EXPERTS):
        for device, records in _by_device(suite, stage):
            title = f"{STAGE_NAMES[stage].capitalize()}: {STAGE_MEANINGS[stage]}"
            stages.append(Part(f"{title}, {device}" if device else title, table=speed_table(records)))
    devices = _drawn([draw_devices(suite)])
    if found := crossovers(suite):
        devices.append(Part("From which batch size on the device wins against the CPU", table=crossover_table(found)))
    memory = [
        Part(device, draw_memory(records), memory_table(records))
        for device, all_of in _by_device(suite, MEMORY)
        if (records := [record for record in all_of if record.bytes])
    ]
    return [
        Section("targets", "Targets", "The figures that this set is held to.", targets),
        _speed_section(suite, WHOLE_STEP, "Whole steps"),
        _speed_section(suite, INFERENCE, "Inference"),
        Section(
            "stages",
            "Time by stage",
            "The parts of a step's time, and how many times as fast each stage alone is.",
            stages,
        ),
        Section(
            "scaling",
            "How it grows",
            "A step's time by samples and by experts. The nearer a line to the dense floor, the less routing costs.",
            _drawn(map(draw_scaling, steps)),
        ),
        Section(
            "devices",
            "Devices",
            "The same work on each device. A device wins from the smallest batch on from which it is faster at every "
            "size measured.",
            devices,
        ),
        Section(
            "memory",
            "Memory",
            "The most memory, in MiB, that is in use at once during a forward and a backward pass, weights included. "
            f"The smaller number says how many times that of {AUTO} it is.",
            memory,
        ),
    ]


def _speed_section(suite: Suite, stage: str, title: str) -> Section:
    parts = []
    for device, records in _by_device(suite, stage):
        parts += [*_drawn([draw_panels(records)]), Part(device, draw_speedups(records), speed_table(records))]
    text = (
        f"Everyone runs {STAGE_MEANINGS[stage]}. Numbers say how many times as fast {AUTO} is: above 1, it is faster."
    )
    return Section(stage, title, text, parts)


def _drawn(drawings: Iterable[Drawing | None]) -> list[Part]:
    return [Part(drawing=drawing) for drawing in drawings if drawing is not None]


def _by_device(suite: Suite, stage: str) -> list[tuple[str, list[Record]]]:
    """A stage's records by the device's name, which is empty if there is but one device."""
    named = {device: DEVICE_NAMES[device] if len(suite.devices) > 1 else "" for device in suite.devices}
    return [(name, records) for device, name in named.items() if (records := suite.of(stage, device))]


def _unfinished(why: Mapping[str, str]) -> dict[str, list[str]]:
    """The names by the reason."""
    names: dict[str, list[str]] = {}
    for name, reason in why.items():
        names.setdefault(reason, []).append(name)
    return names


def _comparison(found: Comparison | None) -> dict[str, Any] | None:
    if found is None:
        return None
    slower, faster, same = (found.of(verdict) for verdict in (SLOWER, FASTER, SAME))
    unshared = {"the other run": found.only_old, "this run": found.only_new}
    return {
        "old_date": f"{found.old.date[:19].replace('T', ' ')} on {found.old.processor}",
        "verdict": f"Of {len(found.changes)} comparisons, {len(slower)} slower and {len(faster)} faster beyond noise.",
        "slower": changes_table(slower),
        "faster": changes_table(faster[::-1]),
        "same": changes_table(same),
        "rule": RULE,
        "unshared": "".join(f"{len(of)} benchmarks are only in {run}. " for run, of in unshared.items() if of),
    }
