"""GPT-Neo: attention scores are not scaled, and every other layer sees a window."""

from __future__ import annotations

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ACTIVATIONS, ConfigReader
from jaxinfer.models.sources import Sources, SourceTable
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec, Norm

PREFIX = "transformer."
IGNORED = (r"(transformer\.)?h\.\d+\.attn\.attention\.(bias|masked_bias)",)


def spec(config: ConfigReader) -> ModelSpec:
    """Turn a GPT-Neo configuration into a spec."""
    hidden, heads, context = (
        config.integer("hidden_size"),
        config.integer("num_heads"),
        config.integer("max_position_embeddings"),
    )
    config.get("attention_types")  # transformers has worked it into attention_layers
    kinds, window = config.get("attention_layers", ()), config.integer("window_size")
    if len(kinds) != config.integer("num_layers") or set(kinds) - {"global", "local"}:
        raise ConfigError(f"gpt_neo config: attention_layers must be 'global' or 'local' for each layer, got {kinds!r}")
    return ModelSpec(
        family="gpt_neo",
        vocab_size=config.integer("vocab_size"),
        hidden=hidden,
        intermediate=config.integer("intermediate_size", 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_dim=config.divide("hidden_size", "num_heads"),
        context_length=context,
        layers=tuple(LayerSpec(scale=1.0, window=window if kind == "local" else None) for kind in kinds),
        norm=Norm(kind="layer", eps=config.number("layer_norm_epsilon"), bias=True),
        activation=config.choice("activation_function", ACTIVATIONS),
        mlp_bias=True,
        out_bias=True,
        learned_positions=context,
        tied_head=config.flag("tie_word_embeddings", True),
    )


def sources(spec: ModelSpec, layout: Layout) -> Sources:
    """Name the tensors of a GPT-Neo checkpoint."""
    table = SourceTable(spec, layout)
    table.vocab("embed.tokens", "transformer.wte.weight")
    table.learned_positions("transformer.wpe.weight")
    for i in range(spec.num_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        table.norm(f"{ours}.norms.0", f"{theirs}.ln_1")
        table.norm(f"{ours}.norms.1", f"{theirs}.ln_2")
        attention = f"{theirs}.attn.attention"
        table.qkv_separate(f"{ours}.attention", f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
        table.out(f"{ours}.attention", f"{attention}.out_proj")
        table.up(f"{ours}.mlp", f"{theirs}.mlp.c_fc")
        table.down(f"{ours}.mlp", f"{theirs}.mlp.c_proj")
    table.norm("head.norm", "transformer.ln_f")
    if not spec.tied_head:
        table.vocab("head.tokens", "lm_head.weight")
    return table.sources
