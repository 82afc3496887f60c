"""Llama 1 to 3 and models that share its architecture."""

from __future__ import annotations

from jaxinfer.models.config import ACTIVATIONS, ConfigReader
from jaxinfer.models.positions import rotary
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec, Norm

PREFIX = "model."
IGNORED = (r".*rotary_emb\.inv_freq",)


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a Llama configuration into a spec."""
    return shared(config)


def shared(config: ConfigReader, *, partial: bool = False) -> ModelSpec:
    """What Llama and the families that grew from it have in common; ``partial``: heads may be rotated in part."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.integer("head_dim", hidden // heads)
    context = config.integer("max_position_embeddings")
    turn = rotary(config.get("rope_parameters"), head_dim, context, partial=partial)
    layer = LayerSpec(scale=head_dim**-0.5, rotary=turn)
    attention_bias = config.flag("attention_bias", False)
    return ModelSpec(
        family=config.family,
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        context_length=context,
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm=Norm(kind="rms", eps=config.number("rms_norm_eps")),
        activation=config.choice("hidden_act", ACTIVATIONS),
        gated_mlp=True,
        mlp_bias=config.flag("mlp_bias", False),
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        tied_head=config.flag("tie_word_embeddings", False),
    )


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a Llama checkpoint, and of those that add a norm on queries and keys."""
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "model.embed_tokens.weight")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        table.norm(f"{ours}.norms.0", f"{theirs}.input_layernorm")
        table.norm(f"{ours}.norms.1", f"{theirs}.post_attention_layernorm")
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
