"""The notebooks run, and the executed ones that are kept are those of the sources beside them."""

from __future__ import annotations

import nbformat
import pytest

from notebooks.execute import execute, read, sources

each = pytest.mark.parametrize("source", sources(), ids=lambda source: source.stem)


@each
def test_the_kept_notebook_is_that_of_its_source(source):
    kept = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert [(cell.cell_type, cell.source) for cell in kept.cells] == [
        (cell.cell_type, cell.source) for cell in read(source).cells
    ], f"run: make notebooks ({source.name} has changed)"
    code = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]


@pytest.mark.notebook
@each
def test_the_notebook_runs(source):
    execute(source)
