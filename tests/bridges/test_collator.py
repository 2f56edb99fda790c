"""`DataLoader`: workers, pages that are locked, and the collators of transformers; and plans in several threads."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import celmoe
from celmoe import RoutingPlan
from tests.bridges.hosts import WORDS, attached, bert, collator, config, llama, planned, routes, samples, stirred, words

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_workers(workers: int) -> None:
    """A plan from another process is the plan of the batch's own samples."""
    model = stirred(attached(bert().eval(), "bert.encoder.layer.*"))
    data = samples(11)
    batches = list(DataLoader(data, 4, collate_fn=collator(model), num_workers=workers))
    assert [batch["plan"].batch_size for batch in batches] == [4, 4, 3]
    languages = [name for batch in batches for name in batch["plan"].routes("language")]
    assert languages == [each["lang"] for each in data]
    for batch in batches:
        assert set(batch) == {"input_ids", "attention_mask", "labels", "plan"}
        with torch.no_grad():
            wanted = model(**{**batch, "plan": planned(model, batch["plan"].routes("language"))}).loss
            assert torch.equal(model(**batch).loss, wanted)


def test_a_collator_is_pickled() -> None:
    model = attached(bert(), "bert.encoder.layer.*")
    other = pickle.loads(pickle.dumps(collator(model)))
    assert other(samples(5))["plan"].routes("language") == collator(model)(samples(5))["plan"].routes("language")


def test_what_pins_a_batch_pins_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `DataLoader` does with ``pin_memory=True``, which needs an accelerator."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, device=None: self)
    pinned: list[RoutingPlan] = []
    monkeypatch.setattr(RoutingPlan, "pin_memory", lambda self: pinned.append(self) or self)
    batch = collator(attached(bert(), "bert.encoder.layer.*"))(samples(5))
    found = pin_memory(batch)
    assert pinned == [batch["plan"]]
    assert found["plan"] is batch["plan"]


class Words:
    """As little of a tokenizer as padding needs."""

    padding_side = "right"

    def pad(self, features: list[Any], **_: Any) -> Any:
        longest = max(len(each["input_ids"]) for each in features)
        rows = [each["input_ids"] + [0] * (longest - len(each["input_ids"])) for each in features]
        return transformers.BatchEncoding({"input_ids": torch.tensor(rows)})


def test_a_collator_of_transformers() -> None:
    """Its result is no dict, and the sentences have several lengths."""
    from transformers import DataCollatorWithPadding

    rows = [{"input_ids": [3] * (2 + place), "lang": name} for place, name in enumerate(routes(4))]
    inner: Any = DataCollatorWithPadding.__new__(DataCollatorWithPadding)
    inner.tokenizer, inner.padding, inner.max_length, inner.pad_to_multiple_of = Words(), True, None, None
    inner.return_tensors = "pt"
    batch = celmoe.Collator(celmoe.RoutingCompiler(config()), {"language": "lang"}, inner)(rows)
    assert isinstance(batch, transformers.BatchEncoding)
    assert batch["input_ids"].shape == (4, 5)
    assert batch["plan"].routes("language") == routes(4)


def test_threads_follow_their_own_plans() -> None:
    """Two threads with one model in inference, many times: each gets the logits of its own languages."""
    model = stirred(attached(llama().eval(), "model.layers.*"))
    given = words(3)
    plans = {name: planned(model, [name] * 3) for name in ("de", "it", "fr", "nl")}
    with torch.no_grad():
        wanted = {name: model(**given, plan=plan).logits for name, plan in plans.items()}

    def run(name: str) -> bool:
        with torch.inference_mode(), celmoe.routed(model, plans[name]):
            return all(torch.equal(model(**given).logits, wanted[name]) for _ in range(15))

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, ["de", "it", "fr", "nl"]))
    assert not torch.equal(wanted["de"], wanted["it"])
    assert wanted["de"].shape[-1] == WORDS
