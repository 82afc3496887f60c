"""The package's table of contents: complete, lazy, and with ``plan`` a function."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxinfer


def test_what_is_imported_lazily_is_what_type_checkers_see():
    tree = ast.parse(Path(jaxinfer.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert seen == {(home, name) for home, names in jaxinfer._HOMES.items() for name in names}


@pytest.mark.parametrize("name", jaxinfer.__all__)
def test_every_name_is_there(name):
    assert getattr(jaxinfer, name).__name__ == name
    assert name in dir(jaxinfer)


def test_a_wrong_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jaxinfer.nothing  # noqa: B018


@pytest.mark.parametrize(
    "first", ["from jaxinfer.plan import Plan", "import jaxinfer.plan", "from jaxinfer import init_inference", "pass"]
)
def test_plan_is_the_function_whatever_was_imported_first(first):
    script = f"{first}\nimport jaxinfer, sys\nassert jaxinfer.plan is sys.modules['jaxinfer.plan'].plan"
    if first == "pass":
        script = "import jaxinfer, sys; assert 'jax' not in sys.modules; f = jaxinfer.plan; assert f.__name__ == 'plan'"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)
