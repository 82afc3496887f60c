"""What holds for the whole repository: who may import what, what is never used, and that tests mirror code."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pallas_kernels", "sharding", "jaxinfer")  # each may import those before it

# Modules that can be used to run code from a file, and torch, which only the tests compare with.
FORBIDDEN = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch", "tests"}

# Modules with code that have no test file of their own, and why.
WITHOUT_TEST = {
    "jaxinfer/__main__.py": "tests of the command line run it",
}

# Families are tables, and one file runs the cases of all of them.
FAMILIES = ROOT / "jaxinfer" / "models" / "families"

PRODUCT = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
ALL = sorted(
    [*PRODUCT, *(path for folder in ("tests", "benchmarks", "notebooks") for path in (ROOT / folder).rglob("*.py"))]
)


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=name(path))


def imports(path: Path) -> set[str]:
    """The top-level names of all modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0] if node.level == 0 else path.relative_to(ROOT).parts[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {arg.value.split(".")[0] for arg in node.args if isinstance(arg, ast.Constant) and arg.value}
    return found


def has_code(path: Path) -> bool:
    """Whether a module defines more than a table of contents: a function or a class."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) for node in tree(path).body)


def test_the_packages_are_found():
    assert {path.relative_to(ROOT).parts[0] for path in PRODUCT} == set(PACKAGES)


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_imports_go_one_way(path):
    rank = PACKAGES.index(path.relative_to(ROOT).parts[0])
    assert not imports(path) & set(PACKAGES[rank + 1 :])


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_nothing_can_run_code_from_a_file(path):
    assert not imports(path) & FORBIDDEN
    calls = {ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)}
    assert not calls & {"eval", "exec"}
    keywords = {
        node.arg: node.value
        for node in ast.walk(tree(path))
        if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code")
    }
    for argument, value in keywords.items():
        assert isinstance(value, ast.Constant), f"{argument} is not a constant"
        assert value.value is False, f"{argument} is not False"


@pytest.mark.parametrize("path", PRODUCT, ids=name)
def test_nvlink_multicast_is_not_used(path):
    words = set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    assert not words & {"multimem", "multicast_ref", "semaphore_signal_multicast"}


@pytest.mark.parametrize("path", [path for path in PRODUCT if name(path) not in WITHOUT_TEST], ids=name)
def test_every_module_has_its_test_file(path):
    if not has_code(path):
        return
    mirrored = path
    if FAMILIES in path.parents:
        mirrored = FAMILIES
    elif path.name == "__init__.py":
        mirrored = path.parent
    test = ROOT / "tests" / mirrored.relative_to(ROOT).with_name(f"test_{mirrored.stem}.py")
    assert test.is_file(), f"{name(path)} has no {name(test)}"


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*/**/test_*.py")), ids=name)
def test_every_test_file_has_its_module(path):
    module = ROOT / path.relative_to(ROOT / "tests").with_name(path.name.removeprefix("test_"))
    assert module.is_file() or module.with_suffix("").is_dir(), f"{name(path)} has no {name(module)}"


def test_the_exceptions_are_needed():
    for module in WITHOUT_TEST:
        path = ROOT / module
        assert path.is_file()
        assert not (ROOT / "tests" / module).with_name(f"test_{path.name}").exists()


@pytest.mark.parametrize("path", ALL, ids=name)
def test_a_file_is_at_most_500_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_that_it_is_typed(package):
    assert (ROOT / package / "py.typed").is_file()
