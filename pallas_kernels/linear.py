"""Products of rows with a weight, the norm before and the epilogue after them: the kernel for few rows, XLA for many.

Shapes: ``K`` inputs, ``N`` outputs, which may be several axes (``[kv_heads, R + 2, head_dim]``); a weight is
``[*N, K]``, or ``[2, *N, K]`` for a gated product, whose halves are the gate and the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choices import FUSED_NORMS, LinearImplementation, device, linear_choice
from pallas_kernels.gated_gemm import gated_gemm
from pallas_kernels.skinny_gemm import MAX_ROWS, Activation, InputNorm, normalise, skinny_gemm

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": jax.nn.silu,
}
"""As XLA computes them; the kernel has its own forms of them, of the operations that Mosaic GPU has."""


def linear(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None = None,
    *,
    norm: InputNorm | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    residual: jax.Array | None = None,
    implementation: LinearImplementation | None = None,
) -> jax.Array:
    """Compute ``act(norm(x) W^T + bias) + residual``, or ``act(norm(x) G^T + b) * (norm(x) V^T + c) + residual``.

    Args:
        x: [..., K].
        weight: [*N, K], or [2, *N, K] holding the gate G and the values V.
        scale: of a quantized weight, float32. int8 and float8: a weight's shape without K, each channel's factor. int4:
            [K / g, *N] or [2, K / g, *N], the factor of each group of ``g`` inputs of a channel.
        norm: normalisation of the last axis of ``x``, in float32.
        bias: a weight's shape without K.
        activation: of the product, or of the gate.
        gated: whether the first axis of the weight is that of gate and values.
        residual: [..., *N], added last.
        implementation: ``mosaic`` is a Hopper kernel: for up to 64 rows one with all of this in it, for more one of
            gated products alone, without scale and bias, after which XLA adds the residual. ``dot`` is XLA's product,
            with what XLA fuses to it. None picks as :func:`pallas_kernels.choices` says.

    Returns:
        [..., *N] in the dtype of ``x``. Sums are float32; the kernel keeps everything after them in float32 and rounds
        once, ``dot`` rounds to the dtype of ``x`` after the sum and after each step that follows it.

    Raises:
        ValueError: an unknown implementation, operands that do not fit each other, or that the kernel, asked for by
            name, cannot run.
    """
    operands = _Operands(x, weight, scale, norm, bias, activation, gated, residual)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"linear: x {x.shape} and weight {weight.shape} have different K")
    if gated and weight.shape[0] != 2:
        raise ValueError(f"linear: a gated weight must be [2, *N, K], got {weight.shape}")
    if implementation is None:
        implementation = linear_choice(
            device(), rows=math.prod(x.shape[:-1]), inputs=x.shape[-1], outputs=math.prod(operands.outputs),
            dtype=x.dtype, weight_dtype=weight.dtype, gated=gated, biased=bias is not None,
            activation=activation,
        ).implementation  # fmt: skip
    if implementation == "mosaic":
        return _mosaic(operands)
    if implementation == "dot":
        return _dot(operands)
    raise ValueError(f"implementation must be 'mosaic', 'dot' or None, got {implementation!r}")


@dataclass(frozen=True)
class _Operands:
    """The arguments of :func:`linear`."""

    x: jax.Array
    weight: jax.Array
    scale: jax.Array | None
    norm: InputNorm | None
    bias: jax.Array | None
    activation: Activation | None
    gated: bool
    residual: jax.Array | None

    @property
    def outputs(self) -> tuple[int, ...]:
        """N, of each half."""
        return self.weight.shape[1 if self.gated else 0 : -1]

    @property
    def grouped(self) -> bool:
        """Whether there is a factor for each group of inputs, not only for each output."""
        return self.scale is not None and self.scale.ndim == self.weight.ndim


def _mosaic(o: _Operands) -> jax.Array:
    """Run the kernel for the number of rows, which knows rows [M, K] and one axis of outputs."""
    if o.gated and math.prod(o.x.shape[:-1]) > MAX_ROWS:
        return _mosaic_gated(o)
    x, norm = o.x, o.norm
    if norm is not None and norm.kind not in FUSED_NORMS:
        x, norm = _normed(x, norm), None
    *lead, inputs = x.shape
    halves, outputs = (2,) if o.gated else (), math.prod(o.outputs)
    scale = o.scale
    if scale is not None:
        groups = scale.shape[len(halves) : len(halves) + 1] if o.grouped else ()
        scale = scale.reshape(*halves, *groups, outputs)
    y = skinny_gemm(
        x.reshape(-1, inputs),
        o.weight.reshape(*halves, outputs, inputs),
        norm=norm,
        bias=None if o.bias is None else o.bias.reshape(*halves, outputs),
        activation=o.activation,
        residual=None if o.residual is None else o.residual.reshape(-1, outputs),
        weight_scale=scale,
        implementation="mosaic",
    )
    return y.reshape(*lead, *o.outputs)


def _mosaic_gated(o: _Operands) -> jax.Array:
    """Run the kernel of gated products of many rows, and leave what is around it to XLA."""
    if o.bias is not None:
        raise ValueError(f"linear: implementation 'mosaic' does not run a bias with more than {MAX_ROWS} rows")
    h = o.x if o.norm is None else _normed(o.x, o.norm)
    inputs, outputs = o.weight.shape[-1], math.prod(o.outputs)
    y = gated_gemm(
        h.reshape(-1, inputs), o.weight.reshape(2, outputs, inputs), activation=o.activation, implementation="mosaic"
    )
    y = y.reshape(*o.x.shape[:-1], *o.outputs)
    return y if o.residual is None else o.residual + y


def _dot(o: _Operands) -> jax.Array:
    """Leave it to XLA: a weight as stored goes into its matrix product, the rest into fusions around it."""
    h = o.x if o.norm is None else _normed(o.x, o.norm)
    if o.scale is None:
        y = _product(h, o.weight)
    elif o.grouped:
        # XLA has no product of groups: the weight is widened first.
        scale = jnp.moveaxis(o.scale, 1 if o.gated else 0, -1)
        wide = o.weight.reshape(*scale.shape, -1).astype(jnp.float32) * scale[..., None]
        y = _product(h, wide.reshape(o.weight.shape).astype(h.dtype))
    else:
        # 8 bits are exact in 16, and the factors come after the sum, in float32: only the result is rounded.
        y = (_product(h, o.weight.astype(h.dtype), jnp.float32) * o.scale).astype(h.dtype)
    if o.bias is not None:
        # Over one axis of outputs: so cuBLASLt adds it within the product, to any other XLA adds a broadcast.
        y = (y.reshape(*o.x.shape[:-1], -1) + o.bias.reshape(-1)).reshape(y.shape)
    if o.activation == "relu" and not o.gated:
        y = jnp.maximum(y, 0)  # exact in any dtype, and where it is not widened cuBLASLt does this too
    elif o.gated or o.activation is not None:
        wide = y.astype(jnp.float32)
        # Taken apart after the product, so that it is one; the halves are the first axis of the weight.
        axis = o.x.ndim - 1
        gate = jax.lax.index_in_dim(wide, 0, axis, keepdims=False) if o.gated else wide
        gate = gate if o.activation is None else ACTIVATIONS[o.activation](gate)
        y = (gate * jax.lax.index_in_dim(wide, 1, axis, keepdims=False) if o.gated else gate).astype(o.x.dtype)
    return y if o.residual is None else o.residual + y


def _product(x: jax.Array, weight: jax.Array, dtype: Any = None) -> jax.Array:
    """Multiply [..., K] with [*N, K], giving [..., *N] in the dtype of ``x`` or in the one asked for."""
    result = x.dtype
    if dtype is not None and device().platform == "cpu":
        x, weight = x.astype(dtype), weight.astype(dtype)  # as in einsum_f32
    over = (((x.ndim - 1,), (weight.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, weight, over, preferred_element_type=dtype or result)


def _normed(x: jax.Array, norm: InputNorm) -> jax.Array:
    with jax.named_scope("norm"):
        return normalise(x, norm)
