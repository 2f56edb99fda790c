"""Some short lives of models at every run of the suite; `lives` tells how to live many."""

from __future__ import annotations

import pytest
import torch

from tests.alone import KINDS, Alone, Expert, Level
from tests.lives import Lives, live
from tests.strategies import examples


@pytest.mark.parametrize("number", range(4))
def test_lives_beside_a_reference(number):
    live(number, lives=examples(8).max_examples, length=30)


def test_code_repeats_a_life():
    life = Lives()
    life.build(
        shape="families",
        optimizer="AdamW",
        engine="looped",
        seed=0,
        is_stacked=True,
        has_groups=True,
        has_fusion=True,
    )
    life.rename(level=1, expert=0, new="x.y", has_optimizer=True)
    life.train(ways=["left out", "ids", "one"], form="plan", size=5, values=3, clears="model", steps=True)
    life.teardown()
    assert "x.y" in life.pair.model.level_modules["language"]


def test_the_reference_mixes_experts_and_lets_samples_pass():
    torch.manual_seed(0)
    tensors = {"only.weight": torch.randn(4, 4), "only.bias": torch.randn(4)}
    other = {name: each + 1 for name, each in tensors.items()}
    experts = {"a": Expert("narrow", tensors=tensors), "b": Expert("narrow", tensors=other)}
    model = Alone([Level("language", experts)], {}, "AdamW", moves_absent=False)
    hidden = torch.randn(3, 4)
    choices = model.choices({"language": [{"a": 0.7, "b": 0.3}, {}, {"b": 1.0}]}, 3)
    one, both = (KINDS["narrow"].run(each, hidden) for each in (tensors, other))
    expected = torch.stack([0.7 * one[0] + 0.3 * both[0], hidden[1], both[2]])
    torch.testing.assert_close(model.run(hidden, choices).fused, expected)
