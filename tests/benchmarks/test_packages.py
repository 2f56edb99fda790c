"""The packages of the benchmarks: imports lead to those named before, and each docstring is a map."""

import ast
from pathlib import Path

import pytest

import benchmarks

ROOT = Path(benchmarks.__file__).parent
# Each may import those before it; the job is no one's business but its own.
ORDER = ["workloads", "harness", "contenders", "suite", "report", "tables"]
JOB = {"multilingual": {"workloads", "harness"}}
MAY = {name: set(ORDER[:place]) for place, name in enumerate(ORDER)} | JOB


def imported(source):
    """The packages of the benchmarks that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "benchmarks":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("benchmarks."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("benchmarks.")}
    return found


@pytest.mark.parametrize("package", MAY)
def test_imports_lead_to_packages_before(package):
    for file in (ROOT / package).rglob("*.py"):
        wrong = imported(file.read_text(encoding="utf-8")) - MAY[package] - {package, "commands", "extras"}
        assert not wrong, f"{file}: {wrong}"


def test_every_package_has_its_place():
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} == set(MAY)


@pytest.mark.parametrize(
    "source",
    ["from benchmarks.report import page", "import benchmarks.report", "def f():\n    from benchmarks import report"],
)
def test_an_import_is_seen(source):
    assert imported(source) == {"report"}


@pytest.mark.parametrize("package", [*MAY, "tables/scaling", "tables/whole_steps"])
def test_a_docstring_names_the_package_s_files(package):
    text = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    names = {
        path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    missing = {
        name for name in names - {"__init__", "__main__"} if not name.startswith("test_") and f"`{name}`" not in text
    }
    assert not missing
