"""The tables of the page, as rows of cells; how they look is the page's own business."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contenders.contender import FLOORS
from benchmarks.harness.tables import geometric_mean
from benchmarks.report.crossover import Crossover
from benchmarks.report.ratios import Ratio, ratio_of, ratios
from benchmarks.report.reading import Record, in_order
from benchmarks.report.regressions import Change, Spread
from benchmarks.report.wording import (
    DEVICE_NAMES,
    STAGE_NAMES,
    mebibytes_words,
    ms_words,
    times_words,
    unusual,
    workload_words,
)

# Reasons that differ in their numbers alone are told once.
_NUMBER = re.compile(r"\d[\d.,]*")
NOTHING = DASH = "\N{EN DASH}"


@dataclass(frozen=True)
class Cell:
    """The content of one place of a table.

    Attributes:
        text: Its text in large letters.
        small: The text below in small letters.
        style: A name of the page's styles.
        note: Shown under the reader's pointer.
    """

    text: str
    small: str = ""
    style: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        headings: The headings of the columns.
        rows: The rows below them.
        names: The number of the first columns that are words; the rest are numbers.
        total: A last row, whose first cell is as wide as all names.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    names: int = 1
    total: Sequence[Cell] = ()


def speed_table(records: Sequence[Record]) -> Table:
    """One stage on one device: our milliseconds, and how many times as fast that is as each contender."""
    found = {(each.record.name, each.slower): each for each in ratios(records)}
    contenders = in_order({slower for _, slower in found})
    ours = in_order({record.contender for record in records})
    names, named = _workload_cells(records)
    rows = [
        [
            *named[record.name],
            Cell(ms_words(1e3 * record.timings.median(record.contender)), f"{record.timings.rounds} rounds"),
            *(_ratio_cell(found.get((record.name, contender)), record, contender) for contender in contenders),
        ]
        for record in records
    ]
    means = [[each.ratio for (_, slower), each in found.items() if slower == name] for name in contenders]
    total = [
        Cell("geometric mean"),
        Cell(""),
        *(Cell(times_words(geometric_mean(each)) if each else NOTHING, f"of {len(each)}") for each in means),
    ]
    return Table([*names, " / ".join(ours), *contenders], rows, len(names), total if len(records) > 1 else ())


def memory_table(records: Sequence[Record]) -> Table:
    """Peak memory in MiB by workload and contender, and how many times ours that is."""
    contenders = in_order({name for record in records for name in record.bytes})[::-1]
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
        rows.append([*named[record.name], *cells])
    return Table([*names, *contenders], rows, len(names))


def crossover_table(found: Sequence[Crossover]) -> Table:
    """From which batch size on a device wins against the CPU, a column for each number of experts."""
    counts = sorted({each.record.workload.num_experts for each in found})
    lines: dict[tuple[str, ...], dict[int, Crossover]] = {}
    for each in found:
        workload = each.record.workload
        experts = ", ".join([workload.expert, f"H {workload.hidden_size}", *unusual(workload)])
        device = DEVICE_NAMES.get(each.device, each.device)
        lines.setdefault((device, STAGE_NAMES[each.record.stage], experts), {})[workload.num_experts] = each
    rows = [
        [*map(Cell, names), *(_crossover_cell(by_count.get(count)) for count in counts)]
        for names, by_count in lines.items()
    ]
    return Table(["device", "stage", "experts", *(f"E = {count}" for count in counts)], rows, 3)


def changes_table(changes: Sequence[Change]) -> Table:
    """The benchmarks that got slower or faster since another run."""
    rows = [
        [
            Cell(STAGE_NAMES[change.record.stage]),
            Cell(DEVICE_NAMES.get(change.record.device, change.record.device)),
            Cell(workload_words(change.record.workload)),
            Cell(change.contender, f"held against {change.yardstick}"),
            _spread_cell(change.then),
            _spread_cell(change.now),
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
    rows = [[Cell(DEVICE_NAMES.get(name, name)), Cell("device"), Cell(why)] for name, why in devices.items()]
    # Contenders that the reader can install come first.
    for (contender, _), missing in sorted(where.items(), key=lambda item: "to get it" not in item[1][0][1]):
        stages = ", ".join(dict.fromkeys(STAGE_NAMES[record.stage] for record, _ in missing))
        reasons = list(dict.fromkeys(why for _, why in missing))
        why = reasons[0] if len(reasons) == 1 else f"such as: {reasons[0]}"
        rows.append([Cell(contender), Cell(f"{stages} ({len(missing)})"), Cell(why)])
    return Table(["what", "where", "why, and how to get it"], rows, 3)


def headline(records: Sequence[Record], against: str, ours: str) -> tuple[float, Ratio, Ratio, int] | None:
    """Geometric mean, least, greatest and number of the ratios to a contender; ``None`` if it was never timed."""
    found = [each for record in records if (each := ratio_of(record, against, ours)) is not None]
    if not found:
        return None
    by_ratio = sorted(found, key=lambda each: each.ratio)
    return geometric_mean([each.ratio for each in found]), by_ratio[0], by_ratio[-1], len(found)


def _workload_cells(records: Sequence[Record]) -> tuple[list[str], dict[str, list[Cell]]]:
    """Headings that describe the workloads, and their cells by record; usual values are left out."""
    columns = {
        "H": [f"{record.workload.hidden_size}" for record in records],
        "B": [f"{record.workload.batch_size:,}" for record in records],
        "E": [f"{record.workload.num_experts}" for record in records],
    }
    # Planning sees no hidden states.
    kept = [name for name, values in columns.items() if (name, set(values)) != ("H", {"1"})]
    cells = {
        record.name: [
            Cell(record.workload.expert, ", ".join(unusual(record.workload))),
            *(Cell(columns[name][row]) for name in kept),
        ]
        for row, record in enumerate(records)
    }
    return ["experts", *kept], cells


def _ratio_cell(found: Ratio | None, record: Record, contender: str) -> Cell:
    if found is None:
        return Cell(NOTHING, note=record.absent.get(contender, "not timed on this workload"))
    style = "floor" if contender in FLOORS else found.verdict
    seconds = ms_words(1e3 * record.timings.median(contender))
    return Cell(times_words(found.ratio), _span(found.low, found.high), style, seconds)


def _crossover_cell(found: Crossover | None) -> Cell:
    if found is None:
        return Cell(NOTHING)
    note = ", ".join(f"B {size:,}: {times_words(ratio)} times as fast" for size, ratio in found.ratios.items())
    return Cell(str(found), style="slower" if found.batch_size is None else "faster", note=note)


def _spread_cell(spread: Spread) -> Cell:
    return Cell(times_words(spread.median), "" if spread.low == spread.high else _span(spread.low, spread.high))


def _span(low: float, high: float) -> str:
    return f"{times_words(low)}{DASH}{times_words(high)}"
