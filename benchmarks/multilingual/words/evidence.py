"""The rules proposed for a word, and the evidence for each: counts over training words.

Lemmatizers by edit rules score a rule by the affixes of the form and of the lemma that it makes (Müller et al. 2015).
This module does so too, with counts in place of one weight an affix: counts need no training, and a network learns
their worth.

* Beginnings and endings of the form, by the change at that end, and pairs of both by the whole rule: the number of
  training words that have this affix and that change.
* Beginnings and endings of the proposed lemma, without case: the number of training lemmas that have them. Only affixes
  shorter than the lemma count, since our split keeps training lemmas and test lemmas apart.

Training words are counted without the forms of their own lemma: see `counts`.

Axes: N words, M proposals, F counts of a proposal, T affixes of a form, K candidate rules, W characters of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.multilingual.words.affixes import (
    ABSENT,
    Hashes,
    affix_hashes,
    code_of,
    joined,
    proper_hashes,
    windows,
    without_case,
)
from benchmarks.multilingual.words.corpus import TRAIN, LanguageSample, save_arrays
from benchmarks.multilingual.words.counts import AffixCounts, Integers, find
from benchmarks.multilingual.words.rules import EditRule
from benchmarks.multilingual.words.suffix_table import table_rules

# Part of the file's name, so that old files are not read: raise it if the meaning of the counts changes.
FORMAT = 1
PROPOSALS = 8
# A rule that training has once is as often a fault in the dictionary as a rule.
LEAST_RULE_COUNT = 2
ENDINGS = 10
BEGINNINGS = 5
# Lengths of beginning and ending.
PAIRS = ((2, 2), (3, 3), (4, 4), (2, 5))
LEMMA_ENDINGS = range(2, 10)
LEMMA_BEGINNINGS = range(2, 6)

FORM_COUNTS = ENDINGS + BEGINNINGS + len(PAIRS)
LEMMA_COUNTS = len(LEMMA_ENDINGS) + len(LEMMA_BEGINNINGS)
# A count c is kept as the nearest whole number to SCALE log(1 + c): one byte holds eight million.
SCALE = 16

NO_PROPOSAL = -1

_BLOCK = 512
_CHANGE_WIDTH = 16
_FORM_WIDTH = 32


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The evidence of training for every word of a sample.

    ``candidates`` int32 [K] are positions in the sample's rules, most frequent first. ``proposals`` int16 [N, M] are
    positions among them, likeliest first, `NO_PROPOSAL` for missing ones. ``counts`` uint8 [N, M, F] are scaled
    (`SCALE`), the form's affixes before the lemma's; ``totals`` uint8 [N, T] count the words with each affix of the
    form, likewise. ``table_rules`` int32 [N] is the baseline's rule for each word: see `suffix_table`.
    """

    candidates: npt.NDArray[np.int32]
    proposals: npt.NDArray[np.int16]
    counts: npt.NDArray[np.uint8]
    totals: npt.NDArray[np.uint8]
    table_rules: npt.NDArray[np.int32]


def save_evidence(evidence: Evidence, path: Path) -> None:
    """Write the file, whole or not at all."""
    save_arrays(path, **vars(evidence))


def load_evidence(path: Path) -> Evidence:
    """The evidence that `save_evidence` wrote."""
    with path.open("rb") as file, np.load(file) as arrays:
        return Evidence(**{field.name: arrays[field.name] for field in fields(Evidence)})


