"""All layers of a decoder for a few tokens in one kernel: products, attention and what is between them.

With one sequence a layer is five short kernels, each of which waits for the one before, starts its blocks, and finds
its weights in memory that meanwhile was idle. Here the blocks of one grid, one on each SM, stay for all layers. Weights
come through a ring in shared memory, in the order in which they are multiplied; it is filled without regard to where
one product ends, so while blocks wait for each other, for the norm or for attention, what comes next arrives.

Six times a layer a block needs what all others have computed: query, key and value (the last two are also written into
the cache), parts of attention, attention, its output, the gate, and down. They send it through the L2 cache in packets,
two values and the number of the layer, which are written and read as one: who finds the number has the values, and
neither fences nor meetings of all are needed (as in NCCL's protocol LL); a fence would wait for the copies under way.

All blocks must be on the GPU at once, or those that are there would wait for ever. They are, since JAX runs one
computation at a time on a GPU; beside another kernel that waits likewise, as of a second process under NVIDIA's MPS,
they need not be.

The paper's Deep-Fusion (DeepSpeed Inference, arXiv 2207.00032, section III.A) fuses what needs no communication between
blocks; packets are what takes this further.

Measured on an H200, 7B layers, one row at 512 tokens, microseconds a layer (limits 98, 50 and 27); the first three
with what a launch of eight takes besides, the last two between the layers of one::

                                                   bfloat16  int8  int4
    meetings at a counter, copies by threads            118          50
    packets, copies by threads                          111
    packets, copies by the copy engine                  112    66    48
    the same                                            111    64    45
    the new token first, products by integers           103    61    40
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.attention import BLOCK_SIZE
from pallas_kernels.choices import Device, device
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.layer_plan import NAMES, PARAMETERS, LayerPlan, Norm, Product, divided
from pallas_kernels.qkv_gemm import qkv_gemm, slots_of
from pallas_kernels.skinny_gemm import DTYPES, QUANTIZED, SMS, Activation, InputNorm, skinny_gemm, weight_bits

Cache = tuple[jax.Array, jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "scales", "biases", "norms"],
    meta_fields=["activation"],
)
@dataclass(frozen=True, kw_only=True)
class LayerOperands:
    """The parameters of a layer whose halves each normalise their input and add their result to it.

    Attributes:
        weights: of query, key and value [G, R + 2, D, H], of the attention's output [H, G * R * D], up [F, H] or,
            gated, [2, F, H], and down [H, F].
        scales: of quantized weights, float32, as :func:`pallas_kernels.linear` has them; else None.
        biases: a weight's shape without its last axis, or None.
        norms: before the first weight and before the third.
        activation: of up, or of its gate.
    """

    weights: tuple[jax.Array, jax.Array, jax.Array, jax.Array]
    scales: tuple[jax.Array | None, ...]
    biases: tuple[jax.Array | None, ...]
    norms: tuple[InputNorm, InputNorm]
    activation: Activation | None


def decoder_layers(
    x: jax.Array,
    layers: Sequence[LayerOperands],
    caches: Sequence[Cache],
    tables: jax.Array,
    positions: jax.Array,
    *,
    rotary: tuple[jax.Array, jax.Array] | None,
    scale: float,
    window: int | None = None,
    implementation: Literal["mosaic", "reference"] | None = None,
) -> tuple[jax.Array, list[Cache]]:
    """Run decoder layers, all of the same shapes, over one new token of each sequence.

    Args:
        x: [B, H].
        layers: their parameters.
        caches: of each layer key and value blocks, each [N, G, 64, D] in the dtype of ``x``; donate them, so that the
            write is in place.
        tables: int32 [B, W] block tables.
        positions: int32 [B]; a negative one marks a row that is not there, whose result may be anything.
        rotary: cos and sin, float32 [B, D / 2]: rotate entry ``i`` of each query and key with entry ``i + D / 2``.
        scale: of the scores.
        window: a query sees itself and the ``window - 1`` keys before it.
        implementation: ``mosaic`` is the Hopper kernel; ``reference``, or None, is ``jax.numpy``.

    Returns:
        [B, H], and the caches with the new rows written.

    Raises:
        ValueError: the operands do not fit each other, or the named implementation cannot run them.
    """
    _check(x, layers, caches, tables, positions, rotary, window)
    rest: dict[str, Any] = {"rotary": rotary, "scale": scale, "window": window}
    if implementation is None or implementation == "reference":
        return reference(x, layers, caches, tables, positions, **rest)
    if implementation != "mosaic":
        raise ValueError(f"decoder_layers: implementation {implementation!r} is none of 'mosaic', 'reference'")
    plan = plan_of(x, layers, caches, tables, **rest)
    problem = cores_problem(device()) or dtype_problem(x, layers, caches) or plan.problem()
    if problem is not None:
        raise ValueError(f"decoder_layers: implementation 'mosaic' cannot run {problem}")
    # Imported here, since it takes a second and only this implementation needs it.
    from pallas_kernels import layer_mosaic

    slots = slots_of(tables, positions[:, None], caches[0][0].shape[0])[:, 0]
    lengths = jnp.clip(positions + 1, 0, tables.shape[1] * BLOCK_SIZE)
    written: list[Cache] = []
    most = PARAMETERS // len(plan.parameters)
    count = -(-len(layers) // -(-len(layers) // most))  # of a launch, all of about as many
    for start in range(0, len(layers), count):
        some = tuple(layers[start : start + count])
        x, new, _ = layer_mosaic.run(
            x, some, tuple(caches[start : start + count]), tables, slots, lengths, rotary,
            plan=dataclasses.replace(plan, layers=len(some)),
        )  # fmt: skip
        written += new
    return x, written


def cores_problem(on: Device) -> str | None:
    """Name that a GPU has too few SMs, or None: blocks that wait for each other must all be there at once."""
    return (
        f"on {on.cores} SMs, since it has a block on each of {SMS}" if on.cores is not None and on.cores < SMS else None
    )


def reference(
    x: jax.Array,
    layers: Sequence[LayerOperands],
    caches: Sequence[Cache],
    tables: jax.Array,
    positions: jax.Array,
    *,
    rotary: tuple[jax.Array, jax.Array] | None,
    scale: float,
    window: int | None = None,
) -> tuple[jax.Array, list[Cache]]:
    """What :func:`decoder_layers` computes, by the operations that it is made of: any platform, any shape."""
    angles = None if rotary is None else (rotary[0][:, None], rotary[1][:, None])
    written = []
    for layer, cache in zip(layers, caches, strict=True):
        query, cache = qkv_gemm(
            x[:, None], layer.weights[0], cache, tables, positions[:, None],
            norm=layer.norms[0], bias=layer.biases[0], rotary=angles, weight_scale=layer.scales[0],
        )  # fmt: skip
        written.append(cache)
        y = decode_attention(query[:, 0], *cache, tables, jnp.maximum(positions + 1, 0), scale=scale, window=window)

        def product(h: jax.Array, which: int, layer: LayerOperands = layer, **rest: Any) -> jax.Array:
            bias, scale = layer.biases[which], layer.scales[which]
            return skinny_gemm(h, layer.weights[which], bias=bias, weight_scale=scale, **rest)

        x = product(y.reshape(x.shape[0], -1), 1, residual=x)
        h = product(x, 2, norm=layer.norms[1], activation=layer.activation)
        x = product(h, 3, residual=x)
    return x, written


def dtype_problem(x: jax.Array, layers: Sequence[LayerOperands], caches: Sequence[Cache]) -> str | None:
    """Name a dtype that the kernel cannot run, or None."""
    if x.dtype not in DTYPES:
        return f"x of {x.dtype}"
    for layer, cache in zip(layers, caches, strict=True):
        for weight in layer.weights:
            if weight.dtype not in (x.dtype, *QUANTIZED):
                return f"weights of {weight.dtype} with x of {x.dtype}"
            if weight.dtype != layers[0].weights[0].dtype:
                return f"weights of {layers[0].weights[0].dtype} and {weight.dtype}"
        if any(blocks.dtype != x.dtype for blocks in cache):
            return f"keys of {cache[0].dtype} and values of {cache[1].dtype} with x of {x.dtype}"
        for array in (*(array for norm in layer.norms for array in (norm.scale, norm.bias)), *layer.biases):
            if array is not None and array.dtype != x.dtype:
                return f"a norm's vector or a bias of {array.dtype} with x of {x.dtype}"
    return None


def plan_of(
    x: jax.Array,
    layers: Sequence[LayerOperands],
    caches: Sequence[Cache],
    tables: jax.Array,
    *,
    rotary: tuple[jax.Array, jax.Array] | None,
    scale: float,
    window: int | None,
) -> LayerPlan:
    """How the kernel divides its work for operands; whether it can, the plan says."""
    layer = layers[0]
    (m, hidden), (groups, heads, dim, _) = x.shape, layer.weights[0].shape
    products = []
    for which, (weight, factors) in enumerate(zip(layer.weights, layer.scales, strict=True)):
        gated = which == 2 and weight.ndim == 3
        channels, inputs = math.prod(weight.shape[:-1]), weight.shape[-1]
        group = 0
        if weight.dtype == jnp.int4 and factors is not None:
            group = inputs // factors.shape[1 if gated else 0]
        apart = dim // 2 if which == 0 else weight.shape[1] if gated else 8
        products.append(
            Product(
                channels=channels, inputs=inputs, apart=apart, halves=1 + gated,
                bits=weight_bits(weight.dtype), group=group,
            )
        )  # fmt: skip
    norms = tuple(
        Norm(
            kind=norm.kind, eps=norm.eps, scaled=norm.scale is not None, shifted=norm.bias is not None,
            unit_offset=norm.unit_offset,
        )
        for norm in layer.norms
    )  # fmt: skip
    a, b, c, d = products
    biased = tuple(bias is not None for bias in layer.biases)
    return divided(
        LayerPlan(
            layers=len(layers), m=m, hidden=hidden, groups=groups, per_group=heads - 2, dim=dim, width=tables.shape[1],
            kv_blocks=caches[0][0].shape[0],
            products=(a, b, c, d), norms=norms, biased=biased,  # type: ignore[arg-type]
            weight=layer.weights[0].dtype.name, kind="bf16" if x.dtype == jnp.bfloat16 else "f16",
            activation=layer.activation, rotary=rotary is not None, scale=scale, window=window,
        )
    )  # fmt: skip


def _check(
    x: jax.Array,
    layers: Sequence[LayerOperands],
    caches: Sequence[Cache],
    tables: jax.Array,
    positions: jax.Array,
    rotary: tuple[jax.Array, jax.Array] | None,
    window: int | None,
) -> None:
    """Refuse operands that do not fit each other, or layers that are not alike."""
    if not layers or len(layers) != len(caches):
        raise ValueError(f"decoder_layers: there must be layers and a cache for each, got {len(layers)}, {len(caches)}")
    qkv, out, up, down = layers[0].weights
    if x.ndim != 2 or qkv.ndim != 4 or qkv.shape[1] < 3:
        raise ValueError(f"decoder_layers: x must be [B, H] and qkv [G, R + 2, D, H], got {x.shape} and {qkv.shape}")
    (batch, hidden), (groups, heads, dim, _) = x.shape, qkv.shape
    inner, lead = groups * (heads - 2) * dim, (2,) if up.ndim == 3 else ()
    wide = up.shape[-2] if up.ndim in (2, 3) else 0
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "qkv": (qkv, (groups, heads, dim, hidden)),
        "out": (out, (hidden, inner)),
        "up": (up, (*lead, wide, hidden)),
        "down": (down, (hidden, wide)),
        "keys": (caches[0][0], (caches[0][0].shape[0], groups, 64, dim)),
        "values": (caches[0][1], caches[0][0].shape),
        "tables": (tables, (batch, tables.shape[-1])),
        "positions": (positions, (batch,)),
    }
    for name, norm in zip(("qkv", "up"), layers[0].norms, strict=True):
        expected |= {f"{name}'s norm scale": (norm.scale, (hidden,)), f"{name}'s norm bias": (norm.bias, (hidden,))}
    for name, weight, bias in zip(NAMES, layers[0].weights, layers[0].biases, strict=True):
        expected[f"bias of {name}"] = (bias, weight.shape[:-1])
    if rotary is not None:
        expected |= {name: (angle, (batch, dim // 2)) for name, angle in zip(("cos", "sin"), rotary, strict=True)}
    for name, (found, wanted) in expected.items():
        if found is not None and found.shape != wanted:
            raise ValueError(f"decoder_layers: {name} must be {list(wanted)}, got {list(found.shape)}")
    for name, weight, factors in zip(NAMES, layers[0].weights, layers[0].scales, strict=True):
        if (weight.dtype in QUANTIZED) != (factors is not None):
            given = "without" if factors is None else "with"
            raise ValueError(f"decoder_layers: {name} of {weight.dtype} {given} a scale; quantized weights have one")
    if window is not None and window < 1:
        raise ValueError(f"decoder_layers: window must be at least 1, got {window}")
    like = jax.tree.map(lambda array: (array.shape, array.dtype), (layers[0], tuple(caches[0])))
    for number, (layer, cache) in enumerate(zip(layers, caches, strict=True)):
        if jax.tree.map(lambda array: (array.shape, array.dtype), (layer, tuple(cache))) != like:
            raise ValueError(f"decoder_layers: layer {number} is not of the shapes, dtypes and kinds of the first")
