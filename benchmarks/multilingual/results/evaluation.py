"""The accuracy of lemmas, language by language.

Axes: N words, R words sorted by language.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.multilingual.learning.batches import Batch
from benchmarks.multilingual.learning.hierarchy import LANGUAGE
from benchmarks.multilingual.learning.network import Lemmatizer, rule_targets
from benchmarks.multilingual.words.corpus import TRAIN, LanguageSample
from benchmarks.multilingual.words.rules import decode
from benchmarks.multilingual.words.vocabulary import NO_RULE, Vocabulary, WordTable
from benchmarks.workloads.languages import FAMILY_OF, NAME_OF

IDENTITY_BASELINE = "identity"


# The shortest lemma that counts as the end of a longer one.
SHORTEST_END = 3


@torch.inference_mode()
def rule_accuracy(network: Lemmatizer, batches: Iterator[Batch]) -> float:
    """Share of the words whose highest score is the right rule: the quick measure while training goes on."""
    network.eval()
    right, words = 0, 0
    for batch in batches:
        pairs = zip(network.logits(network(batch), batch), rule_targets(batch), strict=True)
        right += int(torch.cat([_best(scores).eq(wanted) & wanted.ne(NO_RULE) for scores, wanted in pairs]).sum())
        words += len(batch)
    return right / max(1, words)


@torch.inference_mode()
def predict(network: Lemmatizer, batches: Iterator[Batch]) -> npt.NDArray[np.int64]:
    """For each word [N], in the batches' order, the position of the best rule among its language's candidates."""
    network.eval()
    found = []
    for batch in batches:
        best_R = torch.cat([_best(scores) for scores in network.logits(network(batch), batch)])
        found.append(best_R.index_select(0, batch.plan.levels[LANGUAGE].inverse).cpu().numpy())
    return np.concatenate(found)


def _best(scores: torch.Tensor) -> torch.Tensor:
    # A language none of whose rules is frequent enough has nothing to choose from.
    return scores.argmax(-1) if scores.shape[-1] else scores.new_full((len(scores),), NO_RULE, dtype=torch.int64)


def lemmas_of(
    samples: Sequence[LanguageSample], words: WordTable, vocabulary: Vocabulary, found: npt.NDArray[np.int64]
) -> list[str]:
    """The lemma of every word of the table, by the candidates found [N]."""
    triples = zip(words.language_ids.tolist(), words.positions.tolist(), found.tolist(), strict=True)
    return [
        decode(
            samples[language].forms[position],
            None if rule == NO_RULE else vocabulary.rules[vocabulary.candidates[language][rule]],
        )
        for language, position, rule in triples
    ]


def table_lemmas(
    samples: Sequence[LanguageSample], words: WordTable, table_rules: Sequence[npt.NDArray[np.int32]]
) -> list[str]:
    """The baseline's lemma of every word of the table, by its rules of each language [its sample's N]."""
    return [
        decode(samples[language].forms[position], samples[language].rules[table_rules[language][position]])
        for language, position in zip(words.language_ids.tolist(), words.positions.tolist(), strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class LanguageScore:
    """One language's row: test words, the share that any rule could get right, and the share that each system got.

    ``compounds`` is the share of test lemmas that end in a training lemma: see `ends_in`.
    """

    language: str
    name: str
    family: str
    test_words: int
    train_words: int
    coverage: float
    compounds: float
    accuracy: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One decoded test word."""

    language: str
    form: str
    lemma: str
    predicted: dict[str, str]


def ends_in(lemma: str, known: AbstractSet[str]) -> bool:
    """True if a shorter end of the lemma, of `SHORTEST_END` characters or more, is a known lemma."""
    return any(lemma[start:] in known for start in range(1, len(lemma) - SHORTEST_END + 1))


def score_languages(
    samples: Sequence[LanguageSample], words: WordTable, lemmas: Mapping[str, Sequence[str]]
) -> list[LanguageScore]:
    """Accuracy on the words of ``words`` of every system, whose ``lemmas`` [N] these are, beside the identity.

    A word counts as right if the lemma equals the dictionary's.
    """
    language_ids = words.language_ids.numpy()
    scores = []
    for place, sample in enumerate(samples):
        rows = np.flatnonzero(language_ids == place).tolist()
        if not rows:
            continue
        positions = words.positions[rows].tolist()
        wanted = [sample.lemmas[each] for each in positions]
        found = {IDENTITY_BASELINE: [sample.forms[each] for each in positions]}
        found |= {system: [each[row] for row in rows] for system, each in lemmas.items()}
        trained = {sample.lemmas[each] for each in np.flatnonzero(sample.split == TRAIN).tolist()}
        tested = set(wanted)
        scores.append(
            LanguageScore(
                language=sample.language,
                name=NAME_OF[sample.language],
                family=FAMILY_OF[sample.language],
                test_words=len(rows),
                train_words=int((sample.split == TRAIN).sum()),
                coverage=float(words.targets[rows].ne(NO_RULE).float().mean()),
                compounds=sum(ends_in(lemma, trained) for lemma in tested) / len(tested),
                accuracy={system: sum(map(operator.eq, made, wanted)) / len(wanted) for system, made in found.items()},
            )
        )
    return sorted(scores, key=lambda score: (score.family, score.language))


def macro_mean(scores: Sequence[LanguageScore], system: str) -> float:
    """Mean over languages, each counting once."""
    return float(np.mean([score.accuracy[system] for score in scores]))


def examples_of(
    samples: Sequence[LanguageSample], words: WordTable, lemmas: Mapping[str, Sequence[str]], rows: Sequence[int]
) -> list[Example]:
    """These rows of ``words``, with each system's lemma."""
    examples = []
    for row in rows:
        sample, position = samples[int(words.language_ids[row])], int(words.positions[row])
        predicted = {system: found[row] for system, found in lemmas.items()}
        form, lemma = sample.forms[position], sample.lemmas[position]
        examples.append(Example(language=sample.language, form=form, lemma=lemma, predicted=predicted))
    return examples


def pick_rows(words: WordTable, each: int, seed: int, wrong: Sequence[bool] | None = None) -> list[int]:
    """At most ``each`` rows of every language, drawn by the seed from all of ``words`` or from the ``wrong`` ones."""
    generator = np.random.default_rng(seed)
    language_ids = words.language_ids.numpy()
    rows: list[int] = []
    for place in np.unique(language_ids).tolist():
        eligible = language_ids == place if wrong is None else (language_ids == place) & np.asarray(wrong)
        rows += sorted(generator.permutation(np.flatnonzero(eligible))[:each].tolist())
    return rows
