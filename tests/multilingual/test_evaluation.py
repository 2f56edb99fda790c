"""How accuracy is counted, on words made by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import celmoe
from benchmarks.multilingual.batches import Batch, Collator
from benchmarks.multilingual.corpus import TEST, TRAIN, LanguageSample
from benchmarks.multilingual.evaluation import (
    Example,
    LanguageScore,
    decode,
    macro_mean,
    pick_examples,
    predict,
    rule_accuracy,
    score_languages,
)
from benchmarks.multilingual.network import LEVELS, Lemmatizer, NetworkSettings, hierarchy_config
from benchmarks.multilingual.rules import IDENTITY, EditRule
from benchmarks.multilingual.words import NO_RULE, Vocabulary, WordTable, build_table, build_vocabulary

DROP_LAST = EditRule(0, "", 1, "")
DROP_FIRST = EditRule(1, "", 0, "")
ONLY_IN_TEST = EditRule(0, "", 3, "xyz")


def sample_of(language: str, words: list[tuple[str, EditRule, int]]) -> LanguageSample:
    rules = list(dict.fromkeys(rule for _, rule, _ in words))
    return LanguageSample(
        language=language,
        forms=[form for form, _, _ in words],
        lemmas=[decode(form, rule) for form, rule, _ in words],
        rules=rules,
        rule_ids=np.array([rules.index(rule) for _, rule, _ in words], dtype=np.int32),
        split=np.array([split for _, _, split in words], dtype=np.uint8),
        dictionary_size=len(words),
    )


# Test words stand behind training words, so that a row of the table and a position in the sample differ. Candidates are
# in the order of the rules over all languages: DROP_LAST (3 times), DROP_FIRST (2), IDENTITY (1).
ENGLISH = sample_of(
    "en",
    [
        ("cats", DROP_LAST, TRAIN),
        ("dogs", DROP_LAST, TRAIN),
        ("xdog", DROP_FIRST, TRAIN),
        ("dog", IDENTITY, TRAIN),
        ("hats", DROP_LAST, TEST),
        ("ooo", DROP_LAST, TEST),  # DROP_FIRST gives the same lemma
        ("men", ONLY_IN_TEST, TEST),
        ("hat", IDENTITY, TEST),
    ],
)
FINNISH = sample_of("fi", [("talot", DROP_LAST, TRAIN), ("xtalo", DROP_FIRST, TRAIN), ("yön", DROP_LAST, TEST)])
# All its rules are too rare to be kept: it has nothing to choose from.
TURKISH = sample_of("tr", [("evler", ONLY_IN_TEST, TEST), ("ev", IDENTITY, TEST)])
SAMPLES = [ENGLISH, FINNISH, TURKISH]
LAST, FIRST, SAME = 0, 1, 2


@pytest.fixture
def vocabulary() -> Vocabulary:
    return build_vocabulary(SAMPLES)


@pytest.fixture
def table(vocabulary: Vocabulary) -> WordTable:
    assert vocabulary.rules == [DROP_LAST, DROP_FIRST, IDENTITY]
    assert vocabulary.candidates == [[LAST, FIRST, SAME], [LAST, FIRST], []]
    built = build_table(SAMPLES, vocabulary, TEST)
    assert built.targets.tolist() == [LAST, LAST, NO_RULE, SAME, LAST, NO_RULE, NO_RULE]
    return built


def batch_of(table: WordTable, vocabulary: Vocabulary, rows: list[int]) -> Batch:
    config = hierarchy_config(celmoe, vocabulary.languages, LEVELS, NetworkSettings())
    return Collator(table, vocabulary.languages, celmoe.RoutingCompiler(config))(torch.tensor(rows))


class OneHot(torch.nn.Module):
    """Stands in for the network: what it is told to find for a word, it finds."""

    def __init__(self, found: dict[str, list[int]], counts: dict[str, int]) -> None:
        super().__init__()
        self._found = found
        self._counts = counts

    def forward(self, batch: Batch) -> Any:
        wanted = {language: iter(found) for language, found in self._found.items()}
        return SimpleNamespace(fused_hidden=torch.tensor([[next(wanted[each])] for each in batch.languages]))

    def head(self, hidden: torch.Tensor, plan: celmoe.LevelPlan) -> list[torch.Tensor]:
        groups = hidden.index_select(0, plan.order).split(plan.counts)
        return [
            torch.eye(max(3, self._counts[language]))[group[:, 0]][:, : self._counts[language]]
            for language, group in zip(plan.present, groups, strict=True)
        ]


# Sorted by language, these are no mirror image: taking the order for its inverse is another error.
ROWS = [5, 0, 4, 1, 6, 3]


def one_hot() -> Any:
    return OneHot({"en": [FIRST, SAME, LAST], "fi": [FIRST], "tr": [0, 0]}, {"en": 3, "fi": 2, "tr": 0})


def test_predictions_are_in_the_words_order(table: WordTable, vocabulary: Vocabulary) -> None:
    batch = batch_of(table, vocabulary, ROWS)
    assert batch.languages == ["tr", "en", "fi", "en", "tr", "en"]
    order = batch.plan.levels["language"].order
    assert not torch.equal(order, batch.plan.levels["language"].inverse)
    found = predict(one_hot(), iter([batch, batch]))
    assert found.tolist() == [NO_RULE, FIRST, FIRST, SAME, NO_RULE, LAST] * 2


def test_a_word_is_read_the_same_in_a_mixed_batch_and_alone(vocabulary: Vocabulary) -> None:
    torch.manual_seed(0)
    table = build_table(SAMPLES, vocabulary, TRAIN)
    network = Lemmatizer(vocabulary, NetworkSettings(width=8, universal_width=8, family_width=8, language_width=8))
    rows = [5, 0, 4, 1, 3, 2]
    together = predict(network, iter([batch_of(table, vocabulary, rows)]))
    alone = predict(network, iter([batch_of(table, vocabulary, [row]) for row in rows]))
    assert together.tolist() == alone.tolist()
    assert len(set(together.tolist())) > 1


def test_the_quick_measure_counts_right_rules(table: WordTable, vocabulary: Vocabulary) -> None:
    words = batch_of(table, vocabulary, [4, 0, 3, 1])
    network: Any = OneHot({"en": [LAST, SAME, FIRST], "fi": [FIRST]}, {"en": 3, "fi": 2})
    assert rule_accuracy(network, iter([words])) == 2 / 4


def test_scores_of_hand_made_predictions(table: WordTable, vocabulary: Vocabulary) -> None:
    predictions = {
        # Right; another rule that gives the same lemma; a word that no rule is right for; a wrong rule.
        "experts": np.array([LAST, FIRST, LAST, LAST, LAST, NO_RULE, NO_RULE]),
        # Wrong; right; a word that no rule is right for, found as such, is wrong all the same; right.
        "universal": np.array([FIRST, LAST, NO_RULE, SAME, FIRST, NO_RULE, NO_RULE]),
    }
    scores = score_languages(SAMPLES, table, vocabulary, predictions, train_counts=[4, 2, 0])
    assert [score.language for score in scores] == ["en", "tr", "fi"]  # by family
    by_language = {score.language: score for score in scores}
    assert by_language["en"] == LanguageScore(
        language="en",
        name="English",
        family="germanic",
        test_words=4,
        train_words=4,
        coverage=3 / 4,
        accuracy={"identity": 1 / 4, "experts": 2 / 4, "universal": 2 / 4},
    )
    assert by_language["fi"].accuracy == {"identity": 0.0, "experts": 1.0, "universal": 0.0}
    assert by_language["tr"].accuracy == {"identity": 1 / 2, "experts": 0.0, "universal": 0.0}
    assert by_language["tr"].coverage == 0


def test_another_lemma_from_a_rule_outside_counts_as_wrong_even_if_it_is_right(vocabulary: Vocabulary) -> None:
    # Replacing all of it is no candidate, but taking off the last character gives the same lemma.
    rare = sample_of("en", [("oo", EditRule(2, "", 0, "o"), TEST), ("oh", IDENTITY, TEST)])
    words = build_table([rare], vocabulary, TEST)
    predictions = {"experts": np.array([LAST, SAME])}
    assert decode("oo", DROP_LAST) == rare.lemmas[0]
    [score] = score_languages([rare], words, vocabulary, predictions, [0])
    assert score.accuracy["experts"] == 1 / 2


def test_a_language_without_test_words_has_no_row(table: WordTable, vocabulary: Vocabulary) -> None:
    only_english = WordTable(
        characters=table.characters[:4],
        language_ids=table.language_ids[:4],
        targets=table.targets[:4],
        positions=table.positions[:4],
    )
    scores = score_languages(SAMPLES, only_english, vocabulary, {}, [4, 2, 0])
    assert [(score.language, score.accuracy) for score in scores] == [("en", {"identity": 1 / 4})]


def test_another_case_is_another_lemma(vocabulary: Vocabulary) -> None:
    words = sample_of("en", [("Cat", EditRule(1, "c", 0, ""), TEST), ("cat", IDENTITY, TEST), ("dog", IDENTITY, TEST)])
    assert words.lemmas == ["cat", "cat", "dog"]
    [score] = score_languages([words], build_table([words], vocabulary, TEST), vocabulary, {}, [0])
    assert score.accuracy == {"identity": 2 / 3}


def test_the_mean_counts_every_language_once() -> None:
    def score(words: int, right: float) -> LanguageScore:
        return LanguageScore(
            language="en", name="", family="", test_words=words, train_words=0, coverage=1.0, accuracy={"a": right}
        )

    assert macro_mean([score(1_000, 1.0), score(1, 0.5), score(1, 0.0)], "a") == pytest.approx(0.5)


def test_decoding() -> None:
    assert decode("cats", DROP_LAST) == "cat"
    assert decode("cats", None) == "cats"
    assert decode("a", EditRule(1, "x", 1, "")) == "a"


def test_examples_are_test_words_with_what_each_system_makes_of_them(table: WordTable, vocabulary: Vocabulary) -> None:
    found = {"experts": np.array([LAST, FIRST, LAST, FIRST, LAST, NO_RULE, NO_RULE])}
    examples = pick_examples(SAMPLES, table, vocabulary, found, count=30, seed=0)
    assert examples == [
        Example(language="en", form="hats", lemma="hat", predicted={"experts": "hat"}),
        Example(language="en", form="ooo", lemma="oo", predicted={"experts": "oo"}),
        Example(language="en", form="men", lemma="xyz", predicted={"experts": "me"}),
        Example(language="en", form="hat", lemma="hat", predicted={"experts": "at"}),
        Example(language="fi", form="yön", lemma="yö", predicted={"experts": "yö"}),
        Example(language="tr", form="evler", lemma="evxyz", predicted={"experts": "evler"}),
        Example(language="tr", form="ev", lemma="ev", predicted={"experts": "ev"}),
    ]


def test_examples_are_spread_over_the_languages_and_follow_the_seed(table: WordTable, vocabulary: Vocabulary) -> None:
    def forms(seed: int) -> list[str]:
        return [each.form for each in pick_examples(SAMPLES, table, vocabulary, {}, count=3, seed=seed)]

    assert forms(1) == forms(1)
    assert len({tuple(forms(seed)) for seed in range(8)}) > 1
    picked = pick_examples(SAMPLES, table, vocabulary, {}, count=3, seed=1)
    assert [each.language for each in picked] == ["en", "fi", "tr"]
