"""The whole job on two small languages, for a few steps."""

import csv
import html
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import celmoe
from benchmarks.harness import peers
from benchmarks.harness.setting import processor_name
from benchmarks.multilingual import compare as comparing
from benchmarks.multilingual import job, lemmatize
from benchmarks.multilingual.batches import Batch
from benchmarks.multilingual.checkpoint import FORMAT
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.evidence import FORM_COUNTS, LEMMA_COUNTS, PROPOSALS
from benchmarks.multilingual.hierarchy_clock import HierarchyClock
from benchmarks.multilingual.losses import Losses, LossWeights
from benchmarks.multilingual.network import LEVELS, Lemmatizer, NetworkSettings, hierarchy_config
from benchmarks.multilingual.options import DEFAULT_MINUTES
from benchmarks.multilingual.rules import EditRule
from benchmarks.multilingual.schedule import Deadline
from benchmarks.multilingual.training import is_stacked, make_contender, train_step
from benchmarks.multilingual.words import WINDOW, Vocabulary
from tests.interrupting import interrupt_at

ROOT = Path(__file__).parents[2]
SMALL = ["--languages", "id,ms", "--batch-size", "256"]
HERE = ["--workers", "0"]
FIGURES = ["accuracy_by_language", "expert_load", "samples_by_language", "training_curves"]


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    return {
        f"{name}.{key}": value for name, each in state["contenders"].items() for key, value in each["network"].items()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    assert main([*SMALL, *HERE, "--steps", "6", "--seed", "5", "--report", str(folder)]) == 0
    return folder


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """The modules that were to be compiled, and are not: it would take longer than all else."""
    found: list[torch.nn.Module] = []

    def note(module: torch.nn.Module) -> None:
        found.append(module)

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    return found


def check_facts(facts: dict[str, Any]) -> None:
    """A figure without its setting can't be compared with another."""
    assert facts["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "celmoe": celmoe.__version__,
        "simplemma": version("simplemma"),
    }
    assert abs(datetime.now(UTC) - datetime.fromisoformat(facts["date"])) < timedelta(minutes=30)
    assert facts["machine"] == {"system": platform.platform(), "processor": processor_name(), "accelerator": None}
    assert (facts["threads"], facts["device"], facts["ranks"]) == (torch.get_num_threads(), "cpu", 1)
    assert facts["minutes"] == DEFAULT_MINUTES
    assert facts["network"]["width"] == NetworkSettings().width
    assert facts["loss_weights"] == asdict(LossWeights())


def test_the_report_is_whole(uninterrupted: Path) -> None:
    for name in FIGURES:
        assert (uninterrupted / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert len((uninterrupted / f"{name}.csv").read_text().splitlines()) > 1
    table = json.loads((uninterrupted / "accuracy.json").read_text())
    assert table["run"]["steps"] == 6
    assert table["run"]["words_trained"]["experts"] == 6 * 256
    check_facts(table["run"])
    assert table["run"]["languages"] == ["id", "ms"]
    with (uninterrupted / "accuracy.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["language"] for row in rows] == ["id", "ms"]
    for row, score in zip(rows, table["languages"], strict=True):
        for system in ("experts", "universal", "wide", "table", "identity"):
            assert float(row[system]) == pytest.approx(score["accuracy"][system], abs=1e-4)
    with (uninterrupted / "costs.csv").open() as file:
        costs = {row["system"]: row for row in csv.DictReader(file)}
    assert list(costs) == ["experts", "universal", "wide", "table", "identity"]
    for system, mean in table["macro_mean"].items():
        assert float(costs[system]["mean"]) == pytest.approx(mean)
        assert costs[system]["parameters"] == str(table["run"]["parameters"].get(system, ""))
    for name in ("examples", "errors"):
        with (uninterrupted / f"{name}.csv").open() as file:
            examples = list(csv.DictReader(file))
        assert [row["language"] for row in examples[:: len(examples) // 2]] == ["id", "ms"]
    assert all(row["experts"] != row["true_lemma"] for row in examples)


def test_the_page_shows_every_figure_and_table(uninterrupted: Path) -> None:
    page = (uninterrupted / "index.html").read_text(encoding="utf-8")
    for name in FIGURES:
        assert f'src="{name}.png"' in page
    run = json.loads((uninterrupted / "accuracy.json").read_text())
    for system, mean in run["macro_mean"].items():
        assert f"<td class=text>{system}</td><td>{mean:.1%}</td>" in page
    for language in ("Indonesian", "Malay"):
        assert language in page
    with (uninterrupted / "errors.csv").open() as file:
        for row in csv.DictReader(file):
            assert f"<td class=text>{html.escape(row['form'])}</td>" in page
    # It is whole: every element that opens closes.
    for element in ("table", "tr", "td", "th", "h2", "h3", "a", "span"):
        assert len(re.findall(f"<{element}[ >]", page)) == page.count(f"</{element}>"), element


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


def test_the_load_counts_every_word_once_a_level(uninterrupted: Path) -> None:
    with (uninterrupted / "expert_load.csv").open() as file:
        rows = list(csv.DictReader(file))
    for level in ("universal", "family", "language"):
        assert sum(float(row["words_per_step"]) for row in rows if row["level"] == level) == pytest.approx(256)


def test_the_same_seed_gives_the_same_parameters_with_loader_processes_too(uninterrupted: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--workers", "1", "--steps", "6", "--seed", "5", "--report", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.multilingual", *arguments],
        cwd=ROOT,
        # The child takes this process's number of threads: another number sums in another order.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mean over 2 languages" in done.stdout
    ours, theirs = parameters(uninterrupted), parameters(tmp_path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_resumed_run_equals_an_uninterrupted_one(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main([*SMALL, *HERE, "--steps", "6", "--seed", "5", "--report", str(tmp_path)]) == 130
    said = capsys.readouterr().out
    assert "training 6 steps of 256 words, 1,536 words in all" in said
    command = f"python -m benchmarks.multilingual --resume --report {shlex.quote(str(tmp_path))}"
    assert f"stopped at step 3 of 6; go on with: {command}\n" in said
    assert not (tmp_path / "accuracy.csv").exists()
    # State that a resumed run does not inherit from the process must come from the checkpoint.
    torch.manual_seed(12345)
    assert main(["--resume", *HERE, "--report", str(tmp_path)]) == 0
    ours, theirs = parameters(uninterrupted), parameters(tmp_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (tmp_path / "accuracy.csv").read_text() == (uninterrupted / "accuracy.csv").read_text()


def test_grouped_and_looped_runs_train_to_like_parameters_and_a_grouped_one_can_be_resumed(
    uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    grouped = [*HERE, "--engine", "grouped"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main([*SMALL, *grouped, "--steps", "6", "--seed", "5", "--report", str(whole)]) == 0
    assert "levels by engine grouped: universal looped, family looped, language grouped" in capsys.readouterr().out
    engines = {"universal": "looped", "family": "looped", "language": "grouped"}
    assert json.loads((whole / "accuracy.json").read_text())["run"]["engines"] == engines
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main([*SMALL, *grouped, "--steps", "6", "--seed", "5", "--report", str(parts)]) == 130
    assert "--engine grouped" in capsys.readouterr().out
    assert main(["--resume", *grouped, "--report", str(parts)]) == 0
    ours, resumed, looped = parameters(whole), parameters(parts), parameters(uninterrupted)
    assert all(torch.equal(ours[name], resumed[name]) for name in ours)
    for name in ours:
        torch.testing.assert_close(ours[name], looped[name], rtol=0, atol=1e-4, msg=name)


def test_a_compiled_run_tells_what_compiling_took(
    uninterrupted: Path, tmp_path: Path, compiled: list[torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, *HERE, "--compile", "--steps", "6", "--seed", "5", "--report", str(tmp_path)]) == 0
    (hierarchy,) = compiled
    assert isinstance(hierarchy, celmoe.HierarchicalCELMoE)
    said = capsys.readouterr().out
    assert "engine auto, stacked, compiled, device cpu" in said
    assert re.search(r"^compiled in \d+\.\d s, with a step that trains nothing$", said, re.MULTILINE)
    facts = json.loads((tmp_path / "accuracy.json").read_text())["run"]
    assert (facts["stacked"], facts["compiled"]) == (True, True)
    assert facts["compile_seconds"] > 0
    # Compiling trains nothing.
    ours, theirs = parameters(uninterrupted), parameters(tmp_path)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(("first", "then"), [([], ["--no-stacked"]), (["--no-stacked"], ["--stacked"])])
def test_a_run_goes_on_stacked_or_not(
    first: list[str], then: list[str], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        assert main([*SMALL, *HERE, *first, "--steps", "6", "--seed", "5", "--report", str(tmp_path)]) == 130
    assert main(["--resume", *HERE, *then, "--report", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "accuracy.json").read_text())["run"]["stacked"] == (then == ["--stacked"])
    ours, theirs = parameters(tmp_path), parameters(uninterrupted)
    assert list(ours) == list(theirs)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-4, msg=name)
    for contender in ("experts", "universal"):
        states = [torch.load(folder / "checkpoint.pt")["contenders"][contender] for folder in (tmp_path, uninterrupted)]
        one, other = (state["optimizer"] for state in states)
        for group, wanted in zip(one["param_groups"], other["param_groups"], strict=True):
            assert group["params"] == wanted["params"]
        assert one["state"].keys() == other["state"].keys()
        torch.testing.assert_close(one["state"], other["state"], rtol=0, atol=1e-4)


def test_resuming_a_finished_run_says_so_and_writes_nothing(
    uninterrupted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def state() -> dict[str, tuple[int, bytes]]:
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in uninterrupted.iterdir()}

    before = state()
    assert main(["--resume", *HERE, "--report", str(uninterrupted)]) == 0
    said = capsys.readouterr().out
    assert said == f"the run in {uninterrupted} is finished and its report is written: nothing is left to train\n"
    assert state() == before


def test_a_run_that_was_stopped_before_its_report_is_reported_when_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job, "predict", interrupt)
        assert main([*SMALL, *HERE, "--steps", "2", "--report", str(tmp_path)]) == 130
    assert capsys.readouterr().err.startswith("stopped; the checkpoint of step 2 is kept: python -m ")
    before = parameters(tmp_path)
    assert main(["--resume", *HERE, "--report", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "accuracy.json").read_text())["run"]["steps"] == 2
    assert all(torch.equal(value, before[name]) for name, value in parameters(tmp_path).items())


@pytest.mark.parametrize(("stop_at", "kept"), [(1, None), (5, 4)])
def test_a_second_interrupt_tells_the_truth_about_the_checkpoint(
    stop_at: int,
    kept: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt_at(monkeypatch, stop_at, times=2)
    # A validation, and with it a checkpoint, every second step.
    assert main([*SMALL, *HERE, "--steps", "20", "--report", str(tmp_path)]) == 130
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    if kept is None:
        assert said.startswith("stopped before the first checkpoint")
        assert list(tmp_path.iterdir()) == []
    else:
        assert said.startswith(f"stopped; the checkpoint of step {kept} is kept: python -m benchmarks.multilingual ")
        assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"] == kept


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Writes beyond so many bytes of a file fail."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


# At the start, in the midst, in the last record.
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_full_disk_keeps_the_checkpoint_before(
    share: float,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = (uninterrupted / "checkpoint.pt").read_bytes()
    (tmp_path / "checkpoint.pt").write_bytes(before)
    save = job.save_checkpoint

    def save_on_full_disk(*args: Any) -> Path:
        with full_disk(int(share * len(before))):
            return save(*args)

    monkeypatch.setattr(job, "save_checkpoint", save_on_full_disk)
    assert main([*SMALL, *HERE, "--steps", "1", "--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "a file or folder could not be used: [Errno 27] File too large\n"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_resuming_another_run_is_refused(uninterrupted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--resume", "--seed", "6", "--report", str(uninterrupted)]) == 2
    assert capsys.readouterr().err == "'--seed' must be what the checkpoint was trained with, 5 (got 6)\n"
    assert main(["--resume", "--pairs", "9", "--report", str(uninterrupted)]) == 2
    assert capsys.readouterr().err == "'--pairs' must be what the checkpoint was trained with, 40000 (got 9)\n"
    assert main(["--resume", "--languages", "ms", "--report", str(uninterrupted)]) == 2
    assert capsys.readouterr().err == "'--languages' must be what the checkpoint was trained with, id,ms (got ms)\n"


def flip(path: Path) -> None:
    """One bit of a tensor, which PyTorch itself would load."""
    state = torch.load(path, weights_only=True)
    tensor = next(iter(state["contenders"]["experts"]["network"].values()))
    data = bytearray(path.read_bytes())
    data[data.index(tensor.numpy().tobytes())] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "text": lambda path: path.write_bytes(b"not a checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "a bit": flip,
    "a tensor": lambda path: torch.save(torch.ones(2), path),
    "code": lambda path: torch.save(print, path),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    damage: str, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes((uninterrupted / "checkpoint.pt").read_bytes())
    DAMAGES[damage](tmp_path / "checkpoint.pt")
    assert main(["--resume", "--report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("'--resume' must find a whole checkpoint (got ")
    assert said.count("\n") == 1


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"format": FORMAT - 1}, tmp_path / "checkpoint.pt")
    assert main(["--resume", "--report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"'--resume' must find a checkpoint of format {FORMAT} (got format {FORMAT - 1} in ")
    assert said.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends no interrupt to another process")
@pytest.mark.parametrize(
    ("steps", "awaited", "seconds"),
    [(100_000, "training", 0), (100_000, "training", 1), (300, "step", 0)],
    ids=["at once", "soon", "in the midst"],
)
def test_interrupting_the_process_saves_and_says_how_to_go_on(
    steps: int, awaited: str, seconds: float, tmp_path: Path
) -> None:
    # The looped engine traces nothing, so it prints no line about slow tracing.
    arguments = [*SMALL, "--engine", "looped", "--workers", "1", "--steps", str(steps), "--report", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.multilingual", *arguments],
        cwd=ROOT,
        # Threads that wait for one another take minutes over a few steps if another program uses the processors.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(awaited):
                break
        time.sleep(seconds)
        # Signals the process alone: a signal to its whole group would end its loader processes on its behalf.
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        # One that did not stop must not go on training behind the other tests.
        process.kill()
    assert process.returncode == 130, err
    assert "go on with: python -m benchmarks.multilingual --resume" in out
    assert err == ""
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["progress"]["step"]
    assert f"stopped at step {saved} of {steps};" in out


def test_a_bounded_run_ends_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun = time.monotonic()
    assert main(["--languages", "ms", "--minutes", "0.05", *HERE, "--report", str(tmp_path)]) == 0
    assert time.monotonic() - begun < 30
    assert "mean over 1 languages" in capsys.readouterr().out


@pytest.mark.parametrize(("read_for", "is_little"), [(10, False), (400, True), (600, True)])
def test_a_run_that_read_for_long_still_ends_in_time(
    read_for: float,
    is_little: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rest of the eight minutes is for training and report, if reading took many of them or few."""
    begun = time.monotonic() - read_for
    reads = [begun]
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: reads.pop() if reads else time.monotonic()))
    ends = []

    class Passed(Deadline):
        """One that has passed by now, so that nobody waits for it."""

        def __init__(self, ends_at: float, **options: Any) -> None:
            ends.append(ends_at)
            super().__init__(0.0, **options)

    monkeypatch.setattr(job, "Deadline", Passed)
    assert main([*SMALL, *HERE, "--minutes", "8", "--report", str(tmp_path)]) == 0
    assert ends == [begun + 480 - job.report_seconds(2)]
    # An untrained network has no figures: one step is always taken.
    assert json.loads((tmp_path / "accuracy.json").read_text())["run"]["steps"] == 1
    said = capsys.readouterr().out
    assert ("s of 480 are over before the training, which has " in said) == is_little
    assert "mean over 2 languages" in said


def test_the_comparison_stands_without_the_peer(
    tmp_path: Path,
    compiled: list[torch.nn.Module],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(version: str) -> None:
        raise peers.PeerUnavailableError(f"celmoe-vp=={version} could not be installed: no network")

    monkeypatch.setattr(comparing, "load_peer", missing)
    assert main([*SMALL, "--compare", "--steps", "3", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("WITHOUT THE PEER")
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    check_facts(comparison)
    systems = {each["system"]: each for each in comparison["systems"]}
    assert systems["celmoe.reference"]["largest_parameter_difference"] < 1e-4
    assert systems["no hierarchy"]["largest_parameter_difference"] is None


def test_the_comparison_with_the_peer(
    tmp_path: Path, compiled: list[torch.nn.Module], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*SMALL, "--compare", "--steps", "3", "--report", str(tmp_path)]) == 0
    systems = {each["system"]: each for each in json.loads((tmp_path / "comparison.json").read_text())["systems"]}
    said = capsys.readouterr()
    assert f"{torch.get_num_threads()} threads" in said.out
    peers_found = [comparing.PEER] if comparing.PEER in systems else []
    assert peers_found or "WITHOUT THE PEER" in said.err
    bounds = ["one expert a level", "no hierarchy"]
    ours = ["celmoe plain", "celmoe stacked", "celmoe compiled"]
    assert list(systems) == [*ours, *peers_found, "celmoe.reference", *bounds]
    (hierarchy,) = compiled
    assert any(is_stacked(name) for name, _ in hierarchy.named_parameters())
    for name, system in systems.items():
        assert system["steps"] == 3
        assert system["first_seconds"] > 0
        assert system["words_per_second"] == pytest.approx(256_000 / system["milliseconds_a_step"])
        assert (system["hierarchy_share"] is None) == (name == "no hierarchy")
        if name in {"celmoe plain", *bounds}:
            assert system["largest_parameter_difference"] is None
        else:
            assert system["largest_parameter_difference"] < 1e-4


def test_a_system_that_takes_more_than_its_share_leaves_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(version: str) -> None:
        raise peers.PeerUnavailableError("no network")

    def compile_at_every_step(module: torch.nn.Module) -> None:
        module.register_forward_pre_hook(lambda *_: time.sleep(0.5))

    monkeypatch.setattr(comparing, "load_peer", missing)
    monkeypatch.setattr(torch.nn.Module, "compile", compile_at_every_step)
    # Six systems, of which each has a twentieth of a minute.
    assert main([*SMALL, "--compare", "--steps", "12", "--minutes", "0.3", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"celmoe compiled leaves after \d s, at step \d\n", said)
    systems = {each["system"]: each for each in json.loads((tmp_path / "comparison.json").read_text())["systems"]}
    assert 1 < systems["celmoe compiled"]["steps"] < 8 < systems["celmoe stacked"]["steps"]
    assert systems["celmoe compiled"]["first_seconds"] > 1


def test_a_system_without_timed_steps_has_no_speed(
    tmp_path: Path, compiled: list[torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(version: str) -> None:
        raise peers.PeerUnavailableError("no network")

    monkeypatch.setattr(comparing, "load_peer", missing)
    assert main([*SMALL, "--compare", "--engine", "grouped", "--steps", "1", "--report", str(tmp_path)]) == 0
    systems = json.loads((tmp_path / "comparison.json").read_text())["systems"]
    assert {each["words_per_second"] for each in systems} == {None}
    assert {each["steps"] for each in systems} == {1}


def test_medians_of_a_comparison_leave_out_the_first_steps() -> None:
    untimed = [90.0] * comparing.UNTIMED_STEPS
    seconds, parts = [*untimed, 1.0, 4.0, 2.0], [*untimed, 0.9, 1.0, 1.0]
    timed = comparing.Timed(cast("Any", None), 9, cast("Any", SimpleNamespace(seconds=parts)), seconds)
    # The share's is the median of shares 0.9, 0.25 and 0.5, not the share of the medians.
    assert (timed.step_seconds, timed.hierarchy_seconds, timed.hierarchy_share) == (2.0, 1.0, 0.5)
    bare = comparing.Timed(cast("Any", None), 9, None, seconds)
    assert (bare.step_seconds, bare.hierarchy_seconds, bare.hierarchy_share) == (2.0, None, None)
    assert bare.first_seconds == sum(untimed)
    few = comparing.Timed(cast("Any", None), 9, None, untimed)
    assert (few.step_seconds, few.first_seconds) == (None, sum(untimed))


def test_the_largest_difference_is_over_all_parameters_and_both_signs() -> None:
    ours = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
    assert comparing.largest_difference(ours, {"a": torch.tensor([1.0, 2.5]), "b": torch.tensor([2.75])}) == 0.5
    assert comparing.largest_difference(ours, {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([2.0])}) == 1.0
    assert comparing.largest_difference(ours, ours) == 0.0


class TimedByHand(Lemmatizer):
    """Every part takes a time of its own, forward and backward."""

    now = 0.0

    def run_hierarchy(
        self, hidden: torch.Tensor, context: dict[str, torch.Tensor], batch: Batch
    ) -> celmoe.CELMoEOutput:
        output = super().run_hierarchy(self.takes(hidden, 10, 1_000), context, batch)
        output.fused_hidden = self.takes(output.fused_hidden, 20, 2_000)
        return output

    def takes(self, tensor: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        network = self

        class Takes(torch.autograd.Function):
            @staticmethod
            def forward(ctx, value):
                network.now += forward
                return value.clone()

            @staticmethod
            def backward(ctx, gradient):
                network.now += backward
                return gradient

        return cast("torch.Tensor", Takes.apply(tensor))


@pytest.mark.parametrize("engine", ["looped", "grouped"])
def test_the_clock_reads_the_hierarchy_and_nothing_beside(engine: str) -> None:
    vocabulary = Vocabulary(
        languages=["id", "ms"], characters="ab", rules=[EditRule(0, "", 0, "")] * 2, candidates=[[0, 1], [0, 1]]
    )
    network = TimedByHand(vocabulary, NetworkSettings(width=8, universal_width=8, family_width=8, language_width=8))
    network.hierarchy.engine = engine
    clock = HierarchyClock(network, lambda: network.now)
    encode, score = network.encoder.mix.forward, network.head.forward
    network.encoder.mix.forward = lambda places: network.takes(encode(places), 1, 100)  # type: ignore[method-assign]
    network.head.forward = (  # type: ignore[method-assign]
        lambda words, scores, batch: score(network.takes(words, 40, 4_000), scores, batch)
    )
    compiler = celmoe.RoutingCompiler(hierarchy_config(celmoe, vocabulary.languages, LEVELS, NetworkSettings()))
    languages = ["id", "ms", "ms", "id", "ms"]
    batch = Batch(
        characters=torch.zeros(5, WINDOW, dtype=torch.int32),
        targets=torch.tensor([0, 1, 0, 1, 1]),
        proposals=torch.tensor([[0, 1, *[-1] * (PROPOSALS - 2)]] * 5),
        counts=torch.zeros(5, PROPOSALS, FORM_COUNTS + LEMMA_COUNTS, dtype=torch.uint8),
        totals=torch.zeros(5, FORM_COUNTS, dtype=torch.uint8),
        languages=languages,
        plan=compiler({"language": languages}),
    )
    contender = make_contender("timed by hand", network, Losses(network, LossWeights()))
    for _ in range(2):
        train_step(contender, batch, 1e-3, done=0.0, read=False)
    assert clock.seconds == [3_030, 3_030]
    # The encoder's and the head's are outside of it.
    assert network.now == 2 * (3_030 + 101 + 4_040)
