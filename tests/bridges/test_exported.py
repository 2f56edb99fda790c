"""One language's path for serving: exported, as ONNX, and in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import celmoe
from tests.bridges.hosts import LowRank, attached, bert, planned, stirred, words
from tests.slow import slow_after

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


class Logits(nn.Module):
    """A model as a function of tensors to a tensor."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


PLACES = {
    "layers": ("bert.encoder.layer.*", None),
    "attention": ("bert.encoder.layer.*.attention.output.dense", LowRank),
}


def path(place: str, language: str = "nl", *, is_stacked: bool = False) -> tuple[nn.Module, dict[str, Any], Any, Any]:
    """The path of a language; a batch; its logits, and those of another language."""
    where, factory = PLACES[place]
    model = stirred(attached(bert().eval(), where, *([factory] if factory else [])), 0.5)
    if is_stacked:
        celmoe.adapters(model).stack()
    given = words(4)
    with torch.no_grad():
        wanted, other = (model(**given, plan=planned(model, [name] * 4)).logits for name in (language, "it"))
    celmoe.adapters(model).keep({"language": language})
    return Logits(model).eval(), given, wanted, other


BATCH = torch.export.Dim("batch", min=1, max=64)
SHAPES = {"input_ids": {0: BATCH}, "attention_mask": {0: BATCH}}


@pytest.mark.parametrize("is_stacked", slow_after(1, [False, True]))
@pytest.mark.parametrize("place", PLACES)
def test_exported(place: str, is_stacked: bool, tmp_path: Path) -> None:
    """The program knows nothing of plans, and takes batches of other sizes."""
    model, given, wanted, other = path(place, is_stacked=is_stacked)
    program = torch.export.export(model, (), given, dynamic_shapes=SHAPES)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(loaded(**given), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        loaded(**{key: each[:3] for key, each in given.items()}), wanted[:3], rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(wanted, other, rtol=1e-2)
    assert not any("celmoe::" in str(node.target) for node in program.graph.nodes)


# One name for the first axis of both inputs.
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:# The axis name. batch will not be used:UserWarning")
@pytest.mark.parametrize("place", slow_after(1, list(PLACES)))
def test_onnx(place: str, tmp_path: Path) -> None:
    model, given, wanted, other = path(place)
    torch.onnx.export(
        model, (), tmp_path / "model.onnx", kwargs=given, dynamo=True, dynamic_shapes=SHAPES, verbose=False
    )
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (4, 2):
        fed = {each.name: given[each.name][:size].numpy() for each in session.get_inputs()}
        found = torch.from_numpy(session.run(None, fed)[0])
        torch.testing.assert_close(found, wanted[:size], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, other[:size], rtol=1e-2)


# PyTorch recommends another package in its place, and still has it.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel and other:UserWarning")
def test_int8() -> None:
    """Linear layers of host and experts in 8 bits: logits lie nearer to the language's own than to another one's."""
    model, given, wanted, other = path("layers")
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    kinds = {type(each).__module__ for name, each in small.named_modules() if name.endswith(("up", "down"))}
    assert kinds == {"torch.ao.nn.quantized.dynamic.modules.linear"}
    with torch.no_grad():
        found = small(**given)
    assert (found - wanted).abs().max() < 0.1 * (other - wanted).abs().max()
    assert not torch.equal(found, wanted)
