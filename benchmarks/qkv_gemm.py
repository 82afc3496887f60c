"""Query, key and value in one kernel, beside the product and XLA's rotation and cache write after it.

    python benchmarks/qkv_gemm.py --out benchmarks/results/qkv_gemm_h200.json

In one process of about 60 seconds (``--seconds``), the most wanted first: the kernel's results against float32, for the
forms in ``tests/pallas_kernels/qkv_gemm_cases.py``, with every entry of the cache compared; then times. A figure is the
time of one layer in a decode scan of 8 steps over layers with weights and caches of their own, 1 GB and more, whose
caches are donated: what is in between the layers is what a model has there. ``apart`` is the same with the product's
kernel (or XLA's product) and XLA's fusions after it.

``--rehearse`` runs the same code small and on the CPU, with the reference in the kernel's place.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from skinny_gemm import copy_bandwidth, error, seconds_of, widened

from jaxinfer.models.positions import rotate
from pallas_kernels import InputNorm, Tuning, linear, qkv_gemm, write_cache
from pallas_kernels.qkv_gemm import tuning_for_heads
from pallas_kernels.skinny_gemm import weight_bits

BF16 = jnp.bfloat16
STEPS = 8
WIDTH = 9
"""Blocks of a sequence: 520 tokens are in 9."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer's projection."""

    name: str
    groups: int = 32
    per_group: int = 1
    dim: int = 128
    k: int = 4096
    dtype: Any = BF16
    rotary: bool = True
    bias: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.groups, self.per_group + 2, self.dim, self.k)

    @property
    def nbytes(self) -> int:
        """Of the weight."""
        return self.groups * (self.per_group + 2) * self.dim * self.k * weight_bits(self.dtype) // 8

    def chosen(self, rows: int) -> Tuning:
        """The kernel's own choice."""
        norm = InputNorm(kind="rms", eps=1e-5, scale=jax.ShapeDtypeStruct((self.k,), BF16))  # type: ignore[arg-type]
        return tuning_for_heads(
            rows, self.groups * (self.per_group + 2), self.dim, self.k, parts=1 + self.rotary, norm=norm,
            weight_bytes=weight_bits(self.dtype) / 8,
        )  # fmt: skip

    def weights(self, key: jax.Array) -> dict[str, jax.Array]:
        """What a layer has of its own."""
        made: dict[str, jax.Array] = {"norm": jnp.ones((self.k,), BF16)}
        if self.bias:
            made["bias"] = jnp.ones(self.shape[:-1], BF16)
        if self.dtype == BF16:
            return made | {"weight": jax.random.normal(key, self.shape, BF16) * BF16(self.k**-0.5)}
        limit = 2 ** (weight_bits(self.dtype) - 1)
        groups = (self.k // 128,) if self.dtype == jnp.int4 else ()
        scale = jnp.full((*groups, *self.shape[:-1]), 1 / (0.57 * limit * self.k**0.5), jnp.float32)
        weight = jax.random.randint(key, self.shape, 1 - limit, limit, jnp.int8).astype(self.dtype)
        return made | {"weight": weight, "scale": scale}


SEVEN = Layer("7b")
LAYERS = (
    SEVEN,
    Layer("7b, 8 key heads", groups=8, per_group=4),
    Layer("opt-6.7b", rotary=False, bias=True),
    Layer("7b, int8", dtype=jnp.int8),
    Layer("7b, int4", dtype=jnp.int4),
)

Step = Callable[..., tuple[jax.Array, tuple[jax.Array, jax.Array]]]


def fused(layer: Layer, tuning: Tuning | None, kernel: bool) -> Step:
    """The layer in one kernel."""

    def run(w: dict[str, jax.Array], x: Any, cache: Any, tables: Any, positions: Any, cos: Any, sin: Any) -> Any:
        return qkv_gemm(
            x, w["weight"], cache, tables, positions, norm=InputNorm(kind="rms", eps=1e-5, scale=w["norm"]),
            bias=w.get("bias"), rotary=(cos, sin) if layer.rotary else None, weight_scale=w.get("scale"),
            tuning=tuning, implementation="mosaic" if kernel else "reference",
        )  # fmt: skip

    return run


def apart(layer: Layer, implementation: Any) -> Step:
    """The layer as product, rotation and write."""

    def run(w: dict[str, jax.Array], x: Any, cache: Any, tables: Any, positions: Any, cos: Any, sin: Any) -> Any:
        y = linear(
            x, w["weight"], w.get("scale"), norm=InputNorm(kind="rms", eps=1e-5, scale=w["norm"]), bias=w.get("bias"),
            implementation=implementation,
        )  # fmt: skip
        query, key, value = y[..., :-2, :], y[..., -2:-1, :], y[..., -1, :]
        if layer.rotary:
            query, key = (rotate(a, cos, sin, interleaved=False) for a in (query, key))
        return query, write_cache(cache, key[..., 0, :], value, tables, positions)

    return run


def decode(step: Step) -> Callable[..., Any]:
    """Steps of all layers, each a token further; queries are added up so that none is left out."""

    def run(weights: Any, caches: Any, x: jax.Array, tables: jax.Array, positions: jax.Array) -> Any:
        def body(carry: Any, _: None) -> Any:
            caches, total, positions = carry
            phase = positions[..., None].astype(jnp.float32) * jnp.linspace(0.001, 1, weights_dim(caches) // 2)
            written = []
            for w, cache in zip(weights, caches, strict=True):
                query, cache = step(w, x, cache, tables, positions, jnp.cos(phase), jnp.sin(phase))
                total = total + query[:, 0, 0, 0, 0].astype(jnp.float32)
                written.append(cache)
            return (written, total, positions + 1), None

        start = (caches, jnp.zeros(x.shape[0], jnp.float32), positions)
        return jax.lax.scan(body, start, None, length=STEPS)[0]

    return run


def weights_dim(caches: Any) -> int:
    """Entries of a head."""
    return int(caches[0][0].shape[-1])


class Bench:
    """A run: what it measures goes to ``found``, and to the file after every step."""

    def __init__(self, out: Path | None, seconds: float, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.start = time.perf_counter()
        self.end = self.start + seconds
        self.found: dict[str, Any] = {"machine": describe(), "command": " ".join(sys.argv)}

    def save(self, line: str) -> None:
        """Print a line, and keep what has been found."""
        print(f"{time.perf_counter() - self.start:6.1f} s  {line}", flush=True)
        self.found["seconds"] = round(time.perf_counter() - self.start, 1)
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.found, indent=1) + "\n")

    def late(self) -> bool:
        """Whether the time is up."""
        return time.perf_counter() > self.end

    def numerics(self, names: list[str]) -> None:
        """Compare with float32: query and written rows by their error, the rest of the cache exactly."""
        from tests.pallas_kernels.qkv_gemm_cases import CASES, operands_of

        self.found["numerics"] = self.found.get("numerics", {})
        for name in names:
            if self.late():
                break
            run, shapes = CASES[name]()
            given = operands_of(run.names, shapes)
            keys, values = (given[run.names.index(kept)] for kept in ("keys", "values"))
            try:
                compute = run.reference if self.rehearse else run
                query, cache = jax.jit(compute)(*given)
                again, caches = jax.jit(compute)(*given)
                with jax.default_matmul_precision("highest"):
                    wanted, exact = jax.jit(run.reference)(*widened(given))
                rounded, _ = jax.jit(run.reference)(*given)
                entry: dict[str, Any] = {"query": error(query, wanted), "reference": error(rounded, wanted)}
                entry["same_twice"] = bool(jnp.array_equal(query, again))
                elsewhere = True
                for kept, before, found, twice, want in zip(
                    ("key", "value"), (keys, values), cache, caches, exact, strict=True
                ):
                    wide = before.astype(jnp.float32)
                    written = want != wide
                    elsewhere &= bool(jnp.array_equal(jnp.where(written, before, found), before))
                    entry[kept] = error(jnp.where(written, found, 0), jnp.where(written, want, 0))
                    entry["same_twice"] &= bool(jnp.array_equal(found, twice))
                entry["elsewhere_same"] = elsewhere
                worst = max(entry["query"], entry["key"], entry["value"])
                entry["ok"] = elsewhere and entry["same_twice"] and worst < 2 * entry["reference"] + 1e-3
            except Exception as failure:
                entry = {"ok": False, "failure": f"{type(failure).__name__}: {failure}"[:500]}
            self.found["numerics"][name] = entry
            self.save(f"numerics {name}: {entry}")

    def times(self, layer: Layer, rows: int, ways: dict[str, Step]) -> None:
        """Time a layer."""
        count = 2 if self.rehearse else max(4, -(-(1 << 30) // layer.nbytes))
        make = jax.jit(layer.weights)
        weights = [make(key) for key in jax.random.split(jax.random.key(0), count)]
        blocks = (rows * WIDTH + 1, layer.groups, 64, layer.dim)
        x = jax.random.normal(jax.random.key(1), (rows, 1, layer.k), BF16)
        tables = jnp.arange(rows * WIDTH, dtype=jnp.int32).reshape(rows, WIDTH)
        positions = jnp.full((rows, 1), 512, jnp.int32)
        limit = layer.nbytes / self.found["copy_bytes_per_second"]
        for name, step in ways.items():
            if self.late():
                return
            caches = [(jnp.zeros(blocks, BF16), jnp.zeros(blocks, BF16)) for _ in range(count)]
            entry: dict[str, Any] = {"layer": layer.name, "rows": rows, "way": name, "limit_us": limit * 1e6}
            try:
                jitted = jax.jit(decode(step), donate_argnums=1)
                compiled = jitted.lower(weights, caches, x, tables, positions).compile()
                entry["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
                held = [caches]

                def call(compiled: Any = compiled, held: Any = held) -> jax.Array:
                    held[0], total, _ = compiled(weights, held[0], x, tables, positions)
                    return total  # type: ignore[no-any-return]

                spent = seconds_of(call, repeats=4) / (STEPS * count)
                entry |= {"us": round(spent * 1e6, 2), "share": round(limit / spent, 3)}
            except Exception as failure:
                entry["failure"] = f"{type(failure).__name__}: {failure}"[:500]
            self.found.setdefault("times", []).append(entry)
            self.save(f"{entry}")

    def run(self) -> None:
        """Everything, the most wanted first."""
        rate = copy_bandwidth((16 if self.rehearse else 1024) << 20)
        self.found["copy_bytes_per_second"] = rate
        self.save(f"copy {rate / 1e12:.2f} TB/s")
        first = ["K a multiple of 16", "7b 1", "8 key heads 16", "opt-6.7b 64", "int8 16", "gpt2-xl", "no norm"]
        more = ["gemma, heads of 256", "fused LayerNorm", "int4, groups of 64, bias", "float16, bias", "fp8", "7b 64"]
        self.numerics(first[:1] if self.rehearse else first)
        layers = LAYERS if not self.rehearse else (Layer("tiny", groups=2, k=256),)
        kernel = not self.rehearse
        for layer, rows in itertools.product(layers[:1], (1, 16, 64)):
            ways = {"kernel": fused(layer, None, kernel), "apart, xla": apart(layer, "dot")}
            if kernel:
                ways["apart, kernel"] = apart(layer, "mosaic")
            if kernel and rows == 1:
                chosen = layer.chosen(rows)
                changes: tuple[dict[str, Any], ...] = (
                    {"splits": 2}, {"splits": 8}, {"tile_k": 64, "stages": 5}, {"tile_k": 64, "stages": 5, "splits": 8},
                    {"overlap": False}, {"tile_k": 256, "stages": 3, "splits": 4}, {"splits": 1, "stages": 5},
                )  # fmt: skip
                for change in changes:
                    ways[f"kernel, {change}"] = fused(layer, dataclasses.replace(chosen, **change), kernel)
            self.times(layer, rows, ways)
        for layer in layers[1:]:
            for rows in (1, 16):
                self.times(layer, rows, {"kernel": fused(layer, None, kernel), "apart, kernel": apart(layer, "mosaic")})
        if kernel:
            self.numerics(more)
        self.save("done")


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--seconds", type=float, default=60.0, help="after which nothing new is tried")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU, without the kernel")
    arguments = parser.parse_args()
    Bench(arguments.out, arguments.seconds, arguments.rehearse).run()


if __name__ == "__main__":
    main()
