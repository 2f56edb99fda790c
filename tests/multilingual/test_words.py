import numpy as np
import torch

from benchmarks.multilingual import words
from benchmarks.multilingual.batches import TrainingSteps
from benchmarks.multilingual.corpus import TEST, TRAIN, LanguageSample
from benchmarks.multilingual.rules import IDENTITY, EditRule
from benchmarks.multilingual.words import (
    FIRST_CHARACTER_ID,
    HEAD_CHARACTERS,
    NO_RULE,
    OUTSIDE_ID,
    TAIL_CHARACTERS,
    UNKNOWN_ID,
)

PLURAL = EditRule(0, "", 1, "")
ONLY_IN_TEST = EditRule(1, "", 0, "")


def small_sample() -> LanguageSample:
    return LanguageSample(
        language="en",
        forms=["cat", "cats", "xa"],
        lemmas=["cat", "cat", "a"],
        rules=[IDENTITY, PLURAL, ONLY_IN_TEST],
        rule_ids=np.array([0, 1, 2], dtype=np.int32),
        split=np.array([TRAIN, TRAIN, TEST], dtype=np.uint8),
        dictionary_size=3,
    )


def test_only_training_words_make_the_vocabulary() -> None:
    vocabulary = words.build_vocabulary([small_sample()])
    assert vocabulary.characters == "acts"
    assert vocabulary.rules == [IDENTITY, PLURAL]
    assert vocabulary.candidates == [[0, 1]]


def test_targets_are_places_among_the_candidates() -> None:
    sample = small_sample()
    vocabulary = words.build_vocabulary([sample])
    assert words.build_table([sample], vocabulary, TRAIN).targets.tolist() == [0, 1]
    assert words.build_table([sample], vocabulary, TEST).targets.tolist() == [NO_RULE]


def test_windows_are_flush_with_both_ends_of_the_word() -> None:
    vocabulary = words.build_vocabulary([small_sample()])
    a, c, t, s = range(FIRST_CHARACTER_ID, FIRST_CHARACTER_ID + 4)
    ids = words.encode_forms(["cats", "x", "", "cat" * 5], vocabulary).tolist()
    assert ids[0][:HEAD_CHARACTERS] == [c, a, t, s] + [OUTSIDE_ID] * 4
    assert ids[0][HEAD_CHARACTERS:] == [OUTSIDE_ID] * (TAIL_CHARACTERS - 4) + [c, a, t, s]
    assert ids[1] == [UNKNOWN_ID] + [OUTSIDE_ID] * (HEAD_CHARACTERS + TAIL_CHARACTERS - 2) + [UNKNOWN_ID]
    assert set(ids[2]) == {OUTSIDE_ID}
    assert ids[3] == ([c, a, t] * 3)[:HEAD_CHARACTERS] + ([c, a, t] * 4)


def test_an_epoch_meets_every_word_once_and_follows_from_the_seed() -> None:
    steps = TrainingSteps(word_count=10, batch_size=5, seed=3)
    first = torch.cat([steps[0], steps[1]])
    assert sorted(first.tolist()) == list(range(10))
    later = steps[7]
    assert torch.equal(TrainingSteps(word_count=10, batch_size=5, seed=3)[7], later)
    assert not torch.equal(torch.cat([steps[2], steps[3]]), first)
    assert not torch.equal(TrainingSteps(word_count=10, batch_size=5, seed=4)[7], later)


def test_a_batch_is_never_larger_than_the_corpus() -> None:
    assert TrainingSteps(word_count=3, batch_size=4_096, seed=0).batch_size == 3
