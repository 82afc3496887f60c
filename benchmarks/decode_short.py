"""Decode attention where there is little to read: each way to divide it, right against float32, and its time.

    python benchmarks/decode_short.py --out benchmarks/results/decode_short_h200.json

On one GPU, about a minute. Calls are chained in one jit as the layers of a model are, each over blocks of its own that
no call has read for longer than the L2 cache holds them. ``call`` is the wall time of a chain divided by its calls,
launches and gaps included; ``kernel`` is what the profiler gives for the kernels alone. Ways that could take the device
down with them are run in processes of their own (``--part``), which compile at the same time and take turns on it.

``--compile-for tests/h200.txtpb`` compiles all of it without a GPU (as in ``decode_attention.py``).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

VALUES_AT = 98_765
"""Where values begin in what keys are cut from too."""
PARTS = ("ring", "alone", "cluster", "alibi")
"""Of other kernels; programs that hold all their blocks; clusters of them; two consumers with splits and ALiBi."""
Ring = tuple[int, int, int]  # splits, stages, consumers


@dataclass(frozen=True, kw_only=True)
class Short:
    """A shape, and the ways to divide it: of the ring splits, stages and consumers; of held blocks the splits."""

    name: str
    batch: int
    groups: int
    heads: int = 1
    dim: int = 128
    tokens: int
    dtype: str = "bfloat16"
    ring: tuple[Ring, ...] = ((1, 3, 1),)
    held: tuple[int, ...] = ()
    calls: int = 32

    @property
    def width(self) -> int:
        """Blocks of a table row, one more than there are tokens for, as an engine has it."""
        return self.tokens // 64 + 1

    def bytes(self) -> int:
        """Bytes of the keys and values that are seen."""
        return self.batch * self.tokens * self.groups * self.dim * 4


SHORTS = (
    Short(name="7B B=1 512", batch=1, groups=32, tokens=512, ring=((1, 3, 1), (1, 4, 2)), held=(2, 4, 8)),
    Short(name="7B B=1 128", batch=1, groups=32, tokens=128, ring=((1, 3, 1), (1, 4, 2)), held=(1, 2, 3)),
    Short(name="OPT B=1 132", batch=1, groups=32, tokens=132, dtype="float16", held=(1, 2)),
    Short(name="GPT-2 XL B=1 132", batch=1, groups=25, dim=64, tokens=132, ring=((1, 3, 1), (1, 4, 2)), held=(1, 2, 3)),
    Short(name="GQA B=1 512", batch=1, groups=8, heads=4, tokens=512, ring=((1, 3, 1), (1, 4, 2)), held=(4, 8)),
    Short(name="7B B=2 512", batch=2, groups=32, tokens=512, ring=((1, 3, 1), (1, 4, 2)), held=(2, 4)),
    Short(name="7B B=4 512", batch=4, groups=32, tokens=512, ring=((1, 3, 1), (1, 6, 2)), held=(2,), calls=16),
    Short(name="OPT B=16 132", batch=16, groups=32, tokens=132, dtype="float16", held=(1,), calls=16),
    Short(name="7B B=16 512", batch=16, groups=32, tokens=512, held=(2,), calls=8),
    Short(name="7B B=64 512", batch=64, groups=32, tokens=512, calls=4),
    Short(name="GQA B=32 4096", batch=32, groups=8, heads=4, tokens=4096, calls=4),
)
"""The last three are guards: what is chosen for them must not change."""

# head size, query heads a key head, splits, options; tables of nine blocks and lengths of every kind
CHECKS: dict[str, tuple[tuple[int, int, int, dict[str, Any]], ...]] = {
    "alone": (
        (64, 1, 1, {"alibi": (False, False)}),
        (64, 8, 1, {"sinks": True, "window": 100}),
        (80, 1, 1, {"softcap": 20.0}),
    ),
    "cluster": (
        (128, 1, 4, {}),
        (128, 1, 2, {"alibi": (True, True)}),
        (128, 4, 8, {"sinks": True, "window": 130}),
        (64, 1, 3, {}),
        (96, 3, 2, {"softcap": 20.0}),
    ),
}
CONSUMERS: tuple[tuple[int, int, int, dict[str, Any]], ...] = (
    (128, 1, 3, {}),
    (128, 1, 1, {"alibi": (True, True)}),
    (96, 3, 3, {"alibi": (True, True)}),
    (128, 1, 3, {"alibi": (False, False)}),
)
"""Of two consumers: splits alone, ALiBi alone, and both."""


def configs(short: Short, part: str) -> list[Any]:
    """The ways of a part to divide a shape."""
    from pallas_kernels.decode_config import DecodeConfig

    if part == "ring":
        return [DecodeConfig(splits=s, stages=g, consumers=c, overlap=True) for s, g, c in short.ring]
    if part == "alibi":
        return []
    held = [DecodeConfig(splits=s, stages=-(-short.width // s), resident=True) for s in short.held]
    return [config for config in held if (config.splits == 1) == (part == "alone")]


class Part:
    """One part: what it found, said and kept as it comes."""

    def __init__(self, name: str, out: Path, lock: Path) -> None:
        self.name, self.out, self.lock = name, out, lock
        self.started = time.monotonic()
        self.found: dict[str, list[dict[str, Any]]] = {"checks": [], "times": []}

    def keep(self, kind: str, told: str, record: dict[str, Any]) -> None:
        """Print a result and write all there are."""
        print(f"[{self.name:7} {time.monotonic() - self.started:4.0f} s] {told}", flush=True)
        self.found[kind].append({"part": self.name} | record)
        self.out.write_text(json.dumps(self.found, indent=1) + "\n")

    @contextlib.contextmanager
    def device(self, *, shared: bool = False) -> Iterator[None]:
        """Have the device to itself, or share it with parts that time nothing now."""
        with self.lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            yield

    def checks(self) -> None:
        """Compare with float32, in both dtypes by turns."""
        import decode_attention as wide
        import jax.numpy as jnp

        from pallas_kernels.decode_config import DecodeConfig

        rows = CONSUMERS if self.name == "alibi" else CHECKS.get(self.name, ())
        for number, (dim, heads, splits, options) in enumerate(rows):
            if self.name == "alibi":
                config = DecodeConfig(splits=splits, stages=2, consumers=2, overlap=True)
            else:
                config = DecodeConfig(splits=splits, stages=-(-9 // splits), resident=True)
            named = {"dim": dim, "heads": heads, "options": options, "config": asdict(config)}
            told = f"check D={dim} R={heads} splits {splits} {options}"
            try:
                asked = wide.Check(dim=dim, heads=heads, splits=splits, options=options, config=config)
                with self.device(shared=True):
                    seen = wide.check(asked, (jnp.bfloat16, jnp.float16)[number % 2], 8, 3, 9)
                right = seen["right"] and seen["repeats"] and seen["idle_row_is_zero"]
                told = f"{'RIGHT' if right else 'WRONG'} {told} error {seen['error']:.1e} bound {seen['bound']:.1e}"
                self.keep("checks", told, named | seen | {"config": asdict(config)})
            except Exception as error:  # a failure is a finding: go on
                self.keep("checks", f"FAILED {told} {error!s:.200}", named | {"failed": f"{error!s:.500}"})

    def run(self, placed: dict[str, Any], threads: int, budget: float) -> None:
        """Check while everything is compiled at once, then time one after the other."""
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            jobs = [
                (short, config, pool.submit(_compile, short, config, placed))
                for short in SHORTS
                for config in configs(short, self.name)
            ]
            if not placed:
                self.checks()
            source: Any = None
            for short, group in itertools.groupby(jobs, key=lambda job: job[0]):
                arrays: Any = None
                for _, config, job in group:
                    who = f"{short.name:17} splits {config.splits} stages {config.stages} consumers {config.consumers}"
                    who += " held" if config.resident else " ring"
                    record = {"case": asdict(short), "config": asdict(config), "chosen": config == _chosen(short)}
                    if time.monotonic() - self.started > budget:
                        self.keep("times", f"{who} OUT OF TIME", record | {"failed": "out of time"})
                        continue
                    try:
                        compiled = job.result()
                        if placed:
                            print(who, "compiled", flush=True)
                            continue
                        with self.device():
                            if source is None:
                                source = _source([short for short, *_ in jobs])
                            arrays = arrays or _arrays(short, source)
                            record |= _time(short, compiled, arrays)
                        told = f"call {record['call_us']:6.2f} kernel {record['kernel_us']:6.2f} us"
                        told += f" (bytes {record['bytes_us']:5.2f}) error {record['error']:.1e}"
                        told += "" if record["right"] else " WRONG"
                        self.keep("times", f"{who} {told}{' *' * record['chosen']}", record)
                    except Exception as error:  # a failure is a finding: go on
                        self.keep("times", f"{who} FAILED {error!s:.200}", record | {"failed": f"{error!s:.500}"})


def _chosen(short: Short) -> Any:
    from pallas_kernels.decode_config import decode_config

    return decode_config(
        batch=short.batch, groups=short.groups, heads_per_key=short.heads, width=short.width, head_dim=short.dim
    )


def _sets(short: Short) -> int:
    """Chains after which blocks come round again: 200 MB of them, four times an L2 cache."""
    return max(1, -(-200_000_000 // (short.calls * short.bytes())))


def _shapes(short: Short) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of the query, of a pool of blocks, and of the tables of a chain.

    Calls that read more than 60 MB push the blocks of the call before out of the cache, and share a pool of two.
    """
    own = short.calls * _sets(short) if short.bytes() < 60_000_000 else 2
    return (
        (short.batch, short.groups, short.heads, short.dim),
        (own * short.batch * short.width + 1, short.groups, 64, short.dim),
        (short.calls, short.batch, short.width),
    )


