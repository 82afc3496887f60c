"""Tiny configurations of every model family, chosen so that each option that changes the result is taken both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BOS, EOS, UNKNOWN = 0, 1, 2


@dataclass(frozen=True)
class Case:
    """One tiny random checkpoint.

    Attributes:
        name: unique, readable, and the folder's name on disk.
        family: transformers' ``model_type``.
        options: keyword arguments of the family's transformers config.
        seed: of the random weights; chosen so that greedy decoding has no near ties.
        tensor: tensor-parallel sizes above one that its heads and intermediate size allow.
        attention: transformers' attention implementation that is the reference ("eager" unless it is wrong there).
    """

    name: str
    family: str
    options: Mapping[str, Any] = field(hash=False)
    seed: int = 0
    tensor: tuple[int, ...] = (2, 4)
    attention: str = "eager"

    @property
    def vocab_size(self) -> int:
        return int(self.options["vocab_size"])


def _case(family: str, name: str, shape: Mapping[str, Any], /, **changes: Any) -> Case:
    own = {key: changes.pop(key) for key in ("seed", "tensor", "attention") if key in changes}
    special = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": UNKNOWN}
    return Case(name=f"{family}-{name}", family=family, options=special | dict(shape) | changes, **own)


# head_dim 16 with hidden 48 and 4 heads: heads * head_dim is not hidden. 101 and 99 words do not split over devices.
_LLAMA = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_GPT2 = {"vocab_size": 99, "n_positions": 256, "n_embd": 32, "n_layer": 3, "n_head": 4}
_NEO = {
    "vocab_size": 112,
    "max_position_embeddings": 256,
    "hidden_size": 32,
    "num_layers": 4,
    "num_heads": 4,
    "attention_types": [[["global", "local"], 2]],
    "window_size": 7,
}
_GPTJ = {"vocab_size": 101, "n_positions": 256, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8}
_NEOX = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
}
_OPT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
_BLOOM = {"vocab_size": 112, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_QWEN = _LLAMA | {"hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 96}
_GEMMA = _LLAMA | {"num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 9}
_PHI = _LLAMA | {"hidden_size": 64, "intermediate_size": 96}
_FALCON = {
    "vocab_size": 99,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}

CASES: list[Case] = [
    _case("gpt2", "plain", _GPT2, seed=3),
    _case(
        "gpt2",
        "layer-scaled",
        _GPT2,
        seed=5,
        n_inner=80,
        activation_function="gelu",
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
        layer_norm_epsilon=1e-3,
    ),
    _case(
        "gpt2",
        "unscaled-untied",
        _GPT2,
        seed=7,
        scale_attn_weights=False,
        tie_word_embeddings=False,
        activation_function="relu",
    ),
    _case("gpt_neo", "local", _NEO, seed=21),
    _case(
        "gpt_neo",
        "wide",
        _NEO,
        seed=18,
        num_layers=3,
        attention_types=[[["local"], 1], [["global"], 2]],
        window_size=20,
        intermediate_size=72,
        activation_function="gelu_fast",
    ),
    _case("gptj", "partial", _GPTJ, seed=2),
    _case(
        "gptj",
        "whole-tied",
        _GPTJ,
        seed=17,
        rotary_dim=16,
        n_inner=100,
        tie_word_embeddings=True,
        activation_function="silu",
    ),
    _case("gpt_neox", "parallel", _NEOX, seed=22),
    _case(
        "gpt_neox",
        "sequential",
        _NEOX,
        seed=14,
        use_parallel_residual=False,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
        hidden_act="gelu_fast",
        tie_word_embeddings=True,
    ),
    _case(
        "gpt_neox",
        "linear-rope",
        _NEOX,
        seed=7,
        rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    ),
    _case("opt", "pre-norm", _OPT, seed=0),
    _case("opt", "projected-post-norm", _OPT, seed=6, word_embed_proj_dim=20, do_layer_norm_before=False),
    _case(
        "opt",
        "gelu-unbiased-untied",
        _OPT,
        seed=0,
        activation_function="gelu",
        enable_bias=False,
        tie_word_embeddings=False,
    ),
    _case("opt", "plain-norms", _OPT, seed=11, layer_norm_elementwise_affine=False, _remove_final_layer_norm=True),
    _case("bloom", "plain", _BLOOM, seed=2),
    _case(
        "bloom",
        "post-norm-residual",
        _BLOOM,
        seed=20,
        apply_residual_connection_post_layernorm=True,
        layer_norm_epsilon=1e-4,
    ),
    _case("bloom", "twelve-heads", _BLOOM, seed=2, hidden_size=48, n_head=12, tie_word_embeddings=False),
    _case("llama", "plain", _LLAMA, seed=9),
    _case(
        "llama",
        "biased-tied",
        _LLAMA,
        seed=20,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        hidden_act="gelu",
    ),
    _case(
        "llama",
        "multi-query",
        _LLAMA,
        seed=5,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=8,
        rms_norm_eps=1e-3,
    ),
    _case(
        "llama",
        "linear",
        _LLAMA,
        seed=3,
        num_key_value_heads=4,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    _case(
        "llama",
        "llama3",
        _LLAMA,
        seed=8,
        head_dim=16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    _case(
        "llama",
        "yarn",
        _LLAMA,
        seed=1,
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
        },
    ),
    _case(
        "llama",
        "yarn-mscale",
        _LLAMA,
        seed=2,
        head_dim=16,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 2e4,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        },
    ),
    _case(
        "llama", "dynamic", _LLAMA, seed=9, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    ),
    _case("llama", "three-heads", _LLAMA, seed=3, num_attention_heads=3, num_key_value_heads=3, tensor=()),
    _case("mistral", "window", _LLAMA, seed=5, sliding_window=11),
    _case("mistral", "full", _LLAMA, seed=15, sliding_window=None, head_dim=16, tie_word_embeddings=True),
    _case("qwen2", "plain", _QWEN, seed=23, num_hidden_layers=2, tie_word_embeddings=True),
    _case("qwen2", "late-window", _QWEN, seed=1, use_sliding_window=True, sliding_window=8, max_window_layers=2),
    _case(
        "qwen2",
        "typed-window",
        _QWEN,
        seed=1,
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    ),
    _case("qwen3", "plain", _QWEN, seed=4, num_hidden_layers=2, head_dim=24, rms_norm_eps=1e-2),
    _case(
        "qwen3",
        "biased-tied-window",
        _QWEN,
        seed=9,
        head_dim=8,
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=10,
        max_window_layers=1,
    ),
    _case("gemma2", "plain", _GEMMA, seed=4, attn_logit_softcapping=4.0, final_logit_softcapping=6.0),
    _case(
        "gemma2",
        "uncapped-biased",
        _GEMMA,
        seed=3,
        rms_norm_eps=1e-2,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
        tie_word_embeddings=False,
        layer_types=["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    _case(
        "gemma3_text",
        "plain",
        _GEMMA,
        seed=1,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    ),
    _case(
        "gemma3_text",
        "capped-untied",
        _GEMMA,
        seed=5,
        rms_norm_eps=1e-2,
        num_key_value_heads=1,
        final_logit_softcapping=5.0,
        tie_word_embeddings=False,
        layer_types=["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        },
    ),
    _case("phi3", "plain", _PHI, seed=3, sliding_window=13),
    _case(
        "phi3",
        "longrope",
        _PHI,
        seed=0,
        original_max_position_embeddings=32,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.6, 1.8],
            "long_factor": [1.2, 1.5, 2.0, 3.0, 4.5, 6.0, 9.0, 12.0],
        },
    ),
    _case(
        "phi3",
        "partial-longrope-tied",
        _PHI,
        seed=11,
        tie_word_embeddings=True,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 1.9],
            "long_factor": [1.5, 2.0, 3.0, 5.0, 8.0, 11.0],
        },
    ),
    _case("falcon", "multi-query", _FALCON, seed=13, alibi=False, multi_query=True, parallel_attn=True, bias=False),
    # The eager path of transformers adds ALiBi twice (once in the mask); its default, "sdpa", adds it once.
    _case(
        "falcon",
        "alibi",
        _FALCON,
        seed=11,
        alibi=True,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        attention="sdpa",
    ),
    _case(
        "falcon",
        "alibi-twelve-heads",
        _FALCON,
        seed=15,
        hidden_size=48,
        num_attention_heads=12,
        alibi=True,
        multi_query=True,
        parallel_attn=True,
        bias=True,
        tie_word_embeddings=False,
        attention="sdpa",
        max_position_embeddings=512,
    ),
    _case(
        "falcon",
        "sequential-rotary",
        _FALCON,
        seed=12,
        alibi=False,
        multi_query=False,
        parallel_attn=False,
        bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 2000.0},
        ffn_hidden_size=96,
    ),
    _case(
        "falcon",
        "grouped-two-norms",
        _FALCON,
        seed=24,
        new_decoder_architecture=True,
        num_attention_heads=8,
        num_kv_heads=2,
        bias=False,
    ),
    _case(
        "falcon",
        "grouped-one-norm",
        _FALCON,
        seed=16,
        new_decoder_architecture=True,
        num_attention_heads=8,
        num_kv_heads=4,
        num_ln_in_parallel_attn=1,
        bias=True,
        activation="gelu_new",
        tie_word_embeddings=False,
    ),
]


def case(name: str) -> Case:
    """The case of that name; KeyError when there is none."""
    return {each.name: each for each in CASES}[name]
