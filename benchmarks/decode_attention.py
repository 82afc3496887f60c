"""The decode attention kernel: right against float32, and its time beside the bytes it reads and beside XLA.

    python benchmarks/decode_attention.py --out benchmarks/results/decode_attention_h200.json

One process on one GPU, under two minutes. Bandwidth of a copy is measured in the same run, and a kernel's share is of
that: keys and values of the tokens that are seen, once. Calls are chained in one jit (each query is the result
before), over blocks that no call before has read, so that nothing waits in the L2 cache.

Without a GPU: ``--compile-for h200_target_config.txtpb`` compiles every case ahead of time for that device (it needs
the CUDA plugin of JAX, and with ``MOSAIC_GPU_DUMP_PTXAS=1`` prints registers and spills); ``--interpret`` runs the
checks of numbers, small, in interpret mode.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Bias
from pallas_kernels.decode_attention import decode_attention, decode_config
from pallas_kernels.decode_kernel import DecodeConfig

POOL_BYTES = 1 << 30  # of keys, and as much of values: a chain of calls walks through it
ROUNDS, REPEATS = 3, 5


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape: sequences, key heads, query heads of each, head size, table width in tokens, tokens of each."""

    name: str
    batch: int
    groups: int
    heads: int
    dim: int
    context: int
    mixed: bool = False  # lengths from 64 to the context, else all of it
    window: int | None = None
    xla: bool = True
    variants: tuple[tuple[int | None, int | None], ...] = ((None, None),)  # splits and stages, None as chosen

    @property
    def width(self) -> int:
        """Blocks of a table row."""
        return self.context // 64

    @property
    def calls(self) -> int:
        """Calls of a chain: enough to hide what a dispatch costs, few enough to compile."""
        return 4 if self.batch * self.context * self.groups > 1 << 19 else 24

    def lengths(self) -> np.ndarray:
        """Tokens of each sequence."""
        if not self.mixed:
            return np.full(self.batch, self.context, np.int32)
        return np.linspace(64, self.context, self.batch).astype(np.int32)

    def bytes(self) -> int:
        """Bytes of the keys and values that are seen."""
        seen = np.minimum(self.lengths(), self.window or self.context)
        return int(seen.sum()) * self.groups * self.dim * 2 * 2


def sweep(splits: tuple[int, ...], stages: tuple[int, ...]) -> tuple[tuple[int | None, int | None], ...]:
    """What is chosen, then every combination of these."""
    return ((None, None), *((a, b) for a in splits for b in stages))


CASES = (
    Case(name="issue", batch=32, groups=8, heads=4, dim=128, context=4096, variants=sweep((1, 2, 4, 8), (2, 3, 6))),
    Case(name="batch 64", batch=64, groups=8, heads=4, dim=128, context=4096, variants=sweep((1, 2, 4), (3, 6))),
    Case(
        name="mixed",
        batch=32,
        groups=8,
        heads=4,
        dim=128,
        context=4096,
        mixed=True,
        variants=sweep((1, 4, 8, 16), (3,)),
    ),
    Case(name="short 1", batch=1, groups=8, heads=4, dim=128, context=512, variants=sweep((1, 2, 4), (3,))),
    Case(name="short 16", batch=16, groups=8, heads=4, dim=128, context=512, variants=sweep((1, 2), (3,))),
    Case(name="7B short 1", batch=1, groups=32, heads=1, dim=128, context=512, variants=sweep((1, 4), (3,))),
    Case(name="7B short 16", batch=16, groups=32, heads=1, dim=128, context=512, variants=sweep((1, 2), (3,))),
    Case(name="7B long 16", batch=16, groups=32, heads=1, dim=128, context=2048, variants=sweep((1, 2), (3,))),
    Case(
        name="long 1", batch=1, groups=8, heads=4, dim=128, context=32768, variants=sweep((16, 64), (3, 6)), xla=False
    ),
    Case(name="head 64", batch=32, groups=8, heads=8, dim=64, context=4096, variants=sweep((2,), (3, 6)), xla=False),
    Case(name="head 256", batch=32, groups=8, heads=2, dim=256, context=2048, variants=sweep((2,), (2, 3)), xla=False),
    Case(name="window", batch=32, groups=8, heads=4, dim=128, context=4096, window=1024, xla=False),
)


