"""Small models whose numbers are known by hand."""

import torch
from torch import nn

from celmoe import (
    CELMoEConfig,
    ExpertConfig,
    ExpertModule,
    ExpertResult,
    HierarchicalCELMoE,
    HierarchyLevelConfig,
)

WIDTH = 4


class Calling(ExpertModule):
    """An expert that is a function of its batch."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, batch):
        result = self.function(batch)
        return result if isinstance(result, ExpertResult) else ExpertResult(result)


class Affine(ExpertModule):
    """Multiplies by its one parameter."""

    def __init__(self, factor):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(float(factor)))

    def forward(self, batch):
        return ExpertResult(batch.hidden * self.factor)


FACTORS = {"a": 2.0, "b": 3.0, "c": 5.0, "core": 7.0, "d": 11.0}


class LastLevel(nn.Module):
    """A fusion that keeps the numbers readable."""

    def forward(self, level_hiddens):
        return level_hiddens[-1]


def level(name, *experts, **rest):
    return HierarchyLevelConfig(name, {each: ExpertConfig(each) for each in experts}, **rest)


def model_of(*levels, factory=None, fusion_module="last", **config):
    fusion = LastLevel() if fusion_module == "last" else fusion_module
    made = CELMoEConfig(WIDTH, list(levels), **config)
    return HierarchicalCELMoE(made, factory or (lambda _level, expert, _metadata: Affine(FACTORS[expert])), fusion)


def ones(batch_size):
    return torch.ones(batch_size, WIDTH)


def first_column(hidden):
    return hidden[:, 0].tolist()
