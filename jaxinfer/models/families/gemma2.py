"""Gemma 2: norms before and after each half, soft caps, and a sliding window in every other layer."""

from __future__ import annotations

from jaxinfer.models.config import ACTIVATIONS, ConfigReader
from jaxinfer.models.positions import rotary
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec, Norm

PREFIX = "model."
IGNORED = (r".*rotary_emb\.inv_freq",)


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a Gemma 2 configuration into a spec."""
    head_dim, context = config.integer("head_dim"), config.integer("max_position_embeddings")
    turn = rotary(config.get("rope_parameters"), head_dim, context)
    windows = config.windows(config.integer("num_hidden_layers"))
    scale = config.number("query_pre_attn_scalar") ** -0.5
    layers = tuple(LayerSpec(scale=scale, window=window, rotary=turn) for window in windows)
    return shared(config, layers).replace(softcap=config.optional_number("attn_logit_softcapping"))


def shared(config: ConfigReader, layers: tuple[LayerSpec, ...]) -> ModelSpec:
    """What Gemma 2 and 3 have in common."""
    if config.flag("use_bidirectional_attention", False):
        config.require("use_bidirectional_attention", False)
    hidden, attention_bias = config.integer("hidden_size"), config.flag("attention_bias", False)
    return ModelSpec(
        family=config.family,
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=config.integer("num_attention_heads"),
        kv_heads=config.integer("num_key_value_heads"),
        head_dim=config.integer("head_dim"),
        context_length=config.integer("max_position_embeddings"),
        layers=layers,
        norm=Norm(kind="rms", eps=config.number("rms_norm_eps"), unit_offset=True),
        residual="sandwich",
        activation=config.choice("hidden_activation", ACTIVATIONS),
        gated_mlp=True,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        embedding_scale=hidden**0.5,
        tied_head=config.flag("tie_word_embeddings", True),
        logit_softcap=config.optional_number("final_logit_softcapping"),
    )


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a Gemma checkpoint."""
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "model.embed_tokens.weight")
    norms = ("input", "pre_feedforward", "post_attention", "post_feedforward")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for n, name in enumerate(norms):
            table.norm(f"{ours}.norms.{n}", f"{theirs}.{name}_layernorm")
        attention = f"{theirs}.self_attn"
        table.qkv_separate(f"{ours}.attention", f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        table.qk_norms(f"{ours}.attention", f"{attention}.q_norm", f"{attention}.k_norm")
        table.out(f"{ours}.attention", f"{attention}.o_proj")
        table.gate_up(f"{ours}.mlp", f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj")
        table.down(f"{ours}.mlp", f"{theirs}.mlp.down_proj")
    table.norm("head.norm", "model.norm")
    if not spec.tied_head:
        table.vocab("head.tokens", "lm_head.weight")
    return table.sources
