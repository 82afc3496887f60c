"""The models that are measured, as transformers' configurations; weights are drawn on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2, "dtype": "bfloat16",
}  # fmt: skip
OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 4096, "ffn_dim": 16384,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 50272, "max_position_embeddings": 2048,
    "word_embed_proj_dim": 4096, "do_layer_norm_before": True, "activation_function": "relu", "bos_token_id": 2,
    "eos_token_id": 2, "pad_token_id": 1, "dtype": "bfloat16",
}  # fmt: skip
GPT2_XL = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 1600, "n_head": 25, "n_layer": 48,
    "n_positions": 1024, "vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256, "dtype": "bfloat16",
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "llama-7b": LLAMA,
    "llama-7b-gqa8": LLAMA | {"num_key_value_heads": 8},
    "opt-6.7b": OPT,
    "opt-13b": OPT
    | {
        "hidden_size": 5120,
        "ffn_dim": 20480,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "word_embed_proj_dim": 5120,
    },
    # 40 GB in layers of 405 MB, which pass through a device of 1.6 GB.
    "llama-115-layers": LLAMA | {"num_hidden_layers": 115, "tie_word_embeddings": True, "num_key_value_heads": 8},
    "gpt2-xl": GPT2_XL,
}

# For a rehearsal on a CPU: the same code with sizes that take seconds.
_TINY_LLAMA = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "vocab_size": 128, "dtype": "float32",
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "llama-7b": _TINY_LLAMA,
    "llama-7b-gqa8": _TINY_LLAMA | {"num_key_value_heads": 2},
    "opt-6.7b": {
        "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128,
        "word_embed_proj_dim": 64, "dtype": "float32",
    },
    "opt-13b": {
        "hidden_size": 256, "ffn_dim": 512, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128,
        "word_embed_proj_dim": 256, "dtype": "float32",
    },
    "llama-115-layers": _TINY_LLAMA | {"num_hidden_layers": 9, "dtype": "bfloat16"},
    "gpt2-xl": {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 128, "dtype": "float32", "eos_token_id": 2},
}  # fmt: skip


def config(name: str, *, tiny: bool) -> dict[str, Any]:
    """The configuration of a model."""
    return MODELS[name] | (TINY[name] if tiny else {})


def folder(name: str, root: Path, *, tiny: bool) -> Path:
    """A folder that holds the configuration of a model and nothing else."""
    path = root / (f"{name}-tiny" if tiny else name)
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config(name, tiny=tiny)))
    return path
