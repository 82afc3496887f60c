"""How fast a model runs, and which share that is of what its devices can do, measured in the same process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import html
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer import progress as bars
from jaxinfer.engine import InferenceEngine
from jaxinfer.generation.kv_cache import blocks_for
from jaxinfer.generation.params import SamplingParams
from jaxinfer.hardware import Hardware
from jaxinfer.sizes import size
from sharding import describe

COPY_BYTES = {"cpu": 256 << 20, "gpu": 1 << 30}
"""Bytes of the array that is read and written to measure bandwidth: well over any cache."""
MATMUL_SIDE = {"cpu": 1024, "gpu": 8192}
LEAST_SECONDS = 0.1
REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What each of some devices reaches while all of them work.

    Attributes:
        device: what a device is called.
        devices: how many there are.
        dtype: of the matrix product.
        bandwidth: bytes per second, read and written bytes counted together, of ``x + 1`` in place.
        matmul: floating-point operations per second of a square product, a multiply-add counted as two.
    """

    device: str
    devices: int
    dtype: str
    bandwidth: float
    matmul: float

    def __str__(self) -> str:
        return (
            f"{self.devices} x {self.device}: {size(self.bandwidth)}/s copied, "
            f"{self.matmul / 1e12:.4g} TFLOP/s in {self.dtype} products"
        )

    def hardware(self, like: Hardware) -> Hardware:
        """The device with measured rates in place of known ones."""
        return dataclasses.replace(like, bandwidth=self.bandwidth, matmul=self.matmul, measured=True)


