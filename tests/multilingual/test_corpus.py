from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.words import corpus, data
from benchmarks.multilingual.words.corpus import TEST, TRAIN, VALIDATION, LanguageSample
from benchmarks.multilingual.words.data import EVIDENCE, read_evidence, read_samples

CAP = 3_000
LANGUAGES = ["id", "ms"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("words")


@pytest.fixture(scope="module")
def samples(folder: Path) -> list[LanguageSample]:
    built: list[str] = []
    corpus.build_samples(LANGUAGES, CAP, folder, built.append, builders=1)
    assert sorted(built) == LANGUAGES
    return [corpus.load_sample(each, corpus.cache_path(folder, each, CAP)) for each in LANGUAGES]


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


@pytest.fixture
def cache(samples: list[LanguageSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CELMOE_CACHE", str(tmp_path))
    for sample in samples:
        corpus.save_sample(sample, corpus.cache_path(tmp_path / "multilingual", sample.language, CAP))
    return tmp_path / "multilingual"


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The languages whose dictionaries are read from here on."""
    found: list[str] = []
    draw = corpus.draw_sample

    def note(language: str, cap: int) -> LanguageSample:
        found.append(language)
        return draw(language, cap)

    monkeypatch.setattr(corpus, "draw_sample", note)
    return found


def test_a_cached_language_is_not_drawn_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    languages = drawn(monkeypatch)
    assert [sample.language for sample in read_samples(LANGUAGES, Reporter(), CAP)] == LANGUAGES
    assert languages == []


@pytest.mark.parametrize("damage", ["cut", "empty", "no archive", "a flipped byte"])
def test_a_damaged_file_is_drawn_again(
    damage: str, samples: list[LanguageSample], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = corpus.cache_path(cache, "ms", CAP)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut": whole[:middle],
        "empty": b"",
        "no archive": b"not an archive",
        "a flipped byte": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    path.write_bytes(damaged[damage])
    languages = drawn(monkeypatch)
    again = read_samples(LANGUAGES, Reporter(), CAP)
    assert languages == ["ms"]
    assert [sample.lemmas for sample in again] == [sample.lemmas for sample in samples]
    assert path.stat().st_size == len(whole)


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
        corpus.build_samples(["ms", "sw"], 100, tmp_path, stop)
    # Swahili is begun first and takes a hundred times as long.
    assert [path.name.split("-")[0] for path in tmp_path.iterdir()] == ["ms"]


def test_more_pairs_are_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "FORMS_PER_LANGUAGE", 1_000)
    few, many = (corpus.draw_sample("ms", cap) for cap in (1_000, 3_000))

    def side(sample: LanguageSample, split: int) -> set[tuple[str, str]]:
        rows = np.flatnonzero(sample.split == split).tolist()
        return {(sample.forms[row], sample.lemmas[row]) for row in rows}

    for split in (VALIDATION, TEST):
        assert side(few, split) == side(many, split) != set()
    assert side(few, TRAIN) < side(many, TRAIN)
    assert len(many.forms) < 3_000


def evidence_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(f"*{EVIDENCE}*")}


def test_evidence_is_gathered_once_and_again_where_its_file_is_damaged(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "in_builders", lambda build, languages, on_built: [build(each) for each in languages])
    (first, _) = read_evidence(LANGUAGES, Reporter(), CAP)
    files = evidence_files(cache)
    assert len(files) == 2
    path = corpus.cache_path(cache, "id", CAP, EVIDENCE)
    path.write_bytes(path.read_bytes()[:1_000])
    (again, _) = read_evidence(LANGUAGES, Reporter(), CAP)
    assert np.array_equal(again.counts, first.counts)
    assert path.stat().st_size == len(files[path.name])

    def fail(*_: object) -> None:
        pytest.fail("evidence was gathered again")

    monkeypatch.setattr(data, "in_builders", fail)
    read_evidence(LANGUAGES, Reporter(), CAP)
