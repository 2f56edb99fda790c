"""The guide: every block of every chapter runs, and prints what the chapter shows. Its project has tests of its own."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from tests.documents import GUIDE, ROOT, WrongOutputError, blocks_in, examples, missing_packages, run_page
from tests.features import needs_distributed

CHAPTERS = {path.name: path.read_text(encoding="utf-8") for path in sorted(GUIDE.glob("*.md"))}

pytestmark = [
    needs_distributed,
    # PyTorch's own: its compiler imports a module that is written with it.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    """Each page writes into a folder of its own, and begins from one seed."""
    monkeypatch.chdir(tmp_path)
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    torch.manual_seed(0)


COMPILERS = ("g++", "clang++", "c++", "cl")
# Run by `tests/test_guide_project.py`.
PROJECT = "project.md"


@pytest.mark.parametrize("name", sorted(CHAPTERS.keys() - {PROJECT}))
def test_a_chapter_runs_and_prints_what_it_shows(name):
    if missing := missing_packages(CHAPTERS[name]):
        pytest.skip(f"{', '.join(missing)} must be installed")
    if "torch.compile(" in CHAPTERS[name] and not any(map(shutil.which, COMPILERS)):
        pytest.skip("PyTorch's compiler wants a C++ compiler")
    run_page(CHAPTERS[name], name)


def test_every_chapter_is_in_the_contents_and_has_something_to_run():
    contents = set(re.findall(r"\]\((\w[\w-]*\.md)\)", CHAPTERS["README.md"]))
    assert contents == CHAPTERS.keys() - {"README.md"}
    assert [name for name in contents if not examples(CHAPTERS[name])] == []


def links_in(text):
    """The targets of links into the repository, those of code left out."""
    prose = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", prose)


@pytest.mark.parametrize("name", CHAPTERS)
def test_links_lead_somewhere(name):
    for target in links_in(CHAPTERS[name]):
        path, _, heading = target.partition("#")
        page = (GUIDE / path).resolve() if path else GUIDE / name
        assert page.is_relative_to(ROOT)
        assert page.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}, target


def test_a_broken_block_is_told_with_its_line():
    text = "# Page\n\n```python\na = 1\n```\n\n```python\nb = a\nc = missing\n```\n"
    with pytest.raises(NameError) as caught:
        run_page(text, "page.md")
    assert caught.traceback[-1].lineno + 1 == 9
    assert str(caught.traceback[-1].path).endswith("page.md")


def test_another_output_than_the_page_shows_is_told():
    text = '```python\nprint("one")\n```\n\n```text\ntwo\n```\n'
    with pytest.raises(WrongOutputError, match=r"^page.md, line 6: must show .*:\none\n$"):
        run_page(text, "page.md")


def test_an_output_is_that_of_the_blocks_since_the_last_one():
    text = '```python\nprint("one")\n```\n```text\no...e\n```\n'
    text += '```python\nprint("two")\n```\n```bash\nls\n```\n```text\ntwo\n```\n'
    assert [block.language for block in blocks_in(text)] == ["python", "text", "python", "bash", "text"]
    run_page(text, "page.md")


def test_pages_see_no_names_of_each_other():
    run_page("```python\nx = 1\n```\n", "page.md")
    with pytest.raises(NameError):
        run_page("```python\nx\n```\n", "other.md")


def test_only_packages_of_extras_are_missed(monkeypatch):
    text = "```python\nimport torch, peft.tuners\nfrom transformers.models import bert\nimport misspelled\n```\n"
    assert missing_packages(text) == []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert missing_packages(text) == ["peft", "transformers"]
