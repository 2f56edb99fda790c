"""The corpus as tensors: characters from both ends of a word, its evidence, and which of a language's rules is right.

Axes: N words, W characters of a window, L languages, K candidate rules of one language; M, F and T as in `evidence`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.multilingual.words.corpus import TRAIN, LanguageSample
from benchmarks.multilingual.words.evidence import Evidence
from benchmarks.multilingual.words.rules import EditRule
from benchmarks.workloads.languages import FAMILY_OF, families_of

CHARACTERS = 1_000
# Rules touch the ends, so a word is read from both: its first and its last characters, overlapping in short words.
HEAD_CHARACTERS = 8
TAIL_CHARACTERS = 12
WINDOW = HEAD_CHARACTERS + TAIL_CHARACTERS

# Stands before the first and after the last character, and so marks the word's ends.
OUTSIDE_ID = 0
UNKNOWN_ID = 1
FIRST_CHARACTER_ID = 2

# The target of a word whose rule is not among its language's candidates: never trained, always counted as wrong.
NO_RULE = -1

_CODE_POINTS = 0x110000


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The network's knowledge before training: characters, and for each language the rules it may choose from.

    ``characters`` are in the order of their ids (from `FIRST_CHARACTER_ID`), most frequent first; ``rules`` likewise;
    ``candidates`` [L][K] are positions in ``rules``, in the order of the language's `Evidence.candidates`. The last
    languages, as many as ``later``, came after the others had been trained: see `grown`.
    """

    languages: list[str]
    characters: str
    rules: list[EditRule]
    candidates: list[list[int]]
    later: int = 0

    @property
    def families(self) -> list[str]:
        """Families in the order of their ids: the first languages' sorted, then each when it came."""
        first = len(self.languages) - self.later
        later = (FAMILY_OF[each] for each in self.languages[first:])
        return list(dict.fromkeys((*families_of(self.languages[:first]), *later)))

    @property
    def later_experts(self) -> dict[str, int]:
        """The number of experts of each level that came later."""
        first = families_of(self.languages[: len(self.languages) - self.later])
        return {"family": len(self.families) - len(first), "language": self.later}

    @property
    def character_count(self) -> int:
        """Rows of an embedding table for the characters, the special ids included."""
        return FIRST_CHARACTER_ID + len(self.characters)


@dataclass(frozen=True, kw_only=True)
class WordTable:
    """The words of one split. ``characters`` int16 [N, W]; ``language_ids`` int16 [N]; ``targets`` int32 [N].

    A target is a position among the candidates of the word's language, or `NO_RULE`. ``positions`` int32 [N] are the
    words' positions in their language's sample. The evidence: ``proposals`` int16 [N, M]; ``counts`` uint8
    [N, M, F]; ``totals`` uint8 [N, T].
    """

    characters: torch.Tensor
    language_ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    proposals: torch.Tensor
    counts: torch.Tensor
    totals: torch.Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: torch.Tensor) -> WordTable:
        """The words of these rows [B]."""
        return WordTable(**{name: tensor[rows] for name, tensor in vars(self).items()})

    def followed_by(self, other: WordTable) -> WordTable:
        """These words, then the other table's."""
        return WordTable(**{name: torch.cat((tensor, getattr(other, name))) for name, tensor in vars(self).items()})

    def share_memory(self) -> WordTable:
        """The same table, readable by the loader's processes without a copy."""
        for tensor in vars(self).values():
            tensor.share_memory_()
        return self


def _code_points(forms: Sequence[str]) -> npt.NDArray[np.uint32]:
    return np.frombuffer("".join(forms).encode("utf-32-le"), dtype=np.uint32)


def build_vocabulary(samples: Sequence[LanguageSample], evidence: Sequence[Evidence]) -> Vocabulary:
    """The most frequent characters of the training words, and each language's candidate rules."""
    characters = np.zeros(_CODE_POINTS, dtype=np.int64)
    times: Counter[EditRule] = Counter()
    for sample, told in zip(samples, evidence, strict=True):
        trained = sample.split == TRAIN
        codes = _code_points([form for form, kept in zip(sample.forms, trained.tolist(), strict=True) if kept])
        found, counts = np.unique(codes, return_counts=True)
        characters[found] += counts
        rule_times = np.bincount(sample.rule_ids[trained], minlength=len(sample.rules))
        times.update({sample.rules[each]: int(rule_times[each]) for each in told.candidates.tolist()})
    # Ties are broken by the character and the rule themselves, so that the order of the languages decides nothing.
    order = np.argsort(-characters, kind="stable")[: min(CHARACTERS, int((characters > 0).sum()))]
    rules = sorted(times, key=lambda rule: (-times[rule], rule))
    ids = {rule: position for position, rule in enumerate(rules)}
    return Vocabulary(
        languages=[sample.language for sample in samples],
        characters="".join(map(chr, order.tolist())),
        rules=rules,
        candidates=[
            [ids[sample.rules[each]] for each in told.candidates.tolist()]
            for sample, told in zip(samples, evidence, strict=True)
        ],
    )


