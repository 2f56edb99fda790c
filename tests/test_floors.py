"""The one-way street: a file of the library imports only from its own floor and from those below.

`FLOORS` is the house, lowest first. A name is a package's, or a file's that lies beside the packages. Within a floor,
as within a package, imports make no circle.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import celmoe

PACKAGE = Path(celmoe.__file__).parent

FLOORS = [
    # The contract: what users write, see and catch; and the only file that may name PyTorch's inner parts.
    {
        *("config", "errors", "experts", "outputs", "fusion", "loss", "version"),
        *("based", "directml", "files", "json_values", "load_figure", "names", "patterns", "reference_context"),
        "torch_internals",
    },
    # Parameters of many experts in one tensor, and optimizers for them; names to plans.
    {"stacked", "optim", "routing", "explain", "load_tracker", "collator"},
    # Rows into expert order and back.
    {"rows"},
    # Many experts as one: an expert's graph, lowered, verified and run.
    {"grouped"},
    # The engines, and the decision between them.
    {"engines"},
    # One level: dispatch, engine, combine.
    {"level"},
    # The model, its changes, and its way into compiled graphs.
    {"traced", "lifecycle", "hierarchy"},
    # Functions of whole models; the oracle; ready experts.
    {"groups", "norms", "stacking", "loading", "reference", "zoo"},
    # In other people's models, on other devices, beyond one machine.
    {"attached", "bridges", "devices", "distributed"},
    # The front door.
    {"", "__main__"},
]
FLOOR_BY_NAME = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def sources() -> dict[str, str]:
    """The library's files, by the path below `celmoe`; a package by its own."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


FILES = sources()
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
    while name and name not in FILES:
        name = name.rpartition(".")[0]
    return name


def _floor_of(file: str) -> int:
    return FLOOR_BY_NAME[file.split(".", maxsplit=1)[0]]


def climbs(file: str, source: str) -> list[str]:
    """The imports of a file that lead to a higher floor."""
    return [
        f"{file}, line {line}: imports {other}"
        for other, line in imports(file, source)
        if _floor_of(other) > _floor_of(file)
    ]


def circle(files: dict[str, set[str]]) -> list[str]:
    """Files that import one another in a circle, if there are some.

    Args:
        files: The files that each imports.
    """
    done: set[str] = set()

    def walk(file: str, path: list[str]) -> list[str]:
        if file in path:
            return [*path[path.index(file) :], file]
        if file in done:
            return []
        found = next(filter(None, (walk(other, [*path, file]) for other in sorted(files[file]))), [])
        done.add(file)
        return found

    return next(filter(None, (walk(file, []) for file in sorted(files))), [])


def graph() -> dict[str, set[str]]:
    """The files that each file imports, without its own package: a package's file may import the files in it."""
    return {
        file: {other for other, _ in imports(file, source) if not file.startswith(f"{other}.")}
        for file, source in FILES.items()
    }


def test_every_package_has_its_floor():
    assert {file.split(".")[0] for file in FILES} == FLOOR_BY_NAME.keys()
    assert sum(map(len, FLOORS)) == len(FLOOR_BY_NAME)
    assert len(FLOORS) <= 10


def test_imports_lead_downwards():
    assert not [climb for file, source in FILES.items() for climb in climbs(file, source)]


def test_imports_make_no_circle():
    assert not circle(graph())


def test_a_circle_is_found():
    files = graph()
    files["errors"] = {"routing.plan"}
    found = circle(files)
    assert found[0] == found[-1]
    assert {"errors", "routing.plan"} <= {*found}
    assert circle({"a": {"b"}, "b": {"a"}}) == ["a", "b", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_every_package_says_what_lies_in_it():
    """A package's docstring is its map: it names all its files."""
    for package in PACKAGES:
        text = ast.get_docstring(ast.parse(FILES[package])) or ""
        inside = {file.removeprefix(f"{package}.") for file in FILES if package == "" or file.startswith(f"{package}.")}
        missing = {name for name in inside if "." not in name and f"`{name}`" not in text}
        assert not missing, f"{package}: {sorted(missing)}"


def test_the_street_is_used():
    """Imports are found at all: the top reaches the bottom."""
    reached = graph()
    assert {"routing.compiler", "config", "errors"} <= reached["hierarchy"]
    assert {"grouped.ops.table", "grouped.kernels.product"} <= reached["grouped.ops.recurrent"]
    assert {"distributed.gradients", "hierarchy"} <= reached["distributed.data_parallel"]
    assert not reached["errors"]


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
    for file, source in FILES.items():
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
    assert underscored(FILES["torch_internals"])
    assert {file: names for file, source in FILES.items() if (names := underscored(source))}.keys() == {
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
