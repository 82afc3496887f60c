"""Falcon: 7B and 11B (one norm, parallel), 40B and 180B (two norms, grouped), RW (ALiBi, sequential)."""

from __future__ import annotations

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ACTIVATIONS, ConfigReader
from jaxinfer.models.positions import alibi_slopes, rotary
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import Alibi, LayerSpec, Layout, ModelSpec, Norm, Residual

PREFIX = "transformer."
IGNORED = (r".*rotary_emb\.inv_freq",)


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a Falcon configuration into a spec."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim, context = config.divide("hidden_size", "num_attention_heads"), config.integer("max_position_embeddings")
    alibi, bias = config.flag("alibi", False), config.flag("bias", False)
    residual, kv_heads = _block(config, heads)
    turns = config.get("rope_parameters")
    layer = LayerSpec(scale=head_dim**-0.5, rotary=None if alibi else rotary(turns, head_dim, context))
    return ModelSpec(
        family="falcon",
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("ffn_hidden_size", 4 * hidden),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=context,
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm=Norm(kind="layer", eps=config.number("layer_norm_epsilon"), bias=True),
        residual=residual,
        activation=config.choice("activation", ACTIVATIONS),
        mlp_bias=bias,
        qkv_bias=bias,
        out_bias=bias,
        alibi=Alibi(slopes=alibi_slopes(heads), scaled=True, bfloat16=True) if alibi else None,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def _block(config: ConfigReader, heads: int) -> tuple[Residual, int]:
    """How a layer is joined, and its key/value heads; transformers cannot run the combinations refused here."""
    new, parallel = config.flag("new_decoder_architecture", False), config.flag("parallel_attn", True)
    norms, multi_query = config.integer("num_ln_in_parallel_attn", 2 if new else 1), config.flag("multi_query", True)
    kv_heads = config.integer("num_kv_heads", heads)
    if not new and not multi_query and kv_heads != heads:
        raise ConfigError(f"falcon config: num_kv_heads must be num_attention_heads ({heads}), got {kv_heads}")
    if new and not parallel:
        raise ConfigError("falcon config: new_decoder_architecture needs parallel_attn")
    if norms > 2 or (norms == 2 and parallel and not new):
        raise ConfigError(f"falcon config: num_ln_in_parallel_attn={norms} is not possible here")
    residual: Residual = "pre" if not parallel else "parallel_two_norms" if norms == 2 else "parallel"
    return residual, kv_heads if new or not multi_query else 1


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a Falcon checkpoint; all its layouts of query, key and value are grouped by key head."""
    norms = {
        "pre": ("input_layernorm", "post_attention_layernorm"),
        "parallel": ("input_layernorm",),
        "parallel_two_norms": ("ln_attn", "ln_mlp"),
    }[spec.residual]
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "transformer.word_embeddings.weight")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        for n, name in enumerate(norms):
            table.norm(f"{ours}.norms.{n}", f"{theirs}.{name}")
        table.qkv_grouped(f"{ours}.attention", f"{theirs}.self_attention.query_key_value")
        table.out(f"{ours}.attention", f"{theirs}.self_attention.dense")
        table.up(f"{ours}.mlp", f"{theirs}.mlp.dense_h_to_4h")
        table.down(f"{ours}.mlp", f"{theirs}.mlp.dense_4h_to_h")
    table.norm("head.norm", "transformer.ln_f")
    if not spec.tied_head:
        table.vocab("head.tokens", "lm_head.weight")
    return table.sources