def _compile(short: Short, config: Any, placed: dict[str, Any]) -> Any:
    import jax
    import jax.numpy as jnp

    from pallas_kernels.decode_attention import decode_attention

    def run(query: Any, keys: Any, values: Any, tables: Any, lengths: Any) -> Any:
        first = None
        for table in tables:
            query = decode_attention(
                query, keys, values, table, lengths, scale=short.dim**-0.5, implementation="mosaic", config=config
            )
            first = query if first is None else first
        return query, first

    query, pool, tables = _shapes(short)
    avals = [
        *(jax.ShapeDtypeStruct(shape, short.dtype, **placed) for shape in (query, pool, pool)),
        [jax.ShapeDtypeStruct(tables[1:], jnp.int32, **placed)] * short.calls,
        jax.ShapeDtypeStruct((short.batch,), jnp.int32, **placed),
    ]
    return jax.jit(run).trace(*avals).lower(lowering_platforms=("cuda",) if placed else None).compile()


def _source(shorts: Sequence[Short]) -> Any:
    """Random numbers that all pools are slices of: one array to make, and one program to compile."""
    import jax
    import jax.numpy as jnp

    most = max(math.prod(_shapes(short)[1]) for short in shorts) + VALUES_AT
    return jax.jit(lambda key: jax.random.normal(key, (most,), jnp.bfloat16))(jax.random.key(0))


