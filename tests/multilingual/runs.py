"""A short run of the job on two small languages, and what its files say."""

import platform
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import celmoe
from benchmarks.harness.setting import processor_name
from benchmarks.multilingual.learning.hierarchy import NetworkSettings
from benchmarks.multilingual.learning.losses import LossWeights
from benchmarks.multilingual.options import DEFAULT_MINUTES

ROOT = Path(__file__).parents[2]


SMALL = ["--languages", "id,ms", "--batch-size", "256"]


HERE = ["--workers", "0"]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {
        f"{name}.{key}": value for name, each in state["contenders"].items() for key, value in each["network"].items()
    }


def check_facts(facts: dict[str, Any]) -> None:
    """A figure without its setting can't be compared with another."""
    assert facts["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "celmoe": celmoe.__version__,
        "simplemma": version("simplemma"),
    }
    assert abs(datetime.now(UTC) - datetime.fromisoformat(facts["date"])) < timedelta(minutes=30)
    assert facts["machine"] == {"system": platform.platform(), "processor": processor_name(), "accelerator": None}
    assert (facts["threads"], facts["device"], facts["ranks"]) == (torch.get_num_threads(), "cpu", 1)
    assert facts["minutes"] == DEFAULT_MINUTES
    assert facts["network"]["width"] == NetworkSettings().width
    assert facts["loss_weights"] == asdict(LossWeights())
