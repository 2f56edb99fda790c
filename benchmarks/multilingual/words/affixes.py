"""Beginnings and endings of words as hashes, one for each length.

Axes: N words, W characters of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

# The hash of an affix that a word is too short for, and the code of a place beyond the word.
ABSENT = np.uint64(0)
# The code of the place next to the word: an affix that holds it is the whole word.
EDGE = np.uint64(1)
_FIRST_CODE = np.uint64(2)

_START = np.uint64(14695981039346656037)
_FACTOR = np.uint64(1099511628211)
_SHIFT = np.uint64(29)


def code_of(character: str) -> int:
    """The code that stands for a character in windows."""
    return ord(character) + int(_FIRST_CODE)


def without_case(codes: Hashes) -> Hashes:
    """The same codes in lower case, if that is one character; edges become places beyond the word."""
    present = np.zeros(int(codes.max(initial=0)) + 1, dtype=bool)
    present[codes] = True
    folded = np.arange(len(present), dtype=np.uint64)
    folded[: int(_FIRST_CODE)] = ABSENT
    for code in np.flatnonzero(present[int(_FIRST_CODE) :]) + int(_FIRST_CODE):
        lower = chr(int(code) - int(_FIRST_CODE)).lower()
        folded[code] = code_of(lower) if len(lower) == 1 else code
    found: Hashes = folded[codes]
    return found


def windows(words: Sequence[str], width: int, *, from_end: bool) -> Hashes:
    """Codes [N, W] of the first characters, or of the last ones in reverse; then an edge, then nothing."""
    text = np.frombuffer("".join(words).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64) + _FIRST_CODE
    # One place more than the text, for characters beyond the word's edge.
    codes = np.append(text, ABSENT)
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    ends = np.cumsum(lengths)
    place = np.arange(width)
    at = ends[:, None] - 1 - place if from_end else (ends - lengths)[:, None] + place
    found: Hashes = codes[np.where(place < lengths[:, None], at, len(text))]
    found[place == lengths[:, None]] = EDGE
    return found


def affix_hashes(codes: Hashes, longest: int) -> list[Hashes]:
    """One array [...] for each length from 1 to ``longest``, of codes [..., W]."""
    hashes = []
    running = np.full(codes.shape[:-1], _START, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for place in range(longest):
            code = codes[..., place]
            running = (running ^ code) * _FACTOR
            running ^= running >> _SHIFT
            hashes.append(np.where(code == ABSENT, ABSENT, running))
    return hashes


def proper_hashes(codes: Hashes, longest: int) -> list[Hashes]:
    """Like `affix_hashes`, of affixes alone that are shorter than the word; codes [..., W > longest]."""
    hashes = affix_hashes(codes, longest + 1)
    return [np.where(longer == ABSENT, ABSENT, shorter) for shorter, longer in pairwise(hashes)]


def joined(first: Hashes, second: Hashes) -> Hashes:
    """Hashes of pairs; absent if one of the two is."""
    with np.errstate(over="ignore"):
        both: Hashes = first * np.uint64(31) ^ second
    return np.where((first == ABSENT) | (second == ABSENT), ABSENT, both)