def gather_evidence(sample: LanguageSample, num_proposals: int = PROPOSALS) -> Evidence:
    """The evidence for all words of a sample, on all sides of the split, from its training words."""
    times = np.bincount(sample.rule_ids[sample.split == TRAIN], minlength=len(sample.rules))
    candidates = np.flatnonzero(times >= LEAST_RULE_COUNT)
    candidates = candidates[np.argsort(-times[candidates], kind="stable")]
    numbers: dict[str, int] = {}
    lemmas = np.array([numbers.setdefault(lemma, len(numbers)) for lemma in sample.lemmas], dtype=np.int64)
    size = len(sample.forms)
    proposals = np.full((size, num_proposals), NO_PROPOSAL, dtype=np.int16)
    if not len(candidates):
        counts = np.zeros((size, num_proposals, FORM_COUNTS + LEMMA_COUNTS), dtype=np.uint8)
        return Evidence(
            candidates=candidates.astype(np.int32),
            proposals=proposals,
            counts=counts,
            totals=np.zeros((size, FORM_COUNTS), dtype=np.uint8),
            table_rules=table_rules(sample),
        )
    place_of = np.full(len(sample.rules), NO_PROPOSAL, dtype=np.int64)
    place_of[candidates] = np.arange(len(candidates))
    rules = [sample.rules[each] for each in candidates.tolist()]
    forms = _FormCounts(sample, rules, place_of[sample.rule_ids], lemmas)
    chosen = forms.propose(num_proposals)
    proposals[:, : chosen.shape[1]] = chosen
    asked = np.maximum(proposals, 0).astype(np.int64)
    counts = np.concatenate((forms.counts(asked), _lemma_counts(sample, rules, asked, lemmas, numbers)), axis=2)
    counts[proposals == NO_PROPOSAL] = 0
    return Evidence(
        candidates=candidates.astype(np.int32),
        proposals=proposals,
        counts=counts,
        totals=forms.totals(),
        table_rules=table_rules(sample),
    )


def _scaled(counts: Integers) -> npt.NDArray[np.uint8]:
    scaled: npt.NDArray[np.uint8] = np.round(SCALE * np.log1p(counts)).astype(np.uint8)
    return scaled


class _FormCounts:
    """Counts by the form's affixes. ``targets`` [N] are candidates, or `NO_PROPOSAL`."""

    def __init__(self, sample: LanguageSample, rules: list[EditRule], targets: Integers, lemmas: Integers) -> None:
        trained = np.flatnonzero((sample.split == TRAIN) & (targets != NO_PROPOSAL))
        self._size = len(sample.forms)
        self._behind = _numbered([(rule.strip_suffix, rule.new_suffix) for rule in rules])
        self._before = _numbered([(rule.strip_prefix, rule.new_prefix) for rule in rules])
        whole = np.arange(len(rules))
        tail = affix_hashes(windows(sample.forms, ENDINGS, from_end=True), ENDINGS)
        head = affix_hashes(windows(sample.forms, BEGINNINGS, from_end=False), BEGINNINGS)
        both = [joined(head[begin - 1], tail[end - 1]) for begin, end in PAIRS]

        def count(hashes: list[Hashes], class_of: Integers) -> list[AffixCounts]:
            classes = int(class_of.max()) + 1
            return [AffixCounts(each, class_of[targets], lemmas, trained, classes) for each in hashes]

        self._groups = (
            (count(tail, self._behind), self._behind),
            (count(head, self._before), self._before),
            (count(both, whole), whole),
        )
        self._frequency = np.bincount(targets[trained], minlength=len(rules)) / len(trained)

    def propose(self, num_proposals: int) -> Integers:
        """Candidates [N, at most ``num_proposals``], likeliest first.

        Both ends are taken as independent, but for how much more often than that the rule has joined them.
        """
        (endings, behind), (beginnings, before), _ = self._groups
        shares_behind = np.bincount(behind, self._frequency).astype(np.float32)
        shares_before = np.bincount(before, self._frequency).astype(np.float32)
        attraction = np.sqrt(self._frequency / (shares_behind[behind] * shares_before[before])).astype(np.float32)
        most = min(num_proposals, len(behind))
        chosen = np.zeros((self._size, most), dtype=np.int64)
        for first in range(0, self._size, _BLOCK):
            last = min(first + _BLOCK, self._size)
            # Longer affixes say more: each character doubles the weight.
            score_behind = shares_behind + sum(
                2**length * each.shares(first, last) for length, each in enumerate(endings[1:], 2)
            )
            score_before = shares_before + sum(
                2**length * each.shares(first, last) for length, each in enumerate(beginnings, 1)
            )
            scores = score_behind[:, behind] * score_before[:, before] * attraction
            chosen[first:last] = torch.from_numpy(scores).topk(most).indices.numpy()
        return chosen

    def counts(self, proposals: Integers) -> npt.NDArray[np.uint8]:
        """[N, M] -> scaled counts [N, M, T]."""
        return np.stack(
            [_scaled(each.of_classes(class_of[proposals])) for group, class_of in self._groups for each in group],
            axis=2,
        )

    def totals(self) -> npt.NDArray[np.uint8]:
        """Scaled totals [N, T]."""
        return np.stack([_scaled(each.totals) for group, _ in self._groups for each in group], axis=1)


