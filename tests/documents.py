"""Documents: the blocks of a Markdown page, and how they run.

The Python blocks of a page run in order, in one namespace. A block of plain text is the output of the Python blocks
before it, in which ``...`` stands for anything.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import io
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDE = ROOT / "notes" / "guide"

# A fence, its language, its body up to the fence that closes it; indented ones, in lists, too.
_FENCE = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE
)
_PYTHON = ("python", "py")
# Packages of extras, whose chapters are skipped if a package is missing. A misspelled package is no reason to skip.
_OPTIONAL = {"accelerate", "lightning", "peft", "safetensors", "transformers"}


class WrongOutputError(AssertionError):
    """A page says that its blocks print something else."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        line: The line of the page on which the body begins, from 1 on.
        language: The word behind the fence; empty if there is none.
        body: The lines between the fences.
    """

    line: int
    language: str
    body: str

    @property
    def is_python(self) -> bool:
        """True if the block is run."""
        return self.language in _PYTHON


def blocks_in(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    return [
        Block(text[: fence.start("body")].count("\n") + 1, fence["language"], textwrap.dedent(fence["body"]))
        for fence in _FENCE.finditer(text)
    ]


def examples(text: str) -> list[tuple[int, str]]:
    """The Python blocks of a page, with the line that each begins on."""
    return [(block.line, block.body) for block in blocks_in(text) if block.is_python]


@contextlib.contextmanager
def _session() -> Iterator[dict[str, Any]]:
    """A namespace, which is that of a module as long as the session lasts: pickle and the tracer look there."""
    # Not `mock.patch.dict`: that takes all modules back which the blocks import first, PyTorch's tracer among them.
    module = sys.modules["__page__"] = types.ModuleType("__page__")
    try:
        yield vars(module)
    finally:
        del sys.modules["__page__"]


def run_page(text: str, name: str) -> dict[str, Any]:
    """Run the blocks of a page in one session.

    Returns:
        The names that they leave.

    Raises:
        WrongOutputError: A block of plain text is not the output of the blocks before it.
    """
    printed = io.StringIO()
    with _session() as names, contextlib.redirect_stdout(printed):
        for block in blocks_in(text):
            if block.is_python:
                # A traceback shows the page's own lines.
                exec(compile("\n" * (block.line - 1) + block.body, name, "exec"), names)
            elif block.language == "text":
                _check_output(block, printed.getvalue(), name)
                printed.seek(0)
                printed.truncate()
    return names


def missing_packages(text: str) -> list[str]:
    """The optional packages that a page imports, and that are not installed."""
    imported = set()
    for _, body in examples(text):
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    return sorted(each for each in imported & _OPTIONAL if importlib.util.find_spec(each) is None)


def _check_output(block: Block, printed: str, name: str) -> None:
    if not doctest.OutputChecker().check_output(block.body, printed, doctest.ELLIPSIS):
        raise WrongOutputError(f"{name}, line {block.line}: must show the output of the blocks before it:\n{printed}")
