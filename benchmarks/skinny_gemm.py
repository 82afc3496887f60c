"""The skinny GEMM beside XLA's own product and the memory's limit, over the four weights of a 7B Llama layer.

    python benchmarks/skinny_gemm.py --out benchmarks/results/skinny_gemm_h200.json

In one process of about 100 seconds (``--seconds``), and in this order, so that a run cut short still has what matters:
the copy bandwidth; for one row, some ways to divide each product (:class:`pallas_kernels.skinny_gemm.Tuning`), with
weights of bfloat16, int8, int4 and float8_e4m3fn; an MLP of eight layers, each product waiting for the one before, as
decode has them; then 16 and 64 rows. Every product is compared with float32, and every step writes the JSON.
``--numerics`` compares the other forms that the kernel has instead: norms, biases, activations, odd sizes.

A figure is the time of one product in a jit of many, each with a weight of its own, 1 GB and more together, so that
nothing comes from the L2 cache: host dispatch is hidden, launches and tails are not.

``--rehearse`` runs the same code small and on the CPU, with the reference in the kernel's place; ``--compile`` compiles
every configuration for an H200 without one, see ``tests/aot.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from machine import describe

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pallas_kernels.skinny_gemm import (
    QUANTIZED,
    SMEM_PER_SM,
    InputNorm,
    Tuning,
    reference,
    shared_bytes,
    skinny_gemm,
    tuning_for,
    weight_bits,
)

BF16 = jnp.bfloat16
GROUP = 128
"""Inputs that share a factor in an int4 weight."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """A product of the layer: its weight and what is fused with it."""

    name: str
    n: int
    k: int
    gated: bool = False
    normed: bool = False
    residual: bool = False
    dtype: Any = BF16

    @property
    def bits(self) -> int:
        """Bits of an entry of the weight."""
        return weight_bits(self.dtype)

    @property
    def norm(self) -> InputNorm | None:
        """The norm; its scale has a shape only."""
        scale: Any = jax.ShapeDtypeStruct((self.k,), BF16)
        return InputNorm(kind="rms", eps=1e-5, scale=scale) if self.normed else None

    @property
    def weight(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (2, self.n, self.k) if self.gated else (self.n, self.k)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight."""
        return self.bits * (1 + self.gated) * self.n * self.k // 8

    def make(self, key: jax.Array) -> jax.Array:
        """Make a weight that keeps the size of x."""
        if self.dtype in (jnp.int8, jnp.int4):
            limit = 2 ** (self.bits - 1)
            return jax.random.randint(key, self.weight, 1 - limit, limit, jnp.int8).astype(self.dtype)
        normal = jax.random.normal(key, self.weight, BF16)
        return (normal * BF16(self.k**-0.5 if self.dtype == BF16 else 64.0)).astype(self.dtype)

    def fit(self, tuning: Tuning, rows: int, room: int) -> Tuning | None:
        """The tuning with as many stages, up to its own, as fit into ``room`` bytes; None if none do."""
        kept: dict[str, Any] = {"norm": self.norm, "weight_bytes": self.bits / 8}
        size = functools.partial(shared_bytes, rows=rows, gated=self.gated, **kept)
        while tuning.stages > 2 and size(tuning) > room:
            tuning = dataclasses.replace(tuning, stages=tuning.stages - 1)
        return tuning if size(tuning) <= room else None

    def chosen(self, rows: int) -> Tuning:
        """The kernel's own choice."""
        return tuning_for(rows, self.n, self.k, gated=self.gated, norm=self.norm, weight_bytes=self.bits / 8)

    def quantized(self, dtype: Any) -> Shape:
        """The same with a quantized weight."""
        return dataclasses.replace(self, name=f"{self.name}, {jnp.dtype(dtype).name}", dtype=dtype)

    def smaller(self) -> Shape:
        """The same, to rehearse with."""
        return dataclasses.replace(self, n=-(-self.n // 4096) * 128, k=-(-self.k // 4096) * 128)


SHAPES = (
    Shape("qkv", 12288, 4096, normed=True),
    Shape("out", 4096, 4096, residual=True),
    Shape("gate and up", 11008, 4096, gated=True, normed=True),
    Shape("down", 4096, 11008, residual=True),
)

Product = Callable[..., jax.Array]
Operands = dict[str, jax.Array]


def operands(shape: Shape, rows: int, key: jax.Array) -> Operands:
    """Everything but the weight."""
    keys = jax.random.split(key, 3)
    made = {"x": jax.random.normal(keys[0], (rows, shape.k), BF16)}
    if shape.normed:
        made["scale"] = jax.random.normal(keys[1], (shape.k,), BF16)
    if shape.residual:
        made["residual"] = jax.random.normal(keys[2], (rows, shape.n), BF16)
    if shape.bits < 16:
        *halves, n, k = shape.weight
        scales = (*halves, n) if shape.bits == 8 else (*halves, k // GROUP, n)
        size = 64 if shape.dtype == jnp.float8_e4m3fn else 0.57 * 2 ** (shape.bits - 1)
        made["weight_scale"] = jnp.full(scales, 1 / (size * k**0.5), jnp.float32)
    return made


def product(shape: Shape, tuning: Tuning | None, kernel: bool) -> Product:
    """A function of the weight and the other operands."""

    def run(
        weight: jax.Array, x: jax.Array, scale: Any = None, residual: Any = None, weight_scale: Any = None
    ) -> jax.Array:
        norm = InputNorm(kind="rms", eps=1e-5, scale=scale) if shape.normed else None
        rest: dict[str, Any] = {
            "norm": norm,
            "activation": "silu" if shape.gated else None,
            "residual": residual,
            "weight_scale": weight_scale,
        }
        if kernel:
            return skinny_gemm(x, weight, implementation="mosaic", tuning=tuning, **rest)
        return reference(x, weight, **rest)

    return run


def chain(run: Product, count: int) -> Callable[[list[jax.Array], list[Operands]], list[jax.Array]]:
    """Many products in one program, each with its own operands. The inner jit makes it trace, and lower, once."""
    inner = jax.jit(lambda weight, given: run(weight, **given))

    def many(weights: list[jax.Array], given: list[Operands]) -> list[jax.Array]:
        return [inner(weights[i], given[i]) for i in range(count)]

    return many


def seconds_of(compiled: Callable[..., Any], *arguments: Any, repeats: int = 12) -> float:
    """Median time of a call, several in flight at once so that the host's part hides."""
    jax.block_until_ready(compiled(*arguments))
    times = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*arguments) for _ in range(repeats)])
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times)


