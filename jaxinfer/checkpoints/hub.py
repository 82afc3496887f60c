"""From what a user calls a model to a folder: a path, the bundled model, or an id on the Hugging Face hub."""

from __future__ import annotations

import importlib.resources
import os
import re
from pathlib import Path

from jaxinfer.checkpoints.folder import weight_files
from jaxinfer.checkpoints.safetensors import quoted
from jaxinfer.errors import CheckpointError, JaxinferError

DEMO = "demo"

# Weights only as transformers names them: some repositories hold them a second time, as `consolidated.safetensors`.
_WANTED = ["*.json", "model*.safetensors", "tokenizer.model", "*.txt", "*.jinja"]
_UNWANTED = ["*/*", "adapter_*", "*.msgpack.index.json", "*.bin.index.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


def resolve(model: str | os.PathLike[str], *, weights: bool = True) -> Path:
    """The folder of a model: ``"demo"`` (bundled), an existing folder, or an id on the Hugging Face hub.

    A hub model that is in the cache is used as it is, without asking the network; `hf download` refreshes it. Otherwise
    its configuration, tokenizer and safetensors files are downloaded to the cache (never code, never pickles); without
    ``weights`` no safetensors files, and none need be in the cache.

    Raises:
        CheckpointError: there is no such folder, and the hub has no such model or cannot be reached.
    """
    if model == DEMO:
        return _bundled()
    if model == "":  # which pathlib would take for the current folder
        raise CheckpointError("expected a checkpoint folder or the id of a model on the Hugging Face hub, got nothing")
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint folder, got a file")
    if not isinstance(model, str) or not _HUB_ID.fullmatch(model) or ".." in model or "--" in model:
        raise CheckpointError(f"{quoted(str(model))}: no such folder, and no name that the Hugging Face hub could have")
    return _from_hub(model, weights)


def _bundled() -> Path:
    folder = Path(str(importlib.resources.files("jaxinfer"))) / "demo"
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: the bundled model is missing from this installation")
    return folder


def _from_hub(name: str, weights: bool) -> Path:
    # Imported here: it takes 0.3 s, which a local folder need not pay.
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
        if (cached / "config.json").exists():
            if weights:
                weight_files(cached)
            return cached
        fault = f"{cached}: holds no config.json"
    except LocalEntryNotFoundError:
        fault = "not in the cache"
    except JaxinferError as error:
        fault = str(error)  # a download that stopped half-way, or one of the tokenizer alone
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{name}: no such folder, and the hub is offline (HF_HUB_OFFLINE is set); {fault}")
    try:
        unwanted = _UNWANTED if weights else [*_UNWANTED, "*.safetensors"]
        folder = Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=unwanted))
    except GatedRepoError:
        raise CheckpointError(f"{name}: accept its terms on huggingface.co, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{name}: no such folder, and no such model on the Hugging Face hub") from None
    except Exception as error:  # the client raises its own, httpx's and the system's errors alike
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{name}: no such folder, and no way to the hub's ({reason})") from error
    if weights:
        weight_files(folder)
    return folder
