"""The one-way street: a file of the library imports only from floors below its own.

`FLOORS` is the house, lowest first, its files by the path below `celmoe`. Files of one floor may not import each other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import celmoe

PACKAGE = Path(celmoe.__file__).parent

FLOORS = [
    {"directml"},
    {"version", "errors", "files", "torch_internals"},
    {"json_values", "load_figure"},
    {"config", "experts", "rows.slots", "routing.layout", "routing.load", "routing.memberships"},
    {"based", "rows.containers", "names", "routing.routes", "patterns", "stacked.frozen", "stacked.rows"},
    {"rows.context", "rows.blocks", "routing.planner", "reference_context", "fusion", "stacked.stack"},
    {"stacked.member", "stacked.presence", "stacked.naming"},
    {"stacked.freezing", "stacked.parallel"},
    {"optim.per_expert"},
    {"optim.optimizers"},
    {"optim.members"},
    {"optim.by_name"},
    {"optim"},
    {"stacked.fitness", "stacked.assembly"},
    {"routing.plan"},
    {"routing.compiler", "rows.mixing", "outputs", "explain", "load_tracker"},
    {"rows.dispatch", "collator"},
    {"loss", "grouped.values"},
    {
        "grouped.segments",
        "grouped.inline",
        "grouped.waiting",
        "grouped.canonical",
        "grouped.namespaces",
        "grouped.boundary",
    },
    {"grouped.kernels.even", "grouped.identities"},
    {"grouped.kernels.product"},
    {"grouped.kernels.members", "grouped.kernels.affine", "grouped.kernels.gru", "grouped.guard"},
    {"grouped.kernels.operators"},
    {"grouped.ops.table", "grouped.capture"},
    {*(f"grouped.ops.{name}" for name in ("shape", "reduce", "product", "norm", "parameters", "complex_numbers"))},
    {*(f"grouped.ops.{name}" for name in ("distance", "image", "elementwise", "loss", "attention", "recurrent"))},
    {"grouped.ops.index", "grouped.declared"},
    {"grouped.ops"},
    {"grouped.binding"},
    {"grouped.program"},
    {"grouped.verify"},
    {"grouped.classes"},
    {"engines.looped", "engines.cost", "engines.arrangement"},
    {"engines.choice"},
    {"engines.grouped"},
    {"engines.registry"},
    {"level"},
    {"traced.registered", "traced.modes"},
    {"traced.decision"},
    {"traced.inside", "traced.opaque"},
    {"traced.forward"},
    {"lifecycle.structure", "lifecycle.alone", "lifecycle.newcomer", "lifecycle.shares", "lifecycle.order"},
    {"lifecycle.places"},
    {"lifecycle.grouping"},
    {"lifecycle.changes", "lifecycle.subsets"},
    {"hierarchy"},
    {"stacked.stacking", "groups", "norms", "lifecycle.loading"},
    {"reference", "attached.where", "attached.runs"},
    {"attached.place"},
    {"attached.hosts"},
    {"attached.root"},
    {"attached.attaching", "attached.routed", "attached.adapters"},
    {"attached.files", "attached.merging"},
    {"zoo.arguments", "zoo.layers", "zoo.positions"},
    {*(f"zoo.{name}" for name in ("dense", "bottleneck", "lora", "prefix", "convolution", "block"))},
    {"zoo"},
    {"devices"},
    {"", "__main__"},
    {"distributed.versions"},
    {*(f"distributed.{name}" for name in ("groups", "placement", "transport", "meeting", "samplers"))},
    {"distributed.gradients"},
    {"distributed.data_parallel", "distributed.sharded_level", "distributed.remote"},
    {"distributed.expert_parallel", "distributed.fully_sharded"},
    {"distributed.checkpoints.agreement", "distributed.checkpoints.experts"},
    {"distributed.checkpoints.manifest"},
    {*(f"distributed.checkpoints.{name}" for name in ("pieces", "optimizer_state", "staging"))},
    {"distributed.checkpoints.saving", "distributed.checkpoints.single_file"},
    {"distributed.checkpoints.loading"},
    {"distributed.checkpoints"},
    {"distributed"},
]
# Packages whose file is a map, and nothing else.
MAPS = {"routing", "rows", "grouped", "grouped.kernels", "engines", "stacked", "traced", "lifecycle", "attached"}
FLOOR_BY_FILE = {file: number for number, floor in enumerate(FLOORS) for file in floor}


def sources() -> dict[str, str]:
    """The library's files, by the path below `celmoe`; a package by its own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


PACKAGES = {name for path in PACKAGE.rglob("__init__.py") if (name := ".".join(path.parent.relative_to(PACKAGE).parts))}


