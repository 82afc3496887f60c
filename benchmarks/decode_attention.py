"""The decode attention kernel: right against float32, and its time beside the bytes it reads and beside XLA.

    python benchmarks/decode_attention.py --out benchmarks/results/decode_attention_h200.json

One process on one GPU, under two minutes. Bandwidth of a copy is measured in the same run, and a kernel's share is of
that: keys and values of the tokens that are seen, once. Calls are chained in one jit (each query is the result
before), over blocks that no call before has read, so that nothing waits in the L2 cache. ``--resident`` is a
run of its own: clusters cannot run in interpret mode, and a hang must not cost the other figures. Short contexts have
``decode_short.py`` beside this.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Bias
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_config import DecodeConfig, decode_config

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
    resident: tuple[int, ...] = ()  # splits of programs that hold all their blocks

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


DEFAULT = (None, None)
# The first cases are the ones that matter most: what does not fit the time is left out.
CASES = (
    Case(name="issue", batch=32, groups=8, heads=4, dim=128, context=4096,
         variants=(DEFAULT, (1, 3), (2, 3), (4, 2), (4, 6), (8, 3))),
    Case(name="short 1", batch=1, groups=8, heads=4, dim=128, context=512,
         variants=(DEFAULT, (1, 3), (4, 2)), resident=(2, 4, 8)),
    Case(name="short 16", batch=16, groups=8, heads=4, dim=128, context=512,
         variants=(DEFAULT, (1, 3), (2, 3)), resident=(2, 4)),
    Case(name="7B short 1", batch=1, groups=32, heads=1, dim=128, context=512,
         variants=(DEFAULT, (1, 3), (4, 2)), resident=(2, 4, 8)),
    Case(name="7B short 16", batch=16, groups=32, heads=1, dim=128, context=512, variants=(DEFAULT, (2, 3))),
    Case(name="mixed", batch=32, groups=8, heads=4, dim=128, context=4096, mixed=True,
         variants=(DEFAULT, (1, 3), (8, 3), (16, 3))),
    Case(name="batch 64", batch=64, groups=8, heads=4, dim=128, context=4096, variants=(DEFAULT, (1, 3), (2, 3))),
    Case(name="long 1", batch=1, groups=8, heads=4, dim=128, context=32768, xla=False,
         variants=(DEFAULT, (16, 3), (16, 6), (64, 3))),
    Case(name="7B long 16", batch=16, groups=32, heads=1, dim=128, context=2048, variants=(DEFAULT, (1, 3))),
    Case(name="head 64", batch=32, groups=8, heads=8, dim=64, context=4096, variants=(DEFAULT, (2, 6)), xla=False),
    Case(name="head 256", batch=32, groups=8, heads=2, dim=256, context=2048, variants=(DEFAULT, (2, 2)), xla=False),
    Case(name="window", batch=32, groups=8, heads=4, dim=128, context=4096, window=1024, xla=False),
)  # fmt: skip


def config_of(case: Case, variant: tuple[int | None, int | None]) -> DecodeConfig:
    """Splits and stages of a variant."""
    chosen = decode_config(
        batch=case.batch, groups=case.groups, heads_per_key=case.heads, width=case.width, head_dim=case.dim
    )
    if variant == DEFAULT:
        return chosen
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


def configs_of(case: Case, resident: bool) -> list[DecodeConfig | None]:
    """Each configuration of a case once, then None for XLA; or those whose programs hold all their blocks."""
    if resident:
        return [DecodeConfig(splits=n, stages=-(-case.width // n), resident=True) for n in case.resident]
    found = [config_of(case, variant) for variant in case.variants]
    return [*dict.fromkeys(found), *([None] if case.xla else [])]


def compile_case(
    case: Case, resident: bool, pool: concurrent.futures.ThreadPoolExecutor, **placed: Any
) -> list[tuple[DecodeConfig | None, Any]]:
    """Compile what a case runs, several at a time and all of it before any is timed; a failure is given as its text."""

    def one(config: DecodeConfig | None) -> Any:
        try:
            traced = jax.jit(chain(case, config)).trace(*avals(case, **placed))
            return traced.lower(lowering_platforms=("cuda",) if placed else None).compile()
        except Exception as error:  # one configuration that does not compile must not cost the rest
            return f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"

    configs = configs_of(case, resident)
    return list(zip(configs, pool.map(one, configs), strict=True))


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
    resident: bool = False
    config: DecodeConfig | None = None  # where splits do not say it all


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
    Check(dim=96, heads=8, splits=1),
    Check(dim=128, heads=64, splits=1, options={"softcap": 30.0, "alibi": (False, True)}),
    Check(dim=128, heads=4, splits=4, resident=True),
    Check(dim=64, heads=8, splits=8, options={"sinks": True, "window": 100}, resident=True),
    Check(dim=96, heads=1, splits=2, resident=True),
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
    if case.resident:
        config = DecodeConfig(splits=case.splits, stages=-(-width // case.splits), resident=True)
    config = case.config or config

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


def checks(*, small: bool, resident: bool) -> list[dict[str, Any]]:
    """The checks of programs that hold all their blocks, or of the others; small ones alternate dtypes."""
    batch, groups, width = (2, 1, 3) if small else (16, 2, 9)
    found = []
    for number, case in enumerate(CHECKS):
        if case.resident != resident:
            continue
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
    parser.add_argument("--resident", action="store_true", help="only programs that hold all their blocks")
    parser.add_argument("--interpret", action="store_true")
    asked = parser.parse_args()
    started = time.monotonic()
    if asked.interpret:
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
            assert all(found.get("right") for found in checks(small=True, resident=False))
        return
    if asked.compile_for:
        placed = target(asked.compile_for)
        with concurrent.futures.ThreadPoolExecutor(asked.threads) as pool:
            for case in CASES:
                for config, compiled in (
                    *compile_case(case, False, pool, **placed),
                    *compile_case(case, True, pool, **placed),
                ):
                    print(case.name, config, compiled if isinstance(compiled, str) else "compiled", flush=True)
        return
    found: dict[str, Any] = {
        "machine": machine.describe(),
        "checks": checks(small=False, resident=asked.resident),
        "times": [],
    }

    def keep() -> None:
        found["seconds"] = time.monotonic() - started
        if asked.out:
            asked.out.parent.mkdir(parents=True, exist_ok=True)
            asked.out.write_text(json.dumps(found, indent=1) + "\n")

    found["copy_bytes_per_second"] = bandwidth = copy_bandwidth()
    spent = time.monotonic() - started
    print(f"{found['machine']['device']}: copy {bandwidth / 1e12:.2f} TB/s; checks took {spent:.0f} s")
    keep()
    blocks: tuple[Any, ...] = ()
    with concurrent.futures.ThreadPoolExecutor(asked.threads) as pool:
        for case in (case for case in CASES if case.resident or not asked.resident):
            if time.monotonic() - started > asked.budget:
                print(f"{case.name}: out of time")
                continue
            shape = avals(case)[1].shape
            if not blocks or blocks[0].shape != shape:
                blocks = ()  # freed before the next are made
                blocks = random_blocks(shape)
            for config, compiled in compile_case(case, asked.resident, pool):
                record = time_one(case, config, compiled, blocks, bandwidth)
                found["times"].append(record)
                keep()
    print(f"{time.monotonic() - started:.0f} s")


def random_blocks(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Keys and values made on the device."""
    make = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
    return make(jax.random.key(0)), make(jax.random.key(1))


