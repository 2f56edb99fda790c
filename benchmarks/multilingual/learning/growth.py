"""A trained network gets one more language: an expert of its own, and rows for the new characters and rules.

The language's expert, and its family's if that is new, come by `HierarchicalCELMoE.add_expert`, with the optimizer.
Embeddings and head get rows behind those that they have. Ids stay, so nothing trained changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import celmoe
from benchmarks.multilingual.learning.hierarchy import FAMILY, LANGUAGE, LEVELS, UNIVERSAL, UNIVERSAL_EXPERT
from benchmarks.multilingual.learning.training import Contender
from benchmarks.multilingual.words.vocabulary import FIRST_CHARACTER_ID, Vocabulary
from benchmarks.workloads.languages import FAMILY_OF


def grow(contender: Contender, old: Vocabulary, new: Vocabulary, warm_start: str | None) -> None:
    """Give a contender the last language of ``new``, which is ``old`` and that language.

    Args:
        contender: The contender; its optimizer keeps the state of the known parameters.
        old: The vocabulary of its network.
        new: The vocabulary that `grown` returned.
        warm_start: The language whose expert, encoder row and biases of shared rules the new language copies. ``None``:
            all of the new language's own parameters begin afresh.
    """
    network, optimizer, language = contender.network, contender.optimizer, new.languages[-1]
    family = FAMILY_OF[language]
    if network.levels == LEVELS:
        if family not in old.families:
            source = None if warm_start is None else FAMILY_OF[warm_start]
            config = celmoe.ExpertConfig(family, parent=UNIVERSAL_EXPERT)
            network.hierarchy.add_expert(FAMILY, family, config, warm_start=source, optimizer=optimizer)
        config = celmoe.ExpertConfig(language, parent=family)
        network.hierarchy.add_expert(LANGUAGE, language, config, warm_start=warm_start, optimizer=optimizer)
    relearn(contender, old, new)
    if warm_start is not None:
        place = old.languages.index(warm_start)
        biases = network.head.bias.split(network.head.counts)
        known = dict(zip(new.candidates[place], biases[place].tolist(), strict=True))
        with torch.no_grad():
            network.encoder.languages.weight[-1] = network.encoder.languages.weight[place]
            biases[-1].copy_(torch.tensor([known.get(rule, 0.0) for rule in new.candidates[-1]]))


def relearn(contender: Contender, old: Vocabulary, new: Vocabulary) -> None:
    """Give a contender rows for another vocabulary, and give known entries their old rows.

    Characters, languages and rules are found by themselves, a bias by its language and rule. Rows of new entries begin
    afresh, with moments of zeros. The experts stay as they are.
    """
    network, optimizer = contender.network, contender.optimizer
    encoder, head = network.encoder, network.head
    special = list(range(FIRST_CHARACTER_ID))
    for table, known, wanted, scale in (
        (encoder.characters, [*special, *old.characters], [*special, *new.characters], 1.0),
        (encoder.languages, old.languages, new.languages, 1.0),
        (head.rules, old.rules, new.rules, head.rules.embedding_dim**-0.5),
    ):
        fresh = torch.randn(len(wanted), table.embedding_dim) * scale
        place_rows(optimizer, table, "weight", places_of(wanted, known), fresh)
        table.num_embeddings = len(wanted)
    had, wants = (
        [
            (language, vocabulary.rules[rule])
            for language, rules in zip(vocabulary.languages, vocabulary.candidates, strict=True)
            for rule in rules
        ]
        for vocabulary in (old, new)
    )
    place_rows(optimizer, head, "bias", places_of(wants, had), torch.zeros(len(wants)))
    network.learn_vocabulary(new)


def places_of(wanted: Sequence[Hashable], known: Sequence[Hashable]) -> torch.Tensor:
    """The place of each wanted one among the known; -1 for one that is new."""
    places = {each: place for place, each in enumerate(known)}
    return torch.tensor([places.get(each, -1) for each in wanted], dtype=torch.int64)


def place_rows(
    optimizer: torch.optim.Optimizer, module: nn.Module, name: str, places: torch.Tensor, fresh: torch.Tensor
) -> None:
    """Put another parameter in the place of a module's, in the optimizer too.

    Args:
        optimizer: The optimizer that steps the parameter.
        module: The module.
        name: The parameter's name there.
        places: int64 [R], for each new row the old row that it is; -1 for none.
        fresh: [R, ...], the rows that are not old ones.
    """
    old, kept = module.get_parameter(name), places >= 0

    def placed(tensor: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        others = others.to(tensor)
        others[kept] = tensor[places[kept]]
        return others

    # A parameter that changes its shape would not fit the graphs that hold it.
    new = nn.Parameter(placed(old.detach(), fresh.clone()))
    setattr(module, name, new)
    for group in optimizer.param_groups:
        group["params"] = [new if each is old else each for each in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = {
            key: placed(value, torch.zeros_like(fresh))
            if isinstance(value, torch.Tensor) and value.shape == old.shape
            else value
            for key, value in optimizer.state.pop(old).items()
        }


@dataclass
class Held:
    """The rows that a frozen network keeps while one language learns.

    Frozen are the experts of all other languages and families, the universal expert, the fusion, the encoder, and the
    rows of all known entries. The rows stand in parameters with rows that learn, so each step is followed by
    `put_back`.

    Attributes:
        rows: Parameters with the rows and the optimizer's moments of them, as they were.
    """

    rows: list[tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]

    def put_back(self) -> None:
        """Give the known rows the values that they had."""
        with torch.no_grad():
            for parameter, rows, _ in self.rows:
                parameter[: len(rows)] = rows

    def put_back_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """Give the optimizer the moments of the known rows that it had."""
        for parameter, rows, moments in self.rows:
            state = optimizer.state.get(parameter, {})
            for key, value in moments.items():
                state[key][: len(rows)] = value


def hold(contender: Contender, old: Vocabulary) -> Held:
    """Freeze all of a grown contender that was there under the ``old`` vocabulary."""
    network = contender.network
    for level, names in ((UNIVERSAL, [UNIVERSAL_EXPERT]), (FAMILY, old.families), (LANGUAGE, old.languages)):
        if level in network.levels:
            for name in names:
                network.hierarchy.freeze(level, name)
    for module in (network.hierarchy.fusion, network.encoder.mix, network.encoder.known):
        module.requires_grad_(False)
    known = {
        network.encoder.characters.weight: old.character_count,
        network.encoder.languages.weight: len(old.languages),
        network.head.rules.weight: len(old.rules),
        network.head.bias: sum(map(len, old.candidates)),
    }
    return Held(
        [
            (
                parameter,
                parameter.detach()[:count].clone(),
                {
                    key: value[:count].clone()
                    for key, value in contender.optimizer.state.get(parameter, {}).items()
                    if isinstance(value, torch.Tensor) and value.shape == parameter.shape
                },
            )
            for parameter, count in known.items()
        ]
    )
