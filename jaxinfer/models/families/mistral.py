"""Mistral: Llama without biases, with a sliding window."""

from __future__ import annotations

import dataclasses

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.families import llama
from jaxinfer.models.spec import ModelSpec

PREFIX = llama.PREFIX
IGNORED = llama.IGNORED


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a Mistral configuration into a spec."""
    base = llama.shared(config)
    window = config.optional_integer("sliding_window")
    layers = tuple(dataclasses.replace(layer, window=window) for layer in base.layers)
    return base.replace(layers=layers, mlp_bias=False, qkv_bias=False, out_bias=False)


sources = llama.sources
