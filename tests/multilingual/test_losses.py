"""The losses of a step, on words made by hand."""

import numpy as np
import pytest
import torch

from benchmarks.multilingual.learning.batches import Batch, Collator
from benchmarks.multilingual.learning.hierarchy import (
    FAMILY,
    LANGUAGE,
    LEVELS,
    UNIVERSAL,
    NetworkSettings,
)
from benchmarks.multilingual.learning.losses import Losses, LossWeights
from benchmarks.multilingual.learning.network import Lemmatizer, LemmatizingExpert
from benchmarks.multilingual.studies.ablation import VARIANTS
from benchmarks.multilingual.words.corpus import TRAIN, LanguageSample
from benchmarks.multilingual.words.evidence import gather_evidence
from benchmarks.multilingual.words.rules import IDENTITY, EditRule
from benchmarks.multilingual.words.vocabulary import build_table, build_vocabulary
from benchmarks.workloads.languages import FAMILY_OF


def sample_of(language: str, forms: list[str]) -> LanguageSample:
    """Two words that are their own lemmas, and two that lose a character."""
    return LanguageSample(
        language=language,
        forms=forms,
        lemmas=[*forms[:2], *(form[:-1] for form in forms[2:])],
        rules=[IDENTITY, EditRule(0, "", 1, "")],
        rule_ids=np.array([0, 0, 1, 1], dtype=np.int32),
        split=np.full(4, TRAIN, dtype=np.uint8),
        dictionary_size=4,
    )


def network_and_batch(levels: tuple[str, ...]) -> tuple[Lemmatizer, Batch]:
    samples = [sample_of("en", ["cat", "dog", "cats", "hats"]), sample_of("fi", ["talo", "maa", "talot", "puut"])]
    evidence = [gather_evidence(sample) for sample in samples]
    vocabulary = build_vocabulary(samples, evidence)
    settings = NetworkSettings(width=8, universal_width=8, family_width=8, language_width=8)
    table = build_table(samples, evidence, vocabulary, TRAIN)
    torch.manual_seed(0)
    network = Lemmatizer(vocabulary, settings, levels=levels)
    # The experts begin with zeros here, and every parameter needs a gradient.
    for module in network.modules():
        if isinstance(module, LemmatizingExpert):
            torch.nn.init.normal_(module.judge.weight)
    return network, Collator(table, vocabulary)(torch.tensor([4, 0, 6, 2, 1, 3, 5, 7]))


@pytest.mark.parametrize(
    ("levels", "weights", "expected"),
    [
        (LEVELS, LossWeights(), {"global.rule": 1.0, "language.size": 0.1, "family->language.distance": 0.1}),
        (LEVELS, LossWeights(size=0.3, distance=0), {"global.rule": 1.0, "language.size": 0.3}),
        (LEVELS, LossWeights(size=0, distance=0.2), {"global.rule": 1.0, "family->language.distance": 0.2}),
        ((UNIVERSAL,), LossWeights(), {"global.rule": 1.0}),
    ],
)
def test_a_step_has_these_losses(levels: tuple[str, ...], weights: LossWeights, expected: dict[str, float]) -> None:
    network, batch = network_and_batch(levels)
    bundle = Losses(network, weights)(network(batch), batch)
    assert {term.name: float(term.weight) for term in bundle.terms} == pytest.approx(expected)
    parts = bundle.as_dict()
    assert bundle.total.item() == pytest.approx(sum(weight * parts[name] for name, weight in expected.items()))


def test_size_and_distance_are_read_from_the_language_level() -> None:
    network, batch = network_and_batch(LEVELS)
    output = network(batch)
    parts = Losses(network, LossWeights())(output, batch).as_dict()
    family, language = (output.levels[level].hidden[:, : network.width] for level in ("family", "language"))
    assert parts["language.size"] == pytest.approx(language.square().mean().item())
    assert parts["family->language.distance"] == pytest.approx((language - family).square().mean().item())


def test_the_distance_moves_the_language_experts_alone_and_not_towards_them_the_family() -> None:
    network, batch = network_and_batch(LEVELS)
    output = network(batch)
    bundle = Losses(network, LossWeights(size=0))(output, batch)
    (distance,) = [term.value for term in bundle.terms if term.name == "family->language.distance"]
    family, language = (output.levels[level].hidden for level in ("family", "language"))
    of_family, of_language = torch.autograd.grad(distance, [family, language], retain_graph=True)
    # The family's hidden states are the language experts' input, too: all that reaches them comes that way.
    by_input = torch.autograd.grad(language, family, of_language)[0]
    torch.testing.assert_close(of_family, by_input)
    assert bool(of_language.any())


def test_what_stands_beside_the_rules_loss_fades() -> None:
    network, batch = network_and_batch(LEVELS)
    losses = Losses(network, LossWeights(size=0.2, distance=0.4))
    found = []
    for done in (0.0, 0.25, 0.5, 0.9, 0.0):
        losses.fade(done)
        found.append([float(term.weight) for term in losses(network(batch), batch).terms])
    wanted = [[1.0, 0.2, 0.4], [1.0, 0.1, 0.2], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 0.2, 0.4]]
    assert all(one == pytest.approx(other) for one, other in zip(found, wanted, strict=True))


def test_every_parameter_is_trained() -> None:
    network, batch = network_and_batch(LEVELS)
    Losses(network, LossWeights())(network(batch), batch).total.backward()
    assert [name for name, each in network.named_parameters() if each.grad is None] == []


def test_the_ablation_starts_from_what_the_job_does() -> None:
    job = VARIANTS["as the job does"]
    assert (job.weights, job.settings, job.levels, job.shuffled) == (LossWeights(), NetworkSettings(), LEVELS, False)
    assert all(each != job for name, each in VARIANTS.items() if name != "as the job does")
    assert {name for name, each in VARIANTS.items() if each.weights != job.weights} == {
        "without size",
        "without distance",
        "fused rule loss alone",
    }


def test_shuffled_families_are_as_large_as_the_real_ones_and_follow_the_seed() -> None:
    languages = sorted(FAMILY_OF)
    shuffled = VARIANTS["shuffled families"]
    found = shuffled.family_of(languages, 1)
    assert sorted(found.values()) == sorted(FAMILY_OF.values())
    assert found == shuffled.family_of(languages, 1) != shuffled.family_of(languages, 2)
    assert found != FAMILY_OF == VARIANTS["as the job does"].family_of(languages, 1)


def test_each_variant_without_a_level_trains_the_others() -> None:
    _, batch = network_and_batch(LEVELS)
    for levels in ((FAMILY, LANGUAGE), (UNIVERSAL, LANGUAGE), (UNIVERSAL, FAMILY)):
        network, _ = network_and_batch(levels)
        output = network(batch)
        assert list(output.levels) == list(levels)
        Losses(network, LossWeights())(output, batch).total.backward()
        assert [name for name, each in network.named_parameters() if each.grad is None] == []
