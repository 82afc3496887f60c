"""GPT-2."""

from __future__ import annotations

from jaxinfer.models.config import ACTIVATIONS, ConfigReader
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec, Norm

PREFIX = "transformer."
IGNORED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",)


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a GPT-2 configuration into a spec."""
    hidden, heads, context = config.integer("n_embd"), config.integer("n_head"), config.integer("n_positions")
    head_dim = config.divide("n_embd", "n_head")
    config.get("reorder_and_upcast_attn")  # float32 scores, which ours always are
    scale = head_dim**-0.5 if config.flag("scale_attn_weights", True) else 1.0
    by_layer = config.flag("scale_attn_by_inverse_layer_idx", False)
    layers = range(1, config.integer("n_layer") + 1)
    return ModelSpec(
        family="gpt2",
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("n_inner", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        context_length=context,
        layers=tuple(LayerSpec(scale=scale / layer if by_layer else scale) for layer in layers),
        norm=Norm(kind="layer", eps=config.number("layer_norm_epsilon"), bias=True),
        activation=config.choice("activation_function", ACTIVATIONS),
        mlp_bias=True,
        qkv_bias=True,
        out_bias=True,
        learned_positions=context,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a GPT-2 checkpoint, whose matrices are stored [in, out]."""
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "transformer.wte.weight")
    table.learned_positions("transformer.wpe.weight")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        table.norm(f"{ours}.norms.0", f"{theirs}.ln_1")
        table.norm(f"{ours}.norms.1", f"{theirs}.ln_2")
        table.qkv_concatenated(f"{ours}.attention", f"{theirs}.attn.c_attn", transposed=True)
        table.out(f"{ours}.attention", f"{theirs}.attn.c_proj", transposed=True)
        table.up(f"{ours}.mlp", f"{theirs}.mlp.c_fc", transposed=True)
        table.down(f"{ours}.mlp", f"{theirs}.mlp.c_proj", transposed=True)
    table.norm("head.norm", "transformer.ln_f")
    if not spec.tied_head:
        table.vocab("head.tokens", "lm_head.weight")
    return table.sources