def measure_limits(devices: Sequence[jax.Device] | None = None, dtype: str | None = None) -> Limits:
    """Measure bandwidth and matrix product rate of devices; about two seconds, compilation included.

    Args:
        devices: all at once, as virtual devices of one CPU share its memory; None is all of this process.
        dtype: of the product; None is float32 on a CPU, else bfloat16. float32 products are true float32, not TF32.
    """
    devices = list(jax.local_devices() if devices is None else devices)
    platform = "cpu" if devices[0].platform == "cpu" else "gpu"
    dtype = dtype or ("float32" if platform == "cpu" else "bfloat16")
    nbytes = COPY_BYTES[platform] // (len(devices) if platform == "cpu" else 1)
    free = min(
        (s["bytes_limit"] - s.get("bytes_in_use", 0) for d in devices if (s := d.memory_stats() or {})), default=0
    )
    if free:
        nbytes = min(nbytes, free // 4)
    arrays = [jax.device_put(np.zeros(nbytes // 4, np.float32), device) for device in devices]
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = time_chain(lambda xs: [copy(x) for x in xs], arrays)
    bandwidth = 2 * arrays[0].nbytes / seconds

    side = MATMUL_SIDE[platform]
    # Values matter to a GPU's clock: random ones that stay of unit size, product after product.
    noise = (np.random.default_rng(0).standard_normal((side, side), np.float32) / math.sqrt(side)).astype(
        jnp.dtype(dtype)
    )
    right = [jax.device_put(noise, device) for device in devices]
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        product = jax.jit(jnp.matmul)
        seconds = time_chain(lambda xs: [product(x, w) for x, w in zip(xs, right, strict=True)], list(right))
    return Limits(
        device=devices[0].device_kind, devices=len(devices), dtype=dtype, bandwidth=bandwidth,
        matmul=2 * side**3 / seconds,
    )  # fmt: skip


def time_chain[State](step: Callable[[State], State], state: State, *, repeats: int = REPEATS) -> float:
    """Seconds of a step that starts from what the one before gave: the median of runs of many, handed out at once."""
    state = jax.block_until_ready(step(state))
    start = time.perf_counter()
    state = jax.block_until_ready(step(state))
    count = max(1, math.ceil(LEAST_SECONDS / max(time.perf_counter() - start, 1e-6)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(count):
            state = step(state)
        jax.block_until_ready(state)
        times.append((time.perf_counter() - start) / count)
    return statistics.median(times)


@dataclass(frozen=True, kw_only=True)
class Prefill:
    """The prefill of some prompts at once.

    Attributes:
        batch, tokens: prompts, and tokens of each.
        ms: of the steps back to back.
        tokens_per_second: prompt tokens of all devices.
        matmul_share: operations per second of a device as a share of its measured matrix product rate.
        first_token_ms: from the call to the last prompt's first token, through the engine.
    """

    batch: int
    tokens: int
    ms: float
    tokens_per_second: float
    matmul_share: float
    first_token_ms: float


@dataclass(frozen=True, kw_only=True)
class Decode:
    """Decode steps of some sequences at once.

    Attributes:
        batch: sequences.
        context: tokens of each, averaged over the steps.
        steps: how many were timed.
        ms: of a step as the engine runs it.
        device_ms: of the same steps handed out back to back, with nothing for the host to do in between.
        host_share: of ``ms``, what the devices spent waiting for the host between chunks.
        tokens_per_second: new tokens of all sequences.
        bandwidth_share: bytes per second that a device must read as a share of its measured bandwidth.
        bound_ms: of a step that reads those bytes at the measured bandwidth.
    """

    batch: int
    context: int
    steps: int
    ms: float
    device_ms: float
    host_share: float
    tokens_per_second: float
    bandwidth_share: float
    bound_ms: float


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """What :func:`bench` found.

    Attributes:
        model, dtype, mesh: the engine's.
        weights: the dtype, and how weights are quantized, in words.
        kv_dtype: of cached keys and values.
        limits: of the devices.
        prefill, decode: one entry a batch.
    """

    model: str
    dtype: str
    mesh: str
    weights: str
    kv_dtype: str
    limits: Limits
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        return asdict(self) | {"prefill": [asdict(p) for p in self.prefill], "decode": [asdict(d) for d in self.decode]}

    def tables(self) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
        """The rows of prefill and of decode, the headers first."""
        prefill: list[tuple[str, ...]] = [
            ("prefill: prompts", "tokens", "ms", "tokens/s", "of matmul rate", "first token ms")
        ]
        for p in self.prefill:
            rate, share = f"{p.tokens_per_second:,.0f}", f"{p.matmul_share:.1%}"
            prefill.append((str(p.batch), str(p.tokens), f"{p.ms:.3g}", rate, share, f"{p.first_token_ms:.3g}"))
        decode: list[tuple[str, ...]] = [
            ("decode: batch", "context", "ms/step", "device ms", "host", "tokens/s", "of bandwidth", "bound ms")
        ]
        for d in self.decode:
            times = (f"{d.ms:.3g}", f"{d.device_ms:.3g}", f"{d.host_share:.1%}")
            rates = (f"{d.tokens_per_second:,.0f}", f"{d.bandwidth_share:.1%}", f"{d.bound_ms:.3g}")
            decode.append((str(d.batch), str(d.context), *times, *rates))
        return prefill, decode

    def _heading(self) -> str:
        cache = "" if self.kv_dtype == self.dtype else f", cache {self.kv_dtype}"
        return f"{self.model}, {self.weights}{cache}, {self.mesh}"

    def __str__(self) -> str:
        lines = [self._heading(), str(self.limits)]
        for rows in self.tables():
            widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
            lines += ["", *("  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in rows)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p>{html.escape(line)}</p>" for line in (self._heading(), str(self.limits))]
        for header, *rows in self.tables():
            head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
            parts.append(f"<table><tr>{head}</tr>{body}</table>")
        return "".join(parts)


def bench(
    engine: InferenceEngine,
    *,
    batches: Sequence[int] = (1, 16),
    prompt_tokens: int = 512,
    decode_tokens: int = 128,
    repeats: int = 3,
    limits: Limits | None = None,
    progress: bool | None = None,
) -> BenchResult:
    """Measure prefill and decode of a loaded model with random prompts; compilation comes first and is left out.

    Every figure is a median over ``repeats``. Nothing else may use the engine meanwhile.

    Args:
        engine: with room for the largest batch.
        batches: sequences that run together, over all data shards.
        prompt_tokens: of each.
        decode_tokens: of each; rounded up to whole chunks.
        repeats: of each measurement.
        limits: what the devices reach, measured before; None measures it now, beside the engine's cache.
        progress: show a bar; None shows it in a terminal or notebook.

    Raises:
        ValueError: the engine has too few slots, blocks or tokens for a batch, or an argument is not positive.
    """
    plan = engine.plan
    chunks = -(-decode_tokens // plan.decode_chunk)
    steps = chunks * plan.decode_chunk
    _check(engine, batches, prompt_tokens, steps, repeats)
    limits = limits or measure_limits(list(engine.mesh.devices.flat), plan.dtype)
    prefill, decode = [], []
    with bars.bar(bars.shown(progress), desc="measuring", total=len(batches) * (repeats + 1), unit="run") as bar:
        for batch in batches:
            runs = []
            for _ in range(1 + repeats):
                runs.append(_run(engine, batch, prompt_tokens, steps))
                bar.update()
            timed = runs[1:]  # the first one compiled
            shard = -(-batch // plan.shards)
            prefill_s = statistics.median(run.prefill for run in timed)
            prefill.append(
                Prefill(
                    batch=batch,
                    tokens=prompt_tokens,
                    ms=1e3 * prefill_s,
                    tokens_per_second=batch * prompt_tokens / prefill_s,
                    matmul_share=plan.prefill_flops(shard, prompt_tokens) / prefill_s / limits.matmul,
                    first_token_ms=1e3 * statistics.median(run.first_token for run in timed),
                )
            )
            step = statistics.median(run.decode for run in timed) / steps
            device = statistics.median(run.decode_device for run in timed) / steps
            context = prompt_tokens + steps // 2
            bound = plan.step_bytes(shard, context) / limits.bandwidth
            decode.append(
                Decode(
                    batch=batch,
                    context=context,
                    steps=steps,
                    ms=1e3 * step,
                    device_ms=1e3 * device,
                    host_share=max(0.0, 1 - device / step),
                    tokens_per_second=batch / step,
                    bandwidth_share=bound / step,
                    bound_ms=1e3 * bound,
                )
            )
    return BenchResult(
        model=engine.name, dtype=plan.dtype, weights=plan.weights, kv_dtype=str(plan.cache_dtype),
        mesh=describe(engine.mesh), limits=limits, prefill=tuple(prefill), decode=tuple(decode),
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    """Seconds of one run; those of decode are of all its steps."""

    first_token: float
    decode: float
    prefill: float
    decode_device: float


def _run(engine: InferenceEngine, batch: int, prompt_tokens: int, steps: int) -> _Run:
    """Generate once through the engine, then run the same steps again without it."""
    rng = np.random.default_rng(batch)
    prompts = rng.integers(0, engine.spec.vocab_size, (batch, prompt_tokens)).tolist()
    # The first token comes of the prefill. Nothing may end a sequence early.
    params = SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True)
    with _traced(engine) as trace:
        outputs = engine.generate(prompts, params, progress=False)
    failed = [output.error for output in outputs if output.error is not None]
    if failed:
        raise ValueError(f"the model cannot be measured: {failed[0]}")
    metrics = [output.metrics for output in outputs if output.metrics is not None]
    first = max(m.time_to_first_token or 0.0 for m in metrics)
    total = max(m.total or 0.0 for m in metrics)
    again = {kind: _replay([call for name, call in trace if name == kind]) for kind in ("prefill", "decode")}
    return _Run(first, total - first, again["prefill"], again["decode"])


@contextlib.contextmanager
def _traced(engine: InferenceEngine) -> Iterator[list[tuple[str, Callable[[], Any]]]]:
    trace: list[tuple[str, Callable[[], Any]]] = []
    engine.executor.trace = trace
    try:
        yield trace
    finally:
        engine.executor.trace = None


def _replay(calls: Sequence[Callable[[], Any]]) -> float:
    start = time.perf_counter()
    result = functools.reduce(lambda _, call: call(), calls, None)
    jax.block_until_ready(result)
    return time.perf_counter() - start


def _check(engine: InferenceEngine, batches: Sequence[int], prompt_tokens: int, steps: int, repeats: int) -> None:
    plan = engine.plan
    numbers = {"prompt_tokens": prompt_tokens, "decode_tokens": steps, "repeats": repeats}
    for name, value in [("batches", b) for b in batches] + list(numbers.items()):
        if value < 1:
            raise ValueError(f"{name}: expected a positive integer, got {value}")
    if not batches:
        raise ValueError("batches: expected at least one, got none")
    longest = prompt_tokens + steps + 1
    if longest > plan.max_model_len:
        raise ValueError(
            f"{prompt_tokens} prompt tokens + {steps + 1} new ones are {longest}, and the context length is "
            f"{plan.max_model_len}; give fewer"
        )
    shard = -(-max(batches) // plan.shards)
    if shard > plan.slots:
        raise ValueError(f"batches: {max(batches)} sequences, and the engine has {plan.slots * plan.shards} slots")
    needed = shard * blocks_for(longest)
    if needed > plan.num_blocks - 1:
        raise ValueError(
            f"batches: {max(batches)} sequences of {longest} tokens need {needed} KV blocks a shard, and there are "
            f"{plan.num_blocks - 1}"
        )
