"""Qwen 2 and 2.5: Llama with biases on query, key and value, and a sliding window in some layers."""

from __future__ import annotations

import dataclasses

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.families import llama
from jaxinfer.models.spec import ModelSpec

PREFIX = llama.PREFIX
IGNORED = llama.IGNORED


def windowed(config: ConfigReader, base: ModelSpec) -> ModelSpec:
    """Give the layers that ``layer_types`` calls sliding their window."""
    for name in ("use_sliding_window", "max_window_layers"):
        config.get(name)  # transformers has worked them into sliding_window and layer_types
    windows = config.windows(base.num_layers)
    layers = tuple(dataclasses.replace(layer, window=w) for layer, w in zip(base.layers, windows, strict=True))
    return base.replace(layers=layers)


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a Qwen 2 configuration into a spec."""
    return windowed(config, llama.shared(config)).replace(mlp_bias=False, qkv_bias=True, out_bias=False)


sources = llama.sources
