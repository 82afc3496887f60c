"""Which implementation serves which operation on which device, and why: the one place that chooses, and a table.

Choices are made when a function is traced, from shapes, dtypes and the :class:`Device`. That is JAX's default device,
unless :func:`compiling_for` names another, as whoever lays arrays out over a mesh does with the mesh's devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

AttentionImplementation = Literal["dot", "reduce", "mosaic"]
"""Of attention: matrix products, or multiply and sum, of ``jax.numpy``; or a Hopper kernel."""

LinearImplementation = Literal["dot", "mosaic"]
"""Of a product with a weight: XLA's matrix product and what it fuses to it, or the Hopper kernel."""

QkvImplementation = Literal["apart", "mosaic"]
"""Of query, key and value with their positions and the write into the cache: a product and XLA's fusions after it, or
one Hopper kernel for all."""

RotaryKind = Literal["halves", "partial", "interleaved"]
"""Which entries of a head a rotation mixes: entry ``i`` of one half with entry ``i`` of the other; the same of the
halves of a part of the head; or neighbours."""
RotaryImplementation = Literal["jnp", "mosaic"]
"""Of rotation and cache write: what XLA makes of each, or the Hopper kernel that does both."""

MAX_REDUCE_HEADS = 2
"""Query heads per key head up to which ``reduce`` is chosen: each of them multiplies every key once more."""

MAX_LINEAR_ROWS = 16
"""Rows up to which a product is the kernel's, which runs up to 64. With 16 here, a decode step of a 7B Llama of 16
sequences took 4.76 ms on an H200 (``benchmarks/results/table_h200_host.json``), with XLA's products 5.31 on another
day; one of 64 sequences 8.84 ms with XLA's and 11.09 with the kernel's (``table_h200_batch64_kernel_to_*.json``)."""

MIN_GATED_ROWS = 4096
"""Rows from which a gated product and its activation are one kernel: so many that its tiles fill the GPU many times."""

MAX_QUANTIZED_ROWS = 8
"""Rows up to which a product with a quantized weight has a kernel of its own: they fill the columns of an mma."""

LINEAR_WEIGHTS: tuple[str, ...] = ("int8", "int4", "float8_e4m3fn")
"""Dtypes of quantized weights that the kernel of products reads as they are stored."""

FUSED_NORMS: tuple[str, ...] = ("rms", "layer")
"""Kinds of norm that the kernel of products computes itself; XLA normalises its input for the others."""

DECODE_HEADS = {64: 80, 80: 64, 96: 64, 128: 64, 256: 32}
"""Head sizes that the decode attention kernel runs, and the most query heads a key head that each of them allows:
scores and output of a program live in registers, which spill beyond it."""

DECODE_NARROW: tuple[str, ...] = ("int8", "float8_e4m3fn")
"""Dtypes of quantized keys and values that the decode attention kernel reads as they are stored."""

DECODE_NARROW_HEADS = {64: 64, 128: 48, 256: 32}
"""As :data:`DECODE_HEADS`, for these: widening takes registers too."""

PREFILL_KERNEL = True
"""Whether the prefill attention kernel is chosen where it runs. False leaves prefill to XLA; the kernel, asked for by
name, runs all the same. Its times, and its numbers beside float32, were taken on an H200
(``benchmarks/prefill_attention.py``)."""

PREFILL_HEADS = (64, 80, 96, 128, 256)
"""Head sizes that the prefill attention kernel runs."""

ROTARY_HEADS = (64, 128, 256)
"""Head sizes that the kernel of rotation and cache write runs."""

HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Device:
    """What code is made for.

    Attributes:
        platform: ``cpu``, ``gpu``, ...
        capability: compute capability of an NVIDIA GPU, such as ``9.0``; None elsewhere.
        cores: its SMs; None where that is not known.
    """

    platform: str
    capability: str | None = None
    cores: int | None = None

    @classmethod
    def of(cls, found: jax.Device) -> Device:
        """Describe a device, which may be one of a topology that is not here."""
        capability, cores = getattr(found, "compute_capability", None), getattr(found, "core_count", None)
        return cls(found.platform, capability, cores if isinstance(cores, int) and found.platform == "gpu" else None)

    @property
    def hopper(self) -> bool:
        """Whether the kernels, which are made for sm_90a and for no other, run on it."""
        return self.platform == "gpu" and self.capability == "9.0"

    def __str__(self) -> str:
        return f"{self.platform} of compute capability {self.capability}" if self.capability else self.platform


