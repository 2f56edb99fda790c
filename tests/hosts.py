"""Models of other people: small hosts for attached experts, of each kind of output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from celmoe import CELMoEConfig, ExpertModule, ExpertResult, RoutingCompiler

WIDTH, TOKENS, CLASSES = 8, 20, 3
TREE = {"germanic": ["de", "nl"], "romance": ["fr", "it"]}
NAMES = [name for names in TREE.values() for name in names]


def config():
    return CELMoEConfig.from_tree(TREE, levels=("family", "language"), hidden_size=WIDTH)


def plan_of(names):
    return RoutingCompiler(config())({"language": names})


class Bottleneck(ExpertModule):
    """Starts as the identity if asked to."""

    def __init__(self, width=WIDTH, *, zero=False):
        super().__init__()
        self.down, self.up = nn.Linear(width, 3), nn.Linear(3, width)
        if zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, batch):
        return ExpertResult(batch.hidden + self.up(torch.tanh(self.down(batch.hidden))))


class Penalized(Bottleneck):
    """Returns a loss."""

    def forward(self, batch):
        return ExpertResult(super().forward(batch).hidden, {"size": self.down(batch.hidden).square().mean()})


class Pair(NamedTuple):
    hidden: torch.Tensor
    rest: str


class Output(dict):
    """A mapping with attributes, as transformers has them."""

    def __getattr__(self, name):
        return self[name]


@dataclass(frozen=True)
class Wrapped:
    """Nothing that experts can be behind."""

    hidden: torch.Tensor


WRAPPERS = {
    "tensor": lambda hidden: hidden,
    "tuple": lambda hidden: (hidden, None),
    "list": lambda hidden: [hidden, None],
    "named tuple": lambda hidden: Pair(hidden, "rest"),
    "mapping": lambda hidden: Output(last_hidden_state=hidden, rest=None),
    "object": Wrapped,
}


def hidden_of(output):
    if isinstance(output, torch.Tensor):
        return output
    return output["last_hidden_state"] if isinstance(output, dict) else output[0]


class Block(nn.Module):
    def __init__(self, wrapper):
        super().__init__()
        self.linear, self.norm, self.wrapper = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), wrapper

    def forward(self, hidden):
        return WRAPPERS[self.wrapper](self.norm(hidden + torch.relu(self.linear(hidden))))


class Encoder(nn.Module):
    """Two blocks, of which `checkpointed` says how they are recomputed: ``None`` for not at all."""

    def __init__(self, wrapper="tensor", checkpointed=None):
        super().__init__()
        self.embed, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, CLASSES)
        self.blocks = nn.ModuleList([Block(wrapper) for _ in range(2)])
        self.checkpointed = checkpointed

    def forward(self, tokens):
        hidden = self.embed(tokens)
        for block in self.blocks:
            if self.checkpointed is None:
                hidden = hidden_of(block(hidden))
            else:
                hidden = hidden_of(checkpoint(block, hidden, use_reentrant=self.checkpointed == "reentrant"))
        return self.head(hidden)


def tokens(rows=6, positions=5):
    return torch.randint(0, TOKENS, (rows, positions), generator=torch.Generator().manual_seed(0))


ROUTES = ["de", "it", "nl", "de", "fr", "it"]