def grown(vocabulary: Vocabulary, sample: LanguageSample, told: Evidence) -> Vocabulary:
    """The vocabulary with one more language. Known entries keep their ids; new characters and rules stand behind."""
    alone = build_vocabulary([sample], [told])
    characters = "".join(each for each in alone.characters if each not in vocabulary.characters)
    known = set(vocabulary.rules)
    rules = [*vocabulary.rules, *(rule for rule in alone.rules if rule not in known)]
    ids = {rule: position for position, rule in enumerate(rules)}
    return Vocabulary(
        languages=[*vocabulary.languages, sample.language],
        characters=vocabulary.characters + characters,
        rules=rules,
        candidates=[*vocabulary.candidates, [ids[alone.rules[each]] for each in alone.candidates[0]]],
        later=vocabulary.later + 1,
    )


def only(vocabulary: Vocabulary, language: str) -> tuple[Vocabulary, list[int]]:
    """The vocabulary of one language, and the position in ``vocabulary`` of each of its rules."""
    kept = vocabulary.candidates[vocabulary.languages.index(language)]
    alone = Vocabulary(
        languages=[language],
        characters=vocabulary.characters,
        rules=[vocabulary.rules[each] for each in kept],
        candidates=[list(range(len(kept)))],
    )
    return alone, kept


def encode_forms(forms: Sequence[str], vocabulary: Vocabulary) -> npt.NDArray[np.int16]:
    """[N, W] character ids: the first characters, then the last ones, each side flush with its end of the word."""
    lookup = np.full(_CODE_POINTS, UNKNOWN_ID, dtype=np.int16)
    known = _code_points([vocabulary.characters])
    lookup[known] = np.arange(FIRST_CHARACTER_ID, FIRST_CHARACTER_ID + len(known))
    # One row more than the text, so that a place outside of every word has something to point at.
    ids = np.append(lookup[_code_points(forms)], np.int16(OUTSIDE_ID))
    lengths = np.fromiter(map(len, forms), dtype=np.int64, count=len(forms))
    ends = np.cumsum(lengths)
    starts = ends - lengths
    head = np.arange(HEAD_CHARACTERS)
    tail = np.arange(-TAIL_CHARACTERS, 0)
    at_head = np.where(head < lengths[:, None], starts[:, None] + head, len(ids) - 1)
    at_tail = np.where(-tail <= lengths[:, None], ends[:, None] + tail, len(ids) - 1)
    windows: npt.NDArray[np.int16] = ids[np.concatenate((at_head, at_tail), axis=1)]
    return windows


def build_table(
    samples: Sequence[LanguageSample], evidence: Sequence[Evidence], vocabulary: Vocabulary, split: int
) -> WordTable:
    """The words of this split, language after language."""
    parts: dict[str, list[npt.NDArray[Any]]] = {field.name: [] for field in fields(WordTable)}
    for language_id, (sample, told) in enumerate(zip(samples, evidence, strict=True)):
        chosen = np.flatnonzero(sample.split == split)
        target_of_rule = np.full(len(sample.rules), NO_RULE, dtype=np.int32)
        target_of_rule[told.candidates] = np.arange(len(told.candidates))
        parts["characters"].append(encode_forms([sample.forms[each] for each in chosen.tolist()], vocabulary))
        parts["language_ids"].append(np.full(len(chosen), language_id, dtype=np.int16))
        parts["targets"].append(target_of_rule[sample.rule_ids[chosen]])
        parts["positions"].append(chosen.astype(np.int32))
        parts["proposals"].append(told.proposals[chosen])
        parts["counts"].append(told.counts[chosen])
        parts["totals"].append(told.totals[chosen])
    return WordTable(**{name: torch.from_numpy(np.concatenate(arrays)) for name, arrays in parts.items()})
