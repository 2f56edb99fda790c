"""Counts of a class with an affix in training, without the forms of a word's own lemma.

A training word meets its affixes in other lemmas' words alone, as a test word does. Otherwise its own forms would vouch
for the right class, and a network would learn to trust counts that no unseen lemma has.

Axes: N words, M classes asked for, A affixes, C classes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.multilingual.words.affixes import ABSENT, Hashes

Integers = npt.NDArray[np.int64]


def find(known: npt.NDArray[np.generic], wanted: npt.NDArray[np.generic]) -> tuple[Integers, npt.NDArray[np.bool_]]:
    """Places of ``wanted`` in the sorted ``known``, and whether they are there."""
    if not len(known):
        return np.zeros(wanted.shape, dtype=np.int64), np.zeros(wanted.shape, dtype=bool)
    places = np.searchsorted(known, wanted)
    places[places == len(known)] = 0
    return places, known[places] == wanted


class AffixCounts:
    """Counts over training words of one affix, say the last three characters.

    Args:
        hashes: The affix of every word, ``[N]``; words of all sides of the split.
        classes: The class of every word, ``[N]``; read at training words alone.
        lemmas: The lemma of every word as a number, ``[N]``.
        trained: Positions of the training words that count.
        num_classes: C.
    """

    def __init__(
        self, hashes: Hashes, classes: Integers, lemmas: Integers, trained: Integers, num_classes: int
    ) -> None:
        counted = trained[hashes[trained] != ABSENT]
        self._lemmas = lemmas
        self._num_lemmas = int(lemmas.max(initial=0)) + 1
        self.num_classes = num_classes
        affixes, affix = np.unique(hashes[counted], return_inverse=True)
        self._pairs, pair, self._pair_counts = np.unique(
            affix * num_classes + classes[counted], return_inverse=True, return_counts=True
        )
        # The share that one lemma has in a pair's count, and in an affix's.
        self._own_pairs, self._own_pair_counts = np.unique(
            pair * self._num_lemmas + lemmas[counted], return_counts=True
        )
        own_affixes, own_counts = np.unique(affix * self._num_lemmas + lemmas[counted], return_counts=True)
        places, known = find(affixes, hashes)
        # The affix of every word, and -1 for one that training does not have.
        self._affix_of: Integers = np.where(known & (hashes != ABSENT), places, -1)
        own, is_own = find(own_affixes, self._affix_of * self._num_lemmas + lemmas)
        sizes = np.append(np.bincount(affix, minlength=len(affixes)), 0)
        self.totals: Integers = sizes[self._affix_of]
        self.totals -= np.where(is_own, np.append(own_counts, 0)[own], 0)

    def of_classes(self, classes: Integers) -> Integers:
        """Counts [N, M] of each word's affix with these classes [N, M]."""
        affix = self._affix_of[:, None]
        places, known = find(self._pairs, np.where(affix >= 0, affix * self.num_classes + classes, -1))
        own, is_own = find(self._own_pairs, places * self._num_lemmas + self._lemmas[:, None])
        counts = self._pair_counts[places] if len(self._pairs) else np.zeros(places.shape, dtype=np.int64)
        return np.where(known, counts - np.where(is_own, np.append(self._own_pair_counts, 0)[own], 0), 0)

    def shares(self, first: int, last: int) -> npt.NDArray[np.float32]:
        """Shares [last - first, C] of each class among the words with the affix, zeros for unknown affixes."""
        affix = self._affix_of[first:last]
        begin = np.searchsorted(self._pairs, affix * self.num_classes)
        end = np.searchsorted(self._pairs, (affix + 1) * self.num_classes)
        lengths = np.where(affix >= 0, end - begin, 0)
        row = np.repeat(np.arange(last - first), lengths)
        pair = begin[row] + np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        own, is_own = find(self._own_pairs, pair * self._num_lemmas + self._lemmas[first:last][row])
        counts = self._pair_counts[pair] - np.where(is_own, np.append(self._own_pair_counts, 0)[own], 0)
        # Half a word more than there are: one word alone is less sure than many that agree.
        weights = counts / (self.totals[first:last][row] + 0.5)
        flat = np.bincount(
            row * self.num_classes + self._pairs[pair] % self.num_classes,
            weights=weights,
            minlength=(last - first) * self.num_classes,
        )
        shares: npt.NDArray[np.float32] = flat.astype(np.float32).reshape(last - first, self.num_classes)
        return shares
