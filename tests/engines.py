"""Tiny engines for tests: few shapes, small chunks, so that little is compiled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from jaxinfer.engine import InferenceEngine, init_inference
from tests.cases import case
from tests.oracle import checkpoint

LLAMA = "llama-plain"  # untied, 2 layers, 4 heads and 2 key/value heads of 12, 101 tokens, 256 positions


def tiny(root: Path, name: str = LLAMA, **options: Any) -> InferenceEngine:
    """An engine of a case's checkpoint, on one device unless ``mesh`` says otherwise."""
    return of(checkpoint(case(name), root), **options)


def of(folder: Path, **options: Any) -> InferenceEngine:
    """An engine of a checkpoint folder."""
    defaults: dict[str, Any] = {
        "mesh": {"tensor": 1},
        "decode_chunk": 4,
        "max_batch": 4,
        "prefill_chunk": 48,
        "prefill_tokens": 128,
        "progress": False,
    }
    return init_inference(folder, **(defaults | options))


def changed(
    folder: Path,
    target: Path,
    generation: Mapping[str, Any] | None = None,
    poison: int | None = None,
) -> Path:
    """A copy of a checkpoint with another generation_config, or with NaN as one token's row of the embedding."""
    shutil.copytree(folder, target)
    if generation is not None:
        (target / "generation_config.json").write_text(json.dumps(dict(generation)))
    if poison is not None:
        tensors = load_file(target / "model.safetensors")
        (name,) = (name for name in tensors if "embed_tokens" in name or "wte" in name)
        tensors[name] = tensors[name].copy()
        tensors[name][poison] = np.nan
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
