"""The README is a path: its blocks run in order, in one session, as a reader would paste them."""

from __future__ import annotations

import re

import pytest
import torch

from tests.documents import README, ROOT, blocks_in, examples, run_page
from tests.features import needs_distributed

TEXT = README.read_text(encoding="utf-8")
FIRST = next(block for block in blocks_in(TEXT) if block.is_python)
MOST_LINES = 20


@needs_distributed
def test_the_examples_run_and_print_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_page(TEXT, README.name)


def test_the_first_example_learns_and_runs_its_experts_as_one():
    """It is short, and needs neither the other blocks nor an extra."""
    assert len([line for line in FIRST.body.splitlines() if line.strip()]) <= MOST_LINES
    torch.manual_seed(0)
    found = run_page(f"```python\n{FIRST.body}```\n", README.name)
    family, language = found["model"].explain(found["routing"]).levels
    (experts,) = language.classes
    assert (experts.engine, len(experts.experts)) == ("grouped", 26)
    assert (family.engine, family.num_experts) == ("looped", 3)
    assert found["loss"] < 0.4 * (found["hidden"] - found["targets"]).square().mean()


def test_the_guide_begins_with_the_same_program():
    chapter = examples((ROOT / "notes/guide/start.md").read_text(encoding="utf-8"))[0][1]
    assert chapter.replace('print(f"loss {loss.item():.1f}")\n', "") == FIRST.body


STEPS = [
    *("pip install -e .", "uv pip install --torch-backend cpu", "optimizer.step()", "celmoe.attach(", "torch.save("),
    *(
        "load_state_dict(",
        "add_expert(",
        "subset(",
        "| stacked |",
        "notes/guide/README.md",
        "notes/guide/alternatives.md",
    ),
]


@pytest.mark.parametrize("step", STEPS)
def test_the_path_has_every_step(step):
    assert step in TEXT


def test_it_has_one_figure_and_two_tables_at_most():
    assert len(re.findall(r"^!\[", TEXT, re.MULTILINE)) == 1
    assert len(re.findall(r"^\|[-:| ]+\|$", TEXT, re.MULTILINE)) <= 2


def test_links_into_the_repository_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", TEXT):
        assert (ROOT / target).exists(), target


def test_every_note_is_linked():
    notes = {f"notes/{path.name}" for path in (ROOT / "notes").glob("*.md")}
    assert notes - set(re.findall(r"\]\(([^)#\s]+)", TEXT)) == set()


@pytest.mark.parametrize(
    "command",
    ['pip install -e ".[bench]"', "python -m benchmarks.multilingual", 'pip install -e ".[test]"', "pytest"],
)
def test_the_two_commands_stand_there(command):
    assert command in TEXT


def test_documents_find_blocks_also_in_lists():
    text = "```python\nx = 1\n```\n- in a list\n  ```python\n  y = 2\n  ```\n```\nz = nonsense(\n```\n"
    assert examples(text) == [(2, "x = 1\n"), (6, "y = 2\n")]
    assert run_page(text, "page.md")["y"] == 2
    assert examples("no example at all") == []
