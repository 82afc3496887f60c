"""Products of a few rows with a weight, with the norm before and the epilogue after them in the same kernel.

Shapes: ``M`` rows of activations, ``K`` inputs, ``N`` outputs; a weight is ``[N, K]``, or ``[2, N, K]`` for a gated
product, whose halves are the gate and the values. This is the small-batch GEMM and the Deep-Fusion of DeepSpeed
Inference (SC22, sections 3.2 and 3.3), for Hopper.

The kernel computes the transposed product, ``W x^T``: 64 output channels are the rows of a wgmma instruction and the
tokens its columns, of which 8 are enough, so that nothing is spent on padding 1 row to 64. A block of the grid owns
``rows`` channels and one of ``splits`` parts of K; the blocks of a split are a cluster, whose first block adds the
partial sums up, in order, through distributed shared memory, and does the epilogue. Weights stream through a ring of
``stages`` tiles which starts to fill before the previous kernel has ended (programmatic dependent launch).

A weight of int8, int4 or float8_e4m3fn is widened in registers on its way to the tensor cores, in pieces of 64 inputs.
Up to 8 rows with such a weight have a kernel of their own, :mod:`pallas_kernels.skinny_gemm_quantized`: a layer's four
products took 74 us with int8, 93 with this kernel, and 65 with int4, 102 with this one (H200, 7B, one row, in CUDA
graphs).

Measured on an H200 (``benchmarks/skinny_gemm.py``, microseconds, one row, the four products of a 7B Llama layer, a norm
and an epilogue with each; the time at copy bandwidth; XLA's product). Small kernels varied by a fifth from run to run::

                        qkv   out  gate and up  down
    bfloat16   kernel    33    21           57    28
               XLA       45    20           62    40
               copy      24     8           44    22
    int8       kernel    25    13           41    24
               XLA       39    27           54    38
               copy      12     4           22    11
    int4       kernel    19    19
               XLA       30    25
               copy       6     2

In an earlier run with bfloat16, out took 14 (XLA 16), and gate and up 52 with one split, as is chosen now, where this
run had three. The figures of quantized weights are this kernel's: their time falls by less than their bytes.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.einsum import einsum_f32

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
"""The names are those of ``pallas_kernels.linear.ACTIVATIONS``; ``gelu`` is the exact one."""

MAX_ROWS = 64
"""Rows up to which the kernel is made: above, x no longer is small beside the weight."""

DTYPES = (jnp.bfloat16, jnp.float16)

QUANTIZED = (jnp.int8, jnp.int4, jnp.float8_e4m3fn)
"""Dtypes of a weight that comes with factors."""

SMS = 132
"""SMs of an H100 (SXM) and an H200."""

SMEM_PER_SM = 227 * 1024
"""Shared memory that blocks of an SM of Hopper share; each block also takes 1 KiB for the system."""


@dataclass(frozen=True, kw_only=True)
class InputNorm:
    """A normalisation of the rows of x before the product, as :class:`jaxinfer.models.norm.Norm` computes it.

    Attributes:
        kind: ``rms``, or ``layer`` which also subtracts the mean.
        eps: added to the mean square.
        scale: [K], or None for no scale.
        bias: [K], or None for no bias.
        unit_offset: whether one is added to ``scale``.
    """

    kind: Literal["rms", "layer"]
    eps: float
    scale: jax.Array | None = None
    bias: jax.Array | None = None
    unit_offset: bool = False


jax.tree_util.register_dataclass(InputNorm, data_fields=["scale", "bias"], meta_fields=["kind", "eps", "unit_offset"])


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the kernel divides the work.

    Attributes:
        rows: output channels of a block, of each half of a gated weight; a multiple of 64.
        tile_k: inputs of a tile; a multiple of 64.
        stages: tiles in the ring.
        splits: parts of K, one a block; at most 8.
        reduce: ``cluster`` adds the parts up inside the kernel; ``memory`` writes them out in float32 and leaves the
            sum and the epilogue to XLA, which is what interpret mode can run.
        fuse_norm: normalise inside the kernel, or else before it, as for float16 and where 64 does not divide K.
        overlap: start to fetch the weight while the previous kernel still runs. The weight must not be written by that
            kernel; parameters of the jitted function never are.
    """

    rows: int = 64
    tile_k: int = 128
    stages: int = 5
    splits: int = 1
    reduce: Literal["cluster", "memory"] = "cluster"
    fuse_norm: bool = True
    overlap: bool = True


