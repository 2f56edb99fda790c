from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.multilingual import corpus
from benchmarks.multilingual.corpus import TEST, TRAIN, VALIDATION, LanguageSample

CAP = 3_000
LANGUAGES = ["id", "ms"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[LanguageSample]:
    built: list[str] = []
    corpus.build_missing(LANGUAGES, CAP, folder, built.append, builders=1)
    assert sorted(built) == LANGUAGES
    return corpus.load_corpus(LANGUAGES, CAP, folder)


def test_no_lemma_is_on_two_sides(samples: list[LanguageSample]) -> None:
    sides: dict[str, set[int]] = {}
    for sample in samples:
        for lemma, side in zip(sample.lemmas, sample.split.tolist(), strict=True):
            sides.setdefault(lemma, set()).add(side)
    assert all(len(each) == 1 for each in sides.values())
    assert {side for each in sides.values() for side in each} == {TRAIN, VALIDATION, TEST}


@given(lemma=st.text(alphabet="aAßẞİ\u0131\u03c3ςΣǅŉ-", max_size=10))
def test_case_does_not_separate_a_lemma_from_itself(lemma: str) -> None:
    assert corpus.split_of(lemma) == corpus.split_of(lemma.casefold())


def test_shares_of_the_split(samples: list[LanguageSample]) -> None:
    split = np.concatenate([sample.split for sample in samples])
    assert np.mean(split == TEST) == pytest.approx(0.08, abs=0.03)
    assert np.mean(split == VALIDATION) == pytest.approx(0.04, abs=0.03)


def test_a_sample_is_what_the_dictionary_says(samples: list[LanguageSample]) -> None:
    for sample in samples:
        dictionary = corpus.DefaultDictionaryFactory(1).get_dictionary(sample.language)
        assert sample.dictionary_size == len(dictionary)
        assert len(sample.forms) == len(set(sample.forms)) == CAP
        assert [dictionary[form] for form in sample.forms] == sample.lemmas
        rules = [sample.rules[each] for each in sample.rule_ids.tolist()]
        assert [rule.apply(form) for rule, form in zip(rules, sample.forms, strict=True)] == sample.lemmas


def test_a_sample_is_drawn_the_same_way_twice(samples: list[LanguageSample]) -> None:
    again = corpus.draw_sample("ms", CAP)
    before = samples[LANGUAGES.index("ms")]
    assert (again.forms, again.lemmas, again.rules) == (before.forms, before.lemmas, before.rules)


def test_a_cached_language_is_not_built_again(samples: list[LanguageSample], folder: Path) -> None:
    built: list[str] = []
    corpus.build_missing(LANGUAGES, CAP, folder, built.append)
    assert built == []


def test_a_failed_write_leaves_nothing(
    samples: list[LanguageSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        corpus.save_sample(samples[0], tmp_path / "id.npz")
    assert list(tmp_path.iterdir()) == []


def test_stopping_the_builders_does_not_wait_for_them(tmp_path: Path) -> None:
    def stop(language: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        corpus.build_missing(["ms", "sw"], 100, tmp_path, stop)
    # Swahili is begun first and takes a hundred times as long.
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["ms"]
