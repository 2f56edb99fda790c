"""The API reference: the guide's command makes it of the docstrings, without a warning, with every public name."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys

import pytest

from tests.documents import GUIDE, ROOT, blocks_in
from tests.features import needs_distributed

MODULES = ("celmoe", "celmoe.devices", "celmoe.distributed", "celmoe.optim", "celmoe.reference", "celmoe.zoo")
# Modules without a list of public names.
NAMES = {
    "celmoe.devices": ["DeviceReport", "EngineCheck", "open_device", "report", "self_check"],
    "celmoe.reference": ["reference_forward"],
}

pytestmark = needs_distributed


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The text of each page, by module."""
    (block,) = [each for each in blocks_in((GUIDE / "README.md").read_text(encoding="utf-8")) if "pdoc" in each.body]
    install, _, command = block.body.strip().partition(" && ")
    assert install == 'pip install -e ".[docs]"'
    python, *arguments = shlex.split(command)
    assert (python, arguments[-2:]) == ("python", ["-o", "reference"])
    folder = tmp_path_factory.mktemp("reference")
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments[:-1], str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in folder.rglob("*.html")
        if path.name != "index.html"
    }


def test_it_has_a_page_for_each_public_module(pages):
    assert sorted(pages) == sorted(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_it_has_every_public_name(pages, module):
    public = NAMES.get(module) or importlib.import_module(module).__all__
    shown = set(re.findall(r'id="([\w.]+)"', pages[module]))
    submodules = {name.rpartition(".")[2] for name in MODULES}
    assert {name for name in public if name not in submodules} - shown <= {"__version__"}


def test_docstrings_become_sections(pages):
    """Google's sections are headings, and names in backquotes are links."""
    page = pages["celmoe"]
    assert "<h6" in page
    for word in ("Arguments", "Returns", "Raises"):
        assert word in page
    assert re.search(r'<a href="#RoutingCompiler', page)
