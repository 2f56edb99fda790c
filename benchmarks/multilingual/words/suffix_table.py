"""The baseline that needs no training: a table of affixes and the rule most frequent with each.

Two ways to read the table are tried on each language's validation words, and the better one takes its test words: the
rule of the longest known ending, or the rule of the surest pair of beginning and ending.

Axes: N words.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.multilingual.words.affixes import ABSENT, Hashes, affix_hashes, joined, windows
from benchmarks.multilingual.words.corpus import TRAIN, VALIDATION, LanguageSample
from benchmarks.multilingual.words.counts import Integers, find
from benchmarks.multilingual.words.rules import decode

LONGEST_ENDING = 14
LONGEST_BEGINNING = 4
# Words that an affix must have seen beside its own before its rule counts as sure.
DOUBT = 1.0


def table_rules(sample: LanguageSample) -> npt.NDArray[np.int32]:
    """A position in the sample's rules for every word [N], from the training words alone."""
    validation = np.flatnonzero(sample.split == VALIDATION).tolist()
    ways = _rules_by_way(sample)

    def right(rules: Integers) -> int:
        return sum(decode(sample.forms[each], sample.rules[rules[each]]) == sample.lemmas[each] for each in validation)

    best: Integers = max(ways, key=right)
    return best.astype(np.int32)


def _rules_by_way(sample: LanguageSample) -> tuple[Integers, Integers]:
    """For every word [N] a position in the sample's rules: by the longest ending, and by the surest pair."""
    trained = np.flatnonzero(sample.split == TRAIN)
    tail = affix_hashes(windows(sample.forms, LONGEST_ENDING, from_end=True), LONGEST_ENDING)
    head = affix_hashes(windows(sample.forms, LONGEST_BEGINNING, from_end=False), LONGEST_BEGINNING)
    most_frequent = int(np.bincount(sample.rule_ids[trained]).argmax()) if len(trained) else 0
    longest = np.full(len(sample.forms), most_frequent, dtype=np.int64)
    surest = longest.copy()
    certainty = np.zeros(len(sample.forms))
    for ending in tail:
        rules, sure = _majority(ending, sample.rule_ids, trained)
        longest = np.where(sure > 0, rules, longest)
        for hashes in (ending, *(joined(beginning, ending) for beginning in head)):
            rules, sure = (rules, sure) if hashes is ending else _majority(hashes, sample.rule_ids, trained)
            # Between pairs that are as sure the later one wins, which is the longer one.
            better = (sure > 0) & (sure >= certainty)
            surest = np.where(better, rules, surest)
            certainty = np.where(better, sure, certainty)
    return longest, surest


def _majority(
    hashes: Hashes, rule_ids: npt.NDArray[np.int32], trained: Integers
) -> tuple[Integers, npt.NDArray[np.float64]]:
    """The rule most frequent with each word's affix [N], and how sure it is; 0 for an affix that is not known."""
    counted = trained[hashes[trained] != ABSENT]
    affixes, affix, totals = np.unique(hashes[counted], return_inverse=True, return_counts=True)
    if not len(affixes):
        return np.zeros(len(hashes), dtype=np.int64), np.zeros(len(hashes))
    width = int(rule_ids.max()) + 1
    pairs, times = np.unique(affix * width + rule_ids[counted], return_counts=True)
    # Sorted by affix, then by count: the last of an affix is its most frequent; of two, the one that comes first.
    order = np.lexsort((-pairs, times, pairs // width))
    last = np.append(np.flatnonzero(np.diff(pairs[order] // width)), len(order) - 1)
    best = order[last]
    sure = times[best] / (totals + DOUBT)
    places, found = find(affixes, hashes)
    found &= hashes != ABSENT
    return (pairs[best] % width)[places], np.where(found, sure[places], 0.0)
