"""How the report words what was measured: stages, devices, workloads, numbers."""

from __future__ import annotations

from benchmarks.contenders.contender import (
    AUTO,
    DENSE,
    GROUPED,
    LOOK_UPS,
    LOOPED,
    ORACLE,
    PEFT,
    STACK,
    STACKED,
    TRANSFORMERS,
    VMAP,
)
from benchmarks.hierarchies import TREE, UNIFORM
from benchmarks.report.reading import LATER_PEER, PEER
from benchmarks.stages import BACKWARD, DISPATCH, EXPERTS, FORWARD, INFERENCE, MEMORY, PLAN, WHOLE_STEP
from benchmarks.workloads import Workload

STAGE_NAMES = {
    PLAN: "planning",
    DISPATCH: "dispatch and combine",
    EXPERTS: "experts",
    WHOLE_STEP: "whole step",
    FORWARD: "forward pass",
    BACKWARD: "backward pass",
    INFERENCE: "inference",
    MEMORY: "peak memory",
}
STAGE_MEANINGS = {
    PLAN: "names to index tensors",
    DISPATCH: "one level from names to rows in expert order and back, with experts that return them",
    EXPERTS: "one level from names: planned, moved, run; its products alone, with sorted rows at hand",
    WHOLE_STEP: "clearing of gradients, forward with names for routes, a loss, backward, clipping, fused AdamW",
    FORWARD: "forward with names for routes and a loss, in training",
    BACKWARD: "backward alone",
    INFERENCE: "a forward pass under inference_mode",
    MEMORY: "the most that a forward and a backward pass hold",
}
DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA", "directml": "DirectML"}
CONTENDER_MEANINGS = {
    AUTO: "this library as it comes: groups a level's experts where that pays, loops over them where not",
    STACKED: "the same after stack_experts: one parameter for each tensor of alike experts",
    GROUPED: "this library, told to run experts of one architecture as one",
    LOOPED: "this library, told to run experts one after another",
    PEER: "the package that celmoe replaces",
    LATER_PEER: "its last version",
    ORACLE: "plain Python loops, the reference that results are checked against",
    TRANSFORMERS: "the mixture-of-experts layer of Hugging Face's transformers",
    PEFT: "adapters of Hugging Face's PEFT, mixed within a batch by name",
    STACK: "the same experts, stacked by hand into batched products",
    VMAP: "torch.func's stack_module_state and vmap over padded batches",
    DENSE: "the floor: the same rows through one expert a level, nothing routed, nothing moved",
    LOOK_UPS: "the floor of planning: each name looked up in a dict, and no more",
}


def workload_words(workload: Workload) -> str:
    """``linear, H 64, B 4,096, E 256``; hierarchy and routes only where they are not the usual ones."""
    words = [
        workload.expert,
        f"H {workload.hidden_size}",
        f"B {workload.batch_size:,}",
        f"E {workload.num_experts}",
    ]
    words += [f"{workload.routes} routes"] * (workload.routes != UNIFORM)
    return ", ".join(words + [workload.hierarchy] * (workload.hierarchy != TREE))


def ms_words(ms: float) -> str:
    """Milliseconds in three digits, microseconds below a tenth."""
    if ms < 0.1:
        return f"{_digits(1e3 * ms)} µs"
    return f"{_digits(ms)} ms"


def times_words(ratio: float) -> str:
    """A ratio in three digits or so."""
    return f"{ratio:.2f}" if ratio < 10 else _digits(ratio)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def mebibytes_words(count: float) -> str:
    """Bytes in MiB, without the unit."""
    return _digits(count / 2**20)
