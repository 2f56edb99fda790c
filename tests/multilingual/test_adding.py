"""A checkpoint gets a language by the command line; a refused or stopped call leaves it as it was."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.multilingual import adding, lemmatize
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.learning import network
from benchmarks.multilingual.learning.batches import Collator, all_batches
from benchmarks.multilingual.learning.checkpoint import identity_of, read_checkpoint, vocabulary_of
from benchmarks.multilingual.learning.hierarchy import NetworkSettings, compiler_for
from benchmarks.multilingual.learning.network import Lemmatizer, LemmatizingExpert
from benchmarks.multilingual.learning.serving import network_of
from benchmarks.multilingual.results.evaluation import lemmas_of, predict
from benchmarks.multilingual.studies import newcomers
from benchmarks.multilingual.words.corpus import TEST
from benchmarks.multilingual.words.data import prepare_data
from tests.interrupting import interrupt_at

BASE = ["--languages", "id,tl", "--batch-size", "256", "--seed", "5"]
ADD = ["--add", "ms", "--warm-start", "id", "--words", "400", "--batch-size", "64", "--steps", "6"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main([*BASE, "--steps", "4", "--report", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def grown(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    assert main([*ADD, "--report", str(folder)]) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_checkpoint_has_the_language(finished: Path, grown: Path) -> None:
    before, after = read_checkpoint(finished), read_checkpoint(grown)
    identity = identity_of(after)
    assert (identity.languages, identity.added) == (("id", "tl", "ms"), (("ms", 400),))
    assert vocabulary_of(after).languages == ["id", "tl", "ms"]
    assert after["progress"] == before["progress"]
    # Every network has grown; those beside the experts have learned nothing.
    for name in ("universal", "wide"):
        old, new = (state["contenders"][name]["network"] for state in (before, after))
        assert old.keys() == new.keys()
        assert all(torch.equal(new[key][: len(value)], value) for key, value in old.items())
    experts = after["contenders"]["experts"]["network"]
    assert [key for key in experts if "ms" in key.split(".")]


def test_the_report_tells_of_it(finished: Path, grown: Path) -> None:
    with (grown / "added_ms.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["step"], row["words_seen"]) for row in rows if row["system"] == "added"] == [
        ("0", "0"),
        ("5", "320"),
        ("6", "384"),
    ]
    assert {row["system"] for row in rows} == {"added", "scratch"}
    told = json.loads((grown / "added_ms.json").read_text())
    assert list(told["accuracy"]) == ["added", "scratch", "table", "identity"]
    assert (told["train_words"], told["warm_start"], told["frozen"], told["seed"]) == (400, "id", False, 5)
    assert (grown / "added_ms.png").read_bytes().startswith(b"\x89PNG")
    page = (grown / "index.html").read_text()
    assert "Malay (ms), warm-started from Indonesian, the others trained along, 400 training words" in page
    assert f"<td>{told['accuracy']['scratch']:.1%}</td>" in page
    for element in ("table", "tr", "td", "th", "h2", "h3", "a", "section"):
        assert len(re.findall(f"<{element}[ >]", page)) == page.count(f"</{element}>"), element
    # The run's own report is of the run.
    for name in ("accuracy.csv", "accuracy.json", "training_curves.csv"):
        assert (grown / name).read_bytes() == (finished / name).read_bytes()


def test_test_accuracy_is_that_of_the_checkpoint(grown: Path) -> None:
    state = read_checkpoint(grown)
    identity = identity_of(state)
    data = prepare_data(identity.languages, Reporter(), identity.pairs, identity.added)
    trained = Lemmatizer(data.vocabulary, NetworkSettings(), engine="looped")
    trained.load_state_dict(state["contenders"]["experts"]["network"])
    table = data.tables[TEST].take(data.tables[TEST].language_ids == 2)
    collator = Collator(table, data.vocabulary)
    found = predict(trained, all_batches(table, collator, 1_000, torch.device("cpu")))
    made = lemmas_of(data.samples, table, data.vocabulary, found)
    wanted = [data.samples[2].lemmas[each] for each in table.positions.tolist()]
    right = np.mean([one == other for one, other in zip(made, wanted, strict=True)])
    told = json.loads((grown / "added_ms.json").read_text())
    assert told["accuracy"]["added"] == pytest.approx(right)
    assert told["test_words"] == len(wanted)


def test_lemmatize_builds_and_reads_one_language(
    grown: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = ["membaca", "rumah", "kebaikan", "xqzk"]
    assert lemmatize.main(["--language", "ms", "--report", str(grown), *forms]) == 0
    wanted = capsys.readouterr().out
    # Nothing of the others is read: it may be anything.
    state = read_checkpoint(grown)
    for name, each in state["contenders"].items():
        for key, value in each["network"].items():
            if name != "experts" or any(f"language.{other}." in key for other in ("id", "tl")):
                value.fill_(float("nan"))
    torch.save(state, tmp_path / "checkpoint.pt")
    built = []
    make = LemmatizingExpert.__init__

    def counted(self: LemmatizingExpert, settings: NetworkSettings, level: str) -> None:
        built.append(level)
        make(self, settings, level)

    monkeypatch.setattr(network.LemmatizingExpert, "__init__", counted)
    assert lemmatize.main(["--language", "ms", "--report", str(tmp_path), *forms]) == 0
    assert built == ["universal", "family", "language"]
    assert capsys.readouterr().out == wanted
    assert wanted.count(" -> ") == len(forms)


@pytest.mark.parametrize("language", ["id", "tl", "ms"])
def test_one_languages_network_answers_like_the_whole_one(language: str, grown: Path) -> None:
    state = read_checkpoint(grown)
    identity = identity_of(state)
    data = prepare_data(identity.languages, Reporter(), identity.pairs, identity.added)
    place = data.vocabulary.languages.index(language)
    whole = Lemmatizer(data.vocabulary, NetworkSettings(), engine="looped").eval()
    whole.load_state_dict(state["contenders"]["experts"]["network"])
    alone, vocabulary = network_of(state, language)
    table = data.tables[TEST].take(data.tables[TEST].language_ids == place).take(torch.arange(50))
    rows = torch.arange(50)
    one = Collator(table, data.vocabulary)(rows)
    other = Collator(table, replace(vocabulary, languages=[language] * 3), compiler_for(vocabulary))(rows)
    with torch.no_grad():
        (wanted,) = whole.logits(whole(one), one)
        (found,) = alone.eval().logits(alone(other), other)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_run_with_an_added_language_is_finished_and_can_go_on(
    grown: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(grown, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    assert main(["--resume", "--report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("nothing is left to train\n")
    assert contents(tmp_path) == before
    # Another one, of a family and with characters of its own; frozen, and not warm-started.
    again = ["--add", "he", "--freeze", "--words", "300", "--batch-size", "64", "--steps", "2"]
    assert main([*again, "--report", str(tmp_path)]) == 0
    assert main(["--resume", "--steps", "2", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "its family semitic is new" in said
    assert "mean over 4 languages" in said
    run = json.loads((tmp_path / "accuracy.json").read_text())["run"]
    assert (run["languages"], run["added"]) == (["id", "tl", "ms", "he"], [["ms", 400], ["he", 300]])
    page = (tmp_path / "index.html").read_text()
    assert page.count("<h3>Malay (ms), warm-started") == page.count("<h3>Hebrew (he), without a warm start") == 1
    assert main(["--resume", "--report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("nothing is left to train\n")
    assert lemmatize.main(["--language", "he", "--report", str(tmp_path), "ספרים"]) == 0
    assert "ספרים -> " in capsys.readouterr().out


@pytest.mark.slow
def test_a_new_run_tells_nothing_of_languages_added_to_the_last_one(grown: Path, tmp_path: Path) -> None:
    shutil.copytree(grown, tmp_path, dirs_exist_ok=True)
    assert main([*BASE, "--steps", "1", "--report", str(tmp_path)]) == 0
    assert "Malay" not in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_the_frozen_are_told_to_be_as_they_were(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    assert main([*ADD, "--freeze", "--report", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "added_ms.json").read_text())
    assert told["others_before"] == told["others_after"]
    before, after = read_checkpoint(finished), read_checkpoint(tmp_path)
    old, new = (state["contenders"]["experts"] for state in (before, after))
    for key, value in old["network"].items():
        assert torch.equal(new["network"][key][: len(value)], value), key
    for name, own in old["optimizer"]["state"].items():
        for key, value in own.items():
            if value.ndim:
                assert torch.equal(new["optimizer"]["state"][name][key][: len(value)], value), (name, key)


REFUSED = {
    ("--add", "id"): "'--add' must be a language that the checkpoint does not have (got 'id', and it has id, tl)\n",
    ("--add", "xx"): "'--add' must be the code of one of simplemma's 54 languages (got 'xx'; ",
    ("--add", "ms", "--warm-start", "de"): "'--warm-start' must be a language of the checkpoint (got 'de'; nearest: id",
    ("--add", "ms", "--warm-start", "ms"): "'--warm-start' must be a language of the checkpoint (got 'ms'; ",
    ("--add", "ms", "--words", "1"): "'--words' must leave a rule that the words have twice (got 1)\n",
    ("--add", "ms", "--words", "0"): "'--words' must be a whole number, at least 1 (got '0')\n",
    ("--add", "ms", "--steps", "0"): "'--steps' must be a whole number, at least 1 (got '0')\n",
    ("--add", "ms", "--resume"): "'--add' must stand without '--resume' (got both: the checkpoint knows the rest)\n",
    ("--add", "ms", "--compare"): "'--add' must stand without '--compare' (got both: ",
    ("--add", "ms", "--languages", "id"): "'--add' must stand without '--languages' (got both: ",
    ("--add", "ms", "--pairs", "9"): "'--add' must stand without '--pairs' (got both: ",
    ("--warm-start", "id"): "'--warm-start' must stand with '--add' (got it alone: no language is added)\n",
    ("--freeze",): "'--freeze' must stand with '--add' (got it alone: no language is added)\n",
    ("--words", "9"): "'--words' must stand with '--add' (got it alone: no language is added)\n",
    ("--add",): "'--add' must be followed by a value (got none)\n",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_a_refused_call_changes_nothing(
    arguments: tuple[str, ...], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    assert main([*arguments, "--report", str(finished)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(REFUSED[arguments])
    assert said.count("\n") == 1
    assert contents(finished) == before


def test_adding_without_a_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--add", "ms", "--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"'--add' must find a checkpoint in the report folder (got none in {str(tmp_path)!r})\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_takes_no_language(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        assert main([*BASE, "--steps", "4", "--report", str(tmp_path)]) == 130
    capsys.readouterr()
    assert main([*ADD, "--report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        "'--add' must find a finished run (got one at step 2 of 4; finish it by --resume)\n"
    )


@pytest.mark.parametrize("times", [1, 2])
def test_a_stopped_call_changes_nothing(
    times: int, finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)
    interrupt_at(monkeypatch, 3, times)
    assert main([*ADD, "--report", str(finished)]) == 130
    said = capsys.readouterr()
    assert (said.out.endswith("stopped; the checkpoint is as it was\n"), bool(said.err)) == (times == 1, times == 2)
    assert contents(finished) == before


def test_a_failed_write_leaves_the_checkpoint(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished)

    def fail(*args: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(adding, "save_checkpoint", fail)
    assert main([*ADD, "--report", str(finished)]) == 2
    assert capsys.readouterr().err == "a file or folder could not be used: no space left\n"
    assert contents(finished) == before


SMALL = ["--languages", "id,tl", "--base-steps", "2", "--base-batch-size", "128", "--steps", "5", "--batch-size", "64"]


def test_the_measure_of_newcomers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*SMALL, "--pairs", "ms:id", "--words", "200,all", "--report", str(tmp_path)]
    assert newcomers.main(arguments) == 0
    said = capsys.readouterr().out
    with (tmp_path / "newcomers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert (tmp_path / "newcomers.png").read_bytes().startswith(b"\x89PNG")
    systems = [*newcomers.WAYS, "scratch"]
    for words in ("200", rows[-1]["words"]):
        found = [row for row in rows if row["words"] == words]
        assert [row["system"] for row in found if row["step"] == "5"] == systems
        assert [row["step"] for row in found] == ["0", "5"] * len(systems)
        ends = ", ".join(f"{float(row['test_accuracy']):.1%}" for row in found if row["test_accuracy"])
        assert f"ms from id, {int(words):,} words: {ends}\n" in said
        frozen = next(row for row in found if row["system"] == "warm, others frozen" and row["test_accuracy"])
        assert f"{float(frozen['others_after']):.2%} of their validation words" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pairs", "ms"], "'--pairs' must be language:neighbour, separated by commas (got 'ms')\n"),
        (["--pairs", "ms:xx"], "'--pairs' must be the code of one of simplemma's 54 languages (got 'xx'; "),
        (["--pairs", "ms:id,id:tl"], "'--pairs' must have neighbours that are not held back (got 'id')\n"),
        ([*SMALL, "--pairs", "ms:de"], "'--languages' must have the neighbours in '--pairs' (got none of 'de')\n"),
        (["--words", "some"], "'--words' must be a whole number, at least 1 (got 'some')\n"),
    ],
)
def test_newcomers_that_can_t_be_measured_are_refused(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert newcomers.main(arguments) == 2
    assert capsys.readouterr().err.startswith(sentence)