def normalise(x: jax.Array, norm: InputNorm) -> jax.Array:
    """Normalise rows [M, K] in float32; the result has the dtype of ``x``."""
    y = x.astype(jnp.float32)
    if norm.kind == "layer":
        y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + norm.eps)
    if norm.scale is not None:
        scale = norm.scale.astype(jnp.float32)
        y = y * (1.0 + scale if norm.unit_offset else scale)
    if norm.bias is not None:
        y = y + norm.bias.astype(jnp.float32)
    return y.astype(x.dtype)


def activate(x: jax.Array, activation: Activation | None) -> jax.Array:
    """Apply an activation in float32, with operations that both XLA and Mosaic GPU have."""
    match activation:
        case None:
            return x
        case "silu":
            return x / (1.0 + jnp.exp(-x))
        case "quick_gelu":
            return x / (1.0 + jnp.exp(-1.702 * x))
        case "relu":
            return jnp.maximum(x, 0.0)
        case "gelu_tanh":
            return 0.5 * x * (1.0 + jnp.tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
        case "gelu":
            return 0.5 * x * (1.0 + _erf(x * 0.7071067811865476))


def _erf(x: jax.Array) -> jax.Array:
    """Abramowitz and Stegun 7.1.26, absolute error below 1.5e-7: Mosaic GPU has no ``erf`` for warpgroups."""
    a = jnp.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * a)
    series = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    y = 1.0 - series * jnp.exp(-a * a)
    return jnp.where(x < 0.0, -y, y)


def epilogue(
    parts: list[jax.Array], bias: list[jax.Array] | None, activation: Activation | None, residual: jax.Array | None
) -> jax.Array:
    """Bias, activation, gate and residual, in float32."""
    if bias is not None:
        parts = [part + b for part, b in zip(parts, bias, strict=True)]
    y = activate(parts[0], activation)
    if len(parts) == 2:
        y = y * parts[1]
    return y if residual is None else y + residual.astype(jnp.float32)


def reference(
    x: jax.Array,
    weight: jax.Array,
    *,
    norm: InputNorm | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    weight_scale: jax.Array | None = None,
) -> jax.Array:
    """What :func:`skinny_gemm` computes, in ``jax.numpy``: any platform, any shape."""
    y = products(x, weight, norm, weight_scale)
    biases = None if bias is None else list(bias.astype(jnp.float32).reshape(y.shape[0], y.shape[2]))
    return epilogue(list(y), biases, activation, residual).astype(x.dtype)


def products(x: jax.Array, weight: jax.Array, norm: InputNorm | None, weight_scale: jax.Array | None) -> jax.Array:
    """The product alone of :func:`reference`, float32 [P, M, N]."""
    h = x if norm is None else normalise(x, norm)
    weight = weight if weight.ndim == 3 else weight[None]
    if weight.dtype == jnp.int4 and weight_scale is not None:
        scale = weight_scale.astype(jnp.float32).reshape(weight.shape[0], -1, weight.shape[1])
        groups = weight.astype(x.dtype).reshape(*weight.shape[:2], scale.shape[1], -1)
        y = einsum_f32("mgk,pngk->pmgn", h.reshape(h.shape[0], scale.shape[1], -1), groups)
        return jnp.sum(y * scale[:, None], axis=2)
    if weight_scale is not None:
        y = einsum_f32("mk,pnk->pmn", h, weight.astype(x.dtype))
        return y * weight_scale.astype(jnp.float32).reshape(weight.shape[:2])[:, None]
    return einsum_f32("mk,pnk->pmn", h, weight)


