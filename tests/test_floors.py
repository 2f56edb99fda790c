"""The one-way street: a file of the library imports only from floors below its own.

`FLOORS` is the house, lowest first. Files of one floor may not import each other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import celmoe

PACKAGE = Path(celmoe.__file__).parent

FLOORS = [
    {"directml"},
    {"version", "errors", "files", "ragged", "segments", "slots", "torch_internals", "inline", "waiting"},
    {"config", "experts", "layout", "product", "containers"},
    {"members", "affine", "boundary"},
    {"routing", "names", "context", "reference_context", "fusion"},
    {"operations", "planner", "capture"},
    {
        "plan",
        "operations_shape",
        "operations_reduce",
        "operations_product",
        "operations_norm",
        "operations_parameters",
        "operations_complex",
        "operations_distance",
        "operations_image",
        "declared",
    },
    {"operations_elementwise", "operations_loss", "operations_attention", "operations_recurrent"},
    {"operations_index"},
    {"compiler", "dispatch", "outputs", "explain", "binding"},
    {"program"},
    {"looped", "loss", "verify"},
    {"classes"},
    {"arrangement", "cost"},
    {"choice"},
    {"grouped"},
    {"engines"},
    {"level"},
    {"hierarchy"},
    {"reference"},
    {"devices"},
    {"__init__", "__main__"},
]
FLOOR_BY_FILE = {file: number for number, floor in enumerate(FLOORS) for file in floor}

# A house of its own on top of that: its files import any floor of the other, which knows nothing of it.
DISTRIBUTED_FLOORS = [
    {"versions"},
    {"groups", "placement", "transport", "meeting", "samplers"},
    {"gradients"},
    {"data_parallel", "sharded_level", "remote"},
    {"expert_parallel", "fully_sharded", "checkpoints"},
    {"__init__"},
]
DISTRIBUTED_FLOOR_BY_FILE = {file: number for number, floor in enumerate(DISTRIBUTED_FLOORS) for file in floor}
DISTRIBUTED = "celmoe.distributed"

# The house of the checkpoints, a room in that one.
CHECKPOINT_FLOORS = [
    {"agreement"},
    {"manifest"},
    {"pieces", "optimizer_state", "staging"},
    {"saving", "single_file"},
    {"loading"},
    {"__init__"},
]
CHECKPOINT_FLOOR_BY_FILE = {file: number for number, floor in enumerate(CHECKPOINT_FLOORS) for file in floor}
CHECKPOINTS = "celmoe.distributed.checkpoints"


def siblings(source, package="celmoe"):
    """The files of the package that a source imports, wherever in the file; with the line of each.

    Imports that only a type checker follows count as well: a name that is only needed to annotate is still a climb.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (
            node.level == 1 or (node.level == 0 and f"{node.module}.".startswith(f"{package}."))
        ):
            inside = (node.module or "").removeprefix(package).strip(".") if node.level == 0 else node.module
            if inside:
                found.append((inside.split(".")[0], node.lineno))
            else:
                found.extend((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Import):
            found += [
                (alias.name.removeprefix(f"{package}.").split(".")[0], node.lineno)
                for alias in node.names
                if alias.name.startswith(f"{package}.")
            ]
    return found


def climbs(file, source, floors=FLOOR_BY_FILE, package="celmoe"):
    """The imports of a file that do not lead downwards."""
    return [
        f"{file}.py, line {line}: imports {sibling}"
        for sibling, line in siblings(source, package)
        if floors.get(sibling, len(floors)) >= floors[file]
    ]


def sources(folder=PACKAGE):
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))}


