"""The report's words for measurements: stages, devices, workloads, numbers."""

from __future__ import annotations

from benchmarks.contenders.contender import (
    AUTO,
    BARE,
    DENSE,
    GROUPED,
    LATER_PEER,
    LOOK_UPS,
    LOOPED,
    ORACLE,
    PEER,
    PEFT,
    STACK,
    STACKED,
    TRANSFORMERS,
    VMAP,
)
from benchmarks.suite.stages import BACKWARD, DISPATCH, EXPERTS, FORWARD, INFERENCE, MEMORY, PLAN, ROUTING, WHOLE_STEP
from benchmarks.workloads.bodies import LOW_RANK, PRODUCT, RANK, UNTOUCHED
from benchmarks.workloads.hierarchies import EVEN, JOB, ONE_LEVEL, TREE, UNIFORM, ZIPF
from benchmarks.workloads.workload import POSITIONS, Workload

STAGE_NAMES = {
    PLAN: "planning",
    ROUTING: "routing pass",
    DISPATCH: "dispatch and combine",
    EXPERTS: "experts",
    WHOLE_STEP: "whole step",
    FORWARD: "forward pass",
    BACKWARD: "backward pass",
    INFERENCE: "inference",
    MEMORY: "peak memory",
}
STAGE_MEANINGS = {
    PLAN: "from the names of experts to index tensors",
    ROUTING: "names planned, and one column of rows sent to experts that return it",
    DISPATCH: "names of one level planned, rows moved to experts that return them, and moved back",
    EXPERTS: "names of one level planned, rows moved, experts run",
    WHOLE_STEP: "a training step: gradients cleared, forward from names, a loss, backward, clipping, fused AdamW",
    FORWARD: "from names to the loss, in training",
    BACKWARD: "from the loss to all gradients",
    INFERENCE: "a forward pass from names, in evaluation mode and under inference_mode",
}
DEVICE_NAMES = {"cpu": "CPU", "cuda": "CUDA", "directml": "DirectML"}
CONTENDER_MEANINGS = {
    AUTO: "celmoe as it comes: it runs a level's experts together where that pays, and one after another where not",
    STACKED: "celmoe after stack_experts: alike experts keep each of their tensors in one parameter",
    GROUPED: "celmoe, told to run all experts of one architecture together",
    LOOPED: "celmoe, told to run experts one after another",
    PEER: "the package that celmoe replaces: it runs experts one after another",
    LATER_PEER: "the last version of that package",
    ORACLE: "plain Python loops, written to be read: the reference that results are checked against",
    TRANSFORMERS: "the grouped experts of Hugging Face's transformers; norm and residual are ours",
    PEFT: "adapters of Hugging Face's PEFT, picked by name for each sample of a batch",
    STACK: "what one would write by hand: stacked weights, and one product for all experts of a level",
    VMAP: "the experts' own module under torch.func.vmap, over stacked weights and padded rows",
    DENSE: "a floor, which does less: the same rows through one expert a level, nothing routed, nothing moved",
    BARE: "a floor, which does less: experts one after another on rows cut in place, nothing routed, nothing moved",
    LOOK_UPS: "a floor of planning, which does less: each name is looked up in a dict",
}
# By the kind of experts, and of routes.
WORKLOAD_MEANINGS = {
    "linear": "experts are one linear layer",
    "mlp": "experts are a norm, two linear layers, and a residual",
    "block": f"experts are a Transformer encoder layer, over {POSITIONS} positions",
    "masked-block": f"the same, with a mask over padding among the {POSITIONS} positions",
    "gru": f"experts are one GRU layer, over {POSITIONS} positions",
    "two-widths": "experts of one level are MLPs of two inner widths",
    LOW_RANK: f"experts are a residual change of rank {RANK}, as a LoRA adapter makes it",
    UNTOUCHED: "experts return their rows: only planning and moving are left",
    PRODUCT: "linear experts whose rows are in expert order already: only their products are left",
    ZIPF: "the n-th expert gets 1/n times as many samples as the first; usually all get alike",
    JOB: "the levels of the multilingual job: one universal expert, families, and 54 languages",
    EVEN: "three levels of E experts, each routed by names of its own",
    ONE_LEVEL: "the last level alone",
}


def workload_words(workload: Workload) -> str:
    """``linear, H 64, B 4,096, E 256``; hierarchy and routes only if they are not the usual ones."""
    words = [
        workload.expert,
        f"H {workload.hidden_size}",
        f"B {workload.batch_size:,}",
        f"E {workload.num_experts}",
    ]
    return ", ".join([*words, *unusual(workload)])


def unusual(workload: Workload) -> list[str]:
    """Its routes and hierarchy in words, if they are not the usual ones."""
    routes = [f"{workload.routes} routes"] * (workload.routes != UNIFORM)
    return routes + [workload.hierarchy] * (workload.hierarchy != TREE)


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
