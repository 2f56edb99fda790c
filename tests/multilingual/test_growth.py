"""A trained network gets one more language, and everything that was there stays as it was."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import celmoe
from benchmarks.multilingual.console import Reporter
from benchmarks.multilingual.learning import newcomer
from benchmarks.multilingual.learning.batches import Batch, Collator, TrainingSteps
from benchmarks.multilingual.learning.growth import grow, place_rows, relearn
from benchmarks.multilingual.learning.hierarchy import FAMILY, LANGUAGE, LEVELS, UNIVERSAL, NetworkSettings
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer
from benchmarks.multilingual.learning.newcomer import Newcomer, learn, learner_from_scratch, learner_in_network
from benchmarks.multilingual.learning.schedule import FURTHER_PEAK, Deadline, learning_rate
from benchmarks.multilingual.learning.training import Contender, make_contender, train_step
from benchmarks.multilingual.words.corpus import TEST, TRAIN, VALIDATION, fewer
from benchmarks.multilingual.words.data import Data, prepare_data, read_words
from benchmarks.multilingual.words.evidence import gather_evidence
from benchmarks.multilingual.words.vocabulary import Vocabulary, build_table, build_vocabulary, only
from celmoe.optim import state_by_name

CPU = torch.device("cpu")
SIZES = NetworkSettings(width=16, character_width=4, universal_width=8, family_width=8, language_width=8)
WORDS = 300
# One of a family that is there, and one of a new family with characters of its own.
NEWCOMERS = {"ms": "id", "he": "tl"}


@pytest.fixture(scope="module")
def data() -> Data:
    return prepare_data(["id", "tl"], Reporter())


@pytest.fixture(scope="module")
def newcomers(data: Data) -> dict[str, Newcomer]:
    found = {}
    for language in NEWCOMERS:
        (sample,), (evidence,) = read_words([language], Reporter(), 40_000, [(language, WORDS)])
        found[language] = Newcomer.join(data.vocabulary, sample, evidence)
    return found


def batch_of(data: Data, vocabulary: Vocabulary, rows: slice = slice(0, 64)) -> Batch:
    table = data.tables[TRAIN]
    step = len(table) // 64
    return Collator(table, vocabulary)(torch.arange(len(table))[:: step + 1][rows])


def trained(data: Data, levels: tuple[str, ...] = LEVELS, *, stacked: bool = True) -> Contender:
    torch.manual_seed(1)
    network = Lemmatizer(data.vocabulary, SIZES, levels=levels, engine="looped")
    if stacked:
        celmoe.stack_experts(network.hierarchy)
    contender = make_contender("experts", network, Losses(network, LossWeights()))
    network.train()
    for _ in range(3):
        train_step(contender, batch_of(data, data.vocabulary), 1e-2, done=0.0, read=False)
    return contender


def logits_of(contender: Contender, batch: Batch) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        found = contender.network.eval().logits(contender.network(batch), batch)
    return dict(zip(batch.plan.levels[LANGUAGE].present, found, strict=True))


def tensors(contender: Contender) -> dict[str, torch.Tensor]:
    """Everything that training moves, by name: parameters and moments."""
    found = {f"network.{key}": value.clone() for key, value in contender.network.state_dict().items()}
    for name, own in state_by_name(contender.network, contender.optimizer)["state"].items():
        found |= {f"{key}.{name}": value.clone() for key, value in own.items() if value.ndim}
    return found


def assert_kept(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    """All tensors are as they were; those that have grown, in their first rows."""
    assert before.keys() <= after.keys()
    for name, value in before.items():
        assert torch.equal(after[name][: len(value)], value), name


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("language", NEWCOMERS)
def test_everything_that_was_there_stays(
    language: str, stacked: bool, warm: bool, data: Data, newcomers: dict[str, Newcomer]
) -> None:
    contender, newcomer = trained(data, stacked=stacked), newcomers[language]
    before, wanted = tensors(contender), logits_of(contender, batch_of(data, data.vocabulary))
    grow(contender, data.vocabulary, newcomer.vocabulary, NEWCOMERS[language] if warm else None)
    after = tensors(contender)
    assert_kept(before, after)
    found = logits_of(contender, batch_of(data, newcomer.vocabulary))
    assert all(torch.equal(found[each], wanted[each]) for each in wanted)
    for name in ("head.rules.weight", "head.bias", "encoder.languages.weight"):
        assert not after[f"exp_avg.{name}"][len(before[f"exp_avg.{name}"]) :].any()
        assert len(after[f"network.{name}"]) > len(before[f"network.{name}"])
    # The network is that of the grown vocabulary from the start, and can be loaded into one.
    torch.manual_seed(0)
    again = Lemmatizer(newcomer.vocabulary, SIZES)
    again.load_state_dict(contender.network.state_dict())
    assert again.multiply_adds == contender.network.multiply_adds
    # It trains.
    batch = batch_of(data, newcomer.vocabulary)
    contender.network.train()
    train_step(contender, batch, 1e-3, done=0.0, read=False)


def test_networks_with_the_universal_expert_alone_grow_too(data: Data, newcomers: dict[str, Newcomer]) -> None:
    contender, newcomer = trained(data, (UNIVERSAL,)), newcomers["he"]
    before = tensors(contender)
    grow(contender, data.vocabulary, newcomer.vocabulary, None)
    assert_kept(before, tensors(contender))
    Lemmatizer(newcomer.vocabulary, SIZES, levels=(UNIVERSAL,)).load_state_dict(contender.network.state_dict())


def test_a_warm_start_takes_what_the_neighbour_has(data: Data, newcomers: dict[str, Newcomer]) -> None:
    contender, newcomer = trained(data), newcomers["ms"]
    old, new = data.vocabulary, newcomer.vocabulary
    # Biases that can be told apart.
    with torch.no_grad():
        contender.network.head.bias.copy_(torch.arange(len(contender.network.head.bias)))
    grow(contender, old, new, "id")
    experts = contender.network.hierarchy.level_modules[LANGUAGE]
    for key, value in experts["id"].state_dict().items():
        assert torch.equal(experts["ms"].state_dict()[key], value)
    rows = contender.network.encoder.languages.weight
    assert torch.equal(rows[-1], rows[old.languages.index("id")])
    biases = dict(zip(new.languages, contender.network.head.bias.split(contender.network.head.counts), strict=True))
    theirs = dict(zip(old.candidates[old.languages.index("id")], biases["id"].tolist(), strict=True))
    assert biases["ms"].tolist() == [theirs.get(rule, 0.0) for rule in new.candidates[-1]]
    assert biases["ms"].any()


def test_without_a_warm_start_all_begins_afresh(data: Data, newcomers: dict[str, Newcomer]) -> None:
    contender, newcomer = trained(data), newcomers["ms"]
    grow(contender, data.vocabulary, newcomer.vocabulary, None)
    experts = contender.network.hierarchy.level_modules[LANGUAGE]
    assert not experts["ms"].judge.weight.any()
    assert experts["id"].judge.weight.any()
    assert not contender.network.head.bias.split(contender.network.head.counts)[-1].any()


def test_a_new_family_has_the_last_id_and_takes_the_sources_values(data: Data, newcomers: dict[str, Newcomer]) -> None:
    contender, newcomer = trained(data), newcomers["he"]
    grow(contender, data.vocabulary, newcomer.vocabulary, "tl")
    families = contender.network.hierarchy.level_modules[FAMILY]
    assert list(families) == newcomer.vocabulary.families == ["austronesian", "semitic"]
    for key, value in families["austronesian"].state_dict().items():
        assert torch.equal(families["semitic"].state_dict()[key], value)


def in_network(data: Data, newcomer: Newcomer, contender: Contender, *, frozen: bool, batch_size: int = 32) -> Any:
    return learner_in_network(
        contender,
        data.vocabulary,
        newcomer,
        TrainingSteps(len(newcomer.tables[TRAIN]), batch_size, 3),
        others=None if frozen else data.tables[TRAIN],
        warm_start=None,
        seed=3,
        device=CPU,
    )


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("language", NEWCOMERS)
def test_the_frozen_keep_weights_and_moments(
    language: str, stacked: bool, data: Data, newcomers: dict[str, Newcomer]
) -> None:
    contender = trained(data, stacked=stacked)
    before = tensors(contender)
    wanted = logits_of(contender, batch_of(data, data.vocabulary))
    learner = in_network(data, newcomers[language], contender, frozen=True)
    fresh = tensors(contender)
    assert learn([learner], 6) is not None
    after = tensors(contender)
    assert_kept(before, after)
    found = logits_of(contender, batch_of(data, newcomers[language].vocabulary))
    assert all(torch.equal(found[each], wanted[each]) for each in wanted)
    moved = {name for name in fresh if not torch.equal(fresh[name], after[name])}
    assert any(f"language.{language}" in name for name in moved)
    assert {"network.head.rules.weight", "network.head.bias", "network.encoder.languages.weight"} <= moved
    assert any("family.semitic" in name for name in moved) == (language == "he")


def test_the_others_train_along_when_they_are_not_frozen(data: Data, newcomers: dict[str, Newcomer]) -> None:
    contender = trained(data)
    before = tensors(contender)
    learner = in_network(data, newcomers["ms"], contender, frozen=False)
    batch = learner.batch(0)
    assert batch.languages[:32] == ["ms"] * 32
    assert set(batch.languages[32:]) == {"id", "tl"}
    assert len(batch) == 64
    learn([learner], 2)
    after = tensors(contender)
    assert not torch.equal(before["network.encoder.mix.weight"], after["network.encoder.mix.weight"])


def test_both_learn_from_the_same_words(data: Data, newcomers: dict[str, Newcomer]) -> None:
    newcomer = newcomers["ms"]
    rows = TrainingSteps(len(newcomer.tables[TRAIN]), 32, 3)
    added = in_network(data, newcomer, trained(data), frozen=False)
    scratch = learner_from_scratch(newcomer, rows, 3, "looped", CPU)
    for step in (0, 5, 11):
        one, other = added.batch(step), scratch.batch(step)
        assert torch.equal(one.targets[:32], other.targets)
        assert torch.equal(one.counts[:32], other.counts)
    assert scratch.contender.network.settings == NetworkSettings()
    # The same rules in the same order, by other ids.
    alone = newcomer.alone().vocabulary
    rules = [newcomer.vocabulary.rules[each] for each in newcomer.vocabulary.candidates[-1]]
    assert rules == [alone.rules[each] for each in alone.candidates[0]]


def test_a_trained_network_learns_at_a_lower_rate_and_by_the_same_schedule(
    data: Data, newcomers: dict[str, Newcomer], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: dict[str, list[float]] = {"experts": [], "scratch": []}

    def noted(contender: Contender, _batch: Batch, rate: float, **_: object) -> None:
        rates[contender.name].append(rate)

    monkeypatch.setattr(newcomer, "train_step", noted)
    one = newcomers["ms"]
    rows = TrainingSteps(len(one.tables[TRAIN]), 32, 3)
    learn([in_network(data, one, trained(data), frozen=True), learner_from_scratch(one, rows, 3, "looped", CPU)], 9)
    assert rates["scratch"] == [learning_rate(step, 9) for step in range(9)]
    assert rates["experts"] == pytest.approx([FURTHER_PEAK * rate for rate in rates["scratch"]])


def test_a_curve_begins_before_the_first_step_and_ends_with_the_last(
    data: Data, newcomers: dict[str, Newcomer]
) -> None:
    learner = in_network(data, newcomers["ms"], trained(data), frozen=True)
    curve = learn([learner], 12)
    assert curve is not None
    assert [point.step for point in curve] == [0, 5, 10, 12]
    assert all(0 <= point.accuracy <= 1 for point in curve)


def test_a_slow_machine_takes_fewer_steps(data: Data, newcomers: dict[str, Newcomer]) -> None:
    learner = in_network(data, newcomers["ms"], trained(data), frozen=True)
    curve = learn([learner], 500, deadline=Deadline(0.0))
    assert curve is not None
    assert curve[-1].step == 10


def test_a_stop_gives_no_curve(data: Data, newcomers: dict[str, Newcomer]) -> None:
    learner = in_network(data, newcomers["ms"], trained(data), frozen=True)
    asked = iter([False, False, True])
    assert learn([learner], 500, stop_requested=lambda: next(asked)) is None


def test_the_grown_vocabulary_keeps_all_ids(data: Data, newcomers: dict[str, Newcomer]) -> None:
    old, new = data.vocabulary, newcomers["he"].vocabulary
    assert new.characters.startswith(old.characters)
    assert "\N{HEBREW LETTER ALEF}" in new.characters.removeprefix(old.characters)
    assert new.rules[: len(old.rules)] == old.rules
    assert len(set(new.rules)) == len(new.rules)
    assert new.candidates[:-1] == old.candidates
    assert (new.languages, new.later) == (["id", "tl", "he"], 1)
    assert new.later_experts == {"family": 1, "language": 1}
    assert newcomers["ms"].vocabulary.later_experts == {"family": 0, "language": 1}
    # A run that reads its words anew grows to the same.
    assert prepare_data(["id", "tl", "he"], Reporter(), 40_000, [("he", WORDS)]).vocabulary == new


def test_families_keep_the_order_in_which_they_came() -> None:
    first = {"characters": "", "rules": [], "candidates": []}
    assert Vocabulary(languages=["es", "nb", "ar", "ru"], later=2, **first).families == [
        "germanic",
        "italic",
        "semitic",
        "slavic",
    ]
    assert Vocabulary(languages=["nb", "ru", "es", "ar", "cs"], later=3, **first).families == [
        "germanic",
        "slavic",
        "italic",
        "semitic",
    ]


def test_one_languages_vocabulary(data: Data) -> None:
    alone, rules = only(data.vocabulary, "tl")
    assert alone.languages == ["tl"]
    assert alone.rules == [data.vocabulary.rules[each] for each in data.vocabulary.candidates[1]]
    assert [data.vocabulary.rules[each] for each in rules] == alone.rules


def test_fewer_words_are_among_more_and_leave_the_other_sides(data: Data) -> None:
    sample = data.samples[0]
    few, more = fewer(sample, 50), fewer(sample, 200)

    def pairs(each: Any, split: int) -> list[tuple[str, str]]:
        return [(each.forms[row], each.lemmas[row]) for row in np.flatnonzero(each.split == split)]

    assert (len(pairs(few, TRAIN)), len(pairs(more, TRAIN))) == (50, 200)
    assert set(pairs(few, TRAIN)) <= set(pairs(more, TRAIN)) <= set(pairs(sample, TRAIN))
    for split in (VALIDATION, TEST):
        assert pairs(few, split) == pairs(sample, split)
    for row in range(len(few.forms)):
        at = sample.forms.index(few.forms[row])
        if sample.forms.count(few.forms[row]) == 1:
            assert sample.rules[few.rule_ids[row]] == sample.rules[sample.rule_ids[at]]
    assert fewer(sample, None) is fewer(sample, 10**9) is sample


def test_rows_go_to_their_places_with_their_moments() -> None:
    table = torch.nn.Embedding(3, 2)
    optimizer = celmoe.optim.AdamW(table.parameters(), lr=0.1, weight_decay=0.0)
    # A graph that is still held knows the shape that the parameter had.
    held = (table.weight * torch.arange(6).view(3, 2)).sum()
    held.backward(retain_graph=True)
    optimizer.step()
    weight, state = table.weight.detach().clone(), copy.deepcopy(optimizer.state[table.weight])
    place_rows(optimizer, table, "weight", torch.tensor([2, -1, 0, -1]), torch.full((4, 2), 7.0))
    parameter = table.weight
    assert list(optimizer.state) == [parameter]
    assert torch.equal(parameter[[0, 2]], weight[[2, 0]])
    assert parameter[[1, 3]].eq(7.0).all()
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[parameter][key][[0, 2]], state[key][[2, 0]])
        assert not optimizer.state[parameter][key][[1, 3]].any()
    parameter.sum().backward()
    optimizer.step()
    assert (parameter[[1, 3]] < 7.0).all()


def test_another_vocabulary_finds_rows_by_what_they_are_of(data: Data) -> None:
    """More words change the ids, but not the characters and rules behind them."""
    samples = [fewer(each, 3_000) for each in data.samples]
    evidence = [gather_evidence(each) for each in samples]
    old, new = build_vocabulary(samples, evidence), data.vocabulary
    assert new.rules[: len(old.rules)] != old.rules
    few = replace(data, vocabulary=old, tables={TRAIN: build_table(samples, evidence, old, TRAIN)})
    contender = trained(few)
    wanted = logits_of(contender, batch_of(few, old))
    before = {name: value.clone() for name, value in contender.network.named_parameters()}
    relearn(contender, old, new)
    encoder, head = contender.network.encoder, contender.network.head
    assert torch.equal(encoder.characters.weight[:2], before["encoder.characters.weight"][:2])
    biases = head.bias.split(head.counts)
    places = [
        [new.candidates[row].index(new.rules.index(old.rules[each])) for each in old.candidates[row]] for row in (0, 1)
    ]
    for row, bias in enumerate(before["head.bias"].split([len(each) for each in old.candidates])):
        assert torch.equal(biases[row][places[row]], bias)
        assert len(biases[row]) > len(bias)
    # The same words by other ids are the same to it.
    table = few.tables[TRAIN]
    characters = torch.tensor([0, 1, *(new.characters.index(each) + 2 for each in old.characters)])
    candidates = torch.full((2, max(map(len, places)) + 1), -1)
    for row, found in enumerate(places):
        candidates[row, : len(found)] = torch.tensor(found)
    table = replace(
        table,
        characters=characters[table.characters.long()],
        proposals=candidates[table.language_ids.long()[:, None], table.proposals.long()],
    )
    found = logits_of(contender, batch_of(replace(few, tables={TRAIN: table}), new))
    for row, language in enumerate(("id", "tl")):
        torch.testing.assert_close(found[language][:, places[row]], wanted[language], rtol=0, atol=1e-5)
