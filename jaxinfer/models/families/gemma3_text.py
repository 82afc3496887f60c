"""Gemma 3 (text): Gemma 2 with a norm on queries and keys, and a rotary base for each layer type."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.families import gemma2
from jaxinfer.models.positions import rotary
from jaxinfer.models.spec import LayerSpec, ModelSpec

PREFIX = gemma2.PREFIX
IGNORED = gemma2.IGNORED


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a Gemma 3 text configuration into a spec."""
    head_dim, context = config.integer("head_dim"), config.integer("max_position_embeddings")
    config.get("_sliding_window_pattern")  # transformers has worked it into layer_types
    # transformers' Gemma 3 stores this field and never applies it.
    config.require("attn_logit_softcapping", None)
    turns = config.get("rope_parameters", {})
    windows = config.windows(config.integer("num_hidden_layers"))
    types = ["full_attention" if window is None else "sliding_attention" for window in windows]
    turn = {kind: rotary(turns.get(kind), head_dim, context) for kind in set(types)}
    scale = config.number("query_pre_attn_scalar") ** -0.5
    layers = tuple(
        LayerSpec(scale=scale, window=window, rotary=turn[kind]) for window, kind in zip(windows, types, strict=True)
    )
    base = gemma2.shared(config, layers)
    return base.replace(qk_norm=base.norm)


sources = gemma2.sources
