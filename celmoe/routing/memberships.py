"""The samples of a level of which some go to several experts, or to none: one membership for each sample and expert.

Axes: B samples, R memberships.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

CodeArray: TypeAlias = npt.NDArray[np.unsignedinteger[Any] | np.signedinteger[Any]]

# A plan holds weights in this range exactly, as floats of 32 bits. Smaller ones change no sum, and count as 0.
LEAST_WEIGHT, MOST_WEIGHT = 2.0**-64, 2.0**64
# Weights this close to 1 are 1: sums of weights that a user wrote in decimals come out a rounding error beside it.
_CLOSE = 1e-9


class Memberships(NamedTuple):
    """One level's samples, each with any number of experts.

    Attributes:
        codes: ``[R]``, the expert of each membership; ascending within a sample, without repeats.
        samples: ``[R]`` int64, the sample of each membership, ascending.
        weights: ``[R]`` float64, the expert's weight in the sample's sum.
        size: Samples B.
    """

    codes: CodeArray
    samples: npt.NDArray[np.int64]
    weights: npt.NDArray[np.float64]
    size: int

    def cut(self, start: int, stop: int) -> Memberships:
        """The memberships of the samples from ``start`` up to ``stop``."""
        first, last = np.searchsorted(self.samples, [start, stop])
        rows = slice(first, last)
        return Memberships(self.codes[rows], self.samples[rows] - start, self.weights[rows], stop - start)

    def repeated(self, repeats: int) -> Memberships:
        """The memberships of as many samples for each one, one after another."""
        samples = (self.samples[:, None] * repeats + np.arange(repeats)).ravel()
        order = samples.argsort(kind="stable")
        codes, weights = np.repeat(self.codes, repeats), np.repeat(self.weights, repeats)
        return Memberships(codes[order], samples[order], weights[order], self.size * repeats)

    def settled(self) -> CodeArray | Memberships:
        """The memberships; or the code of each sample, if each has one expert of weight 1."""
        is_plain = len(self.samples) == self.size and (self.weights == 1.0).all()
        return self.codes if is_plain and (self.samples == np.arange(self.size)).all() else self


class ForAll(NamedTuple):
    """One route with several experts, or with none, for however many samples there are.

    Attributes:
        one: The memberships of one sample.
    """

    one: Memberships

    def spread(self, size: int) -> Memberships:
        """The memberships of so many samples."""
        codes, _, weights, _ = self.one
        samples = np.repeat(np.arange(size, dtype=np.int64), len(codes))
        return Memberships(np.tile(codes, size), samples, np.tile(weights, size), size)


def membership_of(codes: CodeArray) -> Memberships:
    """The memberships of samples with one expert each."""
    size = len(codes)
    return Memberships(codes, np.arange(size, dtype=np.int64), np.ones(size), size)


def merged(
    codes: CodeArray, samples: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], size: int
) -> Memberships:
    """Memberships in any order, with the weights of equal ones added up, without those that count as 0."""
    keys = samples * (int(codes.max(initial=0)) + 1) + codes
    if not (keys[1:] > keys[:-1]).all():
        # Nearly sorted, which this sort makes use of.
        order = keys.argsort(kind="stable")
        keys = keys[order]
        is_first = np.concatenate([[True], keys[1:] != keys[:-1]])
        codes, samples = codes[order][is_first], samples[order][is_first]
        weights = np.bincount(is_first.cumsum() - 1, weights=weights[order]).astype(np.float64, copy=False)
    weights = np.where(np.abs(weights - 1.0) < _CLOSE, 1.0, weights)
    counts = weights >= LEAST_WEIGHT
    return Memberships(codes[counts], samples[counts], weights[counts], size)


def joined(parts: Sequence[CodeArray | Memberships]) -> CodeArray | Memberships:
    """The samples of several batches, one batch after another."""
    if not any(isinstance(part, Memberships) for part in parts):
        return np.concatenate([part for part in parts if not isinstance(part, Memberships)])
    whole = [part if isinstance(part, Memberships) else membership_of(part) for part in parts]
    starts = np.cumsum([0, *(part.size for part in whole)])
    return Memberships(
        np.concatenate([part.codes for part in whole]),
        np.concatenate([part.samples + start for part, start in zip(whole, starts, strict=False)]),
        np.concatenate([part.weights for part in whole]),
        int(starts[-1]),
    )
