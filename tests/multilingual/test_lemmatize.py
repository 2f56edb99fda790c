"""Words lemmatized by a run's checkpoint."""

import csv
from pathlib import Path

import pytest

from benchmarks.multilingual import lemmatize


def test_words_are_lemmatized_by_the_checkpoint(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (uninterrupted / "examples.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["language"] == "id"]
    forms = [row["form"] for row in rows]
    assert lemmatize.main(["--language", "id", "--report", str(uninterrupted), *forms, "xqzk"]) == 0
    said = [line.split(" -> ") for line in capsys.readouterr().out.splitlines()]
    assert said[:-1] == [[row["form"], row["experts"]] for row in rows]
    assert said[-1][0] == "xqzk"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--language", "id"], "'words' must be word forms (got none)"),
        (["rumah"], "'--language' must be given, as one of id, ms (got none)"),
        (["--language", "de", "Haus"], "'--language' must be one of id, ms (got 'de'; nearest: id)"),
        (["--language", "id", "--repot", "x"], "'arguments' must be options that --help shows (got '--repot'; "),
    ],
)
def test_lemmatizing_what_can_t_be_is_refused(
    arguments: list[str], sentence: str, uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lemmatize.main([*arguments, *(["--report", str(uninterrupted)] if "--repot" not in arguments else [])]) == 2
    assert capsys.readouterr().err.startswith(sentence)


def test_lemmatizing_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lemmatize.main(["--language", "id", "--report", str(tmp_path), "rumah"]) == 2
    assert "must find a checkpoint in the report folder" in capsys.readouterr().err
