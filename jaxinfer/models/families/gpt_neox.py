"""GPT-NeoX and Pythia: attention and MLP in parallel after a norm each, partly rotated heads."""

from __future__ import annotations

from jaxinfer.models.config import ACTIVATIONS, ConfigReader
from jaxinfer.models.positions import rotary
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec, Norm

PREFIX = "gpt_neox."
IGNORED = (r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",)


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a GPT-NeoX configuration into a spec."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim, context = config.divide("hidden_size", "num_attention_heads"), config.integer("max_position_embeddings")
    turn = rotary(config.get("rope_parameters"), head_dim, context, partial=True)
    layer = LayerSpec(scale=head_dim**-0.5, rotary=turn)
    attention_bias = config.flag("attention_bias", True)
    return ModelSpec(
        family="gpt_neox",
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        context_length=context,
        layers=(layer,) * config.integer("num_hidden_layers"),
        norm=Norm(kind="layer", eps=config.number("layer_norm_eps"), bias=True),
        residual="parallel_two_norms" if config.flag("use_parallel_residual", True) else "pre",
        activation=config.choice("hidden_act", ACTIVATIONS),
        mlp_bias=True,
        qkv_bias=attention_bias,
        out_bias=attention_bias,
        tied_head=config.flag("tie_word_embeddings", False),
    )


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a GPT-NeoX checkpoint."""
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "gpt_neox.embed_in.weight")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"gpt_neox.layers.{i}"
        table.norm(f"{ours}.norms.0", f"{theirs}.input_layernorm")
        table.norm(f"{ours}.norms.1", f"{theirs}.post_attention_layernorm")
        table.qkv_grouped(f"{ours}.attention", f"{theirs}.attention.query_key_value")
        table.out(f"{ours}.attention", f"{theirs}.attention.dense")
        table.up(f"{ours}.mlp", f"{theirs}.mlp.dense_h_to_4h")
        table.down(f"{ours}.mlp", f"{theirs}.mlp.dense_4h_to_h")
    table.norm("head.norm", "gpt_neox.final_layer_norm")
    if not spec.tied_head:
        table.vocab("head.tokens", "embed_out.weight")
    return table.sources
