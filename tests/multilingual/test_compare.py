"""The comparison of the same steps by other ways, and its clock."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import celmoe
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.learning.batches import Batch
from benchmarks.multilingual.learning.hierarchy import LEVELS, NetworkSettings, hierarchy_config
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.learning.training import is_stacked, make_contender, train_step
from benchmarks.multilingual.studies import compare as comparing
from benchmarks.multilingual.studies.hierarchy_clock import HierarchyClock
from benchmarks.multilingual.words.evidence import FORM_COUNTS, LEMMA_COUNTS, PROPOSALS
from benchmarks.multilingual.words.rules import EditRule
from benchmarks.multilingual.words.vocabulary import WINDOW, Vocabulary
from tests.multilingual.runs import SMALL, check_facts


def test_the_comparison_stands_without_the_peer(
    tmp_path: Path, compiled: list[torch.nn.Module], no_peer: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--compare", "--steps", "3", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("WITHOUT THE PEER")
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    check_facts(comparison)
    systems = {each["system"]: each for each in comparison["systems"]}
    assert systems["celmoe.reference"]["largest_parameter_difference"] < 1e-4
    assert systems["no hierarchy"]["largest_parameter_difference"] is None


def test_the_comparison_with_the_peer(
    tmp_path: Path, compiled: list[torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--compare", "--steps", "3", "--report", str(tmp_path)]) == 0
    systems = {each["system"]: each for each in json.loads((tmp_path / "comparison.json").read_text())["systems"]}
    said = capsys.readouterr()
    assert f"{torch.get_num_threads()} threads" in said.out
    peers_found = [comparing.PEER] if comparing.PEER in systems else []
    assert peers_found or "WITHOUT THE PEER" in said.err
    bounds = ["one expert a level", "no hierarchy"]
    ours = ["celmoe plain", "celmoe stacked", "celmoe compiled"]
    assert list(systems) == [*ours, *peers_found, "celmoe.reference", *bounds]
    (hierarchy,) = compiled
    assert any(is_stacked(name) for name, _ in hierarchy.named_parameters())
    for name, system in systems.items():
        assert system["steps"] == 3
        assert system["first_seconds"] > 0
        assert system["words_per_second"] == pytest.approx(256_000 / system["milliseconds_a_step"])
        assert (system["hierarchy_share"] is None) == (name == "no hierarchy")
        if name in {"celmoe plain", *bounds}:
            assert system["largest_parameter_difference"] is None
        else:
            assert system["largest_parameter_difference"] < 1e-4


def test_a_system_that_takes_more_than_its_share_leaves_the_comparison(
    tmp_path: Path, no_peer: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compile_at_every_step(module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: time.sleep(0.3))

    monkeypatch.setattr(torch.nn.Module, "compile", compile_at_every_step)
    # Six systems, of which each has a second and a half.
    assert main([*SMALL, "--compare", "--steps", "12", "--minutes", "0.15", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"celmoe compiled leaves after \d s, at step \d\n", said)
    systems = {each["system"]: each for each in json.loads((tmp_path / "comparison.json").read_text())["systems"]}
    assert 1 < systems["celmoe compiled"]["steps"] < 8 < systems["celmoe stacked"]["steps"]
    assert systems["celmoe compiled"]["first_seconds"] > 0.6


def test_a_system_without_timed_steps_has_no_speed(
    tmp_path: Path, compiled: list[torch.nn.Module], no_peer: None
) -> None:
    assert main([*SMALL, "--compare", "--engine", "grouped", "--steps", "1", "--report", str(tmp_path)]) == 0
    systems = json.loads((tmp_path / "comparison.json").read_text())["systems"]
    assert {each["words_per_second"] for each in systems} == {None}
    assert {each["steps"] for each in systems} == {1}


def test_medians_of_a_comparison_leave_out_the_first_steps() -> None:
    untimed = [90.0] * comparing.UNTIMED_STEPS
    seconds, parts = [*untimed, 1.0, 4.0, 2.0], [*untimed, 0.9, 1.0, 1.0]
    timed = comparing.Timed(cast("Any", None), 9, cast("Any", SimpleNamespace(seconds=parts)), seconds)
    # The share's is the median of shares 0.9, 0.25 and 0.5, not the share of the medians.
    assert (timed.step_seconds, timed.hierarchy_seconds, timed.hierarchy_share) == (2.0, 1.0, 0.5)
    bare = comparing.Timed(cast("Any", None), 9, None, seconds)
    assert (bare.step_seconds, bare.hierarchy_seconds, bare.hierarchy_share) == (2.0, None, None)
    assert bare.first_seconds == sum(untimed)
    few = comparing.Timed(cast("Any", None), 9, None, untimed)
    assert (few.step_seconds, few.first_seconds) == (None, sum(untimed))


def test_the_largest_difference_is_over_all_parameters_and_both_signs() -> None:
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert comparing.largest_difference(ours, {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([2.75])}) == 0.5
    assert comparing.largest_difference(ours, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.0])}) == 1.0
    assert comparing.largest_difference(ours, ours) == 0.0


class TimedByHand(Lemmatizer):
    """Every part takes a time of its own, forward and backward."""

    now = 0.0

    def run_hierarchy(
        self, hidden: torch.Tensor, context: dict[str, torch.Tensor], batch: Batch
    ) -> celmoe.CELMoEOutput:
        output = super().run_hierarchy(self.takes(hidden, 10, 1_000), context, batch)
        output.fused_hidden = self.takes(output.fused_hidden, 20, 2_000)
        return output

    def takes(self, tensor: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        network = self

        class Takes(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                network.now += forward
                return value.clone()

            @staticmethod
            def backward(ctx, gradient):
                network.now += backward
                return gradient

        return cast("torch.Tensor", Takes.apply(tensor))


@pytest.mark.parametrize("engine", ["looped", "grouped"])
def test_the_clock_reads_the_hierarchy_and_nothing_beside(engine: str) -> None:
    vocabulary = Vocabulary(
        languages=["id", "ms"], characters="ab", rules=[EditRule(0, "", 0, "")] * 2, candidates=[[0, 1], [0, 1]]
    )
    network = TimedByHand(vocabulary, NetworkSettings(width=8, universal_width=8, family_width=8, language_width=8))
    network.hierarchy.engine = engine
    clock = HierarchyClock(network, lambda: network.now)
    encode, score = network.encoder.mix.forward, network.head.forward
    network.encoder.mix.forward = lambda places: network.takes(encode(places), 1, 100)  # type: ignore[method-assign]
    network.head.forward = (  # type: ignore[method-assign]
        lambda words, scores, batch: score(network.takes(words, 40, 4_000), scores, batch)
    )
    compiler = celmoe.RoutingCompiler(hierarchy_config(celmoe, vocabulary.languages, LEVELS, NetworkSettings()))
    languages = ["id", "ms", "ms", "id", "ms"]
    batch = Batch(
        characters=torch.zeros(5, WINDOW, dtype=torch.int32),
        targets=torch.tensor([0, 1, 0, 1, 1]),
        proposals=torch.tensor([[0, 1, *[-1] * (PROPOSALS - 2)]] * 5),
        counts=torch.zeros(5, PROPOSALS, FORM_COUNTS + LEMMA_COUNTS, dtype=torch.uint8),
        totals=torch.zeros(5, FORM_COUNTS, dtype=torch.uint8),
        languages=languages,
        plan=compiler({"language": languages}),
    )
    contender = make_contender("timed by hand", network, Losses(network, LossWeights()))
    for _ in range(2):
        train_step(contender, batch, 1e-3, done=0.0, read=False)
    assert clock.seconds == [3_030, 3_030]
    # The encoder's and the head's are outside of it.
    assert network.now == 2 * (3_030 + 101 + 4_040)
