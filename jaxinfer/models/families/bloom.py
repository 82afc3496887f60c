"""BLOOM: ALiBi, and a norm right after the embedding."""

from __future__ import annotations

from jaxinfer.models.config import ConfigReader
from jaxinfer.models.positions import alibi_slopes
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import Alibi, LayerSpec, Layout, ModelSpec, Norm

PREFIX = "transformer."
IGNORED = ()


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a BLOOM configuration into a spec."""
    hidden, heads = config.integer("hidden_size"), config.integer("n_head")
    head_dim = config.divide("hidden_size", "n_head")
    return ModelSpec(
        family="bloom",
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=4 * hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        # ALiBi has no table to run out of; BLOOM's own configurations say what it was trained with, 2048.
        context_length=config.integer("seq_length", 2048),
        layers=(LayerSpec(scale=head_dim**-0.5),) * config.integer("n_layer"),
        norm=Norm(kind="layer", eps=config.number("layer_norm_epsilon"), bias=True),
        residual="normed" if config.flag("apply_residual_connection_post_layernorm", False) else "pre",
        activation="gelu_tanh",
        mlp_bias=True,
        qkv_bias=True,
        out_bias=True,
        alibi=Alibi(slopes=alibi_slopes(heads)),
        embedding_norm=True,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a BLOOM checkpoint."""
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "transformer.word_embeddings.weight")
    table.norm("embed.norm", "transformer.word_embeddings_layernorm")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        table.norm(f"{ours}.norms.0", f"{theirs}.input_layernorm")
        table.norm(f"{ours}.norms.1", f"{theirs}.post_attention_layernorm")
        table.qkv_grouped(f"{ours}.attention", f"{theirs}.self_attention.query_key_value")
        table.out(f"{ours}.attention", f"{theirs}.self_attention.dense")
        table.up(f"{ours}.mlp", f"{theirs}.mlp.dense_h_to_4h")
        table.down(f"{ours}.mlp", f"{theirs}.mlp.dense_4h_to_h")
    table.norm("head.norm", "transformer.ln_f")
    if not spec.tied_head:
        table.vocab("head.tokens", "lm_head.weight")
    return table.sources
