"""Phi-3 and Phi-4-mini: Llama with fused projections, LongRoPE and a sliding window."""

from __future__ import annotations

import dataclasses

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.families import llama
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import Layout, ModelSpec

PREFIX = llama.PREFIX
IGNORED = llama.IGNORED


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a Phi-3 configuration into a spec."""
    config.get("original_max_position_embeddings")  # transformers has worked it into rope_parameters
    base = llama.shared(config, partial=True)
    window = config.optional_integer("sliding_window")
    layers = tuple(dataclasses.replace(layer, window=window) for layer in base.layers)
    return base.replace(layers=layers, mlp_bias=False, qkv_bias=False, out_bias=False)


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a Phi-3 checkpoint."""
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "model.embed_tokens.weight")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table.norm(f"{ours}.norms.0", f"{theirs}.input_layernorm")
        table.norm(f"{ours}.norms.1", f"{theirs}.post_attention_layernorm")
        table.qkv_concatenated(f"{ours}.attention", f"{theirs}.self_attn.qkv_proj")
        table.out(f"{ours}.attention", f"{theirs}.self_attn.o_proj")
        table.gate_up_fused(f"{ours}.mlp", f"{theirs}.mlp.gate_up_proj")
        table.down(f"{ours}.mlp", f"{theirs}.mlp.down_proj")
    table.norm("head.norm", "model.norm")
    if not spec.tied_head:
        table.vocab("head.tokens", "lm_head.weight")
    return table.sources
