"""OPT, including the 350m shape: norms after each half, and a narrower embedding with projections."""

from __future__ import annotations

from jaxinfer.models.config import ACTIVATIONS, ConfigReader
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec, Norm

PREFIX = "model."
IGNORED = ()


def spec(config: ConfigReader) -> ModelSpec:
    """Turn an OPT configuration into a spec."""
    hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim, context = config.divide("hidden_size", "num_attention_heads"), config.integer("max_position_embeddings")
    width = config.integer("word_embed_proj_dim", hidden)
    before, learned = config.flag("do_layer_norm_before", True), config.flag("layer_norm_elementwise_affine", True)
    bias = config.flag("enable_bias", True)
    return ModelSpec(
        family="opt",
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("ffn_dim"),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        context_length=context,
        layers=(LayerSpec(scale=head_dim**-0.5),) * config.integer("num_hidden_layers"),
        norm=Norm(kind="layer", eps=1e-5, weight=learned, bias=learned),
        residual="pre" if before else "post",
        activation=config.choice("activation_function", ACTIVATIONS),
        mlp_bias=bias,
        qkv_bias=bias,
        out_bias=bias,
        learned_positions=context,
        position_offset=2,
        embedding_dim=None if width == hidden else width,
        final_norm=before and not config.flag("_remove_final_layer_norm", False),
        tied_head=config.flag("tie_word_embeddings", True),
    )


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of an OPT checkpoint."""
    table, width = SourceTable(spec, layout), spec.embedding_dim
    table.vocab("embed.tokens", "model.decoder.embed_tokens.weight", width)
    table.learned_positions("model.decoder.embed_positions.weight")
    if width is not None:
        table.whole("embed.project", "model.decoder.project_in.weight", (spec.hidden, width))
        table.whole("head.project", "model.decoder.project_out.weight", (width, spec.hidden))
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"model.decoder.layers.{i}"
        table.norm(f"{ours}.norms.0", f"{theirs}.self_attn_layer_norm")
        table.norm(f"{ours}.norms.1", f"{theirs}.final_layer_norm")
        attention = f"{theirs}.self_attn"
        table.qkv_separate(f"{ours}.attention", f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        table.out(f"{ours}.attention", f"{attention}.out_proj")
        table.up(f"{ours}.mlp", f"{theirs}.fc1")
        table.down(f"{ours}.mlp", f"{theirs}.fc2")
    if spec.final_norm:
        table.norm("head.norm", "model.decoder.final_layer_norm")
    if not spec.tied_head:
        table.vocab("head.tokens", "lm_head.weight", width)
    return table.sources
