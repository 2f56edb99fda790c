"""The packages that a command needs, as ``pyproject.toml`` lists them; only Python's own library is imported."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

_PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
_NAME = re.compile(r"[\w.-]+")
_ITSELF = re.compile(r"celmoe\[(\w+)\]")
# Commands of their own: nothing here imports them.
_TOOLS = {"mypy", "ruff"}


def missing_extra(extra: str, pyproject: Path = _PYPROJECT) -> str:
    """The command that installs an extra, after the packages of it that are not installed.

    Args:
        extra: A key of ``[project.optional-dependencies]``.
        pyproject: The file that has that table.

    Returns:
        One line; an empty one if nothing is missing.
    """
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    names = dict.fromkeys([*_names(project, project["dependencies"]), *_names(project, [f"celmoe[{extra}]"])])
    missing = [name for name in names if name not in _TOOLS and not _is_installed(name)]
    return f'{", ".join(missing)} must be installed: pip install -e ".[{extra}]"' if missing else ""


def _names(project: dict[str, dict[str, list[str]]], requirements: Sequence[str]) -> Iterator[str]:
    for requirement in requirements:
        if itself := _ITSELF.match(requirement):
            yield from _names(project, project["optional-dependencies"][itself[1]])
        elif name := _NAME.match(requirement):
            yield name[0]


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