def _arrays(short: Short, source: Any) -> Any:
    """Query, keys, values, the tables of each set, lengths, and what the first call should give."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    query, pool, tables = _shapes(short)

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def cut(source: Any, at: int, shape: tuple[int, ...]) -> Any:
        return source[at : at + math.prod(shape)].reshape(shape).astype(short.dtype)

    made = [cut(source, at, shape) for at, shape in ((1000, query), (0, pool), (VALUES_AT, pool))]
    order = np.random.default_rng(0).permutation(pool[0] - 1) + 1
    rows = np.resize(order, (_sets(short), *tables)).astype(np.int32)
    lengths = jnp.full((short.batch,), short.tokens, jnp.int32)
    # One sequence of the first call, in float64.
    keys, values = (np.asarray(array[rows[0, 0, 0]], np.float64) for array in made[1:])
    keys, values = (
        array.transpose(1, 0, 2, 3).reshape(short.groups, -1, short.dim)[:, : short.tokens] for array in (keys, values)
    )
    scores = np.asarray(made[0][0], np.float64) @ keys.transpose(0, 2, 1) * short.dim**-0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    exact = weights @ values / weights.sum(-1, keepdims=True)
    return made, [[jnp.asarray(row) for row in rows_of_set] for rows_of_set in rows], lengths, exact


def _time(short: Short, compiled: Any, arrays: Any) -> dict[str, Any]:
    import jax
    import numpy as np
    import step_trace

    made, tables, lengths, exact = arrays
    first = np.asarray(compiled(*made, tables[0], lengths)[1][0], np.float64)
    error, bound = float(np.abs(first - exact).max()), float(np.abs(exact).max())
    bound *= 2.0**-7 if short.dtype == "bfloat16" else 2.0**-10
    turn = itertools.cycle(tables)

    def several(count: int) -> None:
        for _ in range(count):
            result = compiled(*made, next(turn), lengths)
        jax.block_until_ready(result)

    several(3)
    spent = []
    for _ in range(5):
        start = time.perf_counter()
        several(10)
        spent.append((time.perf_counter() - start) / 10 / short.calls)
    traced = step_trace.profile(lambda: several(4), 4 * short.calls, top=4)
    kernels = traced.get("kernels", [])
    return {
        "call_us": statistics.median(spent) * 1e6, "least_call_us": min(spent) * 1e6,
        "kernel_us": sum(kernel["us"] for kernel in kernels if "attention" in kernel["name"]),
        "span_us": traced.get("span_us"), "kernels": kernels, "bytes_us": short.bytes() / 4.2e12 * 1e6,
        "error": error, "bound": bound, "right": bool(error <= bound),
    }  # fmt: skip


def run_part(asked: argparse.Namespace) -> None:
    """Run one part in this process."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    placed: dict[str, Any] = {}
    if asked.compile_for:
        import decode_attention as wide

        placed = wide.target(asked.compile_for)
    Part(asked.part, asked.out, asked.lock).run(placed, asked.threads, asked.budget)


