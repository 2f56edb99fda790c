"""The model for tests of experts that come and go: two kinds of experts, and a picture of a model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig, ExpertModule, ExpertResult, HierarchicalCELMoE
from celmoe.optim.per_expert import shares_of
from celmoe.stacked.presence import reached

WIDTH = 4


class Wide(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)
        self.register_buffer("scale", torch.rand(WIDTH))

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.scale * self.down(torch.tanh(self.up(batch.hidden))))


class Narrow(ExpertModule):
    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch):
        return ExpertResult(torch.tanh(self.only(batch.hidden)))


def factory(_level: str, _name: str, metadata: Any) -> nn.Module:
    return Narrow() if metadata.get("is_narrow") else Wide()


def build(*, is_stacked: bool, seed: int = 0, engine: str = "looped") -> HierarchicalCELMoE:
    """A model of two levels, whose experts are of two classes."""
    torch.manual_seed(seed)
    tree = {"slavic": ["ru", "pl", "uk"], "romance": ["it", "es"], "other": ["fi", "hu"]}
    config = CELMoEConfig.from_tree(tree, ("family", "language"), WIDTH, use_learned_fusion=False)
    for name in ("pl", "es", "hu"):
        config.levels[1].experts[name].metadata = {"is_narrow": True}
    config.levels[0].fallback_expert = "other"
    model = HierarchicalCELMoE(config, factory, engine=engine).double()
    if is_stacked:
        celmoe.stack_experts(model)
    return model


def picture(model: HierarchicalCELMoE, *optimizers: torch.optim.Optimizer) -> Any:
    """All that a refused call must leave as it is."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = [
        (id(each), each.requires_grad, None if each.grad is None else each.grad.clone()) for each in model.parameters()
    ]
    held = [
        (
            [[(id(each), members) for each, _, members in some] for some in shares_of(each)],
            [{key: value for key, value in group.items() if key != "params"} for group in each.param_groups],
            {
                id(parameter): {key: copy.deepcopy(value) for key, value in own.items()}
                for parameter, own in each.state.items()
            },
        )
        for each in optimizers
    ]
    stacks = {level: [(id(each), each.names, each.frozen) for each in some] for level, some in model._stacks.items()}
    present = [
        [None if (some := reached(each.whole(path))) is None else some.tolist() for path in each.keys]
        for own in model._stacks.values()
        for each in own
    ]
    modules = [(name, id(each), type(each), each.training) for name, each in model.named_modules()]
    configs = [[(name, id(each)) for name, each in level.experts.items()] for level in model.config.levels]
    kept = model.layout.packed, model._key, stacks, present, modules, configs, list(map(id, model._levels))
    return state, tensors, held, copy.deepcopy(model.config.to_dict()), kept, torch.get_rng_state()


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected
