"""What a user may call a model: a folder, the bundled one, or a hub id, without any network here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import constants

import jaxinfer
from jaxinfer.checkpoints.folder import Checkpoint
from jaxinfer.checkpoints.hub import resolve
from jaxinfer.errors import CheckpointError

REVISION = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, *, weights: bool = True) -> Path:
    """A model as huggingface_hub leaves it in its cache."""
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / REVISION
    for folder in (snapshot, repository / "refs", repository / "blobs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)
    (repository / "blobs" / "c0").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/c0")
    if weights:
        safetensors.numpy.save_file({"x": np.ones(3)}, repository / "blobs" / "w0")
        (snapshot / "model.safetensors").symlink_to("../../blobs/w0")
    return snapshot


def run(code: str, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    keep = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    root = Path(jaxinfer.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", code],
        env=keep | {"HF_HOME": str(home), "PYTHONPATH": str(root)} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_existing_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert resolve(tmp_path) == resolve(str(tmp_path)) == tmp_path
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/org") == tmp_path / "org"


def test_the_bundled_model_goes_before_a_folder_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("demo") == Path(jaxinfer.__file__).parent / "demo"
    assert resolve(Path("demo")) == Path("demo")


def test_a_file_is_no_folder(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="expected a checkpoint folder, got a file"):
        resolve(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./none", "../none", "a/b/c", "a b", "org/na\nme", "x" * 200, "a/..", "-a/b"]
)
def test_what_cannot_be_a_hub_id_is_never_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # what lies beside the real current folder is not known
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match="no such folder, and no name that") as error:
        resolve(name)
    assert "\n" not in str(error.value)


def test_nothing_is_not_the_current_folder():
    with pytest.raises(CheckpointError, match="got nothing"):
        resolve("")


def test_offline_and_not_cached_is_one_line(tmp_path: Path):
    code = (
        "from jaxinfer.checkpoints.hub import resolve\n"
        "try: resolve('org/name')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    result = run(code, tmp_path, HF_HUB_OFFLINE="1")
    assert result.stdout == (
        "CheckpointError org/name: no such folder, and the hub is offline (HF_HUB_OFFLINE is set); not in the cache\n"
    ), result.stderr


def test_offline_and_cached(tmp_path: Path):
    snapshot = cached(tmp_path / "hub")
    code = (
        "from jaxinfer.checkpoints import resolve, Checkpoint\n"
        "folder = resolve('org/name')\nprint(folder, list(Checkpoint(folder).tensors))"
    )
    result = run(code, tmp_path, HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu")
    assert result.stdout == f"{snapshot} ['x']\n", result.stderr


def test_cached_needs_no_network_though_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = cached(tmp_path)
    asked = []
    real = huggingface_hub.snapshot_download

    def download(name: str, **options: Any) -> str:
        asked.append(options)
        return real(name, cache_dir=tmp_path, **options)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name") == snapshot
    assert asked == [{"local_files_only": True}]


def test_a_half_cached_model_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    snapshot = cached(tmp_path, weights=False)
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append(options)
        if "local_files_only" not in options:
            safetensors.numpy.save_file({"x": np.ones(3)}, snapshot / "model.safetensors")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"offline .*expected model.safetensors or .*got 'config.json'"):
        resolve("org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert list(Checkpoint(resolve("org/name")).tensors) == ["x"]
    wanted = asked[-1]["allow_patterns"]
    assert "model*.safetensors" in wanted
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in wanted)


def test_without_weights_none_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []
    real = huggingface_hub.snapshot_download

    def download(name: str, **options: Any) -> str:
        asked.append(options)
        return real(name, cache_dir=tmp_path, **options) if "local_files_only" in options else str(tmp_path)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("org/name", weights=False) == tmp_path
    assert "*.safetensors" in asked[-1]["ignore_patterns"]
    snapshot = cached(tmp_path, weights=False)
    assert resolve("org/name", weights=False) == snapshot
    assert asked[-1] == {"local_files_only": True}


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError("no route\nto host"), r"no way to the hub's \(no route\)"),
        (ValueError(""), r"no way to the hub's \(ValueError\)"),
    ],
)
def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str):
    real = huggingface_hub.snapshot_download

    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            return real(name, cache_dir=tmp_path, **options)
        raise error

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=message) as raised:
        resolve("org/name")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kind", "message"), [("GatedRepoError", "hf auth login"), ("RepositoryNotFoundError", "no such model")]
)
def test_gated_and_unknown_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, message: str):
    import httpx
    from huggingface_hub import errors

    response = httpx.Response(404, request=httpx.Request("GET", "https://example.invalid"))

    def download(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            raise errors.LocalEntryNotFoundError("none")
        raise getattr(errors, kind)("long\nstory", response=response)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(CheckpointError, match=message):
        resolve("org/name")
