"""Who and what is on the page, in the page's words: contenders by the order of tables, stages, workloads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.contenders import contender as named
from benchmarks.harness.canvas import BLUE, GREY, VERMILION
from benchmarks.suite import stages
from benchmarks.workloads.bodies import LOW_RANK, PRODUCT, RANK, UNTOUCHED
from benchmarks.workloads.hierarchies import EVEN, JOB, ONE_LEVEL, ZIPF
from benchmarks.workloads.workload import POSITIONS


class Shown(NamedTuple):
    """A contender's colour, and its meaning."""

    colour: str
    meaning: str


# In the order of tables and panels: libraries users come from, code they could write, bounds, our engines.
CONTENDERS = {
    named.PEER: Shown(VERMILION, "the package that celmoe replaces: it runs experts one after another"),
    named.LATER_PEER: Shown("#e69f00", "the last version of that package"),
    named.ORACLE: Shown(
        "#cc79a7", "plain Python loops, written to be read: the reference that results are checked against"
    ),
    named.TRANSFORMERS: Shown(
        "#999933", "the grouped experts of Hugging Face's transformers; norm and residual are ours"
    ),
    named.PEFT: Shown("#332288", "adapters of Hugging Face's PEFT, picked by name for each sample of a batch"),
    named.STACK: Shown(
        "#000000", "what one would write by hand: stacked weights, and one product for all experts of a level"
    ),
    named.VMAP: Shown("#882255", "the experts' own module under torch.func.vmap, over stacked weights and padded rows"),
    named.DENSE: Shown(
        GREY, "a floor, which does less: the same rows through one expert a level, nothing routed, nothing moved"
    ),
    named.BARE: Shown(
        "#bbbbbb",
        "a floor, which does less: experts one after another on rows cut in place, nothing routed, nothing moved",
    ),
    named.LOOK_UPS: Shown(GREY, "a floor of planning, which does less: each name is looked up in a dict"),
    named.GROUPED: Shown("#56b4e9", "celmoe, told to run all experts of one architecture together"),
    named.LOOPED: Shown("#009e73", "celmoe, told to run experts one after another"),
    named.STACKED: Shown(
        "#44aa99", "celmoe after stack_experts: alike experts keep each of their tensors in one parameter"
    ),
    named.AUTO: Shown(
        BLUE,
        "celmoe as it comes: it runs a level's experts together where that pays, and one after another where not",
    ),
}
STAGE_NAMES = {
    stages.PLAN: "planning",
    stages.ROUTING: "routing pass",
    stages.DISPATCH: "dispatch and combine",
    stages.EXPERTS: "experts",
    stages.WHOLE_STEP: "whole step",
    stages.FORWARD: "forward pass",
    stages.BACKWARD: "backward pass",
    stages.INFERENCE: "inference",
    stages.MEMORY: "peak memory",
}
STAGE_MEANINGS = {
    stages.PLAN: "from the names of experts to index tensors",
    stages.ROUTING: "names planned, and one column of rows sent to experts that return it",
    stages.DISPATCH: "names of one level planned, rows moved to experts that return them, and moved back",
    stages.EXPERTS: "names of one level planned, rows moved, experts run",
    stages.WHOLE_STEP: "a training step: gradients cleared, forward from names, a loss, backward, clipping, "
    "fused AdamW",
    stages.FORWARD: "from names to the loss, in training",
    stages.BACKWARD: "from the loss to all gradients",
    stages.INFERENCE: "a forward pass from names, in evaluation mode and under inference_mode",
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


def in_order(contenders: Iterable[str]) -> list[str]:
    """Contenders in the order of tables; ones that nobody knows come last."""
    given = set(contenders)
    return [name for name in CONTENDERS if name in given] + sorted(given - CONTENDERS.keys())


def colour_of(contender: str) -> str:
    """The contender's colour in all figures."""
    return CONTENDERS[contender].colour if contender in CONTENDERS else GREY
