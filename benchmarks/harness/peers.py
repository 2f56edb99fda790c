"""The packages we are measured against, installed beside the environment and imported under an alias.

celmoe-vp has our import name, so it can never be an ordinary dependency: each version is unpacked into a folder
of its own in the user's cache and imported as ``celmoe_vp_1_1_4`` and the like. Its imports are relative, so the
alias works. morphoformer, its client, imports it by name, so it is run in a process whose path decides which of the two
libraries that name means: `client_folder`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

INSTALL_SECONDS = 120

# morphoformer by version, with those of its packages that its model and trainer import; `celmoe` is not among them.
CLIENTS = {
    "4.7.7": (
        "morphoformer==4.7.7",
        "chartoken-vp==2.1.4",
        "morphlog-vp==2.1.0",
        "sigmorphon-vp==2.1.4",
        "torchblocks-vp==2.1.4",
        "trainkit-vp==2.3.4",
        "vpterm-vp==2.0.0",
    ),
    "6.0.0": (
        "morphoformer==6.0.0",
        "chartoken-vp==2.2.0",
        "morphlog-vp==2.1.7",
        "sigmorphon-vp==2.2.0",
        "torchblocks-vp==2.2.0",
        "trainkit-vp==2.4.0",
        "vpterm-vp==2.0.1",
    ),
}


class PeerUnavailableError(RuntimeError):
    """The peer could not be installed, with pip's own last words."""


def cache_folder() -> Path:
    """The user's cache folder for this project (``CELMOE_CACHE`` overrides it)."""
    if override := os.environ.get("CELMOE_CACHE"):
        return Path(override)
    base = os.environ.get("XDG_CACHE_HOME") or (
        os.environ.get("LOCALAPPDATA") if os.name == "nt" else str(Path.home() / ".cache")
    )
    return Path(base or Path.home()) / "celmoe"


def install_folder(requirement: str, *others: str) -> Path:
    """The folder of ``requirement`` ("name==version") and ``others``, without dependencies; installed on first use.

    Raises:
        PeerUnavailableError: pip could not install it.
    """
    folder = cache_folder() / "peers" / requirement.replace("==", "-")
    if not folder.exists() and (why_not := _install((requirement, *others), folder)):
        raise PeerUnavailableError(why_not)
    return folder


@functools.cache  # a machine without the package index is found out once, not by every test
def _install(requirements: tuple[str, ...], folder: Path) -> str | None:
    """Install and answer ``None``, or why that failed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        fresh = Path(scratch) / "fresh"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
        command += ["--retries", "1", "--target", str(fresh), *requirements]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return f"installing {requirements[0]} took over {INSTALL_SECONDS} s"
        if done.returncode != 0:
            last_words = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            return f"{requirements[0]} could not be installed: {last_words}"
        try:
            fresh.rename(folder)  # whole or not at all, however many processes do this at once
        except OSError:
            if not folder.exists():
                raise
    return None


def load_peer(version: str) -> ModuleType:
    """celmoe-vp of this version, imported under an alias of its own.

    Raises:
        PeerUnavailableError: it could not be installed.
    """
    alias = "celmoe_vp_" + version.replace(".", "_")
    if alias in sys.modules:
        return sys.modules[alias]
    package = install_folder(f"celmoe-vp=={version}") / "celmoe"
    spec = importlib.util.spec_from_file_location(
        alias, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    if spec is None or spec.loader is None:
        raise PeerUnavailableError(f"celmoe-vp {version} has no importable package in {package}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    spec.loader.exec_module(module)
    return module


def client_folder(version: str) -> Path:
    """The folder that makes morphoformer of this version importable, given a ``celmoe`` to import.

    Raises:
        PeerUnavailableError: it could not be installed.
    """
    return install_folder(*CLIENTS[version])
