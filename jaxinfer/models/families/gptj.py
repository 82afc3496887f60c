"""GPT-J: attention and MLP in parallel after one norm, rotary embedding of neighbouring entries, a biased head."""

from __future__ import annotations

from jaxinfer.models.config import ACTIVATIONS, ConfigReader
from jaxinfer.models.positions import rotary
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec, Norm

PREFIX = "transformer."
IGNORED = (r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias|embed_positions)",)


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a GPT-J configuration into a spec."""
    hidden, heads, context = config.integer("n_embd"), config.integer("n_head"), config.integer("n_positions")
    head_dim = config.divide("n_embd", "n_head")
    turn = rotary(None, config.integer("rotary_dim"), context, interleaved=True)
    layer = LayerSpec(scale=head_dim**-0.5, rotary=turn)
    return ModelSpec(
        family="gptj",
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("n_inner", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        context_length=context,
        layers=(layer,) * config.integer("n_layer"),
        norm=Norm(kind="layer", eps=config.number("layer_norm_epsilon"), bias=True),
        residual="parallel",
        activation=config.choice("activation_function", ACTIVATIONS),
        mlp_bias=True,
        tied_head=config.flag("tie_word_embeddings", False),
        head_bias=True,
    )


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a GPT-J checkpoint."""
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "transformer.wte.weight")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        table.norm(f"{ours}.norms.0", f"{theirs}.ln_1")
        attention = f"{theirs}.attn"
        table.qkv_separate(f"{ours}.attention", f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        table.out(f"{ours}.attention", f"{attention}.out_proj")
        table.up(f"{ours}.mlp", f"{theirs}.mlp.fc_in")
        table.down(f"{ours}.mlp", f"{theirs}.mlp.fc_out")
    table.norm("head.norm", "transformer.ln_f")
    if not spec.tied_head:
        table.vocab("head.tokens", "lm_head.weight")
    table.vocab("head.bias", "lm_head.bias", width=0)
    return table.sources
