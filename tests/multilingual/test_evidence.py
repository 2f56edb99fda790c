"""The counts for a word, beside counts by hand."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.multilingual.words import evidence as gathering
from benchmarks.multilingual.words.affixes import ABSENT, affix_hashes, joined, proper_hashes, windows, without_case
from benchmarks.multilingual.words.corpus import TEST, TRAIN, VALIDATION, LanguageSample
from benchmarks.multilingual.words.counts import AffixCounts
from benchmarks.multilingual.words.evidence import (
    BEGINNINGS,
    ENDINGS,
    FORM_COUNTS,
    LEAST_RULE_COUNT,
    LEMMA_BEGINNINGS,
    LEMMA_ENDINGS,
    NO_PROPOSAL,
    PAIRS,
    SCALE,
    gather_evidence,
)
from benchmarks.multilingual.words.rules import EditRule, find_rule

Triple = tuple[str, str, int]

# Lemmas with several forms, beginnings that change, case that changes, and one word of its own rule.
WORDS: list[Triple] = [
    ("gemacht", "machen", TRAIN),
    ("macht", "machen", TRAIN),
    ("gelacht", "lachen", TRAIN),
    ("lacht", "lachen", TRAIN),
    ("sacht", "sachen", TRAIN),
    ("gesagt", "sagen", TRAIN),
    ("sagt", "sagen", TRAIN),
    ("Haustüren", "Haustür", TRAIN),
    ("Türen", "Tür", TRAIN),
    ("nEoin", "Eoin", TRAIN),
    ("nAoin", "Aoin", TRAIN),
    ("zzz", "q", TRAIN),
    ("gekracht", "krachen", VALIDATION),
    ("kracht", "krachen", TEST),
    ("Autotüren", "Autotür", TEST),
    ("x", "x", TEST),
]


def sample_of(words: Sequence[Triple]) -> LanguageSample:
    found = [find_rule(form, lemma) for form, lemma, _ in words]
    rules = list(dict.fromkeys(found))
    return LanguageSample(
        language="de",
        forms=[form for form, _, _ in words],
        lemmas=[lemma for _, lemma, _ in words],
        rules=rules,
        rule_ids=np.array([rules.index(rule) for rule in found], dtype=np.int32),
        split=np.array([split for _, _, split in words], dtype=np.uint8),
        dictionary_size=len(words),
    )


def scaled(count: int) -> int:
    return round(SCALE * math.log(1 + count))


def affix_of(word: str, *, at_end: bool, length: int) -> str | None:
    """The affix of this length; an affix that is longer than the word by one is the whole word."""
    found = (word[::-1] if at_end else word) + "\n"
    return found[:length] if len(found) >= length else None


def by_hand(words: Sequence[Triple], rules: list[EditRule], row: int, rule: EditRule) -> list[int]:
    form, lemma, _ = words[row]
    others = [
        (other, find_rule(other, its_lemma))
        for other, its_lemma, split in words
        if split == TRAIN and its_lemma != lemma and find_rule(other, its_lemma) in rules
    ]

    def behind(each: EditRule) -> tuple[int, str]:
        return each.strip_suffix, each.new_suffix

    def before(each: EditRule) -> tuple[int, str]:
        return each.strip_prefix, each.new_prefix

    counts = []
    for length in range(1, ENDINGS + 1):
        affix = affix_of(form, at_end=True, length=length)
        alike = [each for other, each in others if affix and affix_of(other, at_end=True, length=length) == affix]
        counts.append(sum(behind(each) == behind(rule) for each in alike))
    for length in range(1, BEGINNINGS + 1):
        affix = affix_of(form, at_end=False, length=length)
        alike = [each for other, each in others if affix and affix_of(other, at_end=False, length=length) == affix]
        counts.append(sum(before(each) == before(rule) for each in alike))
    for first, second in PAIRS:
        pair = affix_of(form, at_end=False, length=first), affix_of(form, at_end=True, length=second)
        alike = [
            each
            for other, each in others
            if None not in pair
            and (affix_of(other, at_end=False, length=first), affix_of(other, at_end=True, length=second)) == pair
        ]
        counts.append(sum(each == rule for each in alike))
    made = rule.apply(form)
    assert made is not None
    known = {its_lemma.lower() for _, its_lemma, split in words if split == TRAIN and its_lemma != lemma}
    small = made.lower()
    for lengths, reads in ((LEMMA_ENDINGS, slice(None, None, -1)), (LEMMA_BEGINNINGS, slice(None))):
        counts += [
            sum(len(small) > length and each[reads].startswith(small[reads][:length]) for each in known)
            for length in lengths
        ]
    return counts


def check_by_hand(words: Sequence[Triple]) -> int:
    """Compare the proposals, and return their number."""
    sample = sample_of(words)
    found = gather_evidence(sample)
    rules = [sample.rules[each] for each in found.candidates.tolist()]
    compared = 0
    for row, (form, _, _) in enumerate(words):
        for place, proposal in enumerate(found.proposals[row].tolist()):
            if proposal == NO_PROPOSAL:
                assert not found.counts[row, place].any()
            elif rules[proposal].apply(form) is not None:
                wanted = [scaled(each) for each in by_hand(words, rules, row, rules[proposal])]
                assert found.counts[row, place].tolist() == wanted, (form, rules[proposal])
                compared += 1
    return compared


def test_counts_are_those_of_other_lemmas_words() -> None:
    assert check_by_hand(WORDS) > 60


@settings(max_examples=25, deadline=None)
@given(
    words=st.lists(
        st.tuples(
            st.text(alphabet="abA", min_size=1, max_size=5),
            st.text(alphabet="abA", min_size=1, max_size=4),
            st.sampled_from([TRAIN, TRAIN, TRAIN, TEST]),
        ),
        min_size=1,
        max_size=30,
        unique_by=lambda word: word[0],
    )
)
def test_counts_of_any_words(words: list[Triple]) -> None:
    # A lemma is on one side, and its case makes no other lemma.
    sides: dict[str, int] = {}
    check_by_hand([(form, lemma.lower(), sides.setdefault(lemma.lower(), split)) for form, lemma, split in words])


def test_totals_count_words_of_other_lemmas() -> None:
    sample = sample_of(WORDS)
    found = gather_evidence(sample)
    kept = {sample.rules[each] for each in found.candidates.tolist()}
    assert found.totals.shape == (len(WORDS), FORM_COUNTS)
    for row, (form, lemma, _) in enumerate(WORDS):
        others = [
            other
            for other, its_lemma, split in WORDS
            if split == TRAIN and its_lemma != lemma and find_rule(other, its_lemma) in kept
        ]
        for length in range(1, ENDINGS + 1):
            affix = affix_of(form, at_end=True, length=length)
            alike = [each for each in others if affix and affix_of(each, at_end=True, length=length) == affix]
            assert found.totals[row, length - 1] == scaled(len(alike))


def test_test_words_say_nothing() -> None:
    changed = [word if word[2] == TRAIN else (word[0], word[0][::-1] + "q", word[2]) for word in WORDS]
    before, after = (gather_evidence(sample_of(words)) for words in (WORDS, changed))
    for name in ("proposals", "counts", "totals"):
        assert np.array_equal(getattr(before, name), getattr(after, name)), name


def test_another_form_of_the_same_lemma_says_nothing() -> None:
    words: list[Triple] = [("xa", "a", TRAIN), ("xb", "b", TRAIN), ("yc", "c", TRAIN)]
    before, after = (gather_evidence(sample_of(each)) for each in (words, [*words, ("ya", "a", TRAIN)]))
    assert np.array_equal(before.totals[0], after.totals[0])
    assert np.array_equal(before.counts[0], after.counts[0])
    assert not np.array_equal(before.totals[2], after.totals[2])


def test_rules_that_training_has_once_are_no_candidates() -> None:
    sample = sample_of(WORDS)
    found = gather_evidence(sample)
    times = np.bincount(sample.rule_ids[sample.split == TRAIN], minlength=len(sample.rules))
    assert sorted(found.candidates.tolist()) == np.flatnonzero(times >= LEAST_RULE_COUNT).tolist()
    assert (np.diff(times[found.candidates]) <= 0).all()


def test_a_sample_without_a_candidate_has_no_proposals() -> None:
    found = gather_evidence(sample_of([("zzz", "q", TRAIN), ("x", "x", TEST)]))
    assert found.candidates.tolist() == []
    assert (found.proposals == NO_PROPOSAL).all()
    assert not found.counts.any()


def test_proposals_are_distinct_and_the_likeliest_comes_first() -> None:
    sample = sample_of(WORDS)
    found = gather_evidence(sample, num_proposals=3)
    rules = [sample.rules[each] for each in found.candidates.tolist()]
    assert all(len(set(row)) == 3 for row in found.proposals.tolist())
    row = [word[0] for word in WORDS].index("gekracht")
    assert rules[found.proposals[row, 0]].apply("gekracht") == "krachen"


def test_a_file_gives_back_what_was_written(tmp_path) -> None:
    found = gather_evidence(sample_of(WORDS))
    gathering.save_evidence(found, tmp_path / "de.npz")
    again = gathering.load_evidence(tmp_path / "de.npz")
    for name, value in vars(found).items():
        assert np.array_equal(value, getattr(again, name))
        assert value.dtype == getattr(again, name).dtype


words = st.lists(st.text(alphabet="abß", max_size=6), min_size=1, max_size=8)


@given(words=words, from_end=st.booleans())
def test_hashes_are_equal_where_affixes_are(words: list[str], from_end: bool) -> None:
    codes = windows(words, 5, from_end=from_end)
    for length, hashes in enumerate(affix_hashes(codes, 5), 1):
        affixes = [affix_of(word, at_end=from_end, length=length) for word in words]
        for one, its_hash in zip(affixes, hashes.tolist(), strict=True):
            assert (one is None) == (its_hash == ABSENT)
            for other, other_hash in zip(affixes, hashes.tolist(), strict=True):
                assert (one == other) == (its_hash == other_hash)


@given(words=words)
def test_a_proper_affix_is_shorter_than_the_word(words: list[str]) -> None:
    codes = without_case(windows(words, 6, from_end=True))
    for length, hashes in enumerate(proper_hashes(codes, 5), 1):
        assert [each != ABSENT for each in hashes.tolist()] == [len(word) > length for word in words]


def test_case_is_taken_away_where_it_is_one_character() -> None:
    one, other = (without_case(windows([word], 6, from_end=False)) for word in ("ÄbĞİ", "äbğİ"))
    assert np.array_equal(one, other)


def test_a_pair_is_absent_with_either_part() -> None:
    one, none = np.array([5], dtype=np.uint64), np.array([0], dtype=np.uint64)
    absent = [joined(*each).tolist() == [0] for each in ((one, one), (one, none), (none, one))]
    assert absent == [False, True, True]


@pytest.mark.parametrize("known", [True, False])
def test_shares_are_of_the_words_with_the_affix(known: bool) -> None:
    hashes = np.array([7, 7, 7, 7 if known else 9], dtype=np.uint64)
    classes, lemmas = np.array([0, 1, 1, 0]), np.array([0, 1, 2, 3])
    counts = AffixCounts(hashes, classes, lemmas, np.array([0, 1, 2]), 2)
    # The last is no training word; of the others each leaves out its own lemma.
    wanted = [[0, 2 / 2.5], [1 / 2.5, 1 / 2.5], [1 / 2.5, 1 / 2.5], [1 / 3.5, 2 / 3.5] if known else [0, 0]]
    assert np.allclose(counts.shares(0, 4), wanted)
    assert np.allclose(counts.shares(2, 4), wanted[2:])
