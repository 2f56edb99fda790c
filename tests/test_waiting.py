"""The line for a user who waits."""

from __future__ import annotations

import pytest

from celmoe.grouped import waiting


@pytest.mark.parametrize(("patience", "lines"), [(60.0, []), (-1.0, ["celmoe: tracing: 1 of 3"])])
def test_a_line_is_told_once_where_nobody_looks(monkeypatch, capsys, patience, lines):
    monkeypatch.setattr(waiting, "PATIENCE", patience)
    assert list(waiting.told("abc", 3, "tracing")) == ["a", "b", "c"]
    assert capsys.readouterr().err.split("\r")[1:] == [f"{line}\n" for line in lines]


def test_a_terminal_is_kept_up_to_date(monkeypatch, capsys):
    monkeypatch.setattr(waiting, "PATIENCE", -1.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    list(waiting.told("ab", 2, "tracing"))
    assert capsys.readouterr().err == "\rcelmoe: tracing: 1 of 2\rcelmoe: tracing: 2 of 2\n"
