"""The whole model, from names and hidden states to gradients, and without gradients."""

from benchmarks.contest import Contest
from benchmarks.stages import INFERENCE, TRAINING_STEP


def test_training_step(contest: Contest) -> None:
    """Forward from names, a loss, backward, and the clearing of gradients."""
    contest.run(TRAINING_STEP)


def test_inference(contest: Contest) -> None:
    """Forward from names in evaluation mode, without gradients."""
    contest.run(INFERENCE)
