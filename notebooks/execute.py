"""Run the notebooks from their sources and keep what they print: ``python notebooks/execute.py [NN_name.py ...]``.

A notebook is written as ``NN_name.py`` (cells between ``# %%`` lines) and kept, executed, as ``NN_name.ipynb``. Ids of
cells are counted and times are left out, so that a notebook that prints the same is the same file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jupytext
import nbclient
import nbformat

FOLDER = Path(__file__).resolve().parent


def sources() -> list[Path]:
    """Return the source of every notebook, in order."""
    return sorted(FOLDER.glob("[0-9]*.py"))


def read(source: Path) -> nbformat.NotebookNode:
    """Return the notebook that a source describes, without outputs."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
    return notebook


def execute(source: Path) -> nbformat.NotebookNode:
    """Return the notebook with its outputs, run in a fresh kernel in the notebooks' folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    notebook = read(source)
    resources = {"metadata": {"path": str(FOLDER)}}
    nbclient.NotebookClient(notebook, timeout=600, record_timing=False, resources=resources).execute()
    return notebook


if __name__ == "__main__":
    for source in [FOLDER / name for name in sys.argv[1:]] or sources():
        print(source.with_suffix(".ipynb").name, flush=True)
        nbformat.write(execute(source), source.with_suffix(".ipynb"))