_device: ContextVar[Device | None] = ContextVar("device", default=None)


def device() -> Device:
    """What is being compiled for."""
    named = _device.get()
    return named or Device.of(jax.devices()[0])


@contextlib.contextmanager
def compiling_for(named: Device) -> Iterator[None]:
    """Let what is traced inside be chosen for a device, whatever JAX's default device is."""
    token = _device.set(named)
    try:
        yield
    finally:
        _device.reset(token)


@dataclass(frozen=True, kw_only=True)
class Choice[Name: str]:
    """What serves an operation.

    Attributes:
        op: the operation, such as ``decode attention``.
        implementation: what its ``implementation`` argument would be called; ``jnp`` where there is only one.
        compiler: who makes machine code of it.
        reason: why it is this one.
    """

    op: str
    implementation: Name
    compiler: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.compiler}), because {self.reason}"

    def to_dict(self) -> dict[str, str]:
        """The choice as JSON-able values."""
        return {
            "op": self.op, "implementation": self.implementation, "compiler": self.compiler, "reason": self.reason,
        }  # fmt: skip


def decode_problem(dtype: Any, kv_dtype: Any, *, head_dim: int, heads_per_key: int) -> str | None:
    """Name what the decode attention kernel cannot run, or None where it can run all."""
    queries, cached = jnp.dtype(dtype).name, jnp.dtype(kv_dtype).name
    if queries not in HALVES:
        return f"dtype {queries}"
    if queries != cached and cached not in DECODE_NARROW:
        return f"queries of {queries} with keys and values of {cached}"
    if head_dim not in DECODE_HEADS:
        return f"head_dim {head_dim}"
    if queries != cached and head_dim not in DECODE_NARROW_HEADS:
        return f"keys and values of {cached} with head_dim {head_dim}"
    if queries != cached and heads_per_key > DECODE_NARROW_HEADS[head_dim]:
        return f"{heads_per_key} query heads a key head with head_dim {head_dim} and keys and values of {cached}"
    if heads_per_key > DECODE_HEADS[head_dim]:
        return f"{heads_per_key} query heads a key head with head_dim {head_dim}"
    return None


def prefill_problem(dtype: Any, kv_dtype: Any, *, head_dim: int) -> str | None:
    """Name what the prefill attention kernel cannot run, or None where it can run all."""
    queries, cached = jnp.dtype(dtype).name, jnp.dtype(kv_dtype).name
    if queries not in HALVES:
        return f"dtype {queries}"
    if queries != cached:
        return f"queries of {queries} with keys and values of {cached}"
    return None if head_dim in PREFILL_HEADS else f"head_dim {head_dim}"


def prefill_choice(
    on: Device, *, head_dim: int, dtype: Any, kv_dtype: Any = None, paged: bool = True
) -> Choice[AttentionImplementation]:
    """Choose how attention of several query tokens a sequence is computed; arguments as in :func:`attention_choice`.

    cuDNN is not among the answers: it reads no blocks, knows no softcap, no ALiBi and no chunk that starts late, and
    was slower in every case that both run (``benchmarks/prefill_attention.py``, H200, one run, bfloat16, TFLOP/s of the
    products over the keys that are seen, without the gather that cuDNN needs before): 473 against 550 (8 x 2040 tokens,
    32 heads of 128), 481 against 557 (the same, 8 key heads), 553 against 631 (1 x 8192), 341 against 378 (8 x 2048,
    heads of 64), 514 against 538 (8 x 2048, 16 heads of 256, 8 key heads), 294 against 397 (8 x 2040, window of 512).
    :func:`pallas_kernels.prefill_attention.prefill_attention` runs it where it is asked for by name.
    """
    op = "prefill attention"
    problem = prefill_problem(dtype, dtype if kv_dtype is None else kv_dtype, head_dim=head_dim)
    if not paged:
        why = "keys and values are not in blocks"
    elif not on.hopper:
        why = f"the kernel is made for Hopper, and this is {on}"
    elif problem is not None:
        why = f"the kernel does not run {problem}"
    elif not PREFILL_KERNEL:
        why = "the kernel is switched off"
    else:
        reason = "the kernel reads the blocks where they lie and keeps no scores; faster than cuDNN on the H200"
        return Choice(op=op, implementation="mosaic", compiler="Mosaic GPU", reason=reason)
    reason = f"{why}; many query tokens share each key, which is what matrix products are for"
    return Choice(op=op, implementation="dot", compiler="XLA", reason=reason)


