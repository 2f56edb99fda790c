"""The page that a run leaves: one file, figures within, that needs neither network nor scripts."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.contenders.contender import AUTO, OURS, PEER, STACKED
from benchmarks.harness.noise import measure_noise
from benchmarks.harness.tables import write_rows
from benchmarks.report.canvas import Drawing
from benchmarks.report.crossover import crossovers
from benchmarks.report.devices import draw_devices
from benchmarks.report.memory import draw_memory
from benchmarks.report.panels import draw_panels
from benchmarks.report.ratios import ratios
from benchmarks.report.reading import CONTENDERS, Record, Suite
from benchmarks.report.regressions import FASTER, RULE, SAME, SLOWER, Comparison
from benchmarks.report.scaling import draw_scaling
from benchmarks.report.speedups import draw_speedups, ratio_row
from benchmarks.report.stages import draw_stages
from benchmarks.report.tables import (
    Table,
    absences,
    changes_table,
    crossover_table,
    headline,
    memory_table,
    speed_table,
)
from benchmarks.report.targets import Mark, draw_marks, marks_table, operations_rows, operations_table
from benchmarks.report.wording import (
    CONTENDER_MEANINGS,
    DEVICE_NAMES,
    STAGE_MEANINGS,
    STAGE_NAMES,
    WORKLOAD_MEANINGS,
    times_words,
    workload_words,
)
from benchmarks.suite.operations import OperationCount
from benchmarks.suite.stages import BACKWARD, DISPATCH, EXPERTS, FORWARD, INFERENCE, MEMORY, PLAN, ROUTING, WHOLE_STEP

PAGE = "index.html"
_TEMPLATE = "page.html.jinja"
_OURS_FIRST = (*OURS, *CONTENDERS[: -len(OURS)])


@dataclass(frozen=True)
class Part:
    """A figure, a table, or both.

    Attributes:
        title: Above them.
        drawing: The figure.
        table: The table.
        folded: The text that a reader clicks to unfold the table; empty if the table is always shown.
    """

    title: str = ""
    drawing: Drawing | None = None
    table: Table | None = None
    folded: str = ""


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
    named = {contender for record in suite.records for contender in (*record.contenders, *record.bytes, *record.absent)}
    loads = [record.workload for record in suite.records]
    used = {word for each in loads for word in (each.expert, each.routes, each.hierarchy)}
    html = environment.get_template(_TEMPLATE).render(
        lead=_lead(suite),
        machine=findings.machine,
        date=str(findings.machine["date"]).replace("T", " ").replace("+00:00", " UTC"),
        threads=_listed({f"{record.threads} thread{'s' * (record.threads > 1)}" for record in suite.records}),
        dtypes=_listed({record.dtype for record in suite.records}),
        tiles=_tiles(suite),
        sections=sections,
        picture=lambda drawing: pictures[drawing.name],
        absent=absences(suite.records, findings.absent_devices),
        unfinished=_unfinished(findings.unfinished),
        comparison=_comparison(findings.comparison),
        contenders=[(name, CONTENDER_MEANINGS[name]) for name in _OURS_FIRST if name in named],
        workloads=[(word, meaning) for word, meaning in WORKLOAD_MEANINGS.items() if word in used],
        noise=measure_noise(seconds for record in suite.records for seconds in record.timings.seconds.values()),
    )
    if found := ratios(suite.records):
        write_rows(folder / "ratios.csv", [*map(ratio_row, found)])
    if findings.counts:
        write_rows(folder / "operations.csv", operations_rows(findings.counts))
    path = folder / PAGE
    path.write_text(html, encoding="utf-8")
    return path


def _data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _listed(words: set[str]) -> str:
    return " and ".join(sorted(words))


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
        f"{count} workloads on {DEVICE_NAMES.get(device, device)}: from {times_words(least.ratio)} "
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
                    "meaning": f"{STAGE_NAMES[stage]}{way}, {DEVICE_NAMES.get(device, device)}",
                    "detail": f"as fast as {PEER}; {count} workloads, {times_words(least.ratio)} to "
                    f"{times_words(greatest.ratio)}",
                }
            )
    return tiles


def _sections(findings: Findings) -> list[Section]:
    suite = findings.suite
    return [
        _targets_section(findings),
        _speed_section(suite, WHOLE_STEP, "Whole steps"),
        _speed_section(suite, INFERENCE, "Inference"),
        _stages_section(suite),
        Section(
            "scaling",
            "How it grows",
            "A step's time by samples and by experts. The nearer a line to the dense floor, the less routing costs.",
            [
                Part(drawing=drawing)
                for device in suite.devices
                for drawing in draw_scaling(suite.of(WHOLE_STEP, device))
            ],
        ),
        _devices_section(suite),
        _memory_section(suite),
    ]


def _targets_section(findings: Findings) -> Section:
    parts = []
    if findings.marks:
        parts.append(Part(drawing=draw_marks(findings.marks), table=marks_table(findings.marks)))
    if findings.counts:
        parts.append(Part("ATen operations of both passes, views not counted", table=operations_table(findings.counts)))
    return Section("targets", "Targets", "The figures that this set is held to.", parts)


def _speed_section(suite: Suite, stage: str, title: str) -> Section:
    parts = []
    for device in suite.devices:
        if records := suite.of(stage, device):
            drawings = draw_speedups(records)
            parts += [Part(drawing=drawing) for drawing in draw_panels(records)]
            name = DEVICE_NAMES.get(device, device) if len(suite.devices) > 1 else ""
            parts.append(Part(name, drawings[0] if drawings else None, speed_table(records)))
    text = (
        f"Everyone runs {STAGE_MEANINGS[stage]}. Numbers say how many times as fast {AUTO} is: above 1, it is faster."
    )
    return Section(stage, title, text, parts)


def _stages_section(suite: Suite) -> Section:
    parts = [Part(drawing=drawing) for device in suite.devices for drawing in draw_stages(suite.of(WHOLE_STEP, device))]
    for stage in (FORWARD, BACKWARD, PLAN, ROUTING, DISPATCH, EXPERTS):
        for device in suite.devices:
            if records := suite.of(stage, device):
                title = f"{STAGE_NAMES[stage].capitalize()}: {STAGE_MEANINGS[stage]}"
                name = f", {DEVICE_NAMES.get(device, device)}" if len(suite.devices) > 1 else ""
                parts.append(Part(title + name, table=speed_table(records)))
    return Section(
        "stages", "Time by stage", "The parts of a step's time, and how many times as fast each stage alone is.", parts
    )


def _devices_section(suite: Suite) -> Section:
    parts = [Part(drawing=drawing) for drawing in draw_devices(suite)]
    if found := crossovers(suite):
        parts.append(Part("From which batch size on the device wins against the CPU", table=crossover_table(found)))
    return Section(
        "devices",
        "Devices",
        "The same work on each device. A device wins from the smallest batch on from which it is faster at every size "
        "measured.",
        parts,
    )


def _memory_section(suite: Suite) -> Section:
    parts = []
    for device in suite.devices:
        if records := [record for record in suite.of(MEMORY, device) if record.bytes]:
            name = DEVICE_NAMES.get(device, device) if len(suite.devices) > 1 else ""
            parts.append(Part(name, draw_memory(records)[0], memory_table(records)))
    text = (
        "The most memory, in MiB, that is in use at once during a forward and a backward pass, weights included. The "
        f"smaller number says how many times that of {AUTO} it is."
    )
    return Section("memory", "Memory", text, parts)


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
    return {
        "old_date": f"{found.old.date[:19].replace('T', ' ')} on {found.old.processor}",
        "verdict": f"Of {len(found.changes)} comparisons, {len(slower)} slower and {len(faster)} faster beyond noise.",
        "slower": changes_table(slower),
        "faster": changes_table(faster[::-1]),
        "same": changes_table(same),
        "rule": RULE,
        "unshared": _unshared(found.only_old, "the other run") + _unshared(found.only_new, "this run"),
    }


def _unshared(records: Sequence[Record], run: str) -> str:
    return f"{len(records)} benchmarks are only in {run}. " if records else ""
