"""The figures that the job reports are of the words, the steps and the seconds that they are said to be of."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.multilingual import job
from benchmarks.multilingual.cli import main
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.job import EXPERTS, TABLE, WIDE, make_contenders, verdict_on
from benchmarks.multilingual.learning import training
from benchmarks.multilingual.learning.batches import Batch, Collator
from benchmarks.multilingual.learning.hierarchy import LEVELS, UNIVERSAL, NetworkSettings, compiler_for
from benchmarks.multilingual.learning.network import Lemmatizer, parameter_count
from benchmarks.multilingual.options import parse_options
from benchmarks.multilingual.results.evaluation import LanguageScore, rule_accuracy
from benchmarks.multilingual.studies import ablation
from benchmarks.multilingual.studies.ablation import VARIANTS, validation_accuracy
from benchmarks.multilingual.words.corpus import TEST, TRAIN, VALIDATION
from benchmarks.multilingual.words.data import Data, prepare_data
from benchmarks.multilingual.words.evidence import gather_evidence
from benchmarks.multilingual.words.rules import decode
from benchmarks.multilingual.words.suffix_table import table_rules
from benchmarks.multilingual.words.vocabulary import NO_RULE, encode_forms
from tests.interrupting import interrupt_at
from tests.slow import slow_after

LANGUAGES = ["id", "ms"]
SMALL = ["--languages", "id,ms", "--batch-size", "256", "--workers", "0", "--seed", "5"]
STEPS = 6
LEVELS_OF = {EXPERTS: LEVELS, UNIVERSAL: (UNIVERSAL,)}
SETTINGS_OF = {EXPERTS: NetworkSettings(), UNIVERSAL: NetworkSettings().universal_alone()}


@pytest.fixture(scope="module")
def data() -> Data:
    return prepare_data(LANGUAGES, Reporter())


def saved(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state


def found_rules(data: Data, folder: Path, system: str, split: int) -> dict[str, list[tuple[str, int | None, int]]]:
    """By language, each word of a split with the rule that the saved network finds and the right one.

    Word by word from the samples, by nothing of the job's own batches, tables and evaluation; ``None`` is a rule that
    the network does not know.
    """
    network = Lemmatizer(data.vocabulary, SETTINGS_OF[system], levels=LEVELS_OF[system], engine="looped").eval()
    network.load_state_dict(saved(folder)["contenders"][system]["network"])
    compiler = compiler_for(data.vocabulary)
    found = {}
    for place, sample in enumerate(data.samples):
        evidence = gather_evidence(sample)
        rows = np.flatnonzero(sample.split == split).tolist()
        forms = [sample.forms[row] for row in rows]
        names = [sample.language] * len(forms)
        batch = Batch(
            characters=torch.from_numpy(encode_forms(forms, data.vocabulary)).int(),
            targets=torch.zeros(len(forms), dtype=torch.int64),
            proposals=torch.from_numpy(evidence.proposals[rows]).long(),
            counts=torch.from_numpy(evidence.counts[rows]),
            totals=torch.from_numpy(evidence.totals[rows]),
            languages=names,
            plan=compiler({"language": names}),
        )
        with torch.inference_mode():
            (scores,) = network.logits(network(batch), batch)
        candidates = data.vocabulary.candidates[place]
        best = [candidates[each] for each in scores.argmax(-1).tolist()]
        known = {rule: each for each, rule in enumerate(data.vocabulary.rules)}
        right = [known.get(sample.rules[rule]) for rule in sample.rule_ids[rows].tolist()]
        right = [each if each in candidates else None for each in right]
        found[sample.language] = list(zip(rows, right, best, strict=True))
    return found


@pytest.mark.parametrize("system", slow_after(1, [EXPERTS, UNIVERSAL]))
def test_the_accuracy_is_of_the_test_words(system: str, uninterrupted: Path, data: Data) -> None:
    told = {each["language"]: each for each in json.loads((uninterrupted / "accuracy.json").read_text())["languages"]}
    for sample in data.samples:
        words = found_rules(data, uninterrupted, system, TEST)[sample.language]
        right = [decode(sample.forms[row], data.vocabulary.rules[best]) == sample.lemmas[row] for row, _, best in words]
        score = told[sample.language]
        assert score["accuracy"][system] == pytest.approx(sum(right) / len(right), abs=1e-9)
        assert score["test_words"] == len(words) == (sample.split == TEST).sum()
        assert score["train_words"] == (sample.split == TRAIN).sum()
        assert score["coverage"] == pytest.approx(sum(rule is not None for _, rule, _ in words) / len(words))
        same = [sample.forms[row] == sample.lemmas[row] for row, _, _ in words]
        assert score["accuracy"]["identity"] == pytest.approx(sum(same) / len(same))


def test_every_file_of_the_report_tells_the_same_accuracy(uninterrupted: Path) -> None:
    told = json.loads((uninterrupted / "accuracy.json").read_text())
    accuracy = {each["language"]: each["accuracy"] for each in told["languages"]}
    for name, digits in (("accuracy.csv", 4), ("accuracy_by_language.csv", 12)):
        with (uninterrupted / name).open() as file:
            rows = {row["language"]: row for row in csv.DictReader(file)}
        for language, by_system in accuracy.items():
            assert {system: float(rows[language][system]) for system in by_system} == pytest.approx(
                by_system, abs=10**-digits
            )
    for system, mean in told["macro_mean"].items():
        assert mean == pytest.approx(sum(each[system] for each in accuracy.values()) / 2)


def test_examples_are_test_words(uninterrupted: Path, data: Data) -> None:
    with (uninterrupted / "examples.csv").open() as file:
        rows = list(csv.DictReader(file))
    samples = {sample.language: sample for sample in data.samples}
    for row in rows:
        sample = samples[row["language"]]
        place = sample.forms.index(row["form"])
        assert (sample.split[place], sample.lemmas[place]) == (TEST, row["true_lemma"])


@pytest.mark.parametrize("system", slow_after(1, [EXPERTS, UNIVERSAL]))
def test_the_validation_is_of_validation_words(system: str, uninterrupted: Path, data: Data) -> None:
    last = [point for point in saved(uninterrupted)["progress"]["curve"] if point["contender"] == system][-1]
    assert last["step"] == STEPS
    words = [word for found in found_rules(data, uninterrupted, system, VALIDATION).values() for word in found]
    # All validation words take part, since they are few.
    assert 1_000 < len(words) <= job.VALIDATION_WORDS
    assert last["validation_accuracy"] == pytest.approx(sum(rule == best for _, rule, best in words) / len(words))


def test_the_quick_measure_counts_words_not_batches(data: Data) -> None:
    class Answers(torch.nn.Module):
        """Finds the right rule of every word of the first batch and of no other."""

        def forward(self, batch: Batch) -> Any:
            return batch.targets

        def logits(self, targets: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
            plan = batch.plan.levels["language"]
            wanted = targets.index_select(0, plan.order).split(plan.counts)
            return [torch.eye(3)[(each if len(targets) == 5 else each + 1) % 3] for each in wanted]

    def batch_of(size: int) -> Batch:
        names = ["id"] * size
        return Batch(
            characters=torch.zeros(size, 20, dtype=torch.int32),
            targets=torch.arange(size) % 3,
            proposals=torch.zeros(size, 0, dtype=torch.int64),
            counts=torch.zeros(size, 0, 0, dtype=torch.uint8),
            totals=torch.zeros(size, 0, dtype=torch.uint8),
            languages=names,
            plan=compiler_for(data.vocabulary)({"language": names}),
        )

    network: Any = Answers()
    assert rule_accuracy(network, iter([batch_of(5), batch_of(2), batch_of(1)])) == 5 / 8


def test_all_networks_take_every_step_of_theirs(uninterrupted: Path) -> None:
    told = json.loads((uninterrupted / "accuracy.json").read_text())["run"]
    for system, each in saved(uninterrupted)["contenders"].items():
        state = each["optimizer"]["state"]
        steps = round(told["words_trained"][system] / 256)
        assert {int(each["step"]) for each in state.values()} == {steps}, system
        points = [point for point in saved(uninterrupted)["progress"]["curve"] if point["contender"] == system]
        assert [point["step"] for point in points] == [1, 2, 3, 4, 5, 6]
    assert told["words_trained"][EXPERTS] == told["words_trained"][UNIVERSAL] == told["steps"] * 256 == STEPS * 256


def test_the_baselines_are_of_the_size_that_they_are_said_to_be_of(data: Data) -> None:
    experts, universal, wide = make_contenders(data, parse_options(SMALL), 0)
    assert (experts.name, universal.name, wide.name) == (EXPERTS, UNIVERSAL, WIDE)
    compute = [each.network.multiply_adds for each in (experts, universal, wide)]
    assert compute[1] == pytest.approx(compute[0], rel=0.01)
    assert parameter_count(wide.network) == pytest.approx(parameter_count(experts.network), rel=0.01)
    assert (experts.stride, universal.stride, wide.stride) == (1, 1, max(1, round(compute[2] / compute[0])))


@pytest.mark.parametrize("levels", [LEVELS, (UNIVERSAL,)])
def test_multiplications_are_those_of_the_matrices_that_a_word_passes(levels: tuple[str, ...], data: Data) -> None:
    network = Lemmatizer(data.vocabulary, NetworkSettings(), levels=levels)
    passed = 0

    def count(module: torch.nn.Module, given: tuple[torch.Tensor], _result: object) -> None:
        nonlocal passed
        passed += module.weight.numel() * (given[0].numel() // module.weight.shape[1])  # type: ignore[union-attr, operator]

    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(count)  # type: ignore[arg-type]
    network.hierarchy.engine = "looped"
    sample = data.samples[0]
    table = data.tables[TEST]
    batch = Collator(table, data.vocabulary)(torch.tensor([0]))
    network(batch)
    rules = sum(map(len, data.vocabulary.candidates)) // len(data.samples)
    assert sample.language == "id"
    assert network.multiply_adds == passed + rules * network.width


def test_the_table_is_right_as_often_as_its_rules_are(uninterrupted: Path, data: Data) -> None:
    told = {each["language"]: each for each in json.loads((uninterrupted / "accuracy.json").read_text())["languages"]}
    for sample in data.samples:
        rules = table_rules(sample)
        test = np.flatnonzero(sample.split == TEST).tolist()
        right = [decode(sample.forms[row], sample.rules[rules[row]]) == sample.lemmas[row] for row in test]
        assert told[sample.language]["accuracy"][TABLE] == pytest.approx(sum(right) / len(right), abs=1e-9)


@pytest.fixture
def one_second_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the experts; the other two take a half and a quarter. Its clock is asked twice for each step of each."""
    now = [0.0, 0]

    def read() -> float:
        now[1] += 1
        if now[1] % 2 == 0:
            now[0] += {2: 1.0, 4: 0.5, 0: 0.25}[now[1] % 6]
        return now[0]

    clock = SimpleNamespace(perf_counter=read, monotonic=training.time.monotonic)
    monkeypatch.setattr(training, "time", clock)