def attention_choice(
    on: Device,
    *,
    query_tokens: int,
    heads_per_key: int,
    head_dim: int,
    dtype: Any,
    kv_dtype: Any = None,
    paged: bool = True,
) -> Choice[AttentionImplementation]:
    """Choose how attention is computed.

    Args:
        on: what is compiled for.
        query_tokens: new tokens of each sequence; 1 is decode.
        heads_per_key: query heads that share a key head.
        head_dim: entries of a head.
        dtype: of the queries.
        kv_dtype: of keys and values as they are stored; None: that of the queries.
        paged: whether keys and values lie in the blocks of a cache, not in one array.
    """
    if query_tokens > 1:
        return prefill_choice(on, head_dim=head_dim, dtype=dtype, kv_dtype=kv_dtype, paged=paged)
    op = "decode attention"
    why = "keys and values are not in blocks"
    if paged:
        problem = decode_problem(
            dtype, dtype if kv_dtype is None else kv_dtype, head_dim=head_dim, heads_per_key=heads_per_key
        )
        why = f"the kernel does not run {problem}"
        if problem is None and on.hopper:
            reason = "the kernel reads each block once, and the blocks that a sequence has, not those of the longest"
            return Choice(op=op, implementation="mosaic", compiler="Mosaic GPU", reason=reason)
    if not on.hopper:
        why = f"the kernel is made for Hopper, and this is {on}"
    if on.platform == "gpu" and heads_per_key <= MAX_REDUCE_HEADS:
        reason = f"{why}; XLA fuses multiply and sum with the gather of the blocks, and writes them out for a product"
        return Choice(op=op, implementation="reduce", compiler="XLA", reason=reason)
    if on.platform != "gpu":
        reason = f"{why}; fusing with the gather of the blocks pays on a GPU only"
    else:
        reason = f"{why}; more than {MAX_REDUCE_HEADS} query heads share each key, and reduce would read it for each"
    return Choice(op=op, implementation="dot", compiler="XLA", reason=reason)


def linear_problem(dtype: Any, weight_dtype: Any, *, inputs: int, outputs: int) -> str | None:
    """Name what the kernel of products cannot run, whatever the number of rows, or None where it can run all."""
    dtype, weight = jnp.dtype(dtype).name, jnp.dtype(weight_dtype).name
    if dtype not in HALVES:
        return f"dtype {dtype}"
    if weight not in (dtype, *LINEAR_WEIGHTS):
        return f"weights of {weight} with x of {dtype}"
    # Rows of a weight are copied in pieces of 16 bytes, and read by wgmma in pieces of 32.
    multiple = {"int4": 64, "int8": 32, "float8_e4m3fn": 32}.get(weight, 16)
    if inputs == 0 or inputs % multiple:
        return f"{inputs} inputs, which {multiple} does not divide"
    if outputs == 0 or outputs % 8:
        return f"{outputs} outputs, which 8 does not divide"
    return None


