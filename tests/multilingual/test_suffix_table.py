"""The baseline without training, on words made by hand."""

import numpy as np

from benchmarks.multilingual.words.corpus import TEST, TRAIN, VALIDATION
from benchmarks.multilingual.words.rules import decode
from benchmarks.multilingual.words.suffix_table import table_rules
from tests.multilingual.test_evidence import Triple, sample_of


def lemmas(words: list[Triple]) -> dict[str, str]:
    sample = sample_of(words)
    rules = table_rules(sample).tolist()
    return {form: decode(form, sample.rules[rule]) for form, rule in zip(sample.forms, rules, strict=True)}


ENDINGS: list[Triple] = [
    ("maps", "map", TRAIN),
    ("taps", "tap", TRAIN),
    ("kisses", "kiss", TRAIN),
    ("misses", "miss", TRAIN),
    ("bus", "bus", TRAIN),
    ("gapped", "gap", TEST),
    ("lasses", "lass", TEST),
    ("caps", "cap", TEST),
    ("crus", "crus", TEST),
]


def test_the_longest_known_ending_decides() -> None:
    found = lemmas([*ENDINGS, ("passes", "pass", VALIDATION)])
    assert (found["lasses"], found["caps"], found["crus"]) == ("lass", "cap", "crus")


def test_the_way_that_is_right_of_validation_words_is_taken() -> None:
    # The longest ending of "zaxo" is that of one odd word; its beginning is sure.
    words: list[Triple] = [
        ("qaxo", "qax", TRAIN),
        *((f"z{letter}o", f"{letter}o", TRAIN) for letter in "bcdfghj"),
        *((f"{letter}o", f"{letter}o", TRAIN) for letter in "klmn"),
    ]
    longest, surest = [("zaxo", "zax", VALIDATION)], [("zaxo", "axo", VALIDATION)]
    test: list[Triple] = [("zbaxo", "", TEST)]
    assert lemmas([*words, *longest, *test])["zbaxo"] == "zbax"
    assert lemmas([*words, *surest, *test])["zbaxo"] == "baxo"


def test_only_training_words_are_in_the_table() -> None:
    others: list[Triple] = [("laps", "lapse", VALIDATION), ("saps", "sapse", TEST)]
    before, after = lemmas(ENDINGS), lemmas([*ENDINGS, *others])
    assert {form: after[form] for form in before} == before


def test_a_word_with_no_known_ending_takes_the_most_frequent_rule() -> None:
    assert lemmas([("abs", "ab", TRAIN), ("cbs", "cb", TRAIN), ("q", "q", TRAIN), ("xyz", "", TEST)])["xyz"] == "xy"


def test_a_sample_without_training_words_has_a_rule_all_the_same() -> None:
    assert np.array_equal(table_rules(sample_of([("ab", "ab", TEST)])), [0])
