"""How often the lemma is right, language by language.

Axes: B words, R words sorted by language (R = B), K candidate rules of one language.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.multilingual.batches import Batch
from benchmarks.multilingual.corpus import LanguageSample
from benchmarks.multilingual.languages import FAMILY_OF, NAME_OF
from benchmarks.multilingual.network import LANGUAGE, Lemmatizer, rule_targets
from benchmarks.multilingual.rules import EditRule
from benchmarks.multilingual.words import NO_RULE, Vocabulary, WordTable

IDENTITY_BASELINE = "identity"


@torch.inference_mode()
def rule_accuracy(network: Lemmatizer, batches: Iterator[Batch]) -> float:
    """Share of the words whose highest score is the right rule: the quick measure while training goes on."""
    network.eval()
    right, words = 0, 0
    for batch in batches:
        logits = network.head(network(batch).fused_hidden, batch.plan.levels[LANGUAGE])
        pairs = zip(logits, rule_targets(batch), strict=True)
        right += int(torch.cat([scores.argmax(-1).eq(wanted) for scores, wanted in pairs]).sum())
        words += len(batch)
    return right / max(1, words)


@torch.inference_mode()
def predict(network: Lemmatizer, batches: Iterator[Batch]) -> npt.NDArray[np.int64]:
    """For each word [N], in the batches' order, the position of the best rule among its language's candidates."""
    network.eval()
    found = []
    for batch in batches:
        plan = batch.plan.levels[LANGUAGE]
        logits = network.head(network(batch).fused_hidden, plan)
        best_R = torch.cat([_best(scores) for scores in logits])
        found.append(best_R.index_select(0, plan.inverse).cpu().numpy())
    return np.concatenate(found)


def _best(scores: torch.Tensor) -> torch.Tensor:
    # A language none of whose rules is frequent enough has nothing to choose from.
    return scores.argmax(-1) if scores.shape[-1] else scores.new_full((len(scores),), NO_RULE, dtype=torch.int64)


def decode(form: str, rule: EditRule | None) -> str:
    """The lemma; a rule that does not fit leaves the form as it is."""
    lemma = None if rule is None else rule.apply(form)
    return form if lemma is None else lemma


@dataclass(frozen=True, kw_only=True)
class LanguageScore:
    """One language's row: test words, the share that any rule could get right, and the share that each system got."""

    language: str
    name: str
    family: str
    test_words: int
    train_words: int
    coverage: float
    accuracy: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One decoded test word."""

    language: str
    form: str
    lemma: str
    predicted: dict[str, str]


def score_languages(
    samples: Sequence[LanguageSample],
    words: WordTable,
    vocabulary: Vocabulary,
    predictions: Mapping[str, npt.NDArray[np.int64]],
    train_counts: Sequence[int],
) -> list[LanguageScore]:
    """Accuracy of every system on the words of ``words``, beside the identity.

    A word counts as right where the decoded lemma equals the true one; a word whose true rule is outside the frequent
    ones counts as wrong for every network, whatever it decodes to.
    """
    language_ids = words.language_ids.numpy()
    scores = []
    for place, sample in enumerate(samples):
        rows = np.flatnonzero(language_ids == place)
        if not len(rows):
            continue
        positions = words.positions.numpy()[rows].tolist()
        targets = words.targets.numpy()[rows]
        forms = [sample.forms[each] for each in positions]
        lemmas = [sample.lemmas[each] for each in positions]
        rules = [vocabulary.rules[each] for each in vocabulary.candidates[place]]
        same = [form == lemma for form, lemma in zip(forms, lemmas, strict=True)]
        accuracy = {IDENTITY_BASELINE: float(np.mean(same))}
        for system, found in predictions.items():
            right = found[rows] == targets
            for row in np.flatnonzero(~right & (targets != NO_RULE)).tolist():
                right[row] = decode(forms[row], rules[int(found[rows[row]])]) == lemmas[row]
            accuracy[system] = float(np.mean(right & (targets != NO_RULE)))
        scores.append(
            LanguageScore(
                language=sample.language,
                name=NAME_OF[sample.language],
                family=FAMILY_OF[sample.language],
                test_words=len(rows),
                train_words=train_counts[place],
                coverage=float(np.mean(targets != NO_RULE)),
                accuracy=accuracy,
            )
        )
    return sorted(scores, key=lambda score: (score.family, score.language))


def macro_mean(scores: Sequence[LanguageScore], system: str) -> float:
    """Mean over languages, each counting once."""
    return float(np.mean([score.accuracy[system] for score in scores]))


def pick_examples(
    samples: Sequence[LanguageSample],
    words: WordTable,
    vocabulary: Vocabulary,
    predictions: Mapping[str, npt.NDArray[np.int64]],
    count: int,
    seed: int,
) -> list[Example]:
    """About ``count`` test words, spread evenly over the languages, right and wrong as they come."""
    generator = np.random.default_rng(seed)
    language_ids = words.language_ids.numpy()
    each = max(1, round(count / len(samples)))
    examples = []
    for place, sample in enumerate(samples):
        rows = np.flatnonzero(language_ids == place)
        for row in sorted(generator.permutation(rows)[:each].tolist()):
            position = int(words.positions[row])
            form = sample.forms[position]
            candidates = vocabulary.candidates[place]
            predicted = {}
            for system, found in predictions.items():
                best = int(found[row])
                rule = vocabulary.rules[candidates[best]] if best != NO_RULE else None
                predicted[system] = decode(form, rule)
            examples.append(
                Example(language=sample.language, form=form, lemma=sample.lemmas[position], predicted=predicted)
            )
    return examples