def skinny_gemm(
    x: jax.Array,
    weight: jax.Array,
    *,
    norm: InputNorm | None = None,
    bias: jax.Array | None = None,
    activation: Activation | None = None,
    residual: jax.Array | None = None,
    weight_scale: jax.Array | None = None,
    implementation: Literal["mosaic", "reference"] | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute ``act(norm(x) W^T + bias) + residual``, or ``act(norm(x) G^T + b) * (norm(x) V^T + c) + residual``.

    Args:
        x: [M, K]. From 9 rows on, a number that is not a multiple of 8 costs the kernel a copy of x and residual.
        weight: [N, K], or [2, N, K] holding the gate G and the values V. Where N is not a multiple of 8, the kernel
            leaves its last ``N % 8`` channels to ``jax.numpy``, and putting the two together is a copy of the result.
        norm: normalisation of the rows of ``x``.
        bias: [N], or [2, N] for a gated weight.
        activation: of the product, or of the gate.
        residual: [M, N], added last.
        weight_scale: for a weight of int8 or float8_e4m3fn, [N] or [2, N]: each channel's factor, applied to its sum.
            For int4, [K / g, N] or [2, K / g, N]: the factor of each group of ``g`` inputs of a channel, g 64 or 128.
        implementation: ``mosaic`` is the Hopper kernel for 1 to 64 rows; ``reference``, or None, is ``jax.numpy``.
        tuning: how the kernel divides the work. None asks :func:`tuning_for`, and leaves up to 8 rows with a quantized
            weight to :mod:`pallas_kernels.skinny_gemm_quantized`, where :func:`pallas_kernels.quantized_plan.plan_for`
            has a plan; a tuning keeps to the kernel that it is for.
        interpret: run the kernel on the CPU, slowly, as tests do; the one for quantized weights cannot.

    Returns:
        [M, N] in the dtype of ``x``; sums are float32.

    Raises:
        ValueError: the operands do not fit each other, or the named implementation cannot run them.
    """
    _check(x, weight, norm, bias, residual, weight_scale)
    rest: dict[str, Any] = {"bias": bias, "activation": activation, "residual": residual, "weight_scale": weight_scale}
    if implementation is None or implementation == "reference":
        return reference(x, weight, norm=norm, **rest)
    if implementation != "mosaic":
        raise ValueError(f"skinny_gemm: implementation {implementation!r} is none of 'mosaic', 'reference'")
    _check_mosaic(x, weight)
    if whole := weight.shape[-2] % 8:
        # Tiles have 8 channels. XLA hands a kernel the first channels of an array without a copy.
        whole = weight.shape[-2] - whole
        given: dict[str, jax.Array | None] = {"bias": bias, "residual": residual, "weight_scale": weight_scale}
        part = functools.partial(_channels, x, weight, norm=norm, activation=activation, given=given)
        y = part(slice(0, whole), implementation="mosaic", tuning=tuning, interpret=interpret)
        return jnp.concatenate((y, part(slice(whole, None), implementation="reference")), axis=1)
    # Imported here, since it takes a second and only this implementation needs it.
    from pallas_kernels import skinny_gemm_mosaic

    gated, size = weight.ndim == 3, weight_bits(weight.dtype) / 8
    weight = weight if gated else weight[None]
    group = 0
    if weight.dtype == jnp.int4 and weight_scale is not None:
        weight_scale = rest["weight_scale"] = weight_scale if gated else weight_scale[None]
        group = x.shape[1] // weight_scale.shape[1]
    if tuning is None and weight_scale is not None and not interpret:
        from pallas_kernels import quantized_plan, skinny_gemm_quantized

        plan = quantized_plan.plan_for(x, weight, weight_scale, norm=norm, bias=bias, residual=residual)
        if plan is not None:
            return skinny_gemm_quantized.run(x, weight, norm=norm, **rest, plan=plan)
    if tuning is None:
        tuning = tuning_for(x.shape[0], weight.shape[1], x.shape[1], gated=gated, norm=norm, weight_bytes=size)
    if group and tuning.tile_k % group:
        raise ValueError(f"skinny_gemm: tile_k must be a multiple of the group, {group}: {tuning}")
    # Inside the kernel, x is multiplied by the norm's scale before it is divided by its size. In float16 that may
    # overflow where the normalised value would not.
    if norm is not None and (x.dtype == jnp.float16 or x.shape[1] % 64 or not tuning.fuse_norm):
        x, norm = normalise(x, norm), None
    if interpret:
        # Interpret mode has none of: dependent launch, remote shared memory, wgmma with an operand in registers.
        tuning, weight = dataclasses.replace(tuning, overlap=False, reduce="memory"), weight.astype(x.dtype)
    _check_tuning(tuning, x.shape[0], x.shape[1], gated, norm, size)
    return skinny_gemm_mosaic.run(x, weight, norm=norm, **rest, tuning=tuning, interpret=interpret)


def _channels(
    x: jax.Array, weight: jax.Array, channels: slice, *, given: dict[str, jax.Array | None], **rest: Any
) -> jax.Array:
    """The product for some of the output channels."""
    own: dict[str, Any] = {name: array if array is None else array[..., channels] for name, array in given.items()}
    return skinny_gemm(x, weight[channels], **own, **rest)


def tuning_for(
    rows: int, n: int, k: int, *, gated: bool, norm: InputNorm | None = None, weight_bytes: float = 2
) -> Tuning:
    """Choose how the kernel divides a product: blocks that load all SMs alike, and large tiles.

    By what was measured on an H200 with one row of a 7B layer. bfloat16: tiles of 32 KiB, two blocks on an SM. In an
    earlier form of the kernel, qkv took 32.0 us with two splits, 34.3 with one and 34.7 with four; gate and up 52.4
    with one and 54.8 with two. In this form, with three, which balance best, they took 57.1, so a gated weight is not
    split. Quantized weights: smaller tiles and three blocks; with int8,
    gate and up took 47.0 us with the norm inside the kernel, 41.1 with it before.
    Where there are no more blocks than SMs, the ring has all of an SM's memory: a step of 16 rows took 4.83 ms instead
    of 4.85. Two blocks an SM with tiles of half the size were as fast, and smaller ones for gate and up slower (5.20
    for 4.99, of another form). From 17 rows on nothing has been tried out.
    """
    many = rows > 32
    # A quantized weight is widened by the same threads that wait for it: more blocks, and smaller, hide that.
    share = 1 if many else 2 if weight_bytes == 2 else 3
    parts, room = 1 + gated, SMEM_PER_SM // share - 1024
    # With many rows, more channels a block, so that x is fetched less often; else fewer, so that there are more blocks.
    channels = 128 if many and not gated and weight_bytes == 2 else 64
    tile_k = int((32 if weight_bytes == 2 else 16) * 1024 / (channels * parts * weight_bytes))
    while tile_k > 128 and (tile_k >= 2 * k or padded_rows(rows, norm) * tile_k * 2 > 16 * 1024):
        tile_k //= 2
    tuning = Tuning(rows=channels, tile_k=tile_k, stages=8, fuse_norm=weight_bytes == 2)
    most = 1 if gated else max(1, min(8, k // (2 * tile_k)))
    balances = {splits: balance(-(-n // channels) * splits) for splits in range(1, most + 1)}
    splits = min(splits for splits, even in balances.items() if even > max(balances.values()) - 0.05)
    tuning = dataclasses.replace(tuning, splits=splits)
    size = functools.partial(shared_bytes, rows=rows, gated=gated, norm=norm, weight_bytes=weight_bytes)
    if weight_bytes == 2 and -(-n // channels) * splits <= SMS:
        room = SMEM_PER_SM - 1024
    while tuning.tile_k > 128 and size(dataclasses.replace(tuning, stages=2)) > room:
        tuning = dataclasses.replace(tuning, tile_k=tuning.tile_k // 2)
    while tuning.stages > 2 and size(tuning) > room:
        tuning = dataclasses.replace(tuning, stages=tuning.stages - 1)
    return tuning


def balance(blocks: int) -> float:
    """The share of the SMs' time that is used when blocks are dealt out evenly."""
    return blocks / (SMS * -(-blocks // SMS))


def weight_bits(dtype: Any) -> int:
    """Bits of an entry of a weight in memory."""
    return 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize


def padded_rows(rows: int, norm: InputNorm | None = None) -> int:
    """Columns of the wgmma instruction: the rows, and one each for the scale and bias of a fused LayerNorm."""
    extra = 0 if norm is None else (norm.kind == "layer") + (norm.bias is not None)
    return -(-(rows + extra) // 8) * 8


def shared_bytes(
    tuning: Tuning, rows: int, gated: bool, *, norm: InputNorm | None = None, weight_bytes: float = 2
) -> int:
    """Shared memory of a block with a residual, in bytes; a little more than what the compiler lays out."""
    tokens, parts = padded_rows(rows, norm), 1 + gated
    stage = int(parts * tuning.rows * tuning.tile_k * weight_bytes) + tokens * tuning.tile_k * 2
    if norm is not None:
        stage += sum(tuning.tile_k * array.dtype.itemsize for array in (norm.scale, norm.bias) if array is not None)
    if weight_bytes < 1:
        stage += parts * tuning.rows * 4 * (tuning.tile_k // 64)  # of groups of 64, the smallest
    exchange = parts * tuning.rows * tokens * 4 if tuning.splits > 1 else 0
    # The output and the residual; bias, scales, barriers, scratch of reductions, and alignment.
    return tuning.stages * stage + exchange + 2 * tuning.rows * tokens * 2 + parts * tuning.rows * 8 + 8 * 1024


def _check(
    x: jax.Array,
    weight: jax.Array,
    norm: InputNorm | None,
    bias: jax.Array | None,
    residual: jax.Array | None,
    weight_scale: jax.Array | None,
) -> None:
    """Whether the operands fit each other."""
    if x.ndim != 2 or weight.ndim not in (2, 3) or (weight.ndim == 3 and weight.shape[0] != 2):
        raise ValueError(f"skinny_gemm: x must be [M, K] and weight [N, K] or [2, N, K]: {x.shape} and {weight.shape}")
    rows, k = x.shape
    if weight.shape[-1] != k:
        raise ValueError(f"skinny_gemm: x {x.shape} and weight {weight.shape} have different K")
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "bias": (bias, weight.shape[:-1]),
        "residual": (residual, (rows, weight.shape[-2])),
    }
    if norm is not None:
        expected |= {"norm.scale": (norm.scale, (k,)), "norm.bias": (norm.bias, (k,))}
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"skinny_gemm: {name} must be {shape}, got {array.shape}")
    if (weight.dtype in QUANTIZED) != (weight_scale is not None):
        given = "none" if weight_scale is None else "one"
        raise ValueError(
            "skinny_gemm: a weight_scale goes with a weight of int8, int4 or float8_e4m3fn; "
            f"{given} with one of {weight.dtype}"
        )
    if weight_scale is not None:
        *halves, n = weight.shape[:-1]
        groups = [(*halves, k // g, n) for g in (64, 128) if k % g == 0]
        shapes = groups if weight.dtype == jnp.int4 else [(*halves, n)]
        if weight_scale.shape not in shapes:
            wanted = " or ".join(map(str, shapes)) or "of groups of 64 or 128, which do not divide K"
            raise ValueError(f"skinny_gemm: weight_scale must be {wanted}, got {weight_scale.shape}")


def _check_mosaic(x: jax.Array, weight: jax.Array) -> None:
    """Whether the kernel can run the operands."""
    runs = (
        f"it runs 1 to {MAX_ROWS} rows, K a multiple of 16, N of at least 8 and a multiple of 8 for a gated weight, "
        "x of bfloat16 or float16, and a weight of the same dtype, int8, int4 or float8_e4m3fn"
    )
    if x.dtype not in DTYPES or weight.dtype not in (x.dtype, *QUANTIZED):
        raise ValueError(
            f"skinny_gemm: implementation 'mosaic' cannot run x of {x.dtype} with a weight of {weight.dtype}: {runs}"
        )
    # The tensor memory accelerator needs rows of whole 16 bytes, wgmma rows of x of whole 32.
    n = weight.shape[-2]
    fits = 1 <= x.shape[0] <= MAX_ROWS and x.shape[1] % 16 == 0 and n >= 8 and (n % 8 == 0 or weight.ndim == 2)
    if not fits or not weight.size:
        raise ValueError(
            f"skinny_gemm: implementation 'mosaic' cannot run x {x.shape} with weight {weight.shape}: {runs}"
        )


def _check_tuning(tuning: Tuning, rows: int, k: int, gated: bool, norm: InputNorm | None, weight_bytes: float) -> None:
    """Whether the tuning makes sense for the operands."""
    if tuning.rows % 64 or tuning.tile_k % 64 or min(tuning.rows, tuning.tile_k, tuning.stages) < 1:
        raise ValueError(f"skinny_gemm: rows and tile_k must be multiples of 64, stages at least 1: {tuning}")
    tiles = -(-k // tuning.tile_k)
    if not 1 <= tuning.splits <= min(8, tiles):
        raise ValueError(f"skinny_gemm: splits must be 1 to 8, and at most one for each tile of K={k}: {tuning}")
    if shared_bytes(tuning, rows, gated, norm=norm, weight_bytes=weight_bytes) > SMEM_PER_SM:
        raise ValueError(f"skinny_gemm: more shared memory than an SM has, for {rows} rows: {tuning}")
