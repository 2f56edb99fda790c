import importlib.util
import shlex
import tempfile
from pathlib import Path

import pytest
import torch

from benchmarks.harness.arguments import OptionError
from benchmarks.multilingual import job, options
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.learning.ranks import Ranks
from benchmarks.multilingual.options import parse_options, resume_command
from benchmarks.multilingual.studies import compare
from benchmarks.multilingual.studies.ablation import main as ablation
from celmoe.engines.registry import ENGINES
from celmoe.errors import UnknownExpertError

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
    ("--pairs", "0"): "'--pairs' must be a whole number, at least 1 (got '0')",
    ("--workers", "65"): "'--workers' must be a whole number from 0 to 64 (got '65')",
    ("--device", "gpu"): "'--device' must be a device that works here, such as cpu, cuda or directml (got 'gpu': ",
    ("--device", "meta"): "'--device' must be a device that works here, such as cpu, cuda or directml (got 'meta': ",
    ("--report", __file__): f"'--report' must be a folder that can be written to (got {__file__!r}: ",
    ("--report", ""): "'--report' must be a folder that can be written to (got '')",
    ("--resume", "--compare"): "'--resume' and '--compare' must not stand together (got both: ",
    ("--parallel", "dpp"): "'--parallel' must be one of ddp, fsdp, expert (got 'dpp'; nearest: ddp",
    ("--parallel", "experts"): "'--parallel' must be one of ddp, fsdp, expert (got 'experts'; nearest: expert",
    ("--parallel", "fsdp"): (
        "'--parallel' must stand under torchrun (got 'fsdp' in a process that was started alone: "
        "torchrun --nproc-per-node 2 -m benchmarks.multilingual --parallel fsdp)"
    ),
    ("--lang", "de"): "'arguments' must be options that --help shows (got '--lang'; nearest: --languages",
    ("german",): "'arguments' must be options that --help shows (got 'german'; ",
    ("--seed",): "'--seed' must be followed by a value (got none)",
    ("--report", "--resume"): "'--report' must be followed by a value (got none)",
    ("--resume=yes",): "'--resume' must stand without a value (got 'yes')",
    ("--stacked=1",): "'--stacked' must stand without a value (got '1')",
    ("--no-stacked=",): "'--no-stacked' must stand without a value (got '')",
    ("--compile=yes",): "'--compile' must stand without a value (got 'yes')",
    ("--compare", "--compile"): "'--compare' must stand without '--compile' and '--stacked' (got one of them: ",
    ("--compare", "--no-stacked"): "'--compare' must stand without '--compile' and '--stacked' (got one of them: ",
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


RANKS_REFUSALS = {
    (): "'--parallel' must be given under torchrun, as one of ddp, fsdp, expert (got none: each of the ranks, 2, ",
    ("--parallel", "fdsp"): "'--parallel' must be one of ddp, fsdp, expert (got 'fdsp'; nearest: fsdp",
    (
        "--parallel",
        "ddp",
        "--stacked",
    ): "'--parallel' must stand without '--compile' and '--stacked' (got one of them: ",
    (
        "--parallel",
        "ddp",
        "--compile",
    ): "'--parallel' must stand without '--compile' and '--stacked' (got one of them: ",
    ("--parallel", "ddp", "--compare"): "'--parallel' and '--compare' must not stand together (got both: ",
}


@pytest.mark.parametrize(("arguments", "message"), list(RANKS_REFUSALS.items()), ids=lambda value: " ".join(value)[:24])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_ranks_refuse_alike_the_first_one_says(
    arguments: tuple[str, ...],
    message: str,
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(message if rank == 0 else "")
    assert said.err.count("\n") == (1 if rank == 0 else 0)


def test_ranks_train_on_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(options, "open_device", torch.device)
    with pytest.raises(OptionError, match=r"^'--device' must be cpu where '--parallel' is given \(got 'cuda:0'\)$"):
        parse_options(["--parallel", "ddp", "--device", "cuda:0"])


def test_a_batch_has_a_word_for_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    few = parse_options(["--parallel", "ddp", "--batch-size", "3", "--report", str(tmp_path)])
    with pytest.raises(OptionError, match=r"^'--batch-size' must be at least the number of ranks, 4 \(got 3\)$"):
        job.run(few, Reporter(), Ranks(0, 4))


def test_engines_are_those_of_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    known = list(ENGINES)
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
    found = parse_options([])
    assert found.engine == "auto"
    assert found.device == torch.device("cpu")
    assert found.report == Path("celmoe-report") / "multilingual"
    assert (found.languages, found.pairs, found.batch_size, found.seed, found.steps, found.parallel) == (None,) * 6
    assert found.minutes < 8
    assert (found.stacked, found.compile) == (True, False)


def test_ranks_share_experts_that_are_not_stacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not parse_options(["--parallel", "ddp"]).stacked
    assert "stacked" not in resume_command(parse_options(["--parallel", "ddp", "--no-stacked"]))


def test_languages_are_sorted() -> None:
    assert parse_options(["--languages", "fi, de"]).languages == ("de", "fi")


def test_resume_without_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", "--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"'--resume' must find a checkpoint in the report folder (got none in {str(tmp_path)!r})\n"
    )