def test_every_file_has_its_floor():
    assert sources().keys() == FLOOR_BY_FILE.keys()
    assert sum(map(len, FLOORS)) == len(FLOOR_BY_FILE)
    rooms = {path.parent.name for path in PACKAGE.glob("distributed/*/__init__.py")}
    assert rooms == {"checkpoints"}
    assert sources(PACKAGE / "distributed").keys() | rooms == DISTRIBUTED_FLOOR_BY_FILE.keys()
    assert sum(map(len, DISTRIBUTED_FLOORS)) == len(DISTRIBUTED_FLOOR_BY_FILE)
    assert sources(PACKAGE / "distributed" / "checkpoints").keys() == CHECKPOINT_FLOOR_BY_FILE.keys()
    assert sum(map(len, CHECKPOINT_FLOORS)) == len(CHECKPOINT_FLOOR_BY_FILE)


def test_imports_lead_downwards():
    assert not [climb for file, source in sources().items() for climb in climbs(file, source)]
    files = sources(PACKAGE / "distributed").items()
    assert not [
        climb for file, source in files for climb in climbs(file, source, DISTRIBUTED_FLOOR_BY_FILE, DISTRIBUTED)
    ]
    for file, source in sources(PACKAGE / "distributed" / "checkpoints").items():
        assert not climbs(file, source, CHECKPOINT_FLOOR_BY_FILE, CHECKPOINTS)
        # A name of the house below is imported by its whole path, and goes down from the room's own floor.
        below = [
            name
            for name, _ in siblings(source.replace("from .", f"from {CHECKPOINTS}."), DISTRIBUTED)
            if name != "checkpoints"
        ]
        assert all(DISTRIBUTED_FLOOR_BY_FILE[name] < DISTRIBUTED_FLOOR_BY_FILE["checkpoints"] for name in below), file


@pytest.mark.parametrize(
    "source",
    ["from .data_parallel import prepare_ddp", "import celmoe.distributed.data_parallel", "from . import anything"],
)
def test_a_climber_is_caught_upstairs(source):
    assert len(climbs("gradients", f"from .groups import a\n{source}\n", DISTRIBUTED_FLOOR_BY_FILE, DISTRIBUTED)) == 1
    assert not climbs("gradients", "from ..hierarchy import a", DISTRIBUTED_FLOOR_BY_FILE, DISTRIBUTED)


def test_the_street_is_used():
    """Imports are found at all: the top reaches the bottom, and only the lowest floors import nothing."""
    reached = {file: {sibling for sibling, _ in siblings(source)} for file, source in sources().items()}
    assert {"compiler", "config", "errors"} <= reached["hierarchy"]
    assert {file for file, found in reached.items() if not found} <= {
        *("version", "errors", "directml", "experts", "files", "names", "ragged", "segments", "slots", "boundary"),
        *("torch_internals", "inline", "waiting"),
    }


CLIMBERS = [
    "from .hierarchy import HierarchicalCELMoE",
    "from celmoe.hierarchy import HierarchicalCELMoE",
    "from . import hierarchy",
    "from celmoe import hierarchy",
    "from celmoe import HierarchicalCELMoE",
    "import celmoe.hierarchy",
    "import celmoe.hierarchy as above",
    "from .level import run_level",
    "from .compiler import RoutingCompiler",
    "from .distributed import anything",
    "def late():\n    from .hierarchy import HierarchicalCELMoE",
    "if True:\n    from .hierarchy import HierarchicalCELMoE",
]


@pytest.mark.parametrize("source", CLIMBERS)
def test_a_climber_is_caught(source):
    assert len(climbs("plan", f"from .errors import PlanError\n{source}\n")) == 1


@pytest.mark.parametrize(
    "source", ["from .routing import Codes", "import torch", "from torch import hierarchy", "import celmoevp.hierarchy"]
)
def test_who_goes_down_is_let_through(source):
    assert not climbs("plan", source)


def test_nothing_is_imported_from_tests_or_benchmarks():
    for file, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            roots = set()
            if isinstance(node, ast.Import):
                roots = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {node.module.split(".")[0]}
            assert not roots & {"tests", "benchmarks", "hypothesis", "pytest"}, file
