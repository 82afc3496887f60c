"""Positions: rotary embeddings with their scalings, ALiBi slopes.

Frequencies are computed once on the host in float32, as transformers does, and are part of the spec.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.errors import ConfigError
from jaxinfer.models.spec import Rotary

ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor", "original_max_position_embeddings"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
            "mscale_all_dim", "truncate", "finetuned",
        }
    ),
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
}  # fmt: skip
# Far above any model: a wrong size is an error before an array of that size is made.
MOST_ENTRIES = 1 << 16
_COMMON = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


def rotary(
    parameters: Mapping[str, Any] | None,
    head_dim: int,
    max_positions: int,
    *,
    partial: bool = False,
    interleaved: bool = False,
) -> Rotary:
    """Compute the frequencies that transformers' ``rope_parameters`` ask for.

    ``dynamic`` scales the base only when a sequence grows past ``max_position_embeddings``, and then differently at
    every length, which keys that are cached already rotated cannot follow. The context ends there, so within it
    ``dynamic`` is ``default``, and that is what it means here. ``longrope`` has two sets: see :attr:`Rotary.long_from`.

    Args:
        parameters: ``rope_parameters`` of the configuration; for a model with one set a layer type, that type's.
        head_dim: entries of a head.
        max_positions: ``max_position_embeddings``.
        partial: the family rotates only ``partial_rotary_factor`` of each head.
        interleaved: pairs are neighbours rather than halves.

    Raises:
        ConfigError: an unknown ``rope_type`` or key, a missing key, or a value that is not a finite number.

    Source: transformers ``modeling_rope_utils``; YaRN (arXiv 2309.00071), LongRoPE (arXiv 2402.13753).
    """
    values = {key: value for key, value in dict(parameters or {}).items() if value is not None}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_KEYS:
        raise ConfigError(f"rope_parameters.rope_type: expected one of {', '.join(ROPE_KEYS)}, got {kind!r}")
    unknown = sorted(set(values) - ROPE_KEYS[kind] - _COMMON)
    if unknown:
        raise ConfigError(f"rope_parameters of type {kind!r}: {', '.join(unknown)} not implemented")

    def number(key: str, default: float | None = None) -> float:
        value = values.get(key, default)
        if value is None:
            raise ConfigError(f"rope_parameters of type {kind!r}: {key} is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise ConfigError(f"rope_parameters.{key}: expected a positive number, got {value!r}")
        return float(value)

    fraction = number("partial_rotary_factor", 1.0)
    if fraction > 1 or (fraction != 1 and not partial):
        raise ConfigError(f"rope_parameters.partial_rotary_factor: {fraction:g} is not implemented for this family")
    dim = int(head_dim * fraction)
    base = number("rope_theta", 10000.0)
    if not 2 <= dim <= MOST_ENTRIES or dim % 2:
        raise ConfigError(f"rope_parameters: the rotated part of a head must be even, 2 to {MOST_ENTRIES}, got {dim}")
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = (np.float32(base) ** exponents).astype(np.float32)
    inv_freq = np.float32(1.0) / wavelengths
    factor = attention_factor = 1.0
    long_inv_freq: tuple[float, ...] | None = None
    long_from: int | None = None
    if kind == "linear":
        inv_freq = inv_freq / np.float32(number("factor"))
    elif kind == "dynamic":
        number("factor")
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, number)
    elif kind == "yarn":
        original = number("original_max_position_embeddings", max_positions)
        factor = number("factor", max_positions / original)
        attention_factor = _yarn_attention_factor(values, factor, number)
        inv_freq = _yarn(wavelengths, dim, base, factor, original, number, bool(values.get("truncate", True)))
    elif kind == "longrope":
        original = number("original_max_position_embeddings", max_positions)
        factor = number("factor", max_positions / original)
        default = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
        attention_factor = number("attention_factor", default)
        factors = {}
        for key in ("short_factor", "long_factor"):
            factors[key] = np.asarray(values.get(key, ()), np.float32)
            if factors[key].shape != (dim // 2,) or not np.all(np.isfinite(factors[key]) & (factors[key] > 0)):
                raise ConfigError(
                    f"rope_parameters.{key}: expected {dim // 2} positive numbers, got {values.get(key)!r}"
                )
        inv_freq = np.float32(1.0) / (factors["short_factor"] * wavelengths)
        long_inv_freq = _floats(np.float32(1.0) / (factors["long_factor"] * wavelengths))
        long_from = int(original)
    return Rotary(
        inv_freq=_floats(inv_freq),
        interleaved=interleaved,
        attention_factor=attention_factor,
        long_inv_freq=long_inv_freq,
        long_from=long_from,
    )


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(value) for value in values.astype(np.float32))


def _llama3(inv_freq: np.ndarray, number: Any) -> np.ndarray:
    """Stretch long wavelengths by ``factor``, keep short ones, and blend between."""
    factor, low, high = number("factor"), number("low_freq_factor"), number("high_freq_factor")
    context = number("original_max_position_embeddings")
    wavelength = 2 * math.pi / inv_freq
    if high == low:
        raise ConfigError(f"rope_parameters: high_freq_factor and low_freq_factor must differ, got {high} twice")
    smooth = (context / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    result = np.where(wavelength > context / low, inv_freq / factor, inv_freq)
    medium = (wavelength >= context / high) & (wavelength <= context / low)
    return np.where(medium, blended, result).astype(np.float32)


def _yarn_attention_factor(values: Mapping[str, Any], factor: float, number: Any) -> float:
    def mscale(scale: float, weight: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0

    if "attention_factor" in values:
        return float(number("attention_factor"))
    if values.get("mscale") and values.get("mscale_all_dim"):
        return mscale(factor, number("mscale")) / mscale(factor, number("mscale_all_dim"))
    return mscale(factor)


def _yarn(
    wavelengths: np.ndarray, dim: int, base: float, factor: float, original: float, number: Any, truncate: bool
) -> np.ndarray:
    """Interpolate low frequencies, extrapolate high ones, and ramp between (YaRN, section 3.2)."""

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(number("beta_fast", 32.0)), dimension(number("beta_slow", 1.0))
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    extrapolation = (np.float32(1.0) / wavelengths) * (1 - ramp)
    return (extrapolation + np.float32(1.0) / (np.float32(factor) * wavelengths) * ramp).astype(np.float32)


def angles(rotary: Rotary, positions: jax.Array, long: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Compute cos and sin of ``positions`` [B, T] as float32 [B, T, pairs]; ``long`` [B] picks the long frequencies."""
    inv_freq = jnp.asarray(rotary.inv_freq, jnp.float32)
    if rotary.long_inv_freq is not None and long is not None:
        inv_freq = jnp.where(long[:, None, None], jnp.asarray(rotary.long_inv_freq, jnp.float32), inv_freq)
    phase = positions.astype(jnp.float32)[..., None] * inv_freq
    return jnp.cos(phase) * rotary.attention_factor, jnp.sin(phase) * rotary.attention_factor


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool) -> jax.Array:
    """Rotate the pairs at the front of each head of ``x`` [B, T, G, R, D] by the angles [B, T, pairs]."""
    pairs = cos.shape[-1]
    cos, sin = cos[:, :, None, None], sin[:, :, None, None]
    turned, rest = x[..., : 2 * pairs].astype(jnp.float32), x[..., 2 * pairs :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        turned = turned.reshape(*turned.shape[:-2], 2 * pairs)
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x.dtype), rest], axis=-1)


def alibi_slopes(heads: int) -> tuple[float, ...]:
    """The slopes of ALiBi for a number of heads (arXiv 2108.12409, section 3), as BLOOM and Falcon extend them.

    Raises:
        ConfigError: more heads than any model has.
    """
    if heads > MOST_ENTRIES:
        raise ConfigError(f"ALiBi: expected at most {MOST_ENTRIES} heads, got {heads}")
    power = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** -(2.0 ** -(math.log2(power) - 3))
    slopes = [base ** (i + 1) for i in range(power)]
    if power < heads:
        extra = 2.0 ** -(2.0 ** -(math.log2(2 * power) - 3))
        slopes += [extra ** (2 * i + 1) for i in range(heads - power)]
    return _floats(np.asarray(slopes))
