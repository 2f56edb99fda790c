"""One expert comes, one goes, one is renamed: all others' training stays exactly as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import celmoe
from celmoe import ExpertConfig, HierarchicalCELMoE
from tests.lifecycle import WIDTH, build

TOLERANCE = 2e-6
OPTIMIZERS = {
    "torch AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "torch SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda parameters: celmoe.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "Adam": lambda parameters: celmoe.optim.Adam(parameters, lr=0.01),
    "SGD": lambda parameters: celmoe.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
}
RENAMED = {"it": "zz"}


def train(
    model: HierarchicalCELMoE, optimizer: Any, steps: range, dtype: torch.dtype, names: dict[str, str]
) -> list[torch.Tensor]:
    outputs = []
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        # 'uk' is absent at first, and 'es' comes late: their counts of steps are their own.
        known = ["ru", "pl", "it", "fi"] if step < 2 else ["pl", "it", "fi", "es"]
        routes = [names.get(known[each], known[each]) for each in torch.randint(4, (6,), generator=draw).tolist()]
        optimizer.zero_grad()
        fused = model(torch.randn(6, WIDTH, generator=draw, dtype=dtype), {"language": routes}).fused_hidden
        fused.square().sum().backward()
        optimizer.step()
        outputs.append(fused.detach())
    return outputs


@pytest.mark.parametrize(("engine", "dtype"), [("looped", torch.float32), ("grouped", torch.float64)])
@pytest.mark.parametrize("is_stacked", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_more_steps(name, is_stacked, engine, dtype):
    found: list[tuple[HierarchicalCELMoE, list[torch.Tensor]]] = []
    for is_changed in (False, True):
        model = build(is_stacked=is_stacked).to(dtype)
        model.engine = engine
        optimizer = OPTIMIZERS[name](model.parameters())
        train(model, optimizer, range(4), dtype, {})
        if is_changed:
            model.remove_expert("language", "hu", optimizer=optimizer)
            model.add_expert(
                "language", "aa", ExpertConfig("aa", parent="slavic"), warm_start="ru", optimizer=optimizer
            )
            model.rename_expert("language", "it", "zz", optimizer=optimizer)
        found.append((model, train(model, optimizer, range(4, 7), dtype, RENAMED if is_changed else {})))
    (never, expected), (changed, outputs) = found
    for mine, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE)
    state = changed.state_dict()
    compared = 0
    for key, value in never.state_dict().items():
        if ".hu." not in key:
            torch.testing.assert_close(state[key.replace(".it.", ".zz.")], value, rtol=0, atol=TOLERANCE)
            compared += 1
    assert compared == len(state) - 4
