from __future__ import annotations

import sys
from types import ModuleType

import pytest

from jaxinfer import progress


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("notebook", [False, True])
def test_bars_show_where_somebody_watches_unless_told(monkeypatch, terminal, notebook):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if notebook:
        monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    assert progress.shown(None) == (terminal or notebook)
    assert progress.shown(True) is True
    assert progress.shown(False) is False


def test_a_bar_that_is_not_shown_is_silent(capsys):
    with progress.bar(False, total=3, desc="loading") as bar:
        bar.update(3)
    with progress.compiling(False, "decode"):
        pass
    assert capsys.readouterr() == ("", "")


def test_a_bar_counts(capsys):
    with progress.bar(True, total=3, desc="loading") as bar:
        bar.update(3)
    found = capsys.readouterr()
    assert "loading: 100%" in found.err
    assert "3/3" in found.err
    assert not found.out  # which belongs to the program's own output


def test_compiling_says_what_and_lets_errors_through(capsys):
    with pytest.raises(ZeroDivisionError), progress.compiling(True, "decode of 4 slots"):
        raise ZeroDivisionError
    assert "compiling decode of 4 slots [00:00]" in capsys.readouterr().err