def main() -> None:
    """Run all parts, each in a process of its own, and put together what they found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--part", choices=PARTS, help="one part, in this process")
    parser.add_argument("--threads", type=int, default=4, help="compilations at a time, of each part")
    parser.add_argument("--budget", type=float, default=50.0, help="seconds after which nothing more is timed")
    parser.add_argument("--compile-for", type=Path, metavar="TARGET_CONFIG")
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part and asked.lock:
        run_part(asked)
        return
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        lock, names = Path(folder) / "device", (asked.part,) if asked.part else PARTS
        running = {}
        for name in names:
            command = [sys.executable, __file__, "--part", name, "--lock", str(lock), "--threads", str(asked.threads)]
            command += ["--out", str(Path(folder) / name), "--budget", str(asked.budget)]
            command += ["--compile-for", str(asked.compile_for)] if asked.compile_for else []
            running[name] = subprocess.Popen(command)
        found: dict[str, Any] = {"checks": [], "times": [], "ended": {}}
        for name, process in running.items():
            try:
                # A hang must not outlast the budget by more than what a part needs to end.
                found["ended"][name] = process.wait(max(1.0, asked.budget + 20 - (time.monotonic() - started)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                found["ended"][name] = "did not end"
        for name in names:
            path = Path(folder) / name
            kept = json.loads(path.read_text()) if path.exists() else {"checks": [], "times": []}
            found["checks"] += kept["checks"]
            found["times"] += kept["times"]
    found["seconds"] = time.monotonic() - started
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['seconds']:.0f} s; parts ended {found['ended']}")


if __name__ == "__main__":
    main()
