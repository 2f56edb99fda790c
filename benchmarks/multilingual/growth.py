"""A trained network gets one more language: an expert of its own, and rows for what is new in its words.

The language's expert, and its family's if that is new, come by `HierarchicalCELMoE.add_expert`, with the optimizer.
Embeddings and head get rows behind those that they have. Ids stay, so nothing that was trained changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import celmoe
from benchmarks.multilingual.languages import FAMILY_OF
from benchmarks.multilingual.network import FAMILY, LANGUAGE, LEVELS, UNIVERSAL, UNIVERSAL_EXPERT
from benchmarks.multilingual.training import Contender
from benchmarks.multilingual.words import Vocabulary


def grow(contender: Contender, old: Vocabulary, new: Vocabulary, warm_start: str | None) -> None:
    """Give a contender the last language of ``new``, which is ``old`` and that language.

    Args:
        contender: The contender; its optimizer keeps the state of all that was there.
        old: The vocabulary of its network.
        new: What `grown` made of it.
        warm_start: The language that the new one begins like: its expert, its row of the encoder, and its biases of
            the rules that both have. ``None``: all of the new language's own begins afresh.
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
    place = None if warm_start is None else old.languages.index(warm_start)
    encoder, head = network.encoder, network.head
    own = torch.randn(1, encoder.languages.embedding_dim) if place is None else encoder.languages.weight[place][None]
    biases = torch.zeros(len(new.candidates[-1]))
    if place is not None:
        known = dict(zip(old.candidates[place], head.bias.split(head.counts)[place].tolist(), strict=True))
        biases = torch.tensor([known.get(rule, 0.0) for rule in new.candidates[-1]])
    more_characters = new.character_count - old.character_count
    more_rules = len(new.rules) - len(old.rules)
    append_rows(optimizer, head, "bias", biases)
    width = head.rules.embedding_dim
    for table, rows in (
        (encoder.characters, torch.randn(more_characters, encoder.characters.embedding_dim)),
        (encoder.languages, own),
        (head.rules, torch.randn(more_rules, width) * width**-0.5),
    ):
        append_rows(optimizer, table, "weight", rows)
        table.num_embeddings = len(table.weight)
    network.learn_vocabulary(new)


def append_rows(optimizer: torch.optim.Optimizer, module: nn.Module, name: str, rows: torch.Tensor) -> None:
    """Append rows to a module's parameter: a longer one takes its place, in the optimizer too.

    The rows' moments begin with zeros.
    """
    old = module.get_parameter(name)
    rows = rows.detach().to(old)
    # A parameter that changes its shape would not fit the graphs that hold it.
    new = nn.Parameter(torch.cat((old.detach(), rows)))
    setattr(module, name, new)
    for group in optimizer.param_groups:
        group["params"] = [new if each is old else each for each in group["params"]]
    if old in optimizer.state:
        optimizer.state[new] = {
            key: torch.cat((value, value.new_zeros(rows.shape)))
            if isinstance(value, torch.Tensor) and value.shape == old.shape
            else value
            for key, value in optimizer.state.pop(old).items()
        }


@dataclass
class Held:
    """What a frozen network keeps while one language learns.

    Frozen are the experts of all other languages and families, the universal expert, the fusion, the encoder, and the
    rows of what was known before. The rows stand in parameters with rows that learn, so each step is followed by
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
