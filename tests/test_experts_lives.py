"""Experts come and go at random, and everybody else's training stays as it was."""

from __future__ import annotations

import pytest

from tests.lifecycle import OPTIMIZERS, live


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_life_of_ordinary_experts(optimizer, seed):
    live(seed, optimizer, is_stacked=False)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("optimizer", ["AdamW", "amsgrad", "SGD"])
def test_a_life_of_stacked_experts(optimizer, seed):
    live(seed, optimizer, is_stacked=True)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_life_in_groups(is_stacked, optimizer, seed):
    live(seed, optimizer, is_stacked=is_stacked, has_groups=True)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("is_stacked", [False, True])
def test_a_life_of_grouped_experts(is_stacked, seed):
    live(seed, "AdamW", is_stacked=is_stacked, engine="grouped")
