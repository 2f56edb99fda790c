"""The README's examples run, one after another, as a reader would paste them into one session."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

from tests.features import needs_distributed

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

# A fence, its language, its body up to the fence that closes it; indented ones, in lists, too.
FENCE = re.compile(
    r"^(?P<indent>[ ]*)```(?P<language>\w*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE
)


def examples(text):
    """The Python examples with the line that each begins on."""
    return [
        (text[: fence.start("body")].count("\n") + 1, textwrap.dedent(fence["body"]))
        for fence in FENCE.finditer(text)
        if fence["language"] in ("python", "py")
    ]


def run(blocks, name="README.md"):
    """Execute the blocks in one namespace; a traceback shows the README's own lines."""
    namespace = {"__name__": "__readme__"}
    for line, block in blocks:
        code = compile("\n" * (line - 1) + block, name, "exec")
        exec(code, namespace)
    return namespace


@needs_distributed
def test_the_examples_run(tmp_path, monkeypatch):
    blocks = examples(README.read_text(encoding="utf-8"))
    assert blocks, "README.md has no python example"
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(blocks)


def test_the_examples_use_the_library():
    text = "\n".join(block for _, block in examples(README.read_text(encoding="utf-8")))
    for word in ("from celmoe import", "HierarchicalCELMoE(", "routing=", ".backward()"):
        assert word in text, word


def test_links_into_the_repository_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (ROOT / target).exists(), target


def test_the_two_commands_stand_there():
    text = README.read_text(encoding="utf-8")
    for command in (
        'pip install -e ".[bench]"',
        "python -m benchmarks.multilingual",
        'pip install -e ".[test]"',
        "pytest",
    ):
        assert command in text, command


SAMPLE = """
```python
x = 1
```
text
- in a list
  ```python
  y = x + 1
  ```
```
z = nonsense(
```
```bash
pip install celmoe
```
"""


def test_examples_are_found_and_run_in_order():
    blocks = examples(SAMPLE)
    assert blocks == [(3, "x = 1\n"), (8, "y = x + 1\n")]
    assert run(blocks)["y"] == 2
    assert examples("no example at all") == []


def test_an_example_that_fails_is_told_with_its_line():
    with pytest.raises(NameError) as caught:
        run(examples("\n\n```python\na = 1\nb = missing\n```\n"))
    assert caught.traceback[-1].lineno + 1 == 5