def rotary_cache_problem(
    dtype: Any, kv_dtype: Any, *, head_dim: int, pairs: int | None, interleaved: bool
) -> str | None:
    """Name what the kernel of rotation and cache write cannot run, or None where it can run all."""
    given, kept = jnp.dtype(dtype).name, jnp.dtype(kv_dtype).name
    if given not in HALVES:
        return f"dtype {given}"
    if kept != given:
        return f"{given} with keys and values of {kept}"
    if head_dim not in ROTARY_HEADS:
        return f"head_dim {head_dim}"
    if interleaved:
        return "pairs of neighbours"
    return None if pairs is None or 2 * pairs == head_dim else f"{2 * pairs} rotated entries of {head_dim}"


def rotary_cache_choice(
    on: Device,
    *,
    query_tokens: int,
    head_dim: int,
    pairs: int | None,
    interleaved: bool,
    dtype: Any,
    kv_dtype: Any,
    normed: bool = False,
) -> Choice[RotaryImplementation]:
    """Choose what rotates queries and keys and writes keys and values into their blocks.

    Args:
        on: what is compiled for.
        query_tokens: new tokens of each sequence.
        head_dim: entries of a head.
        pairs: rotated pairs of a head; None: nothing is rotated.
        interleaved: whether pairs are neighbours.
        dtype: of queries.
        kv_dtype: of keys and values as they are stored.
        normed: whether queries and keys are normalised before they are rotated.
    """
    op = "rotation and cache write of prefill" if query_tokens > 1 else "rotation and cache write of decode"
    if query_tokens == 1:
        reason = "of one token there is little to write"
    elif not on.hopper:
        reason = f"the kernel is made for Hopper, and this is {on}"
    elif normed:
        reason = "the kernel does not normalise heads"
    else:
        problem = rotary_cache_problem(dtype, kv_dtype, head_dim=head_dim, pairs=pairs, interleaved=interleaved)
        if problem is None:
            reason = "the kernel does both in one pass over queries, keys and values"
            return Choice(op=op, implementation="mosaic", compiler="Mosaic GPU", reason=reason)
        reason = f"the kernel does not run {problem}"
    return Choice(op=op, implementation="jnp", compiler="XLA", reason=reason)


def gated_problem(
    dtype: Any, weight_dtype: Any, *, inputs: int, outputs: int, biased: bool = False, activation: str | None = None
) -> str | None:
    """Name what the kernel of gated products of many rows cannot run, or None where it can run all."""
    dtype, weight = jnp.dtype(dtype).name, jnp.dtype(weight_dtype).name
    if dtype not in HALVES:
        return f"dtype {dtype}"
    if weight != dtype:
        return f"weights of {weight} with x of {dtype}"
    # Rows in memory must be of whole tiles of those in shared memory.
    for name, size, tile in (("inputs", inputs, 64), ("outputs", outputs, 16)):
        if size == 0 or size % tile:
            return f"{size} {name}, which {tile} does not divide"
    if activation == "gelu":
        return "the exact GELU, for which registers do not suffice"
    return "a bias" if biased else None


def linear_choice(
    on: Device,
    *,
    rows: int,
    inputs: int,
    outputs: int,
    dtype: Any,
    weight_dtype: Any,
    gated: bool = False,
    biased: bool = False,
    activation: str | None = None,
) -> Choice[LinearImplementation]:
    """Choose how a product of rows with a weight is computed.

    Args:
        on: what is compiled for.
        rows: rows of x.
        inputs, outputs: of the weight on this device, each half's outputs where it is gated.
        dtype: of x.
        weight_dtype: of the weight as it is stored.
        gated: whether the weight has two halves.
        biased: whether a bias is added.
        activation: what follows the product.
    """
    if gated and rows >= MIN_GATED_ROWS:
        problem = gated_problem(
            dtype, weight_dtype, inputs=inputs, outputs=outputs, biased=biased, activation=activation
        )
        return _gated_choice(on, problem)
    op = f"products of up to {MAX_LINEAR_ROWS} rows" if rows <= MAX_LINEAR_ROWS else "products of more rows"
    problem = linear_problem(dtype, weight_dtype, inputs=inputs, outputs=outputs)
    if rows > MAX_LINEAR_ROWS:
        reason = f"beyond {MAX_LINEAR_ROWS} rows XLA is faster (64 rows), or the two have not been timed in a step"
    elif not on.hopper:
        reason = f"the kernel is made for Hopper, and this is {on}"
    elif problem is not None:
        reason = f"the kernel does not run {problem}"
    elif rows == 0:
        reason = "there are no rows"
    else:
        reason = "the kernel reads the weight once and computes the norm before it and what follows as well"
        return Choice(op=op, implementation="mosaic", compiler="Mosaic GPU", reason=reason)
    return Choice(op=op, implementation="dot", compiler="XLA", reason=reason)


