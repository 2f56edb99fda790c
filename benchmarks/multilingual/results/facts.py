"""The setting of a measurement, for those who read its numbers later."""

from __future__ import annotations

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch

import celmoe
from benchmarks.harness.setting import processor_name
from benchmarks.multilingual.learning.hierarchy import NetworkSettings
from benchmarks.multilingual.learning.losses import LossWeights
from benchmarks.multilingual.learning.ranks import launched_ranks
from benchmarks.multilingual.options import Options


def engines_by_level(model: celmoe.HierarchicalCELMoE) -> dict[str, str]:
    """The present engine of each level; "mixed" if some classes of experts are grouped and others looped."""
    return {line.level: line.engine for line in model.explain().levels}


def measurement_facts(options: Options, settings: NetworkSettings, weights: LossWeights) -> dict[str, Any]:
    """Versions, machine, date, time limit, and the sizes and weights that the job has built in."""
    accelerator = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else None
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "celmoe": celmoe.__version__,
            "simplemma": version("simplemma"),
        },
        "machine": {"system": platform.platform(), "processor": processor_name(), "accelerator": accelerator},
        "threads": torch.get_num_threads(),
        "device": options.device_name,
        "engine": options.engine,
        "stacked": options.stacked,
        "compiled": options.compile,
        "parallel": options.parallel,
        "ranks": launched_ranks() or 1,
        "minutes": options.minutes,
        "network": asdict(settings),
        "loss_weights": asdict(weights),
    }