def config_of(case: Case, variant: tuple[int | None, int | None]) -> DecodeConfig:
    """Splits and stages of a variant."""
    chosen = decode_config(
        batch=case.batch, groups=case.groups, heads_per_key=case.heads, width=case.width, head_dim=case.dim
    )
    return DecodeConfig(splits=variant[0] or chosen.splits, stages=variant[1] or chosen.stages)


def pool_blocks(case: Case) -> int:
    """Blocks of the pool: as many bytes in every case, and at least those of one call."""
    return max(POOL_BYTES // (case.groups * 64 * case.dim * 2), case.batch * case.width + 1)


def chain(case: Case, config: DecodeConfig | None) -> Callable[..., jax.Array]:
    """Calls one after the other; without a configuration, XLA's."""

    @jax.jit  # lowered once, not once a call
    def call(query: jax.Array, keys: jax.Array, values: jax.Array, table: jax.Array, lengths: jax.Array) -> jax.Array:
        return decode_attention(
            query, keys, values, table, lengths, scale=case.dim**-0.5, window=case.window,
            implementation="reference" if config is None else "mosaic", config=config,
        )  # fmt: skip

    def run(query: jax.Array, keys: jax.Array, values: jax.Array, tables: jax.Array, lengths: jax.Array) -> jax.Array:
        for number in range(case.calls):
            query = call(query, keys, values, tables[number], lengths)
        return query

    return run


def avals(case: Case, **placed: Any) -> list[jax.ShapeDtypeStruct]:
    """Arguments of a chain."""
    pool = (pool_blocks(case), case.groups, 64, case.dim)
    shapes = [
        ((case.batch, case.groups, case.heads, case.dim), jnp.bfloat16), (pool, jnp.bfloat16), (pool, jnp.bfloat16),
        ((case.calls, case.batch, case.width), jnp.int32), ((case.batch,), jnp.int32),
    ]  # fmt: skip
    return [jax.ShapeDtypeStruct(shape, dtype, **placed) for shape, dtype in shapes]


def programs() -> list[tuple[Case, DecodeConfig | None]]:
    """Every case with each of its configurations once, then with None for XLA."""
    found: list[tuple[Case, DecodeConfig | None]] = []
    for case in CASES:
        configs = dict.fromkeys(config_of(case, variant) for variant in case.variants)
        found += [(case, config) for config in configs]
        if case.xla:
            found.append((case, None))
    return found


def compile_all(threads: int, **placed: Any) -> Iterator[tuple[Case, DecodeConfig | None, Any]]:
    """Compile the programs, several at a time; what fails is given as its error."""

    def one(program: tuple[Case, DecodeConfig | None]) -> Any:
        try:
            return jax.jit(chain(*program)).trace(*avals(program[0], **placed)).lower(
                lowering_platforms=("cuda",)
            ).compile()  # fmt: skip
        except Exception as error:  # one configuration that does not compile must not cost the rest
            return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"

    found = programs()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for (case, config), result in zip(found, pool.map(one, found), strict=True):
            yield case, config, result


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 2 GiB."""
    x = jnp.zeros(1 << 29, jnp.int32)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jax.block_until_ready(copy(x))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(10):
            x = copy(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - start) / 10)
    return 2 * x.nbytes / statistics.median(times)


def measure(case: Case, compiled: Any, keys: jax.Array, values: jax.Array) -> float:
    """Seconds of a call: the median of rounds of chains that are handed out at once."""
    rng = np.random.default_rng(0)
    need = case.batch * case.width
    blocks = rng.permutation(pool_blocks(case) - 1) + 1
    # As far as the pool goes each call has blocks of its own; then they come round again, long since out of the L2.
    taken = np.resize(blocks[: max(len(blocks) // need, 1) * need], case.calls * need)
    tables = jnp.asarray(taken.reshape(case.calls, case.batch, case.width), jnp.int32)
    query = jnp.asarray(rng.standard_normal((case.batch, case.groups, case.heads, case.dim)), jnp.bfloat16)
    lengths = jnp.asarray(case.lengths())
    jax.block_until_ready(compiled(query, keys, values, tables, lengths))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(REPEATS):
            result = compiled(query, keys, values, tables, lengths)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / REPEATS / case.calls)
    return statistics.median(times)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Numbers of one configuration: options, and the largest errors against float32, ours and XLA's."""

    dim: int
    heads: int
    splits: int
    options: dict[str, Any] = field(default_factory=dict)


CHECKS = (
    Check(dim=128, heads=4, splits=1),
    Check(dim=128, heads=4, splits=4),
    Check(dim=128, heads=1, splits=3, options={"window": 100}),
    Check(dim=64, heads=8, splits=2, options={"softcap": 20.0}),
    Check(dim=64, heads=71, splits=1, options={"sinks": True}),
    Check(dim=128, heads=48, splits=5, options={"sinks": True, "window": 130}),
    Check(dim=80, heads=1, splits=1, options={"alibi": (False, False)}),
    Check(dim=96, heads=3, splits=2, options={"alibi": (True, True)}),
    Check(dim=256, heads=1, splits=1, options={"softcap": 50.0, "window": 200}),
    Check(dim=256, heads=8, splits=3),
)


def check(case: Check, dtype: Any, batch: int, groups: int, width: int) -> dict[str, Any]:
    """Compare with float32 over lengths of every kind; what lies past a sequence is NaN, for the kernel."""
    rng = np.random.default_rng(1)
    full = width * 64
    edges = [full, 0, 1, 63, 64, 65, full - 1, full // 2 + 7]
    lengths = np.asarray([edges[i % len(edges)] for i in range(batch)], np.int32)
    tables = (rng.permutation(batch * width) + 1).reshape(batch, width).astype(np.int32)
    pool = (batch * width + 1, groups, 64, case.dim)
    clean = [np.asarray(rng.standard_normal(pool), np.float32) for _ in range(2)]
    dirty = [array.copy() for array in clean]
    for row, length in enumerate(lengths):
        for column in range(width):
            own = int(np.clip(length - column * 64, 0, 64))
            for array in dirty:
                array[tables[row, column], :, own:] = np.nan
    query = rng.standard_normal((batch, groups, case.heads, case.dim)).astype(np.float32)
    options: dict[str, Any] = dict(case.options)
    if options.pop("sinks", False):
        options["sinks"] = jnp.asarray(rng.standard_normal((groups, case.heads)), jnp.float32)
    if alibi := options.pop("alibi", None):
        slopes = jnp.asarray(np.abs(rng.standard_normal((groups, case.heads))) / 50, jnp.float32)
        options["bias"] = Bias(slopes=slopes, scaled=alibi[0], bfloat16=alibi[1])
    stages = config_of(
        Case(name="", batch=batch, groups=groups, heads=case.heads, dim=case.dim, context=full), (case.splits, None)
    ).stages
    config = DecodeConfig(splits=case.splits, stages=min(stages, 3))

    def run(implementation: Any, dtype: Any, blocks: list[np.ndarray]) -> np.ndarray:
        given = [jnp.asarray(array, jnp.bfloat16).astype(dtype) for array in (query, *blocks)]
        call = jax.jit(
            lambda *given: decode_attention(
                *given,
                scale=case.dim**-0.5,
                implementation=implementation,
                config=config if implementation == "mosaic" else None,
                **options,
            )
        )
        return np.asarray(call(*given, jnp.asarray(tables), jnp.asarray(lengths)), np.float64)

    with jax.default_matmul_precision("highest"):
        exact = run("reference", jnp.float32, clean)
    ours, again, xla = run("mosaic", dtype, dirty), run("mosaic", dtype, dirty), run("reference", dtype, clean)
    error = float(np.abs(ours - exact).max())
    # A result is rounded once, weights once: 8 bits each in bfloat16, 11 in float16.
    bound = float(np.abs(exact).max()) * (2.0**-7 if dtype == jnp.bfloat16 else 2.0**-10)
    return {
        **asdict(case), "dtype": jnp.dtype(dtype).name, "stages": config.stages, "error": error,
        "xla_error": float(np.abs(xla - exact).max()), "bound": bound, "right": bool(error <= bound),
        "repeats": bool(np.array_equal(ours, again)), "idle_row_is_zero": not ours[lengths == 0].any(),
    }  # fmt: skip


def checks(*, small: bool) -> list[dict[str, Any]]:
    """All checks, alternating dtypes."""
    batch, groups, width = (2, 1, 3) if small else (16, 2, 9)
    found = []
    for number, case in enumerate(CHECKS):
        for dtype in (jnp.bfloat16, jnp.float16) if not small else ((jnp.bfloat16, jnp.float16)[number % 2],):
            try:
                found.append(check(case, dtype, batch, groups, width))
            except Exception as error:  # a failure is a finding: go on
                found.append({**asdict(case), "failed": f"{type(error).__name__}: {str(error)[:300]}"})
            print(found[-1], flush=True)
    return found


def target(path: Path) -> dict[str, Any]:
    """The sharding that places arrays on a device that is not here."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    with contextlib.suppress(Exception):  # it may be registered already
        import jax_plugins.xla_cuda13 as plugin

        plugin.initialize()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="NVIDIA H200", topology="1x1x1", target_config=path.read_text()
    )
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    return {"sharding": NamedSharding(mesh, PartitionSpec())}


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=8, help="compilations at a time")
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after which no further case is timed")
    parser.add_argument("--compile-for", type=Path, metavar="TARGET_CONFIG")
    parser.add_argument("--interpret", action="store_true")
    asked = parser.parse_args()
    started = time.monotonic()
    if asked.interpret:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            assert all(found.get("right") for found in checks(small=True))
        return
    if asked.compile_for:
        placed = target(asked.compile_for)
        for case, config, compiled in compile_all(asked.threads, **placed):
            print(case.name, config, compiled if isinstance(compiled, str) else "compiled", flush=True)
        return
    found: dict[str, Any] = {"machine": machine.describe(), "checks": checks(small=False), "times": []}

    def keep() -> None:
        found["seconds"] = time.monotonic() - started
        if asked.out:
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")

    found["copy_bytes_per_second"] = bandwidth = copy_bandwidth()
    spent = time.monotonic() - started
    print(f"{found['machine']['device']}: copy {bandwidth / 1e12:.2f} TB/s; checks took {spent:.0f} s")
    keep()
    pools: tuple[Any, ...] = ()
    for case, config, compiled in compile_all(asked.threads):
        record: dict[str, Any] = {
            "case": asdict(case) | {"variants": None}, "config": None if config is None else asdict(config),
            "default": config is not None and config == config_of(case, (None, None)),
        }  # fmt: skip
        found["times"].append(record)
        if time.monotonic() - started > asked.budget:
            record["failed"] = "out of time"
            continue
        if isinstance(compiled, str):
            record["failed"] = compiled
        else:
            shape = avals(case)[1].shape
            if not pools or pools[0].shape != shape:
                pools = ()  # free before the next
                pools = tuple(
                    jax.jit(lambda s=s, n=shape: jax.random.normal(jax.random.key(s), n, jnp.bfloat16))()
                    for s in (0, 1)
                )
            try:
                seconds = measure(case, compiled, *pools)
                record |= {
                    "us": seconds * 1e6, "limit_us": case.bytes() / bandwidth * 1e6,
                    "share": case.bytes() / bandwidth / seconds, "terabytes_per_second": case.bytes() / seconds / 1e12,
                }  # fmt: skip
            except Exception as error:
                record["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        who = "XLA" if config is None else f"splits {config.splits:2} stages {config.stages}"
        mark = " *" if record["default"] else ""
        told = (
            record.get("failed") or f"{record['us']:8.1f} us  limit {record['limit_us']:6.1f}  {record['share']:5.0%}"
        )
        print(f"{case.name:12} {who:20} {told}{mark}", flush=True)
        keep()
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
