"""The prefill attention kernel: right against float32, and its time beside cuDNN and XLA.

    python benchmarks/prefill_attention.py --out benchmarks/results/prefill_attention_h200.json

One process on one GPU, under two minutes. Rates count the two products over the keys that the mask leaves, as if whole
(4 D for each query and key). Calls are handed out at once and waited for together; each takes longer than handing it
out does. What is about to run is printed before it runs: were a kernel to hang, the last line would name it.

Without a GPU: ``--compile`` compiles every kernel ahead of time for an H200 (see tests/aot.py), and ``--rehearse`` runs
everything small, the kernel in interpret mode.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Bias
from pallas_kernels.prefill_attention import prefill_attention, prefill_config
from pallas_kernels.prefill_kernel import PrefillConfig

BF16 = jnp.bfloat16
ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """A shape: sequences, tokens of a chunk, key heads, query heads of each, head size; and what runs it.

    Attributes:
        start: position of each chunk's first token.
        softcap, window, alibi: options of attention.
        variants: changes of the chosen configuration; the first is none.
        xla: whether the reference runs too.
    """

    name: str
    batch: int
    tokens: int
    groups: int
    heads: int
    dim: int
    start: int = 0
    softcap: float | None = None
    window: int | None = None
    alibi: bool = False
    variants: tuple[dict[str, Any], ...] = ({},)
    xla: bool = False

    @property
    def width(self) -> int:
        """Blocks of a table row."""
        return -(-(self.start + self.tokens) // 64)

    def flops(self) -> float:
        """Operations of the two products over the keys that are seen."""
        seen = self.start + np.arange(self.tokens) + 1
        seen = seen if self.window is None else np.minimum(seen, self.window)
        return 4.0 * self.dim * float(seen.sum()) * self.batch * self.groups * self.heads

    def options(self) -> dict[str, Any]:
        """Of :func:`prefill_attention`."""
        slopes = jnp.full((self.groups, self.heads), 0.01, jnp.float32)
        bias = Bias(slopes=slopes) if self.alibi else None
        return {"scale": self.dim**-0.5, "softcap": self.softcap, "window": self.window, "bias": bias}

    def config(self, changes: dict[str, Any]) -> PrefillConfig:
        """The chosen configuration, changed."""
        chosen = prefill_config(head_dim=self.dim, shaped=self.alibi or self.softcap is not None)
        return replace(chosen, **changes)


SWEEP: tuple[dict[str, Any], ...] = (
    {}, {"turns": False}, {"programs": None}, {"keys": 64, "stages": 4}, {"keys": 64, "stages": 4, "turns": False},
    {"keys": 64, "stages": 2}, {"programs": None, "staged": False},
)  # fmt: skip
# The first cases are the ones that matter most: what does not fit the time is left out.
CASES = (
    Case(name="7B", batch=8, tokens=2040, groups=32, heads=1, dim=128, variants=SWEEP, xla=True),
    Case(name="grouped", batch=8, tokens=2040, groups=8, heads=4, dim=128, variants=({}, {"programs": None})),
    Case(name="chunk", batch=8, tokens=512, start=1536, groups=32, heads=1, dim=128,
         variants=({}, {"programs": None}, {"keys": 64, "stages": 4}), xla=True),
    Case(name="one prompt", batch=1, tokens=512, groups=32, heads=1, dim=128, variants=({}, {"keys": 64}), xla=True),
    Case(name="long", batch=1, tokens=8192, groups=32, heads=1, dim=128, variants=({}, {"programs": None})),
    Case(name="head 64", batch=8, tokens=2048, groups=32, heads=1, dim=64,
         variants=({}, {"stages": 2}, {"keys": 64}, {"programs": None}, {"turns": False})),
    Case(name="head 256", batch=8, tokens=2048, groups=8, heads=2, dim=256, variants=({}, {"turns": False})),
    Case(name="window", batch=8, tokens=2040, groups=8, heads=4, dim=128, window=512,
         variants=({}, {"keys": 64, "stages": 4})),
    Case(name="capped 256", batch=8, tokens=2048, groups=8, heads=2, dim=256, softcap=50.0, variants=({},)),
    Case(name="ALiBi", batch=8, tokens=2040, groups=32, heads=1, dim=128, alibi=True,
         variants=({}, {"keys": 128, "stages": 2})),
    Case(name="head 80", batch=8, tokens=2048, groups=32, heads=1, dim=80),
    Case(name="head 96", batch=8, tokens=2048, groups=32, heads=1, dim=96),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Check:
    """Numbers of one configuration."""

    dim: int
    groups: int = 2
    heads: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)


CHECKS = (
    Check(dim=128),
    Check(dim=128, changes={"turns": False, "programs": None}),
    Check(dim=128, heads=4, changes={"programs": 7}),
    Check(dim=128, changes={"keys": 64, "stages": 4, "programs": 3}),
    Check(dim=128, options={"window": 100}, changes={"programs": 5}),
    Check(dim=64, heads=3, options={"sinks": True}, changes={"programs": 11}),
    Check(dim=64, options={"softcap": 20.0}),
    Check(dim=80, options={"alibi": (False, False)}),
    Check(dim=96, options={"alibi": (True, True), "window": 130}),
    Check(dim=128, options={"softcap": 30.0, "sinks": True, "alibi": (False, True)}),
    Check(dim=256, heads=2),
    Check(dim=256, options={"softcap": 50.0, "window": 200}),
)


def check(case: Check, dtype: Any, batch: int, tokens: int, width: int, registers: bool) -> dict[str, Any]:
    """Compare with float32 over chunks of every kind; what lies past a sequence is NaN, for the kernel."""
    rng = np.random.default_rng(1)
    room = width * 64
    lengths = np.asarray([(tokens, 0, 1, 63, 64, 65, tokens - 1, tokens // 2)[i % 8] for i in range(batch)], np.int32)
    starts = np.asarray([(0, 0, 5, 64, 1, room)[i % 6] for i in range(batch)], np.int32)
    starts = np.minimum(starts, room - lengths).astype(np.int32)
    tables = (rng.permutation(batch * width) + 1).reshape(batch, width).astype(np.int32)
    clean = [rng.standard_normal((batch * width + 1, case.groups, 64, case.dim)).astype(np.float32) for _ in range(2)]
    dirty = [array.copy() for array in clean]
    for row, stop in enumerate(starts + lengths):
        for column in range(width):
            for array in dirty:
                array[tables[row, column], :, int(np.clip(stop - column * 64, 0, 64)) :] = np.nan
    query = rng.standard_normal((batch, tokens, case.groups, case.heads, case.dim)).astype(np.float32)
    options: dict[str, Any] = dict(case.options)
    if options.pop("sinks", False):
        options["sinks"] = jnp.asarray(rng.standard_normal((case.groups, case.heads)), jnp.float32)
    if alibi := options.pop("alibi", None):
        slopes = jnp.asarray(np.abs(rng.standard_normal((case.groups, case.heads))) / 50, jnp.float32)
        options["bias"] = Bias(slopes=slopes, scaled=alibi[0], bfloat16=alibi[1])
    config = prefill_config(head_dim=case.dim, shaped=bool({"softcap", "bias"} & set(options)))
    config = replace(config, registers=registers, **case.changes)
    if not registers:  # weights in shared memory take what stages would
        config = replace(config, stages=min(config.stages, 2))

    def run(implementation: Any, dtype: Any, blocks: list[np.ndarray]) -> np.ndarray:
        given = [jnp.asarray(array, BF16).astype(dtype) for array in (query, *blocks)]
        call = jax.jit(
            lambda query, keys, values, tables, starts, lengths: prefill_attention(
                query, keys, values, tables, (starts, lengths), scale=case.dim**-0.5, implementation=implementation,
                config=config if implementation == "mosaic" else None, **options,
            )
        )  # fmt: skip
        return np.asarray(call(*given, *(jnp.asarray(a) for a in (tables, starts, lengths))), np.float64)

    with jax.default_matmul_precision("highest"):
        exact = run("reference", jnp.float32, clean)
    ours, again, xla = run("mosaic", dtype, dirty), run("mosaic", dtype, dirty), run("reference", dtype, clean)
    real = np.arange(tokens) < lengths[:, None]
    error = float(np.abs(ours - exact)[real].max())
    # A result is rounded once, weights once: 8 bits each in bfloat16, 11 in float16.
    bound = float(np.abs(exact[real]).max()) * (2.0**-7 if dtype == BF16 else 2.0**-10)
    return {
        **asdict(case), "dtype": jnp.dtype(dtype).name, "config": asdict(config), "error": error,
        "xla_error": float(np.abs(xla - exact)[real].max()), "bound": bound, "right": bool(error <= bound),
        "repeats": bool(np.array_equal(ours, again)), "padding_is_zero": not ours[~real].any(),
    }  # fmt: skip


class Bench:
    """What is found, kept after each step."""

    def __init__(self, out: Path | None, budget: float, rehearse: bool) -> None:
        self.out, self.budget, self.rehearse, self.started = out, budget, rehearse, time.monotonic()
        self.found: dict[str, Any] = {"machine": machine.describe(), "checks": [], "times": []}

    def late(self, share: float = 1.0) -> bool:
        """Whether this share of the budget is spent."""
        return time.monotonic() - self.started > share * self.budget

    def say(self, text: str) -> None:
        """Print with the seconds so far."""
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def keep(self) -> None:
        """Write what has been found."""
        self.found["seconds"] = time.monotonic() - self.started
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.found, indent=1) + "\n")

    def checks(self) -> None:
        """Numbers, for at most two fifths of the time: the first alone, the others compiled several at a time."""
        self.check(0)
        with concurrent.futures.ThreadPoolExecutor(1 if self.rehearse else 6) as pool:
            list(pool.map(self.check, range(1, len(CHECKS))))

    def check(self, number: int) -> None:
        """One of the checks, in one of the dtypes."""
        case, dtype = CHECKS[number], (BF16, jnp.float16)[number % 2]
        batch, tokens, width = (2, 136, 4) if self.rehearse else (12, 330, 9)
        if self.late(0.4):
            self.say(f"check {number}: out of time")
            return
        self.say(f"check {number}: {case} {jnp.dtype(dtype).name}")
        interpreted = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())
        try:
            with interpreted if self.rehearse else contextlib.nullcontext():
                found = check(case, dtype, batch, tokens, width, registers=not self.rehearse)
            told = {n: found[n] for n in ("right", "error", "xla_error", "bound", "repeats", "padding_is_zero")}
        except Exception as error:  # a failure is a finding: go on
            found = {**asdict(case), "failed": f"{type(error).__name__}: {str(error)[:300]}"}
            told = {"failed": found["failed"]}
        self.found["checks"].append(found)
        self.say(f"check {number}: {told}")
        self.keep()

    def time(self, function: Any, *arguments: Any) -> float:
        """Seconds of a call: the median of rounds of calls that are handed out at once."""
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        once = time.perf_counter() - start
        calls = 1 if self.rehearse else int(np.clip(0.05 / once, 3, 50))
        rounds = []
        for _ in range(1 if self.rehearse else ROUNDS):
            start = time.perf_counter()
            for _ in range(calls):
                result = function(*arguments)
            jax.block_until_ready(result)
            rounds.append((time.perf_counter() - start) / calls)
        return statistics.median(rounds)

    def case(self, case: Case, pool: concurrent.futures.Executor) -> None:
        """Compile everything of a case at once, then time one after the other."""
        arrays = make(case)
        jobs = []
        for name, config, function in runners(case, self.rehearse):
            given = arrays["blocks"] if function is not gather else arrays["blocks"][1:4]
            given = arrays["own"] if name.startswith("cudnn") else given
            jobs.append((name, config, given, pool.submit(compile_one, function, given, self.rehearse)))
        for name, config, given, job in jobs:
            record: dict[str, Any] = {"case": asdict(replace(case, variants=())), "name": name, "config": config}
            try:
                compiled = job.result()
                self.say(f"{case.name:10} {name} ...")
                seconds = self.time(compiled, *given)
                record |= {"us": seconds * 1e6, "tflops": case.flops() / seconds / 1e12}
                told = f"{record['us']:9.1f} us" + (f"  {record['tflops']:6.1f} TFLOP/s" if name != "gather" else "")
            except Exception as error:  # a failure is a finding: go on
                told = record["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            self.found["times"].append(record)
            self.say(f"{case.name:10} {name:60} {told}")
            self.keep()

    def run(self) -> None:
        """Everything, the most wanted first."""
        self.say(f"{self.found['machine']}")
        self.checks()
        with concurrent.futures.ThreadPoolExecutor(1 if self.rehearse else 8) as pool:
            for case in CASES[:4] if self.rehearse else CASES:
                if self.late():
                    self.say(f"{case.name}: out of time")
                    continue
                if self.rehearse:
                    case = replace(case, batch=1, tokens=136, start=min(case.start, 64), groups=1, dim=64, window=None)
                try:
                    self.case(case, pool)
                except Exception as error:  # a failure is a finding: go on
                    self.say(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
        self.keep()


def compile_one(function: Callable[..., Any], given: tuple[Any, ...], rehearse: bool) -> Any:
    """Compile; interpret mode belongs to a thread."""
    interpreted = plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams())
    with interpreted if rehearse else contextlib.nullcontext():
        return jax.jit(function).lower(*given).compile()


def make(case: Case) -> dict[str, tuple[jax.Array, ...]]:
    """Arguments over blocks, in an order of their own, and over contiguous keys and values; made on the device."""
    blocks = case.batch * case.width + 1
    shapes = [
        (case.batch, case.tokens, case.groups, case.heads, case.dim), (blocks, case.groups, 64, case.dim),
        (blocks, case.groups, 64, case.dim), (case.batch, case.tokens, case.groups, case.dim),
        (case.batch, case.tokens, case.groups, case.dim),
    ]  # fmt: skip
    draw = jax.jit(lambda keys: [jax.random.normal(k, s, BF16) for k, s in zip(keys, shapes, strict=True)])
    query, keys, values, key, value = draw(jax.random.split(jax.random.key(0), 5))
    order = np.random.default_rng(0).permutation(blocks - 1) + 1
    tables = jnp.asarray(order.reshape(case.batch, case.width), jnp.int32)
    starts = jnp.full((case.batch,), case.start, jnp.int32)
    lengths = jnp.full((case.batch,), case.tokens, jnp.int32)
    return {"blocks": (query, keys, values, tables, starts, lengths), "own": (query, key, value, lengths)}


def gather(keys: jax.Array, values: jax.Array, tables: jax.Array) -> tuple[jax.Array, ...]:
    """Keys and values of the sequences as cuDNN takes them, [B, S, G, D]."""
    found = []
    for blocks in (keys, values):
        taken = jnp.swapaxes(jnp.take(blocks, tables, axis=0), 2, 3)  # [B, W, 64, G, D]
        found.append(taken.reshape(tables.shape[0], -1, *taken.shape[3:]))
    return tuple(found)


def runners(case: Case, rehearse: bool) -> list[tuple[str, Any, Callable[..., Any]]]:
    """Names, configurations and functions of what runs a case."""
    options = case.options()

    def over_blocks(implementation: Any, config: PrefillConfig | None) -> Callable[..., jax.Array]:
        return lambda query, keys, values, tables, starts, lengths: prefill_attention(
            query, keys, values, tables, (starts, lengths), implementation=implementation, config=config, **options
        )  # fmt: skip

    def cudnn(query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array | None) -> jax.Array:
        return jax.nn.dot_product_attention(
            query.reshape(*query.shape[:2], -1, case.dim), key, value, scale=case.dim**-0.5, is_causal=True,
            query_seq_lengths=lengths, key_value_seq_lengths=lengths, implementation="cudnn",
            local_window_size=None if case.window is None else (case.window - 1, 0),
        )  # fmt: skip

    found: list[tuple[str, Any, Callable[..., Any]]] = []
    for changes in case.variants:
        config = case.config(changes)
        if rehearse:
            config = replace(config, registers=False, stages=min(config.stages, 2))
        told = " ".join(f"{name}={value}" for name, value in asdict(config).items() if name != "registers")
        found.append((f"mosaic {told}{' *' * (not changes)}", asdict(config), over_blocks("mosaic", config)))
    if case.start == 0 and case.softcap is None and not case.alibi:
        found.append(("cudnn with lengths", None, cudnn))
        found.append(("cudnn", None, lambda query, key, value, lengths: cudnn(query, key, value, None)))
        found.append(("gather", None, gather))
    if case.xla:
        found.append(("reference", None, over_blocks("reference", None)))
    return found


def compile_all() -> None:
    """Compile every kernel that would be timed for an H200 that is not there."""
    from tests.aot import compiler

    compile_for_h200 = compiler()
    for case in CASES:
        given = jax.eval_shape(lambda case=case: make(case))["blocks"]
        for name, _, function in runners(case, False):
            if name.startswith("mosaic"):
                try:
                    compile_for_h200(function, given)
                    print(case.name, name, "compiled", flush=True)
                except Exception as error:
                    print(case.name, name, f"{type(error).__name__}: {str(error)[:300]}", flush=True)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after which no further case is timed")
    parser.add_argument("--rehearse", action="store_true", help="small, the kernel in interpret mode")
    parser.add_argument("--compile", action="store_true", help="compile all kernels for an H200, and stop")
    asked = parser.parse_args()
    if asked.compile:
        compile_all()
        return
    Bench(asked.out, asked.budget, asked.rehearse).run()


if __name__ == "__main__":
    main()
