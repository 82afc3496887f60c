"""Qwen 3 (dense): Llama with a norm on each head's query and key, and a sliding window in some layers."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.families import llama, qwen2
from jaxinfer.models.spec import ModelSpec

PREFIX = llama.PREFIX
IGNORED = llama.IGNORED


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a Qwen 3 configuration into a spec."""
    base = llama.shared(config)
    return qwen2.windowed(config, base).replace(mlp_bias=False, qk_norm=base.norm)


sources = llama.sources
