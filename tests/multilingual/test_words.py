import numpy as np
import torch

from benchmarks.multilingual.learning.batches import TrainingSteps
from benchmarks.multilingual.words import vocabulary as words
from benchmarks.multilingual.words.corpus import TEST, TRAIN, LanguageSample
from benchmarks.multilingual.words.evidence import gather_evidence
from benchmarks.multilingual.words.rules import IDENTITY, EditRule
from benchmarks.multilingual.words.vocabulary import (
    FIRST_CHARACTER_ID,
    HEAD_CHARACTERS,
    NO_RULE,
    OUTSIDE_ID,
    TAIL_CHARACTERS,
    UNKNOWN_ID,
)

PLURAL = EditRule(0, "", 1, "")
ONCE = EditRule(1, "", 0, "")
ONLY_IN_TEST = EditRule(1, "", 1, "")


def small_sample() -> LanguageSample:
    return LanguageSample(
        language="en",
        forms=["cat", "cats", "sat", "cas", "ccat", "xa"],
        lemmas=["cat", "cat", "sat", "ca", "cat", "a"],
        rules=[PLURAL, IDENTITY, ONCE, ONLY_IN_TEST],
        rule_ids=np.array([1, 0, 1, 0, 2, 3], dtype=np.int32),
        split=np.array([TRAIN, TRAIN, TRAIN, TRAIN, TRAIN, TEST], dtype=np.uint8),
        dictionary_size=6,
    )


def test_training_words_make_the_vocabulary_and_rules_that_they_have_twice() -> None:
    sample = small_sample()
    vocabulary = words.build_vocabulary([sample], [gather_evidence(sample)])
    assert vocabulary.characters == "acts"
    # Both have two words: the order is the rules' own, and the language's candidates are in the sample's.
    assert vocabulary.rules == [IDENTITY, PLURAL]
    assert vocabulary.candidates == [[1, 0]]


def test_targets_are_places_among_the_candidates() -> None:
    sample = small_sample()
    evidence = gather_evidence(sample)
    vocabulary = words.build_vocabulary([sample], [evidence])
    assert words.build_table([sample], [evidence], vocabulary, TRAIN).targets.tolist() == [1, 0, 1, 0, NO_RULE]
    assert words.build_table([sample], [evidence], vocabulary, TEST).targets.tolist() == [NO_RULE]


def test_a_table_has_the_evidence_of_its_own_words() -> None:
    sample = small_sample()
    evidence = gather_evidence(sample)
    vocabulary = words.build_vocabulary([sample], [evidence])
    table = words.build_table([sample, sample], [evidence, evidence], vocabulary, TEST)
    assert torch.equal(table.counts, torch.from_numpy(evidence.counts[[5, 5]]))
    assert torch.equal(table.totals, torch.from_numpy(evidence.totals[[5, 5]]))
    assert torch.equal(table.proposals, torch.from_numpy(evidence.proposals[[5, 5]]))


def test_windows_are_flush_with_both_ends_of_the_word() -> None:
    sample = small_sample()
    vocabulary = words.build_vocabulary([sample], [gather_evidence(sample)])
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