def time_one(case: Case, config: DecodeConfig | None, compiled: Any, blocks: Any, bandwidth: float) -> dict[str, Any]:
    """Time one configuration of a case, beside what its bytes cost at the bandwidth of a copy."""
    record: dict[str, Any] = {
        "case": {name: value for name, value in asdict(case).items() if name not in ("variants", "resident")},
        "config": None if config is None else asdict(config),
        "default": config is not None and config == config_of(case, DEFAULT),
    }
    try:
        if isinstance(compiled, str):
            raise RuntimeError(compiled)
        seconds = measure(case, compiled, *blocks)
        limit = case.bytes() / bandwidth
        record |= {
            "us": seconds * 1e6, "limit_us": limit * 1e6, "share": limit / seconds,
            "terabytes_per_second": case.bytes() / seconds / 1e12,
        }  # fmt: skip
    except Exception as error:  # a failure is a finding: go on
        record["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
    who = "XLA" if config is None else f"splits {config.splits:2} stages {config.stages}{' resident' * config.resident}"
    told = record.get("failed") or f"{record['us']:8.1f} us  limit {record['limit_us']:6.1f}  {record['share']:5.0%}"
    print(f"{case.name:12} {who:28} {told}{' *' * record['default']}", flush=True)
    return record


if __name__ == "__main__":
    main()
