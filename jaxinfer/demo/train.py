"""Trains the bundled demo model: a Llama of four million parameters that writes English prose.

``python -m jaxinfer.demo.fetch_text TEXT`` prepares the text; then, on one GPU, in under ten minutes:
``python -m jaxinfer.demo.train --text TEXT --out FOLDER``. The folder is a checkpoint as transformers writes it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from safetensors.flax import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from jaxinfer.demo.fetch_text import CHAPTER

END = "<|endoftext|>"  # opens every chapter, hence also closes the one before it
VOCAB = 4096
HELD_OUT = 25  # one chapter in so many is for validation
CHUNK = 50  # steps a dispatch: a step of this model is too short to be launched one by one
CHAT = "{{ bos_token }}{% for message in messages %}{{ message['content'] | trim }}\n{% endfor %}"


def llama_config(vocab: int = VOCAB) -> LlamaConfig:
    """The architecture: 4.0 million parameters, head counts that split over two and four devices."""
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        use_cache=True,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


# Attribute names follow transformers', so that a parameter's path is its name in the checkpoint.


class Linear(nnx.Module):
    """A projection without bias; its weight is [out, in]."""

    def __init__(self, size_in: int, size_out: int, scale: float, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(scale * jax.random.normal(rngs.params(), (size_out, size_in)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Project [..., in] to [..., out]."""
        return x @ self.weight[...].T


class Norm(nnx.Module):
    """RMSNorm over the last axis, computed in float32."""

    def __init__(self, config: LlamaConfig) -> None:
        self.weight = nnx.Param(jnp.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [..., hidden]; the result has the dtype of ``x``."""
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * y.astype(x.dtype)


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding of [batch, positions, heads, head_dim], halves paired as Llama does."""
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention over [batch, positions, hidden]."""

    def __init__(self, config: LlamaConfig, scale: float, rngs: nnx.Rngs) -> None:
        query, key = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(config.hidden_size, query, 0.02, rngs)
        self.k_proj = Linear(config.hidden_size, key, 0.02, rngs)
        self.v_proj = Linear(config.hidden_size, key, 0.02, rngs)
        self.o_proj = Linear(query, config.hidden_size, scale, rngs)
        self.head_dim = config.head_dim
        self.theta = config.rope_parameters["rope_theta"]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attend from every position to itself and those before it."""
        q, k, v = (p(x).reshape(*x.shape[:2], -1, self.head_dim) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = jax.nn.dot_product_attention(rotate(q, self.theta), rotate(k, self.theta), v, is_causal=True)
        return self.o_proj(y.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, config: LlamaConfig, scale: float, rngs: nnx.Rngs) -> None:
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, 0.02, rngs)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, 0.02, rngs)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, scale, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., hidden] to [..., hidden]."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """A pre-norm transformer layer with dropout on what each half adds."""

    def __init__(self, config: LlamaConfig, dropout: float, rngs: nnx.Rngs) -> None:
        scale = 0.02 / (2 * config.num_hidden_layers) ** 0.5
        self.input_layernorm = Norm(config)
        self.self_attn = Attention(config, scale, rngs)
        self.post_attention_layernorm = Norm(config)
        self.mlp = MLP(config, scale, rngs)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None) -> jax.Array:
        """Transform [batch, positions, hidden]; without ``rngs`` nothing is dropped."""
        drop = partial(self.dropout, deterministic=rngs is None, rngs=rngs)
        x = x + drop(self.self_attn(self.input_layernorm(x)))
        return x + drop(self.mlp(self.post_attention_layernorm(x)))


class Embedding(nnx.Module):
    """The token table [vocab, hidden], which is also the output head."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, config.hidden_size)))


