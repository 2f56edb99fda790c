from hypothesis import given
from hypothesis import strategies as st

from benchmarks.multilingual.words.rules import IDENTITY, EditRule, find_rule

# Few letters, so that form and lemma often share something, and a few that are hard on string code.
words = st.text(alphabet="abcéßİ'-", max_size=12)


@given(form=words, lemma=words)
def test_the_rule_that_was_found_makes_the_lemma(form: str, lemma: str) -> None:
    assert find_rule(form, lemma).apply(form) == lemma


@given(form=words, lemma=words)
def test_a_rule_survives_being_written(form: str, lemma: str) -> None:
    rule = find_rule(form, lemma)
    assert EditRule.from_text(rule.to_text()) == rule


@given(form=words, lemma=words)
def test_what_a_rule_keeps_is_the_longest_that_both_share(form: str, lemma: str) -> None:
    rule = find_rule(form, lemma)
    kept = len(form) - rule.strip_prefix - rule.strip_suffix
    shared = {form[start:end] for start in range(len(form)) for end in range(start + 1, len(form) + 1)}
    assert kept == max((len(each) for each in shared if each in lemma), default=0)


@given(form=words)
def test_an_equal_lemma_needs_no_edit(form: str) -> None:
    assert find_rule(form, form) == IDENTITY


def test_a_circumfix() -> None:
    assert find_rule("gemacht", "machen") == EditRule(2, "", 1, "en")


def test_a_change_of_case_is_an_edit() -> None:
    assert find_rule("nEoin", "Eoin") == EditRule(1, "", 0, "")
    assert find_rule("abe", "Abe") == EditRule(1, "A", 0, "")


def test_a_form_that_is_too_short_for_the_rule() -> None:
    assert EditRule(2, "", 2, "").apply("abc") is None
    assert EditRule(2, "", 1, "").apply("abc") == ""
