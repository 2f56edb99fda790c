"""The whole model from names and hidden states: a whole step, its passes alone, and a pass without gradients."""

from benchmarks.suite.contest import Contest
from benchmarks.suite.stages import BACKWARD, FORWARD, INFERENCE, WHOLE_STEP


def test_whole_step(contest: Contest) -> None:
    """Clearing of gradients, forward from names, a loss, backward, clipping, fused AdamW."""
    contest.run(WHOLE_STEP)


def test_forward(contest: Contest) -> None:
    """Forward from names up to the loss, in training."""
    contest.run(FORWARD)


def test_backward(contest: Contest) -> None:
    """Backward from the loss; the forward pass is not timed."""
    contest.run(BACKWARD)


def test_inference(contest: Contest) -> None:
    """Forward from names in evaluation mode, without gradients."""
    contest.run(INFERENCE)
