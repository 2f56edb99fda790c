"""The count of accuracy, on words made by hand."""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.multilingual.learning.batches import Batch, Collator
from benchmarks.multilingual.learning.hierarchy import NetworkSettings
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.results.evaluation import (
    Example,
    LanguageScore,
    ends_in,
    examples_of,
    lemmas_of,
    macro_mean,
    pick_rows,
    predict,
    rule_accuracy,
    score_languages,
    table_lemmas,
)
from benchmarks.multilingual.words.corpus import TEST, TRAIN, LanguageSample
from benchmarks.multilingual.words.evidence import Evidence, gather_evidence
from benchmarks.multilingual.words.rules import IDENTITY, EditRule, decode
from benchmarks.multilingual.words.vocabulary import NO_RULE, Vocabulary, WordTable, build_table, build_vocabulary

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
# in the order of their counts in the language: DROP_LAST, DROP_FIRST, IDENTITY.
ENGLISH = sample_of(
    "en",
    [
        ("cats", DROP_LAST, TRAIN),
        ("dogs", DROP_LAST, TRAIN),
        ("bats", DROP_LAST, TRAIN),
        ("bits", DROP_LAST, TRAIN),
        ("xdog", DROP_FIRST, TRAIN),
        ("xcat", DROP_FIRST, TRAIN),
        ("xbat", DROP_FIRST, TRAIN),
        ("dog", IDENTITY, TRAIN),
        ("bat", IDENTITY, TRAIN),
        ("hats", DROP_LAST, TEST),
        ("ooo", DROP_LAST, TEST),  # DROP_FIRST gives the same lemma
        ("men", ONLY_IN_TEST, TEST),
        ("hat", IDENTITY, TEST),
    ],
)
FINNISH = sample_of(
    "fi",
    [
        ("talot", DROP_LAST, TRAIN),
        ("maat", DROP_LAST, TRAIN),
        ("puut", DROP_LAST, TRAIN),
        ("xtalo", DROP_FIRST, TRAIN),
        ("xmaa", DROP_FIRST, TRAIN),
        ("yön", DROP_LAST, TEST),
    ],
)
# All its rules are too rare to be kept: it has nothing to choose from.
TURKISH = sample_of("tr", [("evi", DROP_LAST, TRAIN), ("evler", ONLY_IN_TEST, TEST), ("ev", IDENTITY, TEST)])
SAMPLES = [ENGLISH, FINNISH, TURKISH]
LAST, FIRST, SAME = 0, 1, 2


@pytest.fixture(scope="module")
def evidence() -> list[Evidence]:
    return [gather_evidence(sample) for sample in SAMPLES]


@pytest.fixture
def vocabulary(evidence: list[Evidence]) -> Vocabulary:
    return build_vocabulary(SAMPLES, evidence)


@pytest.fixture
def table(vocabulary: Vocabulary, evidence: list[Evidence]) -> WordTable:
    assert vocabulary.rules == [DROP_LAST, DROP_FIRST, IDENTITY]
    assert vocabulary.candidates == [[LAST, FIRST, SAME], [LAST, FIRST], []]
    built = build_table(SAMPLES, evidence, vocabulary, TEST)
    assert built.targets.tolist() == [LAST, LAST, NO_RULE, SAME, LAST, NO_RULE, NO_RULE]
    return built


def batch_of(table: WordTable, vocabulary: Vocabulary, rows: list[int]) -> Batch:
    return Collator(table, vocabulary)(torch.tensor(rows))