def imports(file: str, source: str) -> list[tuple[str, int]]:
    """The files of the library that one imports, wherever in the file; with the line of each.

    Imports that only a type checker follows count as well: a name that is only needed to annotate is still a climb.
    """
    here = ["celmoe", *file.split(".")] if file in PACKAGES else ["celmoe", *file.split(".")[:-1]]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            found += [(f"{module}.{alias.name}", node.lineno) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
    own = [(name.removeprefix("celmoe."), line) for name, line in found if f"{name}.".startswith("celmoe.")]
    return [(_file_of(name), line) for name, line in own]


def _file_of(name: str) -> str:
    """The file that a dotted name is of."""
    if name == "celmoe":
        return ""
    while name and name not in FLOOR_BY_FILE and name not in MAPS:
        name = name.rpartition(".")[0]
    return name


def climbs(file: str, source: str) -> list[str]:
    """The imports of a file that do not lead downwards."""
    return [
        f"{file}, line {line}: imports {other}"
        for other, line in imports(file, source)
        if other not in MAPS and FLOOR_BY_FILE[other] >= FLOOR_BY_FILE[file]
    ]


def test_every_file_has_its_floor():
    assert sources().keys() == FLOOR_BY_FILE.keys() | MAPS
    assert sum(map(len, FLOORS)) == len(FLOOR_BY_FILE)


def test_imports_lead_downwards():
    files = sources()
    assert not [climb for file, source in files.items() if file not in MAPS for climb in climbs(file, source)]
    assert not [file for file in MAPS if imports(file, files[file])]


def test_the_street_is_used():
    """Imports are found at all: the top reaches the bottom, and only low floors import nothing."""
    reached = {file: {other for other, _ in imports(file, source)} for file, source in sources().items()}
    assert {"routing.compiler", "config", "errors"} <= reached["hierarchy"]
    assert {"grouped.ops.table", "grouped.kernels.product"} <= reached["grouped.ops.recurrent"]
    assert {"distributed.gradients", "hierarchy"} <= reached["distributed.data_parallel"]
    assert {file for file, found in reached.items() if not found} <= MAPS | {
        *(
            "version",
            "errors",
            "directml",
            "experts",
            "files",
            "names",
            "rows.slots",
            "routing.load",
            "routing.memberships",
            "torch_internals",
        ),
        "traced.registered",
        *(
            "grouped.segments",
            "grouped.inline",
            "grouped.waiting",
            "grouped.namespaces",
            "grouped.canonical",
            "grouped.boundary",
        ),
        *("distributed.placement", "distributed.transport", "distributed.versions"),
    }


CLIMBERS = [
    "from ..hierarchy import HierarchicalCELMoE",
    "from celmoe.hierarchy import HierarchicalCELMoE",
    "from .. import hierarchy",
    "from celmoe import hierarchy",
    "from celmoe import HierarchicalCELMoE",
    "import celmoe",
    "import celmoe.hierarchy",
    "import celmoe.hierarchy as above",
    "from celmoe.level import run_level",
    "from .compiler import RoutingCompiler",
    "from celmoe.routing.compiler import RoutingCompiler",
    "from celmoe.distributed import anything",
    "def late():\n    from celmoe.hierarchy import HierarchicalCELMoE",
    "if True:\n    from celmoe.hierarchy import HierarchicalCELMoE",
]


@pytest.mark.parametrize("source", CLIMBERS)
def test_a_climber_is_caught(source):
    assert len(climbs("routing.plan", f"from celmoe.errors import PlanError\n{source}\n")) == 1


@pytest.mark.parametrize(
    "source", ["from .routes import Codes", "import torch", "from torch import hierarchy", "import celmoevp.hierarchy"]
)
def test_who_goes_down_is_let_through(source):
    assert not climbs("routing.plan", source)


def test_nothing_is_imported_from_tests_or_benchmarks():
    for file, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            roots = set()
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {node.module.split(".")[0]}
            assert not roots & {"tests", "benchmarks", "hypothesis", "pytest"}, file


def underscored(source: str) -> list[str]:
    """The underscored names of PyTorch that a file mentions: attributes of modules and names imported from them."""
    found = []
    tree = ast.parse(source)
    modules = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("torch."):
            modules |= {alias.asname or alias.name for alias in node.names if alias.name.islower()}
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [part for part in parts if part.startswith("_")]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if f"{alias.name}.".startswith("torch.")]
            found += [part for name in names for part in name.split(".") if part.startswith("_")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in modules:
                found.append(ast.unparse(node))
    return found


def test_one_file_names_underscored_apis_of_pytorch():
    files = sources()
    assert underscored(files["torch_internals"])
    assert {file: names for file, source in files.items() if (names := underscored(source))}.keys() == {
        "torch_internals"
    }


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._len_torch_dispatch_stack()",
        "import torch\ntorch.autograd.Variable._execution_engine",
        "from torch.autograd import forward_ad\nforward_ad._current_level",
        "from torch.utils import _pytree",
        "from torch.utils._pytree import tree_map",
        "import torch._dynamo",
    ],
)
def test_an_underscored_api_is_found(source):
    assert underscored(source)
