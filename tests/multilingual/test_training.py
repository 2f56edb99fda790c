from itertools import pairwise

import pytest
import torch

from benchmarks.multilingual.training import LEARNING_RATE, Deadline, learning_rate


@pytest.mark.parametrize("total", [1, 2, 7, 50, 500])
def test_the_learning_rate_rises_then_falls_to_its_end(total: int) -> None:
    rates = [learning_rate(step, total) for step in range(total)]
    top = rates.index(max(rates))
    assert all(before < after for before, after in pairwise(rates[: top + 1]))
    assert all(before >= after for before, after in pairwise(rates[top:]))
    assert max(rates) == pytest.approx(LEARNING_RATE)


def test_a_deadline_counts_the_steps_that_fit() -> None:
    now = 100.0
    deadline = Deadline(110.0, clock=lambda: now)
    assert deadline.steps_that_fit(3.0) == 3
    assert not deadline.passed()
    now = 111.0
    assert deadline.passed()
    assert deadline.steps_that_fit(3.0) == 0


def test_agreement_is_zero_for_equal_predictions_and_teaches_the_student_alone() -> None:
    from benchmarks.multilingual.losses import agreement

    student = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, 3.0]], requires_grad=True)
    assert agreement([student], [student]).item() == pytest.approx(0.0, abs=1e-6)
    agreement([student], [teacher]).backward()
    wanted = student.softmax(-1) - teacher.softmax(-1)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, wanted.detach())
    assert teacher.grad is None
