"""Made-up contents of a ``benchmarks.json``, with seconds of our choosing."""

import itertools
import json
import random

from benchmarks.harness.interleaved import Timings
from benchmarks.suite.record import Record
from benchmarks.workloads.workload import Workload

# Seconds by contender for 1,000 samples over 10 experts.
PACE = {
    "celmoe auto": 1.0,
    "celmoe grouped": 1.05,
    "celmoe looped": 1.8,
    "celmoe-vp 1.1.4": 2.5,
    "oracle": 9.0,
    "dense": 0.6,
    "stack": 0.9,
}

MACHINE = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": "python -m benchmarks",
    "processor": "Slide Rule <9000>",
    "cores": 2,
    "system": "none",
    "devices": {"cpu": "Slide Rule", "cuda": "Abacus"},
    "versions": {"python": "3.11", "torch": "2.13.0", "peft": None},
}


def entry(workload, seconds, stage="whole_step", device="cpu", contender="celmoe auto", **more):
    """One benchmark, as pytest-benchmark writes it."""
    record = Record(stage, workload, device, 1, "float32", contender, Timings(seconds), **more)
    return {"name": f"test_{stage}[{workload}-{device}]", "extra_info": record.to_json()}


def paces(factor=1.0, noise=0.05, rounds=9, seed=0, names=tuple(PACE)):
    """Seconds by contender and round; other load on the machine slows a whole round alike."""
    draw = random.Random(seed)
    weather = [1 + 3 * noise * draw.random() for _ in range(rounds)]
    return {
        name: [factor * PACE[name] * each * (1 + noise * draw.uniform(-1, 1)) for each in weather] for name in names
    }


def document(entries):
    return {
        "machine_info": {"cpu": {"brand_raw": "Slide Rule 9000"}},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": list(entries),
    }


def write(path, entries):
    path.write_text(json.dumps(document(entries)), encoding="utf-8")
    return path


def whole_run(devices=("cpu",), kinds=("linear",), batches=(64, 1024), counts=(4, 32)):
    """Entries of every stage."""
    points = itertools.product(kinds, [64], batches, counts)
    for (expert, width, batch, count), device in itertools.product(points, devices):
        workload = Workload(expert, width, batch, count)
        # A device has a floor of its own, and is ten times as fast above it.
        cost = 1e-3 * (1 + batch / 1e3) * (1 + count / 30)
        seconds = paces(cost if device == "cpu" else 4e-3 + cost / 10, seed=batch + count)
        parts = {"plan": 0.02 * cost, "dispatch": 0.1 * cost, "experts": 0.3 * cost, "backward": 0.5 * cost}
        parts_ms = {name: 1e3 * each for name, each in parts.items()}
        absent = {"celmoe-vp 3.0.0": "celmoe-vp==3.0.0 could not be installed: no network"}
        yield entry(workload, seconds, device=device, parts_ms=parts_ms, absent=absent)
        if batch == 1024:
            inference = {name: [each / 3 for each in rounds] for name, rounds in seconds.items()}
            yield entry(workload, inference, "inference", device)
            for stage, share in (("plan", 0.02), ("dispatch", 0.1), ("experts", 0.8)):
                some = {name: [share * each for each in seconds[name]] for name in ("celmoe auto", "celmoe-vp 1.1.4")}
                yield entry(workload, some, stage, device)
            sizes = {name: int(1e7 * (count + pace)) for name, pace in PACE.items()}
            yield entry(workload, {}, "memory", device, bytes=sizes)