def copy_bandwidth(nbytes: int) -> float:
    """Bytes read and written a second by a copy on the device."""
    x = jnp.zeros(nbytes // 4, jnp.float32)
    return 2 * nbytes / seconds_of(jax.jit(lambda a: a + 1.0), x)


def tunings(shape: Shape, rows: int) -> Iterator[Tuning]:
    """The kernel's own choice, its neighbours, and then a grid; rings fill what two, or one, blocks an SM have."""
    chosen = shape.chosen(rows)
    share = 1 if rows > 32 else 2 if shape.bits == 16 else 3
    wanted: list[tuple[int, dict[str, Any]]] = [(share, {})]
    if shape.normed:
        wanted.append((share, {"fuse_norm": False}))
    wanted += [(share % 3 + 1, {}), (share, {"tile_k": chosen.tile_k // 2}), (share, {"overlap": False})]
    wanted += [(share, {"splits": chosen.splits + 1}), (share - 1 or 3, {"tile_k": chosen.tile_k * 2})]
    wanted += [(4, {"tile_k": chosen.tile_k // 2}), (share, {"splits": max(1, chosen.splits - 1)})]
    wanted.append((2, {"reduce": "memory", "splits": 2}))
    for channels, tile_k, splits in itertools.product((64, 128), (128, 256, 512, 1024, 64), (1, 2, 3, 4)):
        wanted.append((2, {"rows": channels, "tile_k": tile_k, "splits": splits}))
    seen = set()
    for blocks, change in wanted:
        tuning = dataclasses.replace(chosen, stages=8, **change)
        fitting = shape.fit(tuning, rows, SMEM_PER_SM // blocks - 1024)
        grid = -(-shape.n // tuning.rows) * tuning.splits
        if shape.bits == 4 and tuning.tile_k % GROUP:
            continue
        if fitting and fitting not in seen and tuning.tile_k >= 64 and 50 <= grid <= 800:
            seen.add(fitting)
            yield fitting


@functools.partial(jax.jit, static_argnums=0)
def exact(shape: Shape, weight: jax.Array, given: Operands) -> jax.Array:
    """The product in float32."""
    with jax.default_matmul_precision("highest"):
        return product(shape, None, kernel=False)(widened(weight), **widened(given))


def widened(tree: Any) -> Any:
    """Floating-point arrays as float32, but for quantized weights."""
    wide = (jnp.bfloat16, jnp.float16)
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype in wide else a, tree)


def error(got: jax.Array, wanted: jax.Array) -> float:
    """Root mean square of the difference, in units of that of what was wanted."""
    difference = got.astype(jnp.float32) - wanted
    return float(jnp.sqrt(jnp.mean(difference**2) / jnp.mean(wanted**2)))


class Bench:
    """A run: what it measures goes to ``found``, and to the file after every step."""

    def __init__(self, out: Path | None, seconds: float, rehearse: bool) -> None:
        self.out, self.rehearse = out, rehearse
        self.start = time.perf_counter()
        self.end = self.start + seconds
        self.shapes = tuple(shape.smaller() for shape in SHAPES) if rehearse else SHAPES
        self.kernel = not rehearse
        self.found: dict[str, Any] = {"machine": describe(), "command": " ".join(sys.argv)}
        self.bandwidth = 0.0
        self.best: dict[str, list[Tuning]] = {}
        self.held: tuple[Shape | None, list[jax.Array]] = (None, [])

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

    def limits(self) -> None:
        """Measure what a copy reaches."""
        self.bandwidth = copy_bandwidth((16 if self.rehearse else 2048) << 20)
        self.found["copy_bytes_per_second"] = self.bandwidth
        self.save(f"copy {self.bandwidth / 1e12:.2f} TB/s")

    def numerics(self) -> None:
        """Compare the forms of the kernel with float32: none may be further off than rounding x and y explains."""
        from tests.pallas_kernels.skinny_gemm_cases import CASES, operands_of

        self.found["numerics"] = {}
        for name, make in CASES.items():
            # Those of the 7B layer are compared where they are timed.
            if name.startswith("7b") or (self.rehearse and not name.startswith("ragged")):
                continue
            if self.late():
                break
            run, shapes = make()
            given = operands_of(shapes)
            try:
                y = given[0] if self.rehearse else jax.jit(run)(*given)
                again = y if self.rehearse else jax.jit(run)(*given)
                with jax.default_matmul_precision("highest"):
                    wanted = jax.jit(run.reference)(*widened(given))
                entry: dict[str, Any] = {"same_twice": bool(jnp.array_equal(y, again))}
                entry["error"] = 0.0 if self.rehearse else error(y, wanted)
                entry["reference_error"] = error(run.reference(*given), wanted)
                entry["ok"] = entry["same_twice"] and entry["error"] < 2 * entry["reference_error"] + 1e-3
            except Exception as failure:
                entry = {"ok": False, "failure": f"{type(failure).__name__}: {failure}"[:500]}
            self.found["numerics"][name] = entry
            self.save(f"numerics {name}: {entry}")

    def products(self, shape: Shape, rows: int, tried: Iterator[Tuning]) -> None:
        """Time one shape at a number of rows: XLA, then tunings until a tenth of the time is spent."""
        count = min(48, max(4, -(-(1 << 30) // shape.nbytes))) if not self.rehearse else 2
        keys = jax.random.split(jax.random.key(rows), count)
        if self.held[0] != shape:
            self.held = (None, [])  # frees what was held before
            make = jax.jit(shape.make)
            self.held = (shape, [make(key) for key in keys])
        weights = self.held[1]
        given = [operands(shape, rows, key) for key in keys]
        wanted = exact(shape, weights[0], given[0])
        limit = shape.nbytes / self.bandwidth if self.bandwidth else 1.0

        def measure(run: Product) -> dict[str, Any]:
            start = time.perf_counter()
            compiled = jax.jit(chain(run, count)).lower(weights, given).compile()
            built = time.perf_counter() - start
            off = error(compiled(weights, given)[0], wanted)
            spent = seconds_of(compiled, weights, given, repeats=8) / count
            us, share = round(spent * 1e6, 2), round(limit / spent, 3)
            return {"us": us, "share_of_copy": share, "error": off, "compile_s": round(built, 2)}

        entry: dict[str, Any] = {"rows": rows, "bytes": shape.nbytes, "limit_us": round(limit * 1e6, 2)}
        entry["xla"] = measure(product(shape, None, kernel=False))
        entry["mosaic"] = []
        self.found.setdefault("products", {}).setdefault(shape.name, []).append(entry)
        self.save(f"{shape.name}, {rows} rows: limit {entry['limit_us']} us, XLA {entry['xla']['us']} us")
        deadline = time.perf_counter() + 0.1 * (self.end - self.start)
        for tuning in tried:
            if entry["mosaic"] and (self.late() or time.perf_counter() > deadline):
                break
            result: dict[str, Any] = dataclasses.asdict(tuning)
            try:
                result |= measure(product(shape, tuning, self.kernel))
            except Exception as failure:
                result["failure"] = f"{type(failure).__name__}: {failure}"[:500]
            entry["mosaic"].append(result)
            short = {
                name: result.get(name)
                for name in ("rows", "tile_k", "stages", "splits", "fuse_norm", "overlap", "reduce")
            }
            self.save(f"    {result.get('us')} us, error {result.get('error')}, {short} {result.get('failure', '')}")
        right = [r for r in entry["mosaic"] if "us" in r and r["error"] < 2 * entry["xla"]["error"] + 1e-3]
        names = {field.name for field in dataclasses.fields(Tuning)}
        ranked = sorted(right, key=lambda r: r["us"])
        self.best.setdefault(shape.name, [])
        if rows == 1:
            self.best[shape.name] = [Tuning(**{k: v for k, v in r.items() if k in names}) for r in ranked]
        if ranked:
            entry["best"] = ranked[0]
            self.save(f"    best {ranked[0]['us']} us, {ranked[0]['share_of_copy']} of copy bandwidth")

    def mlp(self, rows: int, layers: int = 8) -> None:
        """Time the MLP of some layers, x through all of them, with XLA and with the best tunings for one row."""
        up, down = self.shapes[2], self.shapes[3]
        keys = jax.random.split(jax.random.key(1), layers)
        shapes = {"up": up, "down": down}
        make = jax.jit(
            lambda key: {n: s.make(k) for (n, s), k in zip(shapes.items(), jax.random.split(key), strict=True)}
        )
        weights = [make(key) for key in keys]
        scale = jnp.ones((up.k,), BF16)
        x = jax.random.normal(jax.random.key(2), (rows, up.k), BF16)

        def steps(tuned: tuple[Tuning | None, Tuning | None], kernel: bool) -> Callable[..., jax.Array]:
            first = jax.jit(product(up, tuned[0], kernel))
            second = jax.jit(product(down, tuned[1], kernel))

            def run(weights: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
                for layer in weights:
                    x = second(layer["down"], first(layer["up"], x, scale=scale), residual=x)
                return x

            return run

        limit = layers * (up.nbytes + down.nbytes) / self.bandwidth if self.bandwidth else 1.0
        entry: dict[str, Any] = {"rows": rows, "layers": layers, "limit_us": round(limit * 1e6, 1)}
        best = [(self.best.get(s.name) or [None])[0] for s in (up, down)]
        without = [t and dataclasses.replace(t, overlap=False) for t in best]
        for name, tuned, kernel in (
            ("xla", (None, None), False),
            ("mosaic", tuple(best), self.kernel),
            ("mosaic without overlap", tuple(without), self.kernel),
        ):
            try:
                compiled = jax.jit(steps(tuned, kernel)).lower(weights, x).compile()
                spent = seconds_of(compiled, weights, x)
                entry[name] = {"us": round(spent * 1e6, 1), "share_of_copy": round(limit / spent, 3)}
            except Exception as failure:
                entry[name] = {"failure": f"{type(failure).__name__}: {failure}"[:500]}
        self.found.setdefault("mlp", []).append(entry)
        self.save(f"MLP: {entry}")

    def run(self) -> None:
        """Everything, the most wanted first."""
        self.limits()
        kinds = {dtype: [s.quantized(dtype) for s in self.shapes] for dtype in QUANTIZED}
        for shape in self.shapes:
            self.products(shape, 1, itertools.islice(tunings(shape, 1), 6))
        for shapes in kinds.values():
            for shape in shapes:
                if not self.late():
                    self.products(shape, 1, itertools.islice(tunings(shape, 1), 3))
        self.held = (None, [])
        self.mlp(1)
        for shapes in (self.shapes, kinds[jnp.int8], kinds[jnp.int4]):
            for shape, rows in itertools.product(shapes, (16, 64)):
                if not self.late():
                    self.products(shape, rows, itertools.islice(tunings(shape, rows), 2))
        self.held = (None, [])
        if not self.late():
            self.mlp(16)
        self.save("done")


def compile_all(limit: int) -> None:
    """Compile the first tunings of each shape, in the chains that would be timed, for an H200 that is not there."""
    from tests.aot import compiler

    compile_one = compiler()
    quantized = [s.quantized(dtype) for dtype in QUANTIZED for s in SHAPES]
    for rows in (1, 8, 16, 64):
        for shape in (*SHAPES, *quantized):
            given = jax.eval_shape(lambda key, s=shape, m=rows: operands(s, m, key), jax.random.key(0))
            weight = jax.eval_shape(shape.make, jax.random.key(0))
            for tuning in list(tunings(shape, rows))[:limit]:
                start, failure = time.perf_counter(), ""
                try:
                    compile_one(chain(product(shape, tuning, kernel=True), 4), [[weight] * 4, [given] * 4])
                except Exception as error:
                    failure = f"{type(error).__name__}: {error}"[:300]
                spent = time.perf_counter() - start
                print(f"{spent:.2f} s  {shape.name}, {rows} rows: {tuning} {failure}", flush=True)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--seconds", type=float, default=100.0, help="after which no new configuration is tried")
    parser.add_argument("--rehearse", action="store_true", help="small, on the CPU, without the kernel")
    parser.add_argument("--compile", type=int, metavar="N", help="compile N tunings a shape for an H200, and stop")
    parser.add_argument("--numerics", action="store_true", help="compare the forms of the kernel, time nothing")
    arguments = parser.parse_args()
    if arguments.compile:
        compile_all(arguments.compile)
    else:
        bench = Bench(arguments.out, arguments.seconds, arguments.rehearse)
        bench.numerics() if arguments.numerics else bench.run()


if __name__ == "__main__":
    main()