@pytest.mark.usefixtures("one_second_a_step")
@pytest.mark.parametrize("stopped_after", slow_after(1, [4, None, 2]))
def test_the_seconds_are_of_all_steps_and_of_the_network_s_own(
    stopped_after: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a resume: the seconds from before it count, and so do the words."""
    begin = [*SMALL, "--steps", str(STEPS), "--report", str(tmp_path)]
    if stopped_after is None:
        assert main(begin) == 0
    else:
        with monkeypatch.context() as patch:
            interrupt_at(patch, stopped_after)
            assert main(begin) == 130
        assert main(["--resume", "--workers", "0", "--report", str(tmp_path)]) == 0
    told = json.loads((tmp_path / "accuracy.json").read_text())["run"]
    assert told["training_seconds"] == {EXPERTS: STEPS, UNIVERSAL: STEPS / 2, WIDE: STEPS / 4}
    assert told["words_trained"] == dict.fromkeys((EXPERTS, UNIVERSAL, WIDE), STEPS * 256)
    speeds = {EXPERTS: 256, UNIVERSAL: 512, WIDE: 1024}
    assert told["words_per_second"] == speeds
    curve = saved(tmp_path)["progress"]["curve"]
    assert {point["contender"]: point["words_per_second"] for point in curve} == speeds


def score(**accuracy: float) -> LanguageScore:
    return LanguageScore(
        language="id", name="", family="", test_words=1, train_words=1, coverage=1.0, compounds=0.0, accuracy=accuracy
    )


@pytest.mark.parametrize(
    ("experts", "universal", "identity", "beats"),
    [
        (0.5, 0.4, 0.3, True),
        (0.5, 0.6, 0.3, False),
        (0.5, 0.4, 0.6, False),
        (0.5, 0.5, 0.3, False),
        (0.5, 0.6, 0.6, False),
    ],
)
def test_the_experts_beat_both_or_they_do_not(experts: float, universal: float, identity: float, beats: bool) -> None:
    scores = [score(experts=experts + each, universal=universal, identity=identity) for each in (-0.25, 0.25)]
    said = verdict_on(scores, [EXPERTS, UNIVERSAL, "identity"])
    assert said.startswith("the experts beat all baselines;" if beats else "the experts do NOT beat all baselines;")
    ahead = [sum(experts + each > other for each in (-0.25, 0.25)) for other in (universal, identity)]
    assert said.endswith(f"they are ahead of universal in {ahead[0]}, identity in {ahead[1]}")


def test_what_is_said_at_the_end_is_of_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    others = dict.fromkeys((WIDE, TABLE), 0.125)
    made_up = [
        score(experts=0.5, universal=0.625, identity=0.25, **others),
        score(experts=0.25, universal=0.125, identity=0.25, **others),
    ]
    monkeypatch.setattr(job, "score_languages", lambda *_: made_up)
    assert main([*SMALL, "--steps", "1", "--report", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert (
        "mean over 2 languages: experts 37.5%, universal 37.5%, wide 12.5%, table 12.5%, identity 25.0%: "
        "the experts do NOT beat"
    ) in said


@pytest.mark.parametrize("variant", ["as the job does", "universal expert alone"])
def test_the_ablation_reads_validation_words(variant: str, data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Batch] = []
    right = rule_accuracy

    def spied(network: Lemmatizer, batches: Any) -> float:
        seen.extend(batches)
        return right(network, iter(seen))

    monkeypatch.setattr(ablation, "rule_accuracy", spied)
    validation_accuracy(data, VARIANTS[variant], 1, 64, 0)
    table = data.tables[VALIDATION]
    assert torch.equal(torch.cat([batch.characters for batch in seen]), table.characters.int())
    assert torch.equal(torch.cat([batch.targets for batch in seen]), table.targets.long())


def test_a_word_without_a_known_rule_is_never_right(uninterrupted: Path, data: Data) -> None:
    missing = int((data.tables[TEST].targets == NO_RULE).sum())
    told = json.loads((uninterrupted / "accuracy.json").read_text())["languages"]
    assert missing == sum(round(each["test_words"] * (1 - each["coverage"])) for each in told)
    assert missing > 0
