"""Each of the README's examples runs alone, as a reader would paste it into a session of its own."""

from __future__ import annotations

import re
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from torch import nn

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


def run(line, block, name="README.md"):
    """Execute one block in a namespace of its own; a traceback shows the README's own lines."""
    module = types.ModuleType("__readme__")
    # Not `mock.patch.dict`: that takes all modules back which the block imports first, PyTorch's tracer among them.
    sys.modules[module.__name__] = module
    try:
        exec(compile("\n" * (line - 1) + block, name, "exec"), vars(module))
    finally:
        del sys.modules[module.__name__]
    return vars(module)


BLOCKS = examples(README.read_text(encoding="utf-8"))


@needs_distributed
@pytest.mark.parametrize(("line", "block"), BLOCKS, ids=[f"line {line}" for line, _ in BLOCKS])
def test_an_example_runs_alone(line, block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run(line, block)


def test_the_training_loop_learns_and_runs_its_experts_as_one():
    line, block = BLOCKS[0]
    assert "optimizer.step()" in block
    assert block.count("\n") < 40, "a first example is read in one look"
    found = run(line, block)
    (level,) = found["model"].explain({"language": found["routes"]}).levels
    (experts,) = level.classes
    assert (experts.engine, len(experts.experts)) == ("grouped", 64)
    before = nn.functional.mse_loss(found["hidden"], found["hidden"].flip(1))
    assert found["loss"] < 0.2 * before


def test_the_examples_cover_a_users_way():
    text = "\n".join(block for _, block in BLOCKS)
    for step in ("torch.save(", "load_state_dict(", "use_learned_fusion=False", "torch.autocast(", "RoutingCompiler("):
        assert step in text, step


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
  y = 2
  ```
```
z = nonsense(
```
```bash
pip install celmoe
```
"""


def test_examples_are_found_and_run():
    blocks = examples(SAMPLE)
    assert blocks == [(3, "x = 1\n"), (8, "y = 2\n")]
    assert run(*blocks[1])["y"] == 2
    assert examples("no example at all") == []


def test_an_example_does_not_see_another_ones_names():
    blocks = examples(SAMPLE.replace("y = 2", "y = x"))
    run(*blocks[0])
    with pytest.raises(NameError):
        run(*blocks[1])


def test_an_example_that_fails_is_told_with_its_line():
    with pytest.raises(NameError) as caught:
        run(*examples("\n\n```python\na = 1\nb = missing\n```\n")[0])
    assert caught.traceback[-1].lineno + 1 == 5
