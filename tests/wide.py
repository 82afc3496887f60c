"""Checkpoints wide enough for groups of int4, and an oracle that rounds their weights before torch runs them.

The oracle works on the file's own tensors in float64, so it shares nothing with the product but the definition.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.cases import CASES, Case
from tests.oracle import checkpoint

METHODS = ("int8", "int4", "fp8")
# Two key/value heads over eight queries, and 768 inputs of `down`: on four devices heads are copied and groups shrink.
_LLAMA = {
    "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}  # fmt: skip
_SHAPES = {
    "gpt2": {"n_embd": 256, "n_inner": 512},
    "gpt_neo": {"hidden_size": 256, "intermediate_size": 512},
    "gptj": {"n_embd": 256, "n_inner": 512, "rotary_dim": 32},
    "gpt_neox": {"hidden_size": 256, "intermediate_size": 512},
    "opt": {"hidden_size": 256, "ffn_dim": 512},
    "bloom": {"hidden_size": 256},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA | {"head_dim": 32},
    "gemma2": _LLAMA | {"head_dim": 32},
    "gemma3_text": _LLAMA | {"head_dim": 32},
    "phi3": _LLAMA,
    "falcon": {"hidden_size": 256, "num_attention_heads": 8},
}
_OUT = re.compile(r"(attn|attention).*\.(o_proj|out_proj|c_proj|dense)\.weight")
_DOWN = re.compile(r"\.(down_proj|fc2|fc_out|dense_4h_to_h|mlp\.c_proj)\.weight")


def _wide(family: str) -> Case:
    first = next(each for each in CASES if each.family == family)
    return dataclasses.replace(first, name=f"{family}-for-groups", options=dict(first.options) | _SHAPES[family])


WIDE = [_wide(family) for family in _SHAPES]


def wide(family: str) -> Case:
    """The wide case of a family."""
    return next(each for each in WIDE if each.family == family)


def rounded(rows: np.ndarray, method: str, group: int | None) -> np.ndarray:
    """What weights [out, in] are after quantization, as float64."""
    blocks = rows.astype(np.float64).reshape(rows.shape[0], -1, group or rows.shape[1])
    largest = {"int8": 127, "int4": 7, "fp8": 448}[method]
    scale = (np.abs(blocks).max(axis=-1, keepdims=True).astype(np.float32) / np.float32(largest)).astype(np.float64)
    ratio = (blocks / scale).astype(np.float32)
    values = ratio.astype(ml_dtypes.float8_e4m3fn) if method == "fp8" else np.round(ratio)
    return (values.astype(np.float64) * scale).reshape(rows.shape)


def group_of(name: str, case: Case, width: int, tensor: int) -> int:
    """Inputs of a group for a tensor of the file whose rows have ``width``."""
    if _OUT.search(name):
        heads = next(case.options[key] for key in ("num_attention_heads", "n_head", "num_heads") if key in case.options)
        kv = 1 if case.options.get("multi_query") else case.options.get("num_key_value_heads", heads)
        width //= max(kv, tensor)
    elif _DOWN.search(name):
        width //= tensor
    return 128 if width % 128 == 0 else 64


def dequantized(case: Case, root: Path, method: str, tensor: int = 1) -> Path:
    """A copy of a wide checkpoint with the weights of attention and MLP rounded as for ``tensor`` devices."""
    folder = checkpoint(case, root)
    copy = root / f"{folder.name}-{method}-{tensor}"
    if copy.exists():
        return copy
    unfinished = root / f"{copy.name}-unfinished-{np.random.default_rng().integers(2**62)}"
    shutil.copytree(folder, unfinished)
    tensors = load_file(folder / "model.safetensors")
    for name, values in tensors.items():
        if values.ndim != 2 or not re.search(r"\.(layers|h)\.\d+\.", name):
            continue
        turned = case.family == "gpt2"  # which stores [in, out]
        rows = values.T if turned else values
        group = group_of(name, case, rows.shape[1], tensor) if method == "int4" else None
        found = rounded(rows, method, group)
        tensors[name] = np.ascontiguousarray((found.T if turned else found).astype(np.float32))
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    try:
        unfinished.rename(copy)
    except OSError:  # another worker was faster
        shutil.rmtree(unfinished)
    return copy
