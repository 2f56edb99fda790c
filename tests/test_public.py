"""The public list: the names that `celmoe` shows, the modules that importing it loads, and the top of the
repository."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import celmoe

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(celmoe.__file__).parent

OF_BOTH_PEERS = [
    *("CELMoEConfig", "ExpertConfig", "HierarchyLevelConfig", "ExpertBatch", "ExpertModule", "ExpertResult"),
    *("HierarchicalCELMoE", "LevelOutput", "CELMoEOutput", "CELMoELossAPI", "LossBundle", "LossTerm", "LearnedFusion"),
    *("ExpertMetadata", "ExpertContext", "ExpertContextMap", "ExpertAux", "LevelRouting", "LossMap", "LossResult"),
    *("LossCallable", "LevelLossCallable", "BridgeLossCallable", "__version__"),
    *("PositionAwareFusion", "routing_constant", "validate_routing_length", "merge_routing"),
]
OURS = ["RoutingCompiler", "RoutingPlan", "LevelPlan", "Shared", "CELMoEError", "reference"]

TOP = {"pyproject.toml", "README.md", "celmoe", "benchmarks", "tests", "notes"}


def visible():
    """Names of the package that are neither private nor its own submodules seen by accident."""
    submodules = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.name for path in PACKAGE.iterdir() if path.is_dir()
    }
    names = {name for name in vars(celmoe) if not name.startswith("_")}
    return names - (submodules - {"optim", "reference", "zoo"}) | {"__version__"}


def test_the_list_is_sorted_and_equals_what_is_visible():
    assert celmoe.__all__ == sorted(celmoe.__all__)
    assert set(celmoe.__all__) == visible()
    assert len(set(celmoe.__all__)) == len(celmoe.__all__)


def test_the_list_check_can_fail(monkeypatch):
    monkeypatch.setattr(celmoe, "forgotten", 1, raising=False)
    assert set(celmoe.__all__) != visible()


@pytest.mark.parametrize("name", [*OF_BOTH_PEERS, *OURS])
def test_every_name_can_be_imported(name):
    assert name in celmoe.__all__
    assert hasattr(celmoe, name)


@pytest.mark.parametrize("version", ["1.1.4", "3.0.0"])
def test_every_name_of_the_peer_is_ours_too(version):
    from benchmarks.harness.peers import PeerUnavailableError, load_peer

    try:
        peer = load_peer(version)
    except PeerUnavailableError as error:
        pytest.skip(f"celmoe-vp {version}: {error}")
    assert set(peer.__all__) <= set(celmoe.__all__)


def test_every_error_is_exported_and_documented_in_the_tree():
    from celmoe import errors

    own = {name: value for name, value in vars(errors).items() if getattr(value, "__module__", "") == errors.__name__}
    classes = {name for name, value in own.items() if isinstance(value, type) and not name.startswith("_")}
    assert classes <= set(celmoe.__all__)
    builtins = (KeyError, ValueError, TypeError, RuntimeError)
    for name in classes - {"CELMoEError"}:
        error = getattr(celmoe, name)
        assert issubclass(error, celmoe.CELMoEError)
        assert sum(issubclass(error, builtin) for builtin in builtins) == 1
        (builtin,) = (builtin for builtin in builtins if issubclass(error, builtin))
        assert re.search(rf"^[|']- {name} +{builtin.__name__} ", errors.__doc__, re.MULTILINE), name
        assert str(error("a sentence")) == "a sentence"


STATE = "torch.get_rng_state().sum().item(), torch.get_num_threads(), str(torch.get_default_dtype())"


@functools.cache
def importing(statement):
    """The modules and the state of torch in a fresh interpreter, after torch and after one statement more."""
    look = f"print(json.dumps([sorted(sys.modules), [{STATE}]]))"
    code = f"import sys, json, torch, numpy\n{look}\n{statement}\n{look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    (before, state_before), (after, state_after) = map(json.loads, done.stdout.splitlines())
    return set(after) - set(before), state_before, state_after


FORBIDDEN = ("torch_directml", "celmoe.distributed", "matplotlib", "simplemma", "rich", "tqdm", "pandas", "benchmarks")


def forbidden(modules):
    return {name for name in modules if any(name == each or name.startswith(f"{each}.") for each in FORBIDDEN)}


def test_importing_loads_no_more_than_it_needs():
    loaded, *_ = importing("import celmoe")
    assert "celmoe.reference" in loaded
    assert not forbidden(loaded)


def test_the_import_check_can_fail():
    loaded, *_ = importing("import celmoe, benchmarks.harness.peers; torch.manual_seed(7)")
    assert {"benchmarks", "benchmarks.harness.peers"} <= forbidden(loaded)


def test_importing_touches_neither_random_numbers_nor_threads_nor_defaults():
    _, before, after = importing("import celmoe")
    assert before == after
    _, before, after = importing("import celmoe, benchmarks.harness.peers; torch.manual_seed(7)")
    assert before != after


def test_the_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z0-9.]+)?", celmoe.__version__)
    try:
        installed = importlib.metadata.version("celmoe")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == celmoe.__version__


def test_types_are_shipped():
    assert (PACKAGE / "py.typed").exists()


def test_every_public_thing_says_what_it_is():
    for name in celmoe.__all__:
        value = getattr(celmoe, name)
        if getattr(value, "__module__", "").startswith("celmoe") and isinstance(value, type):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name} has only the signature a dataclass writes"


def test_the_top_of_the_repository():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout:
        pytest.skip("no git checkout")
    entries = {line.split("/")[0] for line in done.stdout.splitlines()}
    assert {entry for entry in entries if not entry.startswith(".")} == TOP


def test_aliases_are_what_the_peer_s_callers_annotate_with():
    assert celmoe.LevelRouting == dict[str, list[str]]
    assert celmoe.ExpertAux == dict[str, object]
    assert torch.Tensor in celmoe.ExpertContext.__args__