def _numbered(changes: list[tuple[int, str]]) -> Integers:
    numbers: dict[tuple[int, str], int] = {}
    return np.array([numbers.setdefault(change, len(numbers)) for change in changes], dtype=np.int64)


def _lemma_counts(
    sample: LanguageSample, rules: list[EditRule], proposals: Integers, lemmas: Integers, numbers: dict[str, int]
) -> npt.NDArray[np.uint8]:
    """[N, M] -> scaled counts [N, M, lengths] of training lemmas with the affixes of the lemma that a rule makes."""
    names = list(numbers)
    trained = np.unique(lemmas[sample.split == TRAIN])
    known = [names[each] for each in trained.tolist()]
    # The place of a word's own lemma among those of training.
    own, is_own = find(trained, lemmas)
    behind = [(rule.strip_suffix, rule.new_suffix[::-1]) for rule in rules]
    before = [(rule.strip_prefix, rule.new_prefix) for rule in rules]
    sizes = np.fromiter(map(len, sample.forms), dtype=np.int64, count=len(sample.forms))
    counts = []
    for near, far, lengths, from_end in (
        (behind, before, LEMMA_ENDINGS, True),
        (before, behind, LEMMA_BEGINNINGS, False),
    ):
        longest = max(lengths)
        forms = windows(sample.forms, _FORM_WIDTH, from_end=from_end)
        made = _changed(forms, sizes, near, far, proposals, longest + 1)
        asked = proper_hashes(without_case(made), longest)
        told = affix_hashes(without_case(windows(known, longest, from_end=from_end)), longest)
        for length in lengths:
            affixes, times = np.unique(told[length - 1], return_counts=True)
            places, found = find(affixes, asked[length - 1])
            found &= asked[length - 1] != ABSENT
            itself = found & is_own[:, None] & (told[length - 1][own][:, None] == asked[length - 1])
            counts.append(_scaled(np.where(found, times[places], 0) - itself))
    return np.stack(counts, axis=2)


def _changed(
    forms: Hashes,
    sizes: Integers,
    near: list[tuple[int, str]],
    far: list[tuple[int, str]],
    proposals: Integers,
    width: int,
) -> Hashes:
    """Codes [N, M, width] at the near end of the lemmas that the proposals make of forms [N, W] of these sizes [N]."""
    strip_near, new_near, length_near = _changes(near, proposals)
    strip_far, new_far, length_far = _changes([(strip, text[::-1]) for strip, text in far], proposals)
    kept = sizes[:, None, None] - strip_near - strip_far
    place = np.arange(width)
    # The places in the part of the form that is kept, and in the text behind that part.
    inner = place - length_near
    outer = inner - kept
    rows = np.arange(len(forms))[:, None, None]
    which = proposals[:, :, None]
    codes = np.where(
        inner < 0,
        new_near[which, np.minimum(place, _CHANGE_WIDTH - 1)],
        np.where(
            outer < 0,
            forms[rows, np.clip(strip_near + inner, 0, forms.shape[1] - 1)],
            np.where(outer < length_far, new_far[which, np.clip(outer, 0, _CHANGE_WIDTH - 1)], ABSENT),
        ),
    )
    # A rule that does not fit makes no lemma.
    changed: Hashes = np.where(kept >= 0, codes, ABSENT)
    return changed


def _changes(changes: list[tuple[int, str]], proposals: Integers) -> tuple[Integers, Hashes, Integers]:
    """Characters stripped [N, M, 1], codes put there by rule [K, _CHANGE_WIDTH], and how many those are [N, M, 1]."""
    strip = np.array([stripped for stripped, _ in changes])[proposals][:, :, None]
    lengths = np.array([min(len(text), _CHANGE_WIDTH) for _, text in changes])[proposals][:, :, None]
    new = np.zeros((len(changes), _CHANGE_WIDTH), dtype=np.uint64)
    for row, (_, text) in enumerate(changes):
        new[row, : min(len(text), _CHANGE_WIDTH)] = [code_of(each) for each in text[:_CHANGE_WIDTH]]
    return strip, new, lengths
