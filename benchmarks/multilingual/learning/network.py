"""The network: a character encoder, the hierarchy of experts, and a head over each language's edit rules.

A word's hidden state is the word's encoding, [D], and behind it a score for each of its proposals, [M].
Every expert adds to both: to the encoding by an MLP, to the scores by a function of the proposals' evidence.

Axes: B words, N words of one expert, W characters of a window, C width of a character, D width of a word's state, K
candidate rules of one language, M proposals, E features of a proposal; F and T as in `evidence`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import cast

import torch
from torch import nn
from torch.nn import functional

import celmoe
from benchmarks.multilingual.learning.batches import Batch
from benchmarks.multilingual.learning.hierarchy import FAMILY, LANGUAGE, LEVELS, NetworkSettings, hierarchy_config
from benchmarks.multilingual.words.evidence import FORM_COUNTS, LEMMA_COUNTS, PROPOSALS, SCALE
from benchmarks.multilingual.words.vocabulary import NO_RULE, WINDOW, Vocabulary
from benchmarks.workloads.languages import FAMILY_OF

# The form's counts, each count beside its total, the lemma's counts, and the proposal's rank.
FEATURES = 2 * FORM_COUNTS + LEMMA_COUNTS + 1


class WordEncoder(nn.Module):
    """Characters int32 [B, W], language ids int64 [B] and totals uint8 [B, T] -> words [B, D].

    Both windows are flush with their end of the word, so every place has a meaning of its own ("the last but one
    character"), and one matrix over all places reads endings better than pooling would, at a fraction of its cost.
    """

    def __init__(self, settings: NetworkSettings, character_count: int, language_count: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(character_count, settings.character_width)
        self.languages = nn.Embedding(language_count, settings.width)
        self.mix = nn.Linear(WINDOW * settings.character_width, settings.width)
        self.known = nn.Linear(FORM_COUNTS, settings.width)

    def forward(self, characters: torch.Tensor, language_ids: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
        """Encode the words."""
        places = self.mix(self.characters(characters).flatten(1))
        known = self.known(totals.to(places.dtype) / SCALE)
        return functional.gelu(places + known + self.languages(language_ids))


def features_of(batch: Batch, dtype: torch.dtype) -> torch.Tensor:
    """The evidence as features [B, M, E]: logarithms of counts, and of the shares that they are of their totals."""
    counts = batch.counts.to(dtype) / SCALE
    totals = (batch.totals.to(dtype) / SCALE).unsqueeze(1)
    form, lemma = counts.split([FORM_COUNTS, LEMMA_COUNTS], dim=-1)
    shares = (form - totals) * totals.gt(0) / 2
    ranks = torch.arange(1, PROPOSALS + 1, dtype=dtype, device=counts.device).log()
    return torch.cat((form, shares, lemma, ranks[None, :, None].expand(len(batch), -1, 1)), dim=-1)


class LemmatizingExpert(celmoe.ExpertModule):
    """Adds to a word's state W2 gelu(W1 norm(state)), and to each proposal's score an MLP and a sum of its features."""

    def __init__(self, settings: NetworkSettings, level: str) -> None:
        super().__init__()
        self.width = settings.width
        self.norm = nn.LayerNorm(settings.width)
        self.widen = nn.Linear(settings.width, settings.inner_width(level))
        self.narrow = nn.Linear(settings.inner_width(level), settings.width)
        self.weigh = nn.Linear(FEATURES, settings.evidence_width)
        self.heed = nn.Linear(settings.width, settings.evidence_width, bias=False)
        self.judge = nn.Linear(settings.evidence_width, 1)
        self.trust = nn.Linear(FEATURES, 1, bias=False)
        # No expert has an opinion on counts before it has learned.
        nn.init.zeros_(self.judge.weight)
        nn.init.zeros_(self.trust.weight)

    def forward(self, batch: celmoe.ExpertBatch) -> celmoe.ExpertResult:
        """[N, D + M] -> [N, D + M]."""
        context = cast("Mapping[str, torch.Tensor]", batch.context)
        features = context[FEATURES_KEY]
        words, scores = batch.hidden[:, : self.width], batch.hidden[:, self.width :]
        read = self.norm(words)
        # Counts mean other things in other words.
        weighed = functional.relu(self.weigh(features) + self.heed(read).unsqueeze(1))
        opinion = self.judge(weighed) + self.trust(features)
        words = words + self.narrow(functional.gelu(self.widen(read)))
        return celmoe.ExpertResult(torch.cat((words, scores + opinion.squeeze(-1)), dim=-1))


FEATURES_KEY = "features"


class RuleHead(nn.Module):
    """Scores of each language's candidate rules.

    A rule has one weight row for all languages, and one bias a language. A word is scored against the rules that
    training has seen twice in its language, some 500 of all languages' thousands. Its proposals have their scores
    beside.
    """

    candidates: torch.Tensor

    def __init__(self, width: int, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.register_buffer("candidates", torch.empty(0, dtype=torch.int64), persistent=False)
        self.learn_vocabulary(vocabulary)
        self.rules = nn.Embedding(len(vocabulary.rules), width)
        self.bias = nn.Parameter(torch.zeros(len(self.candidates)))
        nn.init.normal_(self.rules.weight, std=width**-0.5)

    def learn_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take over which rules each language may choose from; the parameters must have rows for them."""
        self.languages = {language: place for place, language in enumerate(vocabulary.languages)}
        self.counts = [len(rules) for rules in vocabulary.candidates]
        flat = [rule for rules in vocabulary.candidates for rule in rules]
        self.candidates = torch.tensor(flat, dtype=torch.int64, device=self.candidates.device)

    def forward(self, words: torch.Tensor, scores: torch.Tensor, batch: Batch) -> list[torch.Tensor]:
        """Words [B, D] and scores [B, M] -> logits [N, K] of every language present, in the plan's order of experts."""
        plan = batch.plan.levels[LANGUAGE]
        weights = self.rules(self.candidates).split(self.counts)
        biases = self.bias.split(self.counts)
        order = plan.order
        proposals = batch.proposals.index_select(0, order)
        scores = scores.index_select(0, order).masked_fill(proposals.lt(0), 0.0)
        groups = zip(
            (self.languages[language] for language in plan.present),
            words.index_select(0, order).split(plan.counts),
            scores.split(plan.counts),
            proposals.clamp(min=0).split(plan.counts),
            strict=True,
        )
        logits = []
        for place, group, added, where in groups:
            known = torch.addmm(biases[place], group, weights[place].t())
            logits.append(known.scatter_add(1, where, added.to(known.dtype)) if self.counts[place] else known)
        return logits


class Lemmatizer(nn.Module):
    """Encoder, hierarchy and head. The hierarchy is any library's: it is made by ``library.HierarchicalCELMoE``.

    ``multiply_adds`` are those of a forward pass of one word. ``family_of`` may give languages other families than
    their own, for a control.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        settings: NetworkSettings,
        *,
        levels: Sequence[str] = LEVELS,
        engine: str = "auto",
        library: ModuleType = celmoe,
        family_of: Mapping[str, str] = FAMILY_OF,
    ) -> None:
        super().__init__()
        self.encoder = WordEncoder(settings, vocabulary.character_count, len(vocabulary.languages))
        options = {"engine": engine} if library is celmoe else {}
        self.hierarchy: celmoe.HierarchicalCELMoE = library.HierarchicalCELMoE(
            hierarchy_config(library, vocabulary.languages, levels, settings, family_of, vocabulary.families),
            lambda level, _name, _metadata: LemmatizingExpert(settings, level),
            **options,
        )
        self.head = RuleHead(settings.width, vocabulary)
        self.levels = tuple(levels)
        self.width = settings.width
        self.settings = settings
        self.multiply_adds = multiply_adds(settings, vocabulary, levels)
        # A plain dictionary, which can be copied with the network.
        self._family_of = dict(family_of)
        self._takes_plans = self.levels == LEVELS and self._family_of == FAMILY_OF

    def learn_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Take over a vocabulary that the parameters have grown for."""
        self.head.learn_vocabulary(vocabulary)
        self.multiply_adds = multiply_adds(self.settings, vocabulary, self.levels)

    def forward(self, batch: Batch) -> celmoe.CELMoEOutput:
        """The hierarchy's output; the losses and the evaluation take `logits` of it."""
        features = features_of(batch, self.head.bias.dtype)
        words = self.encoder(batch.characters, batch.plan.levels[LANGUAGE].expert_ids, batch.totals)
        return self.run_hierarchy(functional.pad(words, (0, PROPOSALS)), {FEATURES_KEY: features}, batch)

    def run_hierarchy(
        self, hidden: torch.Tensor, context: dict[str, torch.Tensor], batch: Batch
    ) -> celmoe.CELMoEOutput:
        """Hidden [B, D + M] through the experts; a comparison puts another way of running them here."""
        output: celmoe.CELMoEOutput = self.hierarchy(hidden, routing=self._routing(batch), context=context)
        return output

    def _routing(self, batch: Batch) -> celmoe.RoutingPlan | dict[str, list[str]] | None:
        if self._takes_plans:
            return batch.plan
        # The plan is for all levels and real families.
        routes = {FAMILY: [self._family_of[each] for each in batch.languages], LANGUAGE: batch.languages}
        return {level: names for level, names in routes.items() if level in self.levels} or None

    def logits(self, output: celmoe.CELMoEOutput, batch: Batch) -> list[torch.Tensor]:
        """Logits [N, K] of every language present: words as the levels' fusion has them, scores as the last level."""
        scores = output.levels[self.levels[-1]].hidden[:, self.width :]
        found: list[torch.Tensor] = self.head(output.fused_hidden[:, : self.width], scores, batch)
        return found


def rule_targets(batch: Batch) -> tuple[torch.Tensor, ...]:
    """Targets [N] of every language present, aligned with the scores of `RuleHead`."""
    plan = batch.plan.levels[LANGUAGE]
    sorted_targets: tuple[torch.Tensor, ...] = batch.targets.index_select(0, plan.order).split(plan.counts)
    return sorted_targets


def cross_entropy(logits: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over the words whose rule is among the candidates, and how many those are."""
    sums = [
        functional.cross_entropy(scores, wanted, ignore_index=NO_RULE, reduction="sum")
        for scores, wanted in zip(logits, targets, strict=True)
    ]
    return torch.stack(sums).sum(), torch.cat(list(targets)).ne(NO_RULE).sum()


def parameter_count(network: nn.Module) -> int:
    """Numbers in all parameters."""
    return sum(each.numel() for each in network.parameters())


def expert_size(settings: NetworkSettings, level: str) -> int:
    """Numbers in the parameters of one expert of this level."""
    with torch.device("meta"):
        return parameter_count(LemmatizingExpert(settings, level))


def multiply_adds(settings: NetworkSettings, vocabulary: Vocabulary, levels: Sequence[str]) -> int:
    """Multiplications of a forward pass for one word, in all matrices that the word passes."""
    width, size, hidden = settings.width, settings.hidden_size, settings.evidence_width
    encoder = (WINDOW * settings.character_width + FORM_COUNTS) * width
    proposals = PROPOSALS * (FEATURES * hidden + hidden + FEATURES)
    experts = sum(width * (2 * settings.inner_width(level) + hidden) + proposals for level in levels)
    rules = sum(map(len, vocabulary.candidates)) // len(vocabulary.candidates)
    return encoder + experts + len(levels) * size**2 + rules * width