def qkv_problem(
    dtype: Any, weight_dtype: Any, kv_dtype: Any, *, inputs: int, head_dim: int, rotary: RotaryKind | None
) -> str | None:
    """Name what the kernel of query, key and value cannot run, whatever the number of rows, or None."""
    if jnp.dtype(kv_dtype) != jnp.dtype(dtype):
        return f"keys and values of {jnp.dtype(kv_dtype).name} with x of {jnp.dtype(dtype).name}"
    if rotary not in (None, "halves"):
        return f"{rotary} rotary embedding"
    multiple = 64 if rotary is None else 128
    if head_dim == 0 or head_dim % multiple:
        return f"{'' if rotary is None else 'rotated '}heads of {head_dim}, which {multiple} does not divide"
    return linear_problem(dtype, weight_dtype, inputs=inputs, outputs=head_dim)


def qkv_choice(
    on: Device,
    *,
    rows: int,
    inputs: int,
    head_dim: int,
    dtype: Any,
    weight_dtype: Any,
    kv_dtype: Any,
    rotary: RotaryKind | None = None,
    head_norms: bool = False,
) -> Choice[QkvImplementation]:
    """Choose how query, key and value are computed, and keys and values written into the blocks of a cache.

    Args:
        on: what is compiled for.
        rows: tokens.
        inputs: of the weight.
        head_dim: entries of a head.
        dtype: of x.
        weight_dtype, kv_dtype: of the weight and of cached keys and values, as they are stored.
        rotary: of the rotary embedding, or None.
        head_norms: whether queries and keys are normalised before they are rotated.
    """
    op = "query, key, value and cache write"
    problem = qkv_problem(dtype, weight_dtype, kv_dtype, inputs=inputs, head_dim=head_dim, rotary=rotary)
    if head_norms:
        problem = "norms of queries and keys"
    if rows > MAX_LINEAR_ROWS:
        reason = f"beyond {MAX_LINEAR_ROWS} rows the product is XLA's"
    elif not on.hopper:
        reason = f"the kernel is made for Hopper, and this is {on}"
    elif problem is not None:
        reason = f"the kernel does not run {problem}"
    elif 0 < rows <= MAX_QUANTIZED_ROWS and jnp.dtype(weight_dtype).name in LINEAR_WEIGHTS:
        own = f"the product of up to {MAX_QUANTIZED_ROWS} rows with quantized weights has a kernel of its own"
        reason = f"{own}, which does not write the cache"
    elif rows == 0:
        reason = "there are no rows"
    else:
        reason = "the kernel of the product rotates and writes into the blocks what it has in registers"
        return Choice(op=op, implementation="mosaic", compiler="Mosaic GPU", reason=reason)
    reason = f"{reason}; XLA fuses rotation and write, and rows of donated blocks are written in place"
    return Choice(op=op, implementation="apart", compiler="XLA", reason=reason)


def _gated_choice(on: Device, problem: str | None) -> Choice[LinearImplementation]:
    """Choose for a gated product of many rows."""
    op = f"gated products of {MIN_GATED_ROWS} rows or more"
    if on.hopper and problem is None:
        reason = "the kernel joins gate and values in registers, where XLA writes both and reads them again"
        return Choice(op=op, implementation="mosaic", compiler="Mosaic GPU", reason=reason)
    reason = f"the kernel does not run {problem}" if on.hopper else f"the kernel is made for Hopper, and this is {on}"
    return Choice(op=op, implementation="dot", compiler="XLA", reason=reason)
