"""The tables of the page, as rows of cells; how they look is the page's own business."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contenders.contender import FLOORS
from benchmarks.harness.tables import geometric_mean
from benchmarks.harness.wording import (
    DEVICE_NAMES,
    mebibytes_words,
    ms_words,
    times_words,
    unusual,
    workload_words,
)
from benchmarks.report.crossover import Crossover
from benchmarks.report.ratios import Ratio, ratios
from benchmarks.report.regressions import Change
from benchmarks.report.roster import STAGE_NAMES, in_order
from benchmarks.suite.record import Record
from benchmarks.workloads.workload import Workload

# Reasons that differ in their numbers alone are told once.
_NUMBER = re.compile(r"\d[\d.,]*")
NOTHING = DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """A place of a table: its text, one in small letters below, a name of the page's styles, and a reader's hint."""

    text: str
    small: str = ""
    style: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first `names` columns are words, and the first cell of its last row is as wide as these."""

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int = 1
    total: Sequence[Cell] = ()


def speed_table(records: Sequence[Record]) -> Table:
    """One stage on one device: our milliseconds, and how many times as fast that is as each contender."""
    found = {(each.workload, each.slower): each for each in ratios(records)}
    contenders = in_order(slower for _, slower in found)
    ours = in_order(record.contender for record in records)
    names, named = _workload_cells(records)
    rows = [
        [
            *named[record.workload],
            Cell(ms_words(1e3 * record.timings.median(record.contender)), f"{record.timings.rounds} rounds"),
            *(_ratio_cell(found.get((record.workload, contender)), record, contender) for contender in contenders),
        ]
        for record in records
    ]
    means = [[each.ratio for (_, slower), each in found.items() if slower == name] for name in contenders]
    total = [
        Cell("geometric mean"),
        Cell(""),
        *(Cell(times_words(geometric_mean(each)), f"of {len(each)}") for each in means),
    ]
    return Table([*names, " / ".join(ours), *contenders], rows, len(names), total if len(records) > 1 else ())


def memory_table(records: Sequence[Record]) -> Table:
    """Peak memory in MiB by workload and contender, and how many times ours that is."""
    contenders = in_order(name for record in records for name in record.bytes)[::-1]
    names, named = _workload_cells(records)
    rows = []
    for record in records:
        ours = record.bytes.get(record.contender)
        cells = []
        for contender in contenders:
            size = record.bytes.get(contender)
            share = (
                f"{size / ours:.2f}\N{MULTIPLICATION SIGN}" if size and ours and contender != record.contender else ""
            )
            why = record.absent.get(contender, "")
            cells.append(Cell(NOTHING, note=why) if size is None else Cell(mebibytes_words(size), share))
        rows.append([*named[record.workload], *cells])
    return Table([*names, *contenders], rows, len(names))


def crossover_table(found: Sequence[Crossover]) -> Table:
    """From which batch size on a device wins against the CPU, a column for each number of experts."""
    counts = sorted({each.record.workload.num_experts for each in found})
    lines: dict[tuple[str, ...], dict[int, Crossover]] = {}
    for each in found:
        record, workload = each.record, each.record.workload
        experts = ", ".join([workload.expert, f"H {workload.hidden_size}", *unusual(workload)])
        line = DEVICE_NAMES[record.device], STAGE_NAMES[record.stage], experts
        lines.setdefault(line, {})[workload.num_experts] = each
    rows = [
        [*map(Cell, names), *(_crossover_cell(by_count.get(count)) for count in counts)]
        for names, by_count in lines.items()
    ]
    return Table(["device", "stage", "experts", *(f"E = {count}" for count in counts)], rows, 3)


def changes_table(changes: Sequence[Change]) -> Table:
    """The benchmarks that got slower or faster since another run."""
    rows = [
        [
            *map(Cell, (STAGE_NAMES[change.record.stage], DEVICE_NAMES[change.record.device])),
            Cell(workload_words(change.record.workload)),
            Cell(change.now.faster, f"held against {change.now.slower}"),
            *(_change_cell(each) for each in (change.then, change.now)),
            Cell(f"{change.factor - 1:+.0%}", style=change.verdict),
        ]
        for change in changes
    ]
    return Table(["stage", "device", "workload", "engine", "then", "now", "change"], rows, 4)


def absences(records: Iterable[Record], devices: Mapping[str, str]) -> Table:
    """The absent contenders and devices, their stages, and ways to get them.

    Args:
        records: The records whose contenders may be absent.
        devices: By name, the reason why a device is absent.
    """
    where: dict[tuple[str, str], list[tuple[Record, str]]] = {}
    for record in records:
        for contender, why in record.absent.items():
            where.setdefault((contender, _NUMBER.sub("0", why)), []).append((record, why))
    rows = [[Cell(DEVICE_NAMES[name]), Cell("device"), Cell(why)] for name, why in devices.items()]
    # Contenders that the reader can install come first.
    for (contender, _), missing in sorted(where.items(), key=lambda item: "to get it" not in item[1][0][1]):
        stages = ", ".join(dict.fromkeys(STAGE_NAMES[record.stage] for record, _ in missing))
        reasons = list(dict.fromkeys(why for _, why in missing))
        why = reasons[0] if len(reasons) == 1 else f"such as: {reasons[0]}"
        rows.append([Cell(contender), Cell(f"{stages} ({len(missing)})"), Cell(why)])
    return Table(["what", "where", "why, and how to get it"], rows, 3)


def _workload_cells(records: Sequence[Record]) -> tuple[list[str], dict[Workload, list[Cell]]]:
    """Headings that describe the workloads, and their cells; usual values are left out."""
    workloads = [record.workload for record in records]
    # Planning sees no hidden states.
    wide = any(each.hidden_size != 1 for each in workloads)
    cells = {
        each: [
            Cell(each.expert, ", ".join(unusual(each))),
            *([Cell(f"{each.hidden_size}")] if wide else []),
            Cell(f"{each.batch_size:,}"),
            Cell(f"{each.num_experts}"),
        ]
        for each in workloads
    }
    return ["experts", *(["H"] if wide else []), "B", "E"], cells


def _ratio_cell(found: Ratio | None, record: Record, contender: str) -> Cell:
    if found is None:
        return Cell(NOTHING, note=record.absent.get(contender, "not timed on this workload"))
    style = "floor" if contender in FLOORS else found.verdict
    return Cell(times_words(found.ratio), _span(found), style, ms_words(1e3 * record.timings.median(contender)))


def _crossover_cell(found: Crossover | None) -> Cell:
    if found is None:
        return Cell(NOTHING)
    note = ", ".join(f"B {size:,}: {times_words(ratio)} times as fast" for size, ratio in found.ratios.items())
    return Cell(str(found), style="slower" if found.batch_size is None else "faster", note=note)


def _change_cell(found: Ratio) -> Cell:
    """Memory has no quartiles."""
    return Cell(times_words(found.ratio), "" if found.low == found.high else _span(found))


def _span(found: Ratio) -> str:
    return f"{times_words(found.low)}{DASH}{times_words(found.high)}"
