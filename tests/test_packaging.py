"""A clone is importable from every folder; a missing package is told with the command that installs it."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from benchmarks import extras
from benchmarks.commands import JOB, MEASUREMENTS
from benchmarks.extras import missing_extra
from tests.slow import slow_after

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def name_of(requirement):
    return re.match(r"[\w.-]+", requirement)[0]


def python(*arguments, cwd, **options):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False, **options)


WHERE = "import celmoe; print(celmoe.__file__)"


@pytest.mark.parametrize("inside", slow_after(1, ["celmoe", "celmoe/celmoe", "elsewhere/celmoe"]))
def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path, inside):
    """The folder above a clone is such a place: `python -c` looks into the working directory first."""
    try:
        importlib.metadata.version("celmoe")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("celmoe is not installed")
    (tmp_path / inside).mkdir(parents=True)
    assert Path(python("-c", WHERE, cwd=tmp_path).stdout.strip()).parts[-2:] == ("celmoe", "__init__.py")


def test_the_folder_would_be_found_where_nothing_is_installed(tmp_path):
    (tmp_path / "celmoe").mkdir()
    assert python("-S", "-E", "-c", WHERE, cwd=tmp_path).stdout.strip() == "None"


def test_no_extra_replaces_an_installed_torch():
    assert [name_of(each) for each in PROJECT["dependencies"]] == ["torch", "numpy"]
    assert not [each for extra in EXTRAS.values() for each in extra if name_of(each) == "torch"]
    for requirement in [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]:
        assert "==" not in requirement or name_of(requirement) == "simplemma", requirement


def test_every_package_of_the_tests_has_a_tested_version():
    lines = (ROOT / ".ci/constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name_of(line) for line in lines if re.fullmatch(r"[\w.-]+==[\w.]+", line)}
    assert pinned == {name_of(line) for line in lines if not line.startswith("#")}
    extras = [each for extra, packages in EXTRAS.items() if extra != "directml" for each in packages]
    wanted = [*PROJECT["dependencies"], *extras]
    assert {name_of(each) for each in wanted} - {"celmoe"} <= pinned


@pytest.mark.parametrize(
    ("test", "bench", "missing"),
    [
        ([], [], ""),
        (["pytest>=8", "numpy"], ["rich"], ""),
        (["no-such-package>=1,<2"], ["rich"], "no-such-package"),
        (["celmoe[bench]", "no.such_package"], ["nor-this; python_version > '3'"], "nor-this, no.such_package"),
        (["celmoe[bench]", "nor-this"], ["nor-this[with]==1"], "nor-this"),
    ],
)
def test_packages_that_are_missing(tmp_path, test, bench, missing):
    table = f"[project]\ndependencies = ['torch>=1']\n[project.optional-dependencies]\ntest = {test}\nbench = {bench}\n"
    path = tmp_path / "pyproject.toml"
    path.write_text(table, encoding="utf-8")
    assert missing_extra("test", path) == (missing and f'{missing} must be installed: pip install -e ".[test]"')


def nothing_is_installed(name):
    raise importlib.metadata.PackageNotFoundError(name)


def test_tools_may_be_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "distribution", nothing_is_installed)
    path = tmp_path / "pyproject.toml"
    table = "[project]\ndependencies = []\n[project.optional-dependencies]\nx = ['mypy', 'ruff']\n"
    path.write_text(table, encoding="utf-8")
    assert missing_extra("x", path) == ""


def test_a_missing_dependency_is_told_too(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text(
        "[project]\ndependencies = ['neither']\n[project.optional-dependencies]\nx = []\n", encoding="utf-8"
    )
    assert missing_extra("x", path) == 'neither must be installed: pip install -e ".[x]"'


COMMANDS = [("", name) for name in MEASUREMENTS] + [(".multilingual", name) for name in JOB]


@pytest.mark.parametrize(("module", "name"), COMMANDS)
def test_a_command_without_its_packages_says_how_to_get_them(module, name):
    done = python("-S", "-E", "-m", f"benchmarks{module}", *filter(None, [name]), cwd=ROOT)
    assert done.returncode == 1
    assert re.fullmatch(r'torch, numpy, .*rich.* must be installed: pip install -e "\.\[bench\]"\n', done.stderr)
    assert done.stdout == ""


# Runs a command under a torch without the function that celmoe.distributed looks for.
OLDER_TORCH = """
import runpy, sys, torch.distributed
vars(torch.distributed).pop("all_gather_single", None)
sys.argv[1:] = ["scaling"]
runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
"""


def test_a_command_that_wants_a_newer_torch_says_so():
    done = python("-c", OLDER_TORCH, cwd=ROOT)
    assert done.returncode == 1
    assert re.fullmatch(r"'celmoe\.distributed' must have PyTorch 2\.13 or later \(got 2\..*\)\n", done.stderr)


def test_every_command_is_tried():
    modules = [path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py")]
    runnable = [path for path in modules if '__name__ == "__main__"' in (ROOT / path).read_text(encoding="utf-8")]
    found = {".".join(path.with_suffix("").parts).removesuffix(".__main__") for path in runnable}
    assert found == {f"benchmarks{module}" for module, _ in COMMANDS}


def test_a_wrong_name_is_refused_in_one_sentence():
    done = python("-m", "benchmarks", "whole-step", cwd=ROOT)
    known = "whole-steps, scaling, mixed-routes, lora-languages, trainer-compile"
    assert done.returncode == 1
    assert done.stderr == (
        f"'python -m benchmarks' must be given one of {known}, or options (got 'whole-step'; nearest: whole-steps)\n"
    )


# Runs pytest as if one package were not installed.
PYTEST = """
import importlib.metadata, sys, pytest
installed = importlib.metadata.distribution
def distribution(name):
    if name == sys.argv[1]:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)
importlib.metadata.distribution = distribution
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.parametrize(
    ("package", "arguments", "extra"),
    [
        ("hypothesis", ["tests/test_names.py"], "test"),
        ("rich", [], "test"),
        ("pytest-xdist", ["-p", "no:xdist"], "test"),
        ("pytest-benchmark", ["-p", "no:benchmark", "benchmarks/suite"], "bench"),
    ],
)
def test_pytest_without_a_package_says_how_to_get_it(package, arguments, extra):
    done = python("-c", PYTEST, package, *arguments, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == f'{package} must be installed: pip install -e ".[{extra}]"\n'
    assert done.stdout == ""


def test_pytest_runs_where_nothing_is_missing():
    done = python("-c", PYTEST, "nothing", "tests/test_names.py", "--collect-only", "-q", cwd=ROOT)
    assert done.returncode == 0, done.stderr
