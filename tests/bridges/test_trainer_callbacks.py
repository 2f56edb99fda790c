"""The callbacks for the `Trainer` of transformers, and those packages that may be missing."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bridges.test_trainer import STEPS, classifier, trainer_of

pytest.importorskip("transformers")
ours = importlib.import_module("celmoe.bridges.transformers")


def test_loads_and_norms_are_logged(tmp_path: Path) -> None:
    """Evaluations are not counted."""
    trainer = trainer_of(classifier(), tmp_path, logging_steps=2, eval_strategy="steps", eval_steps=2)
    loads = ours.LoadCallback(trainer.log)
    trainer.add_callback(loads)
    trainer.add_callback(ours.GradientNormCallback(trainer.log))
    trainer.train()
    assert loads.tracker.steps == STEPS
    history = trainer.state.log_history
    logged = [each for each in history if "load/language/de" in each]
    assert [each["step"] for each in logged] == [2, 4, 6]
    assert logged[-1].items() >= loads.tracker.scalars().items()
    norms = [each for each in history if "gradient_norm/family/germanic" in each]
    assert len(norms) == STEPS // 2
    # The hook is gone.
    trainer.evaluate()
    trainer.model.train()
    assert loads.tracker.steps == STEPS


def test_experts_stop_one_by_one(tmp_path: Path) -> None:
    """The host goes on for as long as an expert does."""
    model, calls = classifier(), []

    def metrics(_: Any) -> dict[str, float]:
        calls.append(len(calls))
        return {
            f"loss_{name}": float(-min(len(calls), end)) for name, end in {"de": 1, "nl": 2, "fr": 2, "it": 3}.items()
        }

    trainer = trainer_of(model, tmp_path, max_steps=20, eval_strategy="steps", eval_steps=1)
    trainer.compute_metrics = metrics
    stopping = ours.ExpertEarlyStopping("language", "eval_loss_{expert}", patience=1)
    trainer.add_callback(stopping)
    trainer.train()
    assert stopping.patience.frozen == ["de", "nl", "fr", "it"]
    assert trainer.state.global_step == 4
    frozen = model.bert.encoder.layer[1].celmoe.level_modules["language"]["nl"]
    assert not any(each.requires_grad for each in frozen.parameters())
    # A new run goes on with the state of this one.
    other = classifier()
    again = ours.ExpertEarlyStopping("language", "eval_loss_{expert}", patience=1)
    again.patience.load_state_dict(stopping.patience.state_dict())
    again.on_train_begin(None, None, None, model=other)
    expert = other.bert.encoder.layer[0].celmoe.level_modules["language"]["it"]
    assert not any(each.requires_grad for each in expert.parameters())
    assert isinstance(expert.up.weight, torch.nn.Parameter)


MISSING = """
import sys
sys.modules["lightning.pytorch"] = sys.modules["transformers"] = None
import celmoe, celmoe.bridges.patience
for name in ("lightning", "transformers"):
    try:
        __import__(f"celmoe.bridges.{name}")
    except celmoe.PackageMissingError as error:
        print(error)
"""


def test_a_package_that_is_missing() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "lightning must be installed for its callbacks (pip install lightning)",
        "transformers must be installed for its callbacks (pip install transformers)",
    ]


def test_the_library_imports_no_bridge() -> None:
    look = "import sys, celmoe; print(*{'celmoe.bridges', 'transformers', 'lightning'}.intersection(sys.modules))"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
