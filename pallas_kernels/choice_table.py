"""What serves which operation of a model, and why, as a table; :mod:`pallas_kernels.choices` chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pallas_kernels.choices import (
    FUSED_NORMS,
    MAX_LINEAR_ROWS,
    MAX_REDUCE_HEADS,
    MIN_GATED_ROWS,
    Choice,
    Device,
    RotaryKind,
    attention_choice,
    device,
    linear_choice,
    linear_problem,
    qkv_choice,
    rotary_cache_choice,
)
from pallas_kernels.layers_choice import MAX_LAYER_ROWS, layers_choice


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """What of a model decides which implementations serve it; sizes are those of one device.

    Attributes:
        dtype: of activations.
        heads_per_key: query heads that share a key head.
        head_dim: entries of a head.
        kv_dtype: of cached keys and values; None: ``dtype``.
        products: (name, inputs, outputs, dtype of the weight) of a layer's products; a gated weight's outputs are those
            of one half.
        gated: names of the products whose weights are gated, and whether a bias is added to each.
        activation: of a gated product.
        norm: ``rms`` or ``layer``.
        rotary: of the rotary embedding, or None.
        head_norms: whether queries and keys are normalised before they are rotated.
        pairs: rotated pairs of a head; None where nothing is rotated.
        interleaved: whether these pairs are neighbours.
        whole: for 1, 2, ... rows of decode why the kernel of whole layers cannot run them, or None; the last holds for
            more.
    """

    dtype: str
    heads_per_key: int
    head_dim: int
    kv_dtype: str | None = None
    products: Sequence[tuple[str, int, int, str]] = ()
    gated: Mapping[str, bool] = field(default_factory=dict)
    activation: str | None = None
    norm: Literal["rms", "layer"] = "rms"
    rotary: RotaryKind | None = None
    head_norms: bool = False
    pairs: int | None = None
    interleaved: bool = False
    whole: Sequence[str | None] = ("layers that are not described",)


def choices(on: Device | None = None, model: Shapes | None = None) -> tuple[Choice[str], ...]:
    """List what serves each operation.

    Args:
        on: what is compiled for; None: :func:`device`.
        model: the model at hand; None lists what holds for models in bfloat16 with heads of 128.
    """
    on = on or device()
    shapes = model or Shapes(dtype="bfloat16", heads_per_key=1, head_dim=128, pairs=64, whole=(None,))

    def attention(query_tokens: int, heads_per_key: int) -> Choice[str]:
        return attention_choice(
            on, query_tokens=query_tokens, heads_per_key=heads_per_key, head_dim=shapes.head_dim, dtype=shapes.dtype,
            kv_dtype=shapes.kv_dtype,
        )  # fmt: skip

    few = attention(1, shapes.heads_per_key)
    decode: tuple[Choice[str], ...] = (few,)
    if model is None:
        many = attention(1, MAX_REDUCE_HEADS + 1)
        if many.implementation != few.implementation:
            named = f"{few.op} with up to {MAX_REDUCE_HEADS} query heads a key"
            decode = (dataclasses.replace(few, op=named), dataclasses.replace(many, op=f"{many.op} with more"))
    rotation = rotary_cache_choice(
        on, query_tokens=2, head_dim=shapes.head_dim, pairs=shapes.pairs, interleaved=shapes.interleaved,
        dtype=shapes.dtype, kv_dtype=shapes.kv_dtype or shapes.dtype, normed=shapes.head_norms,
    )  # fmt: skip
    rest = (
        ("head", "its result is float32, and every token needs it once"),
        ("embedding, sampling", "there is no kernel of our own for them"),
    )
    return (
        attention(2, shapes.heads_per_key),
        *decode,
        rotation,
        *_products(on, shapes),
        _norms(on, shapes),
        _qkv(on, shapes),
        *_whole(on, shapes),
        *(Choice(op=op, implementation="jnp", compiler="XLA", reason=reason) for op, reason in rest),
    )


def _qkv(on: Device, shapes: Shapes) -> Choice[str]:
    """Query, key and value of few rows, and the write of the last two."""
    product = next((each for each in shapes.products if each[0] == "attention.qkv"), ("", 128, 128, shapes.dtype))
    return qkv_choice(
        on, rows=1, inputs=product[1], head_dim=shapes.head_dim, dtype=shapes.dtype, weight_dtype=product[3],
        kv_dtype=shapes.kv_dtype or shapes.dtype, rotary=shapes.rotary, head_norms=shapes.head_norms,
    )  # fmt: skip


def _whole(on: Device, shapes: Shapes) -> Iterator[Choice[str]]:
    """All layers of a decode step, apart where it depends on the rows."""
    found: dict[Choice[str], list[str]] = {}
    for rows in range(1, MAX_LAYER_ROWS + 1):
        problem = shapes.whole[min(rows, len(shapes.whole)) - 1]
        choice: Choice[str] = layers_choice(on, rows=rows, problem=problem)
        found.setdefault(choice, []).append(str(rows))
    for choice, rows_of in found.items():
        yield choice if len(found) == 1 else dataclasses.replace(choice, op=f"{choice.op} ({', '.join(rows_of)})")


def _products(on: Device, shapes: Shapes) -> Iterator[Choice[str]]:
    """Products of few rows, apart where they differ, and of many."""
    products = shapes.products or (("", 128, 128, shapes.dtype),)
    found: dict[Choice[str], list[str]] = {}
    for name, inputs, outputs, weight in products:
        choice: Choice[str] = linear_choice(
            on, rows=1, inputs=inputs, outputs=outputs, dtype=shapes.dtype, weight_dtype=weight
        )
        found.setdefault(choice, []).append(name)
    for choice, names in found.items():
        # Named only where there is more than one answer.
        yield choice if len(found) == 1 else dataclasses.replace(choice, op=f"{choice.op} ({', '.join(names)})")
    _, inputs, outputs, weight = products[0]
    yield linear_choice(
        on, rows=MAX_LINEAR_ROWS + 1, inputs=inputs, outputs=outputs, dtype=shapes.dtype, weight_dtype=weight
    )
    for name, inputs, outputs, weight in products:
        if name in shapes.gated or not shapes.products:
            yield linear_choice(
                on, rows=MIN_GATED_ROWS, inputs=inputs, outputs=outputs, dtype=shapes.dtype, weight_dtype=weight,
                gated=True, biased=shapes.gated.get(name, False), activation=shapes.activation,
            )  # fmt: skip


def _norms(on: Device, shapes: Shapes) -> Choice[str]:
    """Where the norm before a product of few rows is computed."""
    served = all(
        linear_problem(shapes.dtype, weight, inputs=inputs, outputs=outputs) is None
        for _, inputs, outputs, weight in shapes.products or (("", 128, 128, shapes.dtype),)
    )
    if on.hopper and served and shapes.norm in FUSED_NORMS:
        reason = "the kernel of a product normalises what it reads; where there are more rows, XLA does"
        return Choice(op="norms before products", implementation="mosaic", compiler="Mosaic GPU", reason=reason)
    reason = "XLA fuses them with what is before them"
    if on.hopper and served:
        reason = f"the kernel of products does not compute norms of kind {shapes.norm!r} yet"
    return Choice(op="norms before products", implementation="jnp", compiler="XLA", reason=reason)
