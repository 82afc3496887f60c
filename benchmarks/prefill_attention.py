"""The prefill attention kernel: right against float32, and its time beside cuDNN and XLA.

    python benchmarks/prefill_attention.py --out benchmarks/results/prefill_attention_h200.json

One process on one GPU, under two minutes; ``--checks-only`` stops after the numbers, which take 45 seconds at most, and
fails where one is wrong or missing. Rates count the two products over the keys that the mask leaves, as if whole (4 D
for each query and key). Calls are handed out at once and waited for together; each takes longer than handing it out
does. What is about to run is printed before it runs: were a kernel to hang, the last line would name it.

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
from collections.abc import Callable, Sequence
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
        room: positions that the table has at least.
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
    room: int = 0
    softcap: float | None = None
    window: int | None = None
    alibi: bool = False
    variants: tuple[dict[str, Any], ...] = ({},)
    xla: bool = False

    @property
    def width(self) -> int:
        """Blocks of a table row."""
        return -(-max(self.start + self.tokens, self.room) // 64)

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
        chosen = prefill_config(
            heads=self.batch * self.groups * self.heads, tokens=self.tokens, width=self.width, head_dim=self.dim,
            shaped=self.alibi or self.softcap is not None,
        )  # fmt: skip
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
         variants=({}, {"programs": 132}, {"staged": False}), xla=True),
    Case(name="first chunk", batch=8, tokens=512, room=2048, groups=32, heads=1, dim=128,
         variants=({}, {"programs": 132}, {"staged": False})),
    Case(name="one prompt", batch=1, tokens=512, groups=32, heads=1, dim=128,
         variants=({}, {"stages": 4}, {"keys": 128}), xla=True),
    Case(name="long", batch=1, tokens=8192, groups=32, heads=1, dim=128, variants=({}, {"programs": None})),
    Case(name="head 64", batch=8, tokens=2048, groups=32, heads=1, dim=64,
         variants=({}, {"stages": 2}, {"keys": 64}, {"programs": None}, {"turns": False})),
    Case(name="head 256", batch=8, tokens=2048, groups=8, heads=2, dim=256, variants=({}, {"turns": True})),
    Case(name="window", batch=8, tokens=2040, groups=8, heads=4, dim=128, window=512,
         variants=({}, {"programs": None}, {"keys": 64, "stages": 4})),
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
    batch: int = 12
    tokens: int = 330
    width: int = 9
    dtype: str = "bfloat16"
    options: dict[str, Any] = field(default_factory=dict)
    changes: dict[str, Any] = field(default_factory=dict)


CHECKS = (
    Check(dim=128, changes={"programs": 132}),
    Check(dim=128, dtype="float16", changes={"turns": False}),
    Check(dim=128, heads=4, changes={"programs": 7}),
    Check(dim=128, dtype="float16", changes={"keys": 64, "stages": 4, "programs": 3}),
    Check(dim=128, options={"window": 100}, changes={"programs": 5}),
    Check(dim=64, dtype="float16", heads=3, tokens=5, options={"sinks": True}),
    Check(dim=64, options={"softcap": 20.0}, changes={"programs": 11}),
    Check(dim=80, dtype="float16", tokens=512, width=8, options={"alibi": (False, False)}),
    Check(dim=96, options={"alibi": (True, True), "window": 130}),
    Check(dim=128, dtype="float16", options={"softcap": 30.0, "sinks": True, "alibi": (False, True)}),
    Check(dim=256, heads=2),
    Check(dim=256, dtype="float16", options={"softcap": 50.0, "window": 200}),
)
CHECKS_BUDGET = 45.0
"""Seconds after which no further check is begun."""


class Checking:
    """One check: its arguments, what is compiled for it, and what it should give."""

    def __init__(self, case: Check, registers: bool) -> None:
        self.case, self.dtype = case, jnp.dtype(case.dtype)
        rng = np.random.default_rng(1)
        batch, tokens, width = case.batch, case.tokens, case.width
        room, kinds = width * 64, (tokens, 0, 1, 63, 64, 65, tokens - 1, tokens // 2)
        self.lengths = np.asarray([min(kinds[i % 8], tokens) for i in range(batch)], np.int32)
        starts = np.asarray([(0, 0, 5, 64, 1, room)[i % 6] for i in range(batch)], np.int32)
        self.starts = np.minimum(starts, room - self.lengths).astype(np.int32)
        self.tables = (rng.permutation(batch * width) + 1).reshape(batch, width).astype(np.int32)

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32).astype(BF16).astype(self.dtype)

        self.query = draw(batch, tokens, case.groups, case.heads, case.dim)
        self.blocks = [draw(batch * width + 1, case.groups, 64, case.dim) for _ in range(2)]
        self.options = dict(case.options)
        if self.options.pop("sinks", False):
            self.options["sinks"] = rng.standard_normal((case.groups, case.heads)).astype(np.float32)
        if alibi := self.options.pop("alibi", None):
            slopes = np.abs(rng.standard_normal((case.groups, case.heads))).astype(np.float32) / 50
            self.options["bias"] = Bias(slopes=jnp.asarray(slopes), scaled=alibi[0], bfloat16=alibi[1])
        config = prefill_config(
            heads=batch * case.groups * case.heads, tokens=tokens, width=width, head_dim=case.dim,
            shaped=bool({"softcap", "bias"} & set(self.options)),
        )  # fmt: skip
        config = replace(config, registers=registers, **case.changes)
        if not registers:  # weights in shared memory take what stages would
            config = replace(config, stages=min(config.stages, 2))
        self.config = config

    def given(self) -> list[jax.Array]:
        """The arguments; what lies past a sequence is NaN."""
        dirty = [array.copy() for array in self.blocks]
        for row, stop in enumerate(self.starts + self.lengths):
            for column, block in enumerate(self.tables[row]):
                for array in dirty:
                    array[block, :, int(np.clip(stop - column * 64, 0, 64)) :] = np.nan
        return [jnp.asarray(array) for array in (self.query, *dirty, self.tables, self.starts, self.lengths)]

    def call(self, query: Any, keys: Any, values: Any, tables: Any, starts: Any, lengths: Any) -> jax.Array:
        """The kernel."""
        return prefill_attention(
            query, keys, values, tables, (starts, lengths), scale=self.case.dim**-0.5, implementation="mosaic",
            config=self.config, **self.options,
        )  # fmt: skip

    def exact(self) -> np.ndarray:
        """In float32 by NumPy, a sequence at a time: [B, T, G, R, D]."""
        case, options = self.case, self.options
        softcap, window, bias, sinks = (options.get(name) for name in ("softcap", "window", "bias", "sinks"))
        scale = np.float32(case.dim**-0.5)
        places = np.arange(case.width * 64, dtype=np.int32)
        alibi: Any = 0.0
        if bias is not None:

            def rounded(x: np.ndarray) -> np.ndarray:
                return x.astype(BF16).astype(np.float32) if bias.bfloat16 else x

            slopes = rounded(np.asarray(bias.slopes))[:, :, None, None]
            alibi = rounded(slopes * rounded(places.astype(np.float32)))
        out = np.zeros(self.query.shape, np.float32)
        for row, (start, length) in enumerate(zip(self.starts, self.lengths, strict=True)):
            keys, values = (
                np.moveaxis(blocks[self.tables[row]].astype(np.float32), 1, 0).reshape(case.groups, 1, -1, case.dim)
                for blocks in self.blocks
            )
            query = np.moveaxis(self.query[row, :length].astype(np.float32), 0, 2)  # [G, R, T, D]
            scores = query @ keys.swapaxes(-1, -2)
            scores = (scores + alibi) * scale if bias is not None and bias.scaled else scores * scale
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            if bias is not None and not bias.scaled:
                scores = scores + alibi
            distance = (start + np.arange(length))[:, None] - places
            seen = (distance >= 0) & (distance < (window or len(places)))
            scores = np.where(seen, scores, -np.inf)
            top = scores.max(-1, keepdims=True)
            if sinks is not None:
                top = np.maximum(top, sinks[:, :, None, None])
            weights = np.exp(scores - top)
            total = weights.sum(-1, keepdims=True)
            if sinks is not None:
                total = total + np.exp(sinks[:, :, None, None] - top)
            out[row, :length] = np.moveaxis(weights / total @ values, 2, 0)
        return out

    def run(self, compiled: Any) -> dict[str, Any]:
        """Run what was compiled, twice, and compare."""
        given = self.given()
        ours, again = (np.asarray(compiled(*given), np.float64) for _ in range(2))
        exact = self.exact()
        real = np.arange(self.case.tokens) < self.lengths[:, None]
        error = float(np.abs(ours - exact)[real].max())
        # A result is rounded once, weights once: 8 bits each in bfloat16, 11 in float16.
        bound = float(np.abs(exact[real]).max()) * (2.0**-7 if self.dtype == BF16 else 2.0**-10)
        found = {
            "error": error, "bound": bound, "repeats": bool(np.array_equal(ours, again)),
            "padding_is_zero": not ours[~real].any(),
        }  # fmt: skip
        found["right"] = bool(error <= bound and found["repeats"] and found["padding_is_zero"])
        return found


class Bench:
    """What is found, kept after each step."""

    def __init__(self, out: Path | None, budget: float, rehearse: bool) -> None:
        self.out, self.budget, self.rehearse, self.started = out, budget, rehearse, time.monotonic()
        self.found: dict[str, Any] = {"machine": machine.describe(), "checks": [], "times": []}

    def late(self) -> bool:
        """Whether the budget is spent."""
        return time.monotonic() - self.started > self.budget

    def say(self, text: str) -> None:
        """Print with the seconds so far."""
        print(f"{time.monotonic() - self.started:6.1f} s  {text}", flush=True)

    def keep(self) -> None:
        """Write what has been found."""
        self.found["seconds"] = time.monotonic() - self.started
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(json.dumps(self.found, indent=1) + "\n")

    def checks(self) -> bool:
        """Numbers: all are compiled at once, and run one after the other; whether all are right."""
        with concurrent.futures.ThreadPoolExecutor(1 if self.rehearse else len(CHECKS)) as pool:
            jobs = []
            for case in CHECKS:
                if self.rehearse:
                    case = replace(case, batch=2, tokens=min(case.tokens, 131), width=4)
                checking = Checking(case, registers=not self.rehearse)
                jobs.append((checking, pool.submit(compile_one, checking.call, checking.given(), self.rehearse)))
            for number, (checking, job) in enumerate(jobs):
                left = CHECKS_BUDGET - (time.monotonic() - self.started)
                found = {**asdict(checking.case), "config": asdict(checking.config)}
                try:
                    compiled = job.result(timeout=None if self.rehearse else max(left, 0.1))
                    self.say(f"check {number}: {checking.case} ...")
                    told = checking.run(compiled)
                except Exception as error:  # a failure is a finding: go on
                    told = {"failed": f"{type(error).__name__}: {str(error)[:300]}", "right": False}
                self.found["checks"].append(found | told)
                self.say(f"check {number}: {told}")
                self.keep()
        right = sum(check["right"] for check in self.found["checks"])
        self.say(f"checks: {right} of {len(CHECKS)} are right")
        return right == len(CHECKS)

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

    def run(self, checks_only: bool = False) -> bool:
        """Everything, the most wanted first; whether all numbers are right."""
        self.say(f"{self.found['machine']}")
        right = self.checks()
        if checks_only:
            return right
        with concurrent.futures.ThreadPoolExecutor(1 if self.rehearse else 8) as pool:
            for case in CASES[:4] if self.rehearse else CASES:
                if self.late():
                    self.say(f"{case.name}: out of time")
                    continue
                if self.rehearse:
                    case = replace(
                        case, batch=1, tokens=136, start=min(case.start, 64), room=0, groups=1, dim=64, window=None
                    )
                try:
                    self.case(case, pool)
                except Exception as error:  # a failure is a finding: go on
                    self.say(f"{case.name}: {type(error).__name__}: {str(error)[:300]}")
        self.keep()
        return right


def compile_one(function: Callable[..., Any], given: Sequence[Any], rehearse: bool) -> Any:
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
    """Compile every kernel that would be checked or timed for an H200 that is not there."""
    from tests.aot import compiler

    compile_for_h200 = compiler()

    def attempt(name: str, function: Callable[..., Any], given: tuple[Any, ...]) -> None:
        started = time.monotonic()
        try:
            compile_for_h200(function, given)
            told = "compiled"
        except Exception as error:  # a failure is a finding: go on
            told = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{time.monotonic() - started:6.1f} s  {name}: {told}", flush=True)

    for number, check in enumerate(CHECKS):
        checking = Checking(check, registers=True)
        attempt(f"check {number}", checking.call, tuple(checking.given()))
    for case in CASES:
        given = jax.eval_shape(lambda case=case: make(case))["blocks"]
        for name, _, function in runners(case, False):
            if name.startswith("mosaic"):
                attempt(f"{case.name} {name}", function, given)


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON to write")
    parser.add_argument("--budget", type=float, default=100.0, help="seconds after which no further case is timed")
    parser.add_argument("--checks-only", action="store_true", help="the numbers, and no times")
    parser.add_argument("--rehearse", action="store_true", help="small, the kernel in interpret mode")
    parser.add_argument("--compile", action="store_true", help="compile all kernels for an H200, and stop")
    asked = parser.parse_args()
    if asked.compile:
        compile_all()
        return
    if not Bench(asked.out, asked.budget, asked.rehearse).run(asked.checks_only):
        raise SystemExit("not all numbers are right")


if __name__ == "__main__":
    main()
