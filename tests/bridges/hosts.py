"""What the tests of bridges share: tiny models of transformers, two kinds of experts, and batches in many languages."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import celmoe
from celmoe import CELMoEConfig, ExpertBatch, ExpertResult, RoutingPlan

WIDTH, WORDS, POSITIONS = 32, 50, 7
LANGUAGES = ("de", "nl", "fr", "it")
TREE = {"germanic": ("de", "nl"), "romance": ("fr", "it")}


class Bottleneck(nn.Module):
    """An adapter that begins as the identity."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm, self.down, self.up = nn.LayerNorm(width), nn.Linear(width, 4), nn.Linear(4, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        return ExpertResult(batch.hidden + self.up(torch.relu(self.down(self.norm(batch.hidden)))))


class LowRank(nn.Module):
    """A change of the layer in front, of rank 2, that begins at zero."""

    reads_input = True

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, batch: ExpertBatch) -> ExpertResult:
        context: Any = batch.context
        return ExpertResult(batch.hidden + self.up(self.down(context["input"])))

    def weight_delta(self) -> torch.Tensor:
        return self.up.weight @ self.down.weight


def config(width: int = WIDTH) -> CELMoEConfig:
    return CELMoEConfig.from_tree(TREE, ("family", "language"), hidden_size=width)


def attached(model: nn.Module, where: Any, factory: Callable[[], nn.Module] = Bottleneck) -> Any:
    torch.manual_seed(1)
    return celmoe.attach(model, config(), lambda level, name, metadata: factory(), where)


def stirred(model: Any, scale: float = 0.1) -> Any:
    """The model with experts that are no identity any more, each another one."""
    torch.manual_seed(2)
    with torch.no_grad():
        for each in celmoe.adapters(model).values():
            for parameter in each.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def bert(head: str = "BertForSequenceClassification", **others: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    made = transformers.BertConfig(
        **{
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "max_position_embeddings": 32,
            **others,
        }
    )
    return getattr(transformers, head)(made)


def xlm_roberta() -> Any:
    import transformers

    torch.manual_seed(0)
    made = transformers.XLMRobertaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    return transformers.XLMRobertaForSequenceClassification(made)


def llama() -> Any:
    import transformers

    torch.manual_seed(0)
    made = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(made)


def gpt2() -> Any:
    import transformers

    torch.manual_seed(0)
    made = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(made)


def t5() -> Any:
    import transformers

    torch.manual_seed(0)
    made = transformers.T5Config(
        vocab_size=WORDS,
        d_model=WIDTH,
        d_kv=16,
        num_heads=2,
        d_ff=48,
        num_layers=2,
        decoder_start_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(made)


def routes(size: int, seed: int = 0, languages: Sequence[str] = LANGUAGES) -> list[str]:
    draw = random.Random(seed)
    return [draw.choice(languages) for _ in range(size)]


def planned(model: Any, languages: Sequence[str]) -> RoutingPlan:
    return celmoe.adapters(model).compile_routing({"language": list(languages)})


def words(size: int, positions: int = POSITIONS) -> dict[str, torch.Tensor]:
    """Sentences of several lengths, padded at the end."""
    draw = torch.Generator().manual_seed(size)
    ids = torch.randint(3, WORDS, (size, positions), generator=draw)
    lengths = torch.randint(2, positions + 1, (size,), generator=draw)
    mask = (torch.arange(positions) < lengths[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def samples(size: int, languages: Sequence[str] = LANGUAGES, positions: int = POSITIONS) -> list[dict[str, Any]]:
    """A data set: sentences with a label and a language each."""
    given = words(size, positions)
    draw = torch.Generator().manual_seed(7)
    labels = torch.randint(2, (size,), generator=draw).tolist()
    return [
        {**{name: each[place] for name, each in given.items()}, "labels": label, "lang": language}
        for place, (label, language) in enumerate(zip(labels, routes(size, 3, languages), strict=True))
    ]


def collator(model: Any) -> celmoe.Collator:
    return celmoe.Collator(celmoe.adapters(model).compiler, {"language": "lang"})


def experts_of(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all experts' tensors, by key."""
    return {key: each.detach().clone() for key, each in model.state_dict().items() if ".celmoe." in key}


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], **tolerances: float) -> None:
    assert found.keys() == wanted.keys()
    for key, each in wanted.items():
        torch.testing.assert_close(found[key], each, **tolerances, msg=lambda text, key=key: f"{key}: {text}")
