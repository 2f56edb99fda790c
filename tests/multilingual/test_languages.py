from benchmarks.multilingual.words.corpus import known_languages
from benchmarks.workloads.languages import FAMILY_OF, LANGUAGES_BY_FAMILY, NAME_OF, families_of


def test_every_language_of_the_package_has_one_family_and_a_name() -> None:
    assert sorted(FAMILY_OF) == known_languages()
    assert len(FAMILY_OF) == sum(map(len, LANGUAGES_BY_FAMILY.values())) == 54
    assert len({NAME_OF[language] for language in FAMILY_OF}) == 54
    assert {code: NAME_OF[code] for code in ("cy", "eo", "sw")} == {"cy": "Welsh", "eo": "Esperanto", "sw": "Swahili"}


def test_families_of_some_languages() -> None:
    assert families_of(["fi", "de", "hu", "en"]) == ["germanic", "uralic"]
