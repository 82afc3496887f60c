from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest

from jaxinfer import progress


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("shell", ["none", "terminal", "notebook"])
def test_bars_show_where_somebody_watches_unless_told(monkeypatch, terminal, shell):
    found = {"none": None, "terminal": object(), "notebook": SimpleNamespace(kernel=object())}[shell]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: found))
    assert progress.shown(None) == (terminal or shell == "notebook")
    assert progress.shown(True) is True
    assert progress.shown(False) is False


def test_whoever_has_looked_for_kernels_is_no_notebook(monkeypatch):
    """As every process has that imported jupyter_client and asked it for a kernel."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    importlib.import_module("ipykernel.kernelbase")
    assert progress.shown(None) is False


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
