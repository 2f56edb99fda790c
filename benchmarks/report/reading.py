"""From pytest-benchmark's JSON to records: one for each benchmark, checked here and nowhere after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.suite.record import Record, from_json
from benchmarks.suite.stages import STAGES


class ReadError(ValueError):
    """A file lacks the content that this command's runs leave; the message names the file and the reason."""


@dataclass(frozen=True)
class Suite:
    """All that a run left: records in the order in which they ran, when, and on what."""

    records: Sequence[Record]
    date: str
    processor: str

    def of(self, stage: str, device: str | None = None) -> list[Record]:
        """The records of a stage, and of one device if given."""
        return [each for each in self.records if each.stage == stage and device in (None, each.device)]

    @property
    def devices(self) -> list[str]:
        """On which something was measured, the CPU first."""
        return sorted({each.device for each in self.records}, key=lambda device: (device != "cpu", device))


def read_suite(path: Path) -> Suite:
    """Read the content of a ``benchmarks.json``.

    Raises:
        ReadError: It can't be read, or is not of this command.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReadError(f"{str(path)!r}: {error.strerror or type(error).__name__}") from None
    except ValueError:
        raise ReadError(f"{str(path)!r}: not JSON") from None
    if not isinstance(content, dict) or not isinstance(content.get("benchmarks"), list):
        raise ReadError(f"{str(path)!r}: no list of 'benchmarks'")
    records = []
    for entry in content["benchmarks"]:
        name = entry.get("fullname", entry.get("name"))
        try:
            records.append(from_json(entry.get("extra_info", {})))
        except ValueError as error:
            raise ReadError(f"{str(path)!r}: benchmark {name!r} {error}") from None
        if records[-1].stage not in STAGES:
            raise ReadError(f"{str(path)!r}: benchmark {name!r} is of no known stage (got {records[-1].stage!r})")
    processor = content.get("machine_info", {}).get("cpu", {}).get("brand_raw", "an unknown processor")
    return Suite(records, str(content.get("datetime", "at an unknown time")), str(processor))
