"""Weights of 8 and 4 bits: what their values and factors are, and how they are made and undone.

Symmetric, ``weight ~ value * factor``, rounded to the nearest, ties to even. ``int8`` and ``fp8`` (e4m3, with
subnormals and without infinities) have one float32 factor for each output channel, ``int4`` one for each group of
consecutive inputs of a channel. A factor takes the largest magnitude of its channel or group to the largest value. For
int4, a search among smaller ones for the least squared error changed the bundled model's perplexity by less than 0.2 %
either way, so there is none.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxinfer.errors import ConfigError

DTYPES = {
    "int8": np.dtype(np.int8),
    "int4": np.dtype(ml_dtypes.int4),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""Method -> dtype of the values."""
LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
"""Method -> the largest value. Neither -128 nor -8 is used."""
GROUPS = (128, 64)
"""Inputs of a group of int4, the first of these that divides what each device holds of them."""
# Of a float32: smaller factors would be flushed to zero where subnormals are.
_LEAST_FACTOR = np.float32(np.finfo(np.float32).tiny)
# Elements that are worked on at a time, so that the float32 copies of them stay in the cache.
_BLOCK = 1 << 18


@dataclass(frozen=True)
class Quantization:
    """How a weight ``[lead..., channels..., inputs...]`` is quantized.

    Attributes:
        method: ``int8``, ``int4`` or ``fp8``.
        lead: leading axes that stay in front of the groups in the factors of int4: 1 for gate and up in one weight.
        inputs: trailing axes over which a product with the weight sums.
        group: inputs of a group; None where a channel has one factor.
    """

    method: str
    lead: int = 0
    inputs: int = 1
    group: int | None = None

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        return DTYPES[self.method]

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the factors: ``[lead..., channels...]``, or of int4 ``[lead..., groups..., channels...]``.

        Groups lie within the last axes of the inputs, and the first one, which may be divided among devices, is kept:
        inputs [G, R, D] have groups [G, R * D / g].
        """
        return (*shape[: self.lead], *self.groups(shape), *shape[self.lead : len(shape) - self.inputs])

    def groups(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The axes of the groups: none where a channel has one factor."""
        if self.group is None:
            return ()
        kept, *rest = shape[len(shape) - self.inputs :]
        return (kept, math.prod(rest) // self.group) if rest else (kept // self.group,)


def check_method(method: object) -> None:
    """Refuse what is not a way to quantize.

    Raises:
        ConfigError: it is neither None nor one of :data:`DTYPES`.
    """
    if method is not None and (not isinstance(method, str) or method not in DTYPES):
        raise ConfigError(f"quantize: expected None or one of {', '.join(DTYPES)}, got {method!r}")


def quantization(method: str, name: str, held: int, *, lead: int = 0, inputs: int = 1) -> Quantization:
    """Decide how a weight is quantized.

    Args:
        method: ``int8``, ``int4`` or ``fp8``.
        name: the weight, for the error.
        held: consecutive inputs that a group must divide: those of one device or, of attention's output, of one
            key/value head.
        lead, inputs: see :class:`Quantization`.

    Raises:
        ConfigError: int4, and no group divides ``held``.
    """
    if method != "int4":
        return Quantization(method, lead, inputs)
    for group in GROUPS:
        if held % group == 0:
            return Quantization(method, lead, inputs, group)
    of = "each key/value head on each device" if inputs > 1 else "each device"
    raise ConfigError(
        f"{name}: int4 has groups of {' or '.join(map(str, GROUPS))} inputs, and neither divides the {held} of {of}; "
        "take int8 or fp8, or a smaller tensor axis"
    )


def bits(dtype: Any) -> int:
    """Bits that an element takes on a device."""
    return 4 if jnp.dtype(dtype) == DTYPES["int4"] else 8 * jnp.dtype(dtype).itemsize


def quantize(rows: np.ndarray, method: str, group: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Quantize channels. The interpreter lock is free for most of the time, so that threads run side by side.

    Args:
        rows: [channels, inputs], float32, bfloat16 or float16.
        method: ``int8``, ``int4`` or ``fp8``.
        group: inputs of a group, for int4.

    Returns:
        Values as :func:`wire_dtype` says, [channels, inputs] or, of int4, [channels, inputs / 2] with the even input in
        the low half of a byte; and factors, float32 [channels] or, of int4, [channels, inputs / group].

    Raises:
        ValueError: a weight is not finite.
    """
    count, width = rows.shape
    parts = 1 if group is None else width // group
    values = np.empty((count, width // 2 if method == "int4" else width), wire_dtype(method))
    scales = np.empty((count, parts), np.float32)
    step = max(1, _BLOCK // width)
    for start in range(0, count, step):
        block = _float32(rows[start : start + step]).reshape(-1, parts, width // parts)
        scale = scales[start : start + step]
        np.max(np.abs(block), axis=2, out=scale)
        if not np.isfinite(scale).all():
            raise ValueError("expected finite weights, got NaN or an infinity")
        scale /= np.float32(LARGEST[method])
        np.maximum(scale, _LEAST_FACTOR, out=scale)
        block /= scale[:, :, None]
        target = values[start : start + step]
        if method == "fp8":
            target[...] = _fp8(block).reshape(target.shape)
            continue
        np.rint(block, out=block)
        if method == "int8":
            np.copyto(target, block.reshape(target.shape), casting="unsafe")
        else:
            target[...] = pack(block.reshape(-1, width).astype(np.int8))
    return values, scales[:, 0] if group is None else scales


def dequantize(values: np.ndarray, scales: np.ndarray, how: Quantization) -> np.ndarray:
    """The float32 weight that values [lead..., channels..., inputs...] and their factors stand for."""
    shape, lead = values.shape, how.lead
    channels = shape[lead : len(shape) - how.inputs]
    groups = len(how.groups(shape))
    # Groups behind the channels, as the inputs are.
    order = (*range(lead), *range(lead + groups, scales.ndim), *range(lead, lead + groups))
    scales = scales.transpose(order).reshape(*shape[:lead], *channels, -1, 1)
    whole = values.astype(np.float32).reshape(*shape[:lead], *channels, scales.shape[-2], -1)
    return (whole * scales).reshape(shape)


def wire_dtype(method: str) -> np.dtype:
    """The dtype of values in files, on the host and on their way to a device."""
    return np.dtype(np.uint8) if method == "int4" else DTYPES[method]


def wire_shape(shape: Sequence[int], method: str) -> tuple[int, ...]:
    """The shape of values in files, on the host and on their way: int4 has two to a byte."""
    return (*shape[:-1], shape[-1] // 2) if method == "int4" else tuple(shape)


def pack(values: np.ndarray) -> np.ndarray:
    """Put int8 values of -8 to 7 [..., n] two to a byte: uint8 [..., n / 2], the even one in the low half."""
    halves = values.view(np.uint8).reshape(*values.shape[:-1], -1, 2)
    return (halves[..., 0] & 15) | (halves[..., 1] << 4)


def unpack(packed: jax.Array) -> jax.Array:
    """Undo :func:`pack`, on a device: uint8 [..., n / 2] to int4 [..., n]."""
    signed = packed.astype(jnp.int8)
    both = jnp.stack([(signed << 4) >> 4, signed >> 4], axis=-1)  # arithmetic shifts keep the sign
    return both.astype(jnp.int4).reshape(*packed.shape[:-1], -1)


def _float32(values: np.ndarray) -> np.ndarray:
    """A contiguous float32 copy. numpy holds the interpreter lock while it converts bfloat16, but not for integers."""
    if values.dtype == ml_dtypes.bfloat16:
        wide = values.view(np.uint16).astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    return values.astype(np.float32, order="C")


def _fp8(values: np.ndarray) -> np.ndarray:
    """float32 to float8_e4m3fn, rounded to the nearest, ties to even.

    By a table of 2^16 entries: the upper half of a float32 has four bits more than the result, and with whether the
    lower half is zero in its last bit it rounds the same way. ml_dtypes' own conversion holds the interpreter lock.
    """
    whole = values.view(np.uint32)
    key = (whole >> 16).astype(np.uint16)
    key |= (whole & 0xFFFF) != 0
    return np.take(_fp8_table(), key).view(DTYPES["fp8"])


@functools.cache
def _fp8_table() -> np.ndarray:
    every = np.arange(1 << 16, dtype=np.uint32) << 16
    with np.errstate(invalid="ignore"):
        return every.view(np.float32).astype(DTYPES["fp8"]).view(np.uint8)
