"""One converted store for all tests of a worker, and copies of it to damage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from jaxinfer.checkpoints.convert import convert
from jaxinfer.checkpoints.manifest import MANIFEST
from tests.cases import case
from tests.oracle import checkpoint, shared_root

LLAMA = case("llama-plain")


def source(factory: pytest.TempPathFactory) -> Path:
    return checkpoint(LLAMA, shared_root(factory))


def converted(factory: pytest.TempPathFactory) -> Path:
    """A store of the tiny Llama; not to be changed."""
    return convert(source(factory), factory.mktemp("store") / "llama", progress=False)


def copied(store: Path, place: Path) -> Path:
    shutil.copytree(store, place)
    return place


def data_file(store: Path, group: str) -> Path:
    """The file of a group that holds the tensors' bytes: the largest."""
    return max((store / "weights" / group).rglob("d/*"), key=lambda path: path.stat().st_size)


def edit(store: Path, change) -> None:
    """Change the manifest's JSON."""
    document = json.loads((store / MANIFEST).read_text())
    change(document)
    (store / MANIFEST).write_text(json.dumps(document))