class OneHot(torch.nn.Module):
    """Stands in for the network: it finds the given lemma for each word."""

    def __init__(self, found: dict[str, list[int]], counts: dict[str, int]) -> None:
        super().__init__()
        self._found = found
        self._counts = counts

    def forward(self, batch: Batch) -> Any:
        wanted = {language: iter(found) for language, found in self._found.items()}
        return torch.tensor([[next(wanted[each])] for each in batch.languages])

    def logits(self, hidden: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        plan = batch.plan.levels["language"]
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


def test_a_word_is_read_the_same_in_a_mixed_batch_and_alone(vocabulary: Vocabulary, evidence: list[Evidence]) -> None:
    torch.manual_seed(0)
    table = build_table(SAMPLES, evidence, vocabulary, TRAIN)
    network = Lemmatizer(vocabulary, NetworkSettings(width=8, universal_width=8, family_width=8, language_width=8))
    rows = [12, 0, 9, 1, 14, 7]
    together = predict(network, iter([batch_of(table, vocabulary, rows)]))
    alone = predict(network, iter([batch_of(table, vocabulary, [row]) for row in rows]))
    assert together.tolist() == alone.tolist()
    assert len(set(together.tolist())) > 1


def test_the_quick_measure_counts_right_rules(table: WordTable, vocabulary: Vocabulary) -> None:
    words = batch_of(table, vocabulary, [4, 0, 3, 1])
    network: Any = OneHot({"en": [LAST, SAME, FIRST], "fi": [FIRST]}, {"en": 3, "fi": 2})
    assert rule_accuracy(network, iter([words])) == 2 / 4


def test_scores_of_hand_made_lemmas(table: WordTable) -> None:
    lemmas = {
        "experts": ["hat", "oo", "me", "ha", "yö", "evler", "ev"],
        "universal": ["ats", "oo", "xyz", "hat", "ön", "evxyz", "ev"],
    }
    scores = score_languages(SAMPLES, table, lemmas)
    assert [score.language for score in scores] == ["en", "tr", "fi"]  # by family
    by_language = {score.language: score for score in scores}
    assert by_language["en"] == LanguageScore(
        language="en",
        name="English",
        family="germanic",
        test_words=4,
        train_words=9,
        coverage=3 / 4,
        compounds=0.0,
        accuracy={"identity": 1 / 4, "experts": 2 / 4, "universal": 3 / 4},
    )
    assert by_language["fi"].accuracy == {"identity": 0.0, "experts": 1.0, "universal": 0.0}
    # A lemma that is right counts, whether or not its rule is among the candidates.
    assert by_language["tr"].accuracy == {"identity": 1 / 2, "experts": 1 / 2, "universal": 1.0}
    assert by_language["tr"].coverage == 0


def test_found_rules_make_lemmas(table: WordTable, vocabulary: Vocabulary) -> None:
    found = np.array([LAST, FIRST, LAST, SAME, LAST, NO_RULE, NO_RULE])
    assert lemmas_of(SAMPLES, table, vocabulary, found) == ["hat", "oo", "me", "hat", "yö", "evler", "ev"]


def test_the_tables_rules_are_the_samples_own(table: WordTable) -> None:
    rules = [np.arange(len(sample.forms)) % len(sample.rules) for sample in SAMPLES]
    made = [
        decode(sample.forms[word], sample.rules[rules[place][word]])
        for place, sample in enumerate(SAMPLES)
        for word in np.flatnonzero(sample.split == TEST)
    ]
    assert table_lemmas(SAMPLES, table, [each.astype(np.int32) for each in rules]) == made


@pytest.mark.parametrize(
    ("lemma", "known", "is_compound"),
    [
        ("Haustür", {"tür"}, True),
        ("tür", {"tür"}, False),
        ("Haustür", {"ür"}, False),
        ("Haustür", {"Haus"}, False),
        ("ab", {"b"}, False),
    ],
)
def test_a_compound_ends_in_a_shorter_lemma(lemma: str, known: set[str], is_compound: bool) -> None:
    assert ends_in(lemma, known) == is_compound


def test_compounds_are_counted_among_distinct_lemmas_by_training_lemmas() -> None:
    words = [("tür", IDENTITY, TRAIN), ("tor", IDENTITY, TRAIN)]
    words += [(form, DROP_LAST, TEST) for form in ("haustüra", "haustürb", "hausa", "stadttora")]
    words.append(("xhaus", IDENTITY, TEST))
    sample = sample_of("de", words)
    evidence = [gather_evidence(sample)]
    [score] = score_languages([sample], build_table([sample], evidence, build_vocabulary([sample], evidence), TEST), {})
    assert score.compounds == 2 / 4


def test_a_language_without_test_words_has_no_row(table: WordTable) -> None:
    only_english = WordTable(**{name: values[:4] for name, values in vars(table).items()})
    scores = score_languages(SAMPLES, only_english, {})
    assert [(score.language, score.accuracy) for score in scores] == [("en", {"identity": 1 / 4})]


def test_another_case_is_another_lemma() -> None:
    words = sample_of("en", [("Cat", EditRule(1, "c", 0, ""), TEST), ("cat", IDENTITY, TEST), ("dog", IDENTITY, TEST)])
    assert words.lemmas == ["cat", "cat", "dog"]
    evidence = [gather_evidence(words)]
    table = build_table([words], evidence, build_vocabulary([words], evidence), TEST)
    [score] = score_languages([words], table, {})
    assert score.accuracy == {"identity": 2 / 3}


def test_the_mean_counts_every_language_once() -> None:
    def score(words: int, right: float) -> LanguageScore:
        return LanguageScore(
            language="en",
            name="",
            family="",
            test_words=words,
            train_words=0,
            coverage=1.0,
            compounds=0.0,
            accuracy={"a": right},
        )

    assert macro_mean([score(1_000, 1.0), score(1, 0.5), score(1, 0.0)], "a") == pytest.approx(0.5)


def test_decoding() -> None:
    assert decode("cats", DROP_LAST) == "cat"
    assert decode("cats", None) == "cats"
    assert decode("a", EditRule(1, "x", 1, "")) == "a"


def test_examples_are_words_with_what_each_system_makes_of_them(table: WordTable) -> None:
    lemmas = {"experts": ["a", "b", "c", "d", "e", "f", "g"]}
    assert examples_of(SAMPLES, table, lemmas, [3, 4, 5]) == [
        Example(language="en", form="hat", lemma="hat", predicted={"experts": "d"}),
        Example(language="fi", form="yön", lemma="yö", predicted={"experts": "e"}),
        Example(language="tr", form="evler", lemma="evxyz", predicted={"experts": "f"}),
    ]


def test_rows_are_spread_over_the_languages_and_follow_the_seed(table: WordTable) -> None:
    assert pick_rows(table, 9, seed=0) == list(range(7))
    assert pick_rows(table, 1, seed=1) == pick_rows(table, 1, seed=1)
    assert len({tuple(pick_rows(table, 1, seed=seed)) for seed in range(8)}) > 1
    assert table.language_ids[pick_rows(table, 1, seed=1)].tolist() == [0, 1, 2]


def test_rows_may_be_wrong_ones_alone(table: WordTable) -> None:
    wrong = [True, False, True, False, False, False, True]
    assert pick_rows(table, 9, 0, wrong) == [0, 2, 6]
