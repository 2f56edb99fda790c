"""The guide's project: short, and right: mixed batches, resuming, old languages, the served one."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.nn import functional as F

import celmoe
from tests.documents import GUIDE, examples, missing_packages, run_page
from tests.features import needs_distributed

PAGE = (GUIDE / "project.md").read_text(encoding="utf-8")
MOST_LINES = 40
LANGUAGES = ("ru", "pl", "de")

pytestmark = needs_distributed


@pytest.fixture(scope="module", autouse=True)
def _alone():
    """accelerate keeps the device and precision of a Trainer for the whole process."""
    yield
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The folder in which the project ran, and the names that it left."""
    if missing := missing_packages(PAGE):
        pytest.skip(f"{', '.join(missing)} must be installed")
    pytest.importorskip("accelerate", reason="transformers' Trainer wants accelerate")
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.manual_seed(0)
        names = run_page(PAGE, "project.md")
    return folder, names


def trained(project, checkpoint, *newcomers):
    """The model of one of the project's checkpoints, in evaluation."""
    load_file = pytest.importorskip("safetensors.torch").load_file
    folder, names = project
    model = names["build"]()
    for name in newcomers:
        celmoe.adapters(model).add_expert("language", name, celmoe.ExpertConfig(name, parent="slavic"))
    model.load_state_dict(load_file(folder / checkpoint / "model.safetensors"))
    return model.eval()


def batch_of(samples):
    """The tokens, labels and languages of some samples."""
    tokens = torch.stack([each["input_ids"] for each in samples])
    return tokens, torch.tensor([each["labels"] for each in samples]), [each["lang"] for each in samples]


def run_model(model, tokens, labels, languages):
    """The logits, and the gradients of the summed loss, by name."""
    model.zero_grad()
    logits = model(tokens, plan=celmoe.adapters(model).compile_routing({"language": languages})).logits
    F.cross_entropy(logits.float(), labels, reduction="sum").backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return logits.detach().float(), grads


def test_it_is_short_and_does_all_that_it_says():
    ((_, block),) = examples(PAGE)
    assert len([line for line in block.splitlines() if line.strip()]) <= MOST_LINES
    for step in ("bf16=True", "activation_checkpointing=True", "resume_from_checkpoint=True", "add_expert(", "keep("):
        assert step in block, step


@pytest.mark.parametrize(("autocast", "tolerance"), [(False, 1e-5), (True, 2e-2)], ids=["float32", "bfloat16"])
def test_a_mixed_batch_equals_separate_runs_by_language(project, autocast, tolerance):
    model = trained(project, "run/checkpoint-100")
    tokens, labels, languages = batch_of(project[1]["dataset"][:24])
    assert languages[:4] == ["ru", "pl", "de", "ru"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        mixed, grads = run_model(model, tokens, labels, languages)
        alone = torch.empty_like(mixed)
        sums = {name: torch.zeros_like(grad) for name, grad in grads.items()}
        for language in LANGUAGES:
            places = [place for place, each in enumerate(languages) if each == language]
            alone[places], own = run_model(model, tokens[places], labels[places], [language] * len(places))
            for name, grad in own.items():
                sums[name] += grad
    torch.testing.assert_close(mixed, alone, rtol=0, atol=tolerance * mixed.abs().max().item())
    largest = max(grad.abs().max().item() for grad in grads.values())
    torch.testing.assert_close(grads, sums, rtol=0, atol=tolerance * largest)


def test_another_languages_experts_would_be_seen(project):
    """The comparison above can fail."""
    model = trained(project, "run/checkpoint-100")
    tokens, labels, languages = batch_of(project[1]["dataset"][:24])
    right, _ = run_model(model, tokens, labels, languages)
    wrong, _ = run_model(model, tokens, labels, ["pl"] * 24)
    assert (right - wrong).abs().max() > 0.1 * right.abs().max()


@pytest.mark.parametrize("language", LANGUAGES)
def test_it_learns_each_language(project, language):
    """Labels in Polish are the others' swapped: no model without experts could tell them apart."""
    tokens, labels, languages = batch_of([each for each in project[1]["dataset"] if each["lang"] == language])
    logits, _ = run_model(trained(project, "run/checkpoint-100"), tokens, labels, languages)
    assert (logits.argmax(-1) == labels).float().mean() > 0.75


def test_a_resumed_run_is_as_if_it_had_never_stopped(project, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    _, names = project

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 50:
                control.should_save = control.should_training_stop = True

    def model():
        torch.manual_seed(1)
        return names["build"]()

    whole, stopped, resumed = model(), model(), model()
    names["train"](whole, names["dataset"], str(tmp_path / "whole"), steps=60)
    with monkeypatch.context() as patch:
        patch.setitem(names, "Trainer", lambda *given: transformers.Trainer(*given, callbacks=[Stops()]))
        names["train"](stopped, names["dataset"], str(tmp_path / "cut"), steps=60)
    assert not torch.equal(stopped.classifier.weight, whole.classifier.weight)
    names["train"](resumed, names["dataset"], str(tmp_path / "cut"), steps=60, resume_from_checkpoint=True)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict())


def test_old_languages_stay_as_they_are(project):
    before, after = trained(project, "run/checkpoint-100"), trained(project, "czech/checkpoint-50", "cs")
    batch = batch_of(project[1]["dataset"][:24])
    assert torch.equal(run_model(before, *batch)[0], run_model(after, *batch)[0])


def test_the_new_language_is_served_without_a_plan(project):
    folder, names = project
    served, whole = names["model"], trained(project, "czech/checkpoint-50", "cs")
    tokens = torch.randint(100, (3, 12))
    plan = celmoe.adapters(whole).compile_routing({"language": ["cs"] * 3})
    with torch.autocast("cpu", torch.bfloat16):  # the Trainer leaves its model so
        torch.testing.assert_close(served(tokens).logits, whole(tokens, plan=plan).logits.float())
    files = sorted(path.name for path in (folder / "experts").iterdir())
    assert files == [f"{name}.safetensors" for name in ("cs", "de", "pl", "rest", "ru")]
