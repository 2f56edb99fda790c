"""Wrong averages of losses over samples, each of which the tests must catch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import celmoe.level
from celmoe import CELMoELossAPI, CELMoEOutput
from tests import test_losses_by_samples as losses
from tests.parity import ParityError
from tests.test_parity_meta import of_kind

Patch = pytest.MonkeyPatch
CASE = of_kind("losses")


def change_shares(change: Callable[[dict[str, float], CELMoEOutput], dict[str, float]]) -> Callable[[Patch], None]:
    """A mutant that computes with other shares than the output's."""

    def apply(patch: Patch) -> None:
        right = CELMoELossAPI._expert_weights

        def wrong(self: CELMoELossAPI, output: CELMoEOutput) -> dict[str, float]:
            shares = dict(output.loss_shares)
            output.loss_shares = change(shares, output)
            weights = right(self, output)
            output.loss_shares = shares
            return weights

        patch.setattr(CELMoELossAPI, "_expert_weights", wrong)

    return apply


def record_shares(change: Callable[[float], float]) -> Callable[[Patch], None]:
    """A mutant whose levels record other shares."""

    def apply(patch: Patch) -> None:
        right = celmoe.level._add_losses
        patch.setattr(celmoe.level, "_add_losses", lambda *rest: right(*rest[:-1], change(rest[-1])))

    return apply


def forget_the_weights(patch: Patch) -> None:
    patch.setattr(CELMoELossAPI, "_expert_weights", lambda _, output: dict(output.loss_shares))


def forget_the_shares(patch: Patch) -> None:
    patch.setattr(CELMoELossAPI, "_expert_weights", lambda _, output: dict(output.loss_weights))


def rolled(shares: dict[str, float], _: CELMoEOutput) -> dict[str, float]:
    return dict(zip(shares, [*shares.values()][1:] + [*shares.values()][:1], strict=True))


def by_number_of_experts(shares: dict[str, float], output: CELMoEOutput) -> dict[str, float]:
    number = {name: len({*level.losses}) / 2 for level in output.levels.values() for name in level.losses}
    return {name: 1 / number[name] for name in shares}


MUTANTS: dict[str, Callable[[Patch], None]] = {
    "the weights forgotten": forget_the_weights,
    "the shares forgotten": forget_the_shares,
    "shares of the neighbour": change_shares(rolled),
    "the mean over experts present": change_shares(by_number_of_experts),
    "shares of all levels' samples": change_shares(
        lambda shares, output: {name: share / len(output.levels) for name, share in shares.items()}
    ),
    "shares of all terms": change_shares(
        lambda shares, _: {name: share / sum(shares.values()) for name, share in shares.items()}
    ),
    "shares twice": change_shares(lambda shares, _: {name: share**2 for name, share in shares.items()}),
    "numbers of samples": change_shares(
        lambda shares, output: {name: share * output.fused_hidden.shape[0] for name, share in shares.items()}
    ),
    "numbers of positions": change_shares(
        lambda shares, output: {name: share * output.fused_hidden.shape[1] for name, share in shares.items()}
    ),
    "one over the samples": change_shares(
        lambda shares, output: {name: 1 / (share * len(output.fused_hidden)) for name, share in shares.items()}
    ),
    "shares of one recorded": record_shares(lambda _: 1.0),
    "whole numbers recorded": record_shares(lambda share: share // 0.1),
    "rests recorded": record_shares(lambda share: 1 - share),
}


@pytest.mark.parametrize("engine", ["looped", "grouped"])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_average_is_caught(name: str, engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    losses.assert_mean_over_samples(CASE, engine, is_stacked=False)
    MUTANTS[name](monkeypatch)
    with pytest.raises(ParityError, match=r"^(total|output\.loss_shares)"):
        losses.assert_mean_over_samples(CASE, engine, is_stacked=False)


def test_averaged_losses_of_all_scopes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CELMoELossAPI.compute

    def wrong(self: CELMoELossAPI, output: CELMoEOutput, *rest: Any) -> Any:
        bundle = right(self, output, *rest)
        for term in bundle.terms[len(output.losses) :]:
            term.weight = term.weight / 2
        return bundle

    monkeypatch.setattr(CELMoELossAPI, "compute", wrong)
    with pytest.raises(AssertionError):
        losses.test_other_scopes_keep_their_weights()


def test_a_total_of_zero_without_a_graph_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = CELMoELossAPI.compute

    def wrong(self: CELMoELossAPI, output: CELMoEOutput, *rest: Any) -> Any:
        bundle = right(self, output, *rest)
        bundle._of_no_losses = torch.zeros(())
        return bundle

    monkeypatch.setattr(CELMoELossAPI, "compute", wrong)
    with pytest.raises(RuntimeError, match="does not require grad"):
        losses.test_samples_without_losses_total_zero_and_run_backward(is_finite=True)
