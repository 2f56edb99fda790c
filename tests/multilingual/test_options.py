import importlib.util
from pathlib import Path

import pytest
import torch

from benchmarks.multilingual.cli import main
from benchmarks.multilingual.options import OptionError, parse_options
from celmoe.engines import ENGINES

REFUSALS = {
    ("--languages", "de,fer"): (
        "'--languages' must be codes of simplemma's 54 languages, separated by commas (got 'fer'; nearest: fr"
    ),
    (
        "--languages",
        "",
    ): "'--languages' must be codes of simplemma's 54 languages, separated by commas (got ''",
    ("--languages", "de,de"): "'--languages' must name each language once (got 'de' more than once)",
    ("--batch-size", "0"): "'--batch-size' must be a whole number, at least 1 (got '0')",
    ("--batch-size", "4k"): "'--batch-size' must be a whole number, at least 1 (got '4k')",
    ("--minutes", "0"): "'--minutes' must be a number above 0 (got '0')",
    ("--minutes", "nan"): "'--minutes' must be a number above 0 (got 'nan')",
    ("--minutes", "soon"): "'--minutes' must be a number above 0 (got 'soon')",
    ("--seed", "-1"): "'--seed' must be a whole number from 0 to 9223372036854775807 (got '-1')",
    ("--steps", "0"): "'--steps' must be a whole number, at least 1 (got '0')",
    ("--workers", "65"): "'--workers' must be a whole number from 0 to 64 (got '65')",
    ("--device", "gpu"): "'--device' must be a device that works here, such as cpu, cuda or directml (got 'gpu': ",
    ("--report", __file__): f"'--report' must be a folder (got {__file__!r}, which is a file)",
    ("--resume", "--compare"): "'--resume' and '--compare' must not stand together",
    ("--resume", "--steps", "3"): "'--resume' and '--steps' must not stand together",
    ("--lang", "de"): "unrecognized arguments: --lang de",
}


@pytest.mark.parametrize(("arguments", "message"), list(REFUSALS.items()), ids=lambda value: " ".join(value)[:24])
def test_a_refusal_is_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1


def test_engines_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    known = ["auto", *ENGINES]
    assert [parse_options(["--engine", engine]).engine for engine in known] == known
    assert main(["--engine", "loop"]) == 2
    assert capsys.readouterr().err.startswith(
        f"'--engine' must be one of {', '.join(known)} (got 'loop'; nearest: looped"
    )


def test_directml_is_refused_in_words_where_it_is_missing() -> None:
    if importlib.util.find_spec("torch_directml") is not None:
        assert parse_options(["--device", "directml"]).device.type != "cpu"
        return
    with pytest.raises(OptionError, match="must be cpu or cuda where torch-directml is missing \\(got 'directml'\\)"):
        parse_options(["--device", "directml"])


def test_defaults() -> None:
    options = parse_options([])
    assert options.engine == "auto"
    assert options.device == torch.device("cpu")
    assert options.report == Path("celmoe-report") / "multilingual"
    assert (options.languages, options.batch_size, options.seed, options.steps) == (None, None, None, None)
    assert options.minutes < 8


def test_languages_are_sorted() -> None:
    assert parse_options(["--languages", "fi, de"]).languages == ("de", "fi")


def test_resume_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", "--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"'--resume' must find a checkpoint in the report folder (got none in {str(tmp_path)!r})\n"
    )
