"""The page on bridges: its examples run, and print what it shows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.documents import ROOT, missing_packages, run_page


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
def test_the_page_runs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "notes" / "bridges.md").read_text(encoding="utf-8")
    for name in ("transformers", "lightning"):
        pytest.importorskip(name)
    assert not missing_packages(page)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    run_page(page, "bridges.md")