class Llama(nnx.Module):
    """A tied-embedding Llama (transformers' ``LlamaForCausalLM``)."""

    def __init__(self, config: LlamaConfig, dropout: float, rngs: nnx.Rngs) -> None:
        self.embed_tokens = Embedding(config, rngs)
        self.layers = nnx.List([Layer(config, dropout, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = Norm(config)
        self.dropout = nnx.Dropout(dropout)

    def __call__(self, tokens: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Logits, float32 [batch, positions, vocab], of tokens [batch, positions]; ``rngs`` turns dropout on."""
        x = self.dropout(self.embed_tokens.weight[...][tokens], deterministic=rngs is None, rngs=rngs)
        for layer in self.layers:
            x = layer(x, rngs)
        return jnp.einsum(
            "bph,vh->bpv", self.norm(x), self.embed_tokens.weight[...], preferred_element_type=jnp.float32
        )


def tensors(params: nnx.State, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """The parameters under transformers' names, in [out, in] order."""
    leaves = nnx.to_flat_state(params)
    return {"model." + ".".join(map(str, path)): leaf[...].astype(dtype) for path, leaf in leaves}


# Text


def read_chapters(folder: Path) -> Iterator[tuple[bool, str]]:
    """Yield (held out?, chapter) of every .txt file in ``folder``, in order of names."""
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise FileNotFoundError(f"no .txt file in {folder}")
    for file in files:
        for index, chapter in enumerate(file.read_text(encoding="utf-8").split(CHAPTER)):
            yield index % HELD_OUT == HELD_OUT // 2, chapter.strip()


def train_tokenizer(texts: Sequence[str], vocab: int = VOCAB) -> Tokenizer:
    """A byte-level BPE that opens every text with ``END``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """All texts as one stream of ids, each behind an ``END``; one more ``END`` closes it."""
    ids = [np.asarray(encoding.ids, np.int32) for encoding in tokenizer.encode_batch(texts)]
    return np.concatenate([*ids, np.full(1, tokenizer.token_to_id(END), np.int32)])


def paragraph_starts(tokenizer: Tokenizer, stream: np.ndarray, context: int) -> np.ndarray:
    """Where in ``stream`` paragraphs begin that have ``context`` tokens after the token before them."""
    ids = tokenizer.get_vocab()
    (breaks,) = np.nonzero(
        np.isin(stream, [ids[END], ids["\u010a"]])
    )  # U+010A is how the byte-level BPE spells a newline
    starts = breaks + 1
    return starts[starts + context <= len(stream)].astype(np.int32)


# Training


class Recipe(NamedTuple):
    """What the optimizer needs; windows are ``batch`` rows of ``context`` tokens."""

    batch: int
    context: int
    rate: float = 3e-3
    decay: float = 0.1
    warmup: int = 100


class Progress(NamedTuple):
    """What training carries from step to step."""

    params: nnx.State
    moments: optax.OptState
    step: jax.Array
    key: jax.Array


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW before its learning rate, with clipped gradients and no decay of norms."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(b1=0.9, b2=0.95),
        optax.add_decayed_weights(recipe.decay, mask=partial(jax.tree.map, lambda p: p.ndim > 1)),
    )


def cross_entropy(graph: nnx.GraphDef, params: nnx.State, windows: jax.Array, key: jax.Array | None) -> jax.Array:
    """Mean loss in nats a token of windows [rows, context + 1], computed in bfloat16; a key turns dropout on."""
    model = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    logits = model(windows[:, :-1], None if key is None else nnx.Rngs(dropout=key))
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()


@partial(jax.jit, static_argnames=("graph", "recipe"), donate_argnames="progress")
def train(
    graph: nnx.GraphDef, recipe: Recipe, progress: Progress, stream: jax.Array, starts: jax.Array, total: jax.Array
) -> tuple[Progress, jax.Array]:
    """Take ``CHUNK`` of ``total`` steps (warm-up, then a cosine to a hundredth); returns their mean loss too."""

    def step(progress: Progress, _: None) -> tuple[Progress, jax.Array]:
        key, rows_key, drop_key = jax.random.split(progress.key, 3)
        rows = jax.random.choice(rows_key, starts, (recipe.batch, 1))
        # A row reads as a text of its own: it begins with a paragraph, behind END (id 0).
        windows = stream[rows - 1 + jnp.arange(recipe.context + 1)].at[:, 0].set(0)
        loss, grads = jax.value_and_grad(cross_entropy, argnums=1)(graph, progress.params, windows, drop_key)
        updates, moments = optimizer(recipe).update(grads, progress.moments, progress.params)
        cosine = 0.505 + 0.495 * jnp.cos(jnp.pi * jnp.minimum(progress.step / total, 1))
        rate = recipe.rate * jnp.minimum((progress.step + 1) / recipe.warmup, cosine)
        params = jax.tree.map(lambda p, u: p - rate * u, progress.params, updates)
        return Progress(params, moments, progress.step + 1, key), loss

    progress, losses = jax.lax.scan(step, progress, length=CHUNK)
    return progress, losses.mean()


@partial(jax.jit, static_argnames=("graph", "context"))
def validate(graph: nnx.GraphDef, params: nnx.State, stream: jax.Array, context: int) -> jax.Array:
    """Mean loss over ``stream`` in windows that do not overlap, each behind an ``END``; a shorter rest is left out."""
    count = (len(stream) - 1) // context
    windows = stream[jnp.arange(count)[:, None] * context + jnp.arange(context + 1)].at[:, 0].set(0)
    return jax.lax.map(lambda row: cross_entropy(graph, params, row[None], None), windows, batch_size=8).mean()


def fit(
    config: LlamaConfig,
    recipe: Recipe,
    tokenizer: Tokenizer,
    texts: tuple[list[str], list[str]],
    *,
    dropout: float,
    steps: int,
    minutes: float,
) -> tuple[nnx.State, dict[str, object]]:
    """Train on texts[0], validate on texts[1]; returns the parameters with the best validation loss, and a report.

    Takes fewer than ``steps`` steps where the measured step time says that they would outlast ``minutes``.
    """
    began = time.monotonic()
    train_stream, valid_stream = (encode(tokenizer, part) for part in texts)
    starts = jnp.asarray(paragraph_starts(tokenizer, train_stream, recipe.context))
    stream, valid = jnp.asarray(train_stream), jnp.asarray(valid_stream)
    graph, params = nnx.split(Llama(config, dropout, nnx.Rngs(0)), nnx.Param)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    print(f"{count} parameters, {len(stream)} training and {len(valid)} validation tokens, {len(starts)} paragraphs")
    progress = Progress(params, optimizer(recipe).init(params), jnp.zeros((), jnp.int32), jax.random.key(1))
    best, best_step, best_params, train_loss = float("inf"), 0, jax.device_get(params), float("nan")
    total, done = steps, 0
    while done < total:
        chunk_began = time.monotonic()
        progress, loss = train(graph, recipe, progress, stream, starts, jnp.asarray(total, jnp.float32))
        train_loss, done = float(loss), done + CHUNK
        valid_loss = float(validate(graph, progress.params, valid, recipe.context))
        now = time.monotonic()
        if valid_loss < best:
            best, best_step, best_params = valid_loss, done, jax.device_get(progress.params)
        print(f"{now - began:6.1f} s  step {done:5d}  train {train_loss:.4f}  validation {valid_loss:.4f}", flush=True)
        if done == 2 * CHUNK:  # the first chunk was compiled
            fits = int((60 * minutes - (now - began)) / (now - chunk_began)) * CHUNK + done
            total = min(steps, fits)
        if now - began > 60 * minutes:
            break
    report: dict[str, object] = {
        "parameters": count,
        "training_tokens": len(stream),
        "validation_tokens": len(valid),
        "steps": done,
        "tokens_seen": done * recipe.batch * recipe.context,
        "epochs": done * recipe.batch * recipe.context / len(stream),
        "final_train_loss_with_dropout": train_loss,
        "best_step": best_step,
        "validation_loss": best,
        "dropout": dropout,
        **recipe._asdict(),
        "seconds": time.monotonic() - began,
        "device": jax.devices()[0].device_kind,
    }
    return jax.tree.map(jnp.asarray, best_params), report


def export(folder: Path, config: LlamaConfig, params: nnx.State, tokenizer: Tokenizer) -> None:
    """Write the checkpoint: weights in bfloat16, configurations and tokenizer, as transformers does."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors(params, jnp.bfloat16), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": 0}
    GenerationConfig(**ends, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=128).save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT,
    )
    fast.save_pretrained(folder)


def main() -> None:
    """Train the model and write it into ``--out``, with ``training.json`` beside it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="folder of .txt files from fetch_text.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=3400)
    parser.add_argument("--minutes", type=float, default=8.0, help="wall limit; fewer steps are planned if need be")
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=Recipe._field_defaults["rate"])
    args = parser.parse_args()
    parts: tuple[list[str], list[str]] = ([], [])
    for held_out, chapter in read_chapters(args.text):
        parts[held_out].append(chapter)
    tokenizer = train_tokenizer(parts[0])
    config = llama_config(tokenizer.get_vocab_size())
    recipe = Recipe(args.batch, args.context, args.rate)
    params, report = fit(config, recipe, tokenizer, parts, dropout=args.dropout, steps=args.steps, minutes=args.minutes)
    export(args.out, config, params, tokenizer)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