@pytest.mark.parametrize("mode", [[], ["--compare"]])
def test_the_report_folder_is_tried_before_any_word_is_read(
    mode: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    def read(*args: object) -> None:
        pytest.fail("words were read")

    monkeypatch.setattr(job, "prepare_data", read)
    monkeypatch.setattr(compare, "prepare_data", read)
    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    assert main([*mode, "--report", str(tmp_path / "new")]) == 2
    wanted = f"'--report' must be a folder that can be written to (got {str(tmp_path / 'new')!r}: Permission denied)\n"
    assert capsys.readouterr().err == wanted


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            OSError(28, "No space left on device"),
            "a file or folder could not be used: [Errno 28] No space left on device",
        ),
        (UnknownExpertError("level 'language' has no expert\n'xx'"), "level 'language' has no expert 'xx'"),
    ],
)
def test_what_goes_wrong_later_is_one_line_too(
    error: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(job, "prepare_data", fail)
    assert main(["--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_the_resume_command_can_be_pasted() -> None:
    assert resume_command(parse_options([])) == (
        f"python -m benchmarks.multilingual --resume --report {Path('celmoe-report') / 'multilingual'}"
    )
    arguments = ["--engine", "looped", "--device", "cpu:0", "--workers", "1", "--minutes", "20"]
    command = resume_command(parse_options(["--report", "my report; rm *", *arguments, "--seed", "3"]))
    assert shlex.split(command)[:3] == ["python", "-m", "benchmarks.multilingual"]
    again = parse_options(shlex.split(command)[3:])
    assert (again.report, again.engine, again.device) == (Path("my report; rm *"), "looped", torch.device("cpu:0"))
    assert (again.resume, again.workers, again.minutes) == (True, 1, 20)


@pytest.mark.parametrize("ways", [["--no-stacked"], ["--compile"], ["--no-stacked", "--compile"], []])
def test_a_run_is_resumed_in_its_way(ways: list[str]) -> None:
    given = parse_options(ways)
    again = parse_options(shlex.split(resume_command(given))[3:])
    assert given.stacked == again.stacked == ("--no-stacked" not in ways)
    assert given.compile == again.compile == ("--compile" in ways)


def test_ranks_are_resumed_as_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    command = shlex.split(resume_command(parse_options(["--parallel", "expert", "--report", "here"])))
    assert command[:5] == ["torchrun", "--nproc-per-node", "2", "-m", "benchmarks.multilingual"]
    again = parse_options(command[5:])
    assert (again.resume, again.parallel, again.report) == (True, "expert", Path("here"))


ABLATION_REFUSALS = {
    ("--languages", "xx"): "'--languages' must be codes of simplemma's 54 languages, separated by commas (got 'xx'; ",
    ("--steps", "0"): "'--steps' must be a whole number, at least 1 (got '0')",
    ("--seeds", "few"): "'--seeds' must be a whole number, at least 1 (got 'few')",
    ("nothing",): "'variants' must be among as the job does, ",
    ("--step", "3"): "'arguments' must be options that --help shows (got '--step'; nearest: --steps",
}


@pytest.mark.parametrize(
    ("arguments", "message"), list(ABLATION_REFUSALS.items()), ids=lambda value: " ".join(value)[:24]
)
def test_the_ablation_refuses_in_one_sentence_too(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ablation(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(message)
    assert said.err.count("\n") == 1
