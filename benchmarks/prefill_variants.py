"""What lies between the products of a prefill step: the kernels for it beside XLA, alone and in a step.

    python benchmarks/prefill_variants.py --out prefill_variants.json

First numbers: the gated product and the rotation with its cache write, against float32 and against XLA. Then the gated
product in several configurations beside XLA's product and activation, each kept up for ``--sustain`` seconds, since a
GPU under full load lowers its clock. Last, prefill steps of a 7B Llama of ``--layers`` layers, 8 prompts of 2040
tokens, in one engine: what each kernel and option changes, each in two rounds. Results are written as they come.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import shapes  # noqa: E402
import step_trace  # noqa: E402
import table_ours  # noqa: E402
from machine import describe  # noqa: E402

import jaxinfer.executor as executor_module  # noqa: E402
from jaxinfer.bench import _replay, _traced  # noqa: E402
from pallas_kernels import rotary_cache  # noqa: E402
from pallas_kernels.gated_gemm import GatedConfig, gated_gemm  # noqa: E402
from pallas_kernels.linear import ACTIVATIONS, linear  # noqa: E402

# The package's own attributes of these names are functions.
choices = importlib.import_module("pallas_kernels.choices")
gated_module = importlib.import_module("pallas_kernels.gated_gemm")

REHEARSE = "--rehearse" in sys.argv
BF16 = jnp.bfloat16
CUBLAS = {"xla_gpu_enable_triton_gemm": "False"}
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {},
    "lead 1": {"lead": 1},
    "lead 2": {"lead": 2},
    "group 16": {"group": 16},
    "group 4": {"group": 4},
    "tile_k 32, 8 stages": {"tile_k": 32, "stages": 8},
    "no cluster": {"cluster": 1},
}
STEPS: dict[str, dict[str, Any]] = {
    "XLA between": {},
    "residual in cuBLAS": {"options": CUBLAS},
    "gated": {"gated": True},
    "rotary": {"rotary": True},
    "gated, rotary": {"gated": True, "rotary": True},
    "all": {"gated": True, "rotary": True, "options": CUBLAS},
}


def say(found: dict[str, Any], path: Path, section: str, name: str, value: dict[str, Any]) -> None:
    """Keep a result, on disk too, and print it."""
    found.setdefault(section, {})[name] = value
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{section}: {name}: {json.dumps(value)}", flush=True)


def worst(a: Any, b: Any) -> float:
    """The largest difference, in units of the largest value."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return float(np.abs(a - b).max() / np.abs(b).max())


def normal(key: int, *shape: int, size: float = 1.0) -> jax.Array:
    """Random numbers, drawn where they are used."""
    draw = jax.jit(lambda k: (jax.random.normal(k, shape) * size).astype(BF16))
    return jax.block_until_ready(draw(jax.random.key(key)))


def gated_error(rows: int, outputs: int, inputs: int, activation: Any, **config: Any) -> dict[str, Any]:
    """The kernel against float32 of the same numbers, on some of the rows."""
    x, weight = normal(1, rows, inputs), normal(2, 2, outputs, inputs, size=inputs**-0.5)
    y = gated_gemm(
        x, weight, activation=activation, implementation="mosaic", config=GatedConfig(**config), interpret=REHEARSE
    )
    picked = np.unique(np.concatenate([np.arange(0, rows, max(rows // 300, 1)), np.arange(max(rows - 70, 0), rows)]))
    with jax.default_matmul_precision("highest"):
        both = jnp.einsum("mk,pnk->pmn", x[picked].astype(jnp.float32), weight.astype(jnp.float32))
    gate = both[0] if activation is None else ACTIVATIONS[activation](both[0])
    error = worst(y[picked].astype(jnp.float32), gate * both[1])
    return {"largest_error": error, "right": error < 2**-7}


def angles(dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a rotary embedding of base 10,000."""
    phase = positions[..., None].astype(jnp.float32) * 1e4 ** (-jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    return jnp.cos(phase), jnp.sin(phase)


def rotary_operands(
    batch: int, tokens: int, groups: int, per_key: int, dim: int, starts: Any, lengths: Any
) -> dict[str, Any]:
    """Arguments of :func:`rotary_cache`; the tables are shuffled."""
    begin, length = (jnp.asarray(np.resize(v, batch), jnp.int32)[:, None] for v in (starts, lengths))
    places = jnp.arange(tokens, dtype=jnp.int32)
    width = -(-(max(np.max(starts), 0) + tokens) // 64)
    tables = np.random.default_rng(0).permutation(batch * width).reshape(batch, width)
    blocks = (batch * width, groups, 64, dim)
    return {
        "qkv": normal(3, batch, tokens, groups, per_key + 2, dim),
        "cache": (normal(4, *blocks), normal(5, *blocks)),
        "tables": jnp.asarray(tables, jnp.int32),
        "positions": jnp.where(places < length, begin + places, -1),
    }


def rotary_error(*sizes: int, starts: Any, lengths: Any) -> dict[str, Any]:
    """The kernel against XLA: the same arithmetic, so that a fused multiply-add is all that may differ."""
    given = rotary_operands(*sizes, starts, lengths)

    def run(implementation: Any, **kw: Any) -> Any:
        return rotary_cache(
            **kw,
            angles=functools.partial(angles, sizes[4]),
            implementation=implementation,
            interpret=REHEARSE and implementation == "mosaic",
        )

    ours, theirs = (jax.jit(functools.partial(run, name))(**given) for name in ("mosaic", "reference"))
    real = (given["positions"] >= 0)[:, :, None, None, None]
    errors = {
        "query": worst(*(jnp.where(real, q, 0).astype(jnp.float32) for q in (ours[0], theirs[0]))),
        "keys": worst(ours[1][0].astype(jnp.float32), theirs[1][0].astype(jnp.float32)),
        "values": worst(ours[1][1].astype(jnp.float32), theirs[1][1].astype(jnp.float32)),
    }
    return errors | {"right": errors["query"] < 2**-8 and errors["keys"] < 2**-8 and errors["values"] == 0}


def sustained(call: Callable[[int], Any], seconds: float) -> dict[str, Any]:
    """Milliseconds of a call, kept up for so long: the median of the batches of the second half."""
    jax.block_until_ready(call(0))
    start = time.perf_counter()
    jax.block_until_ready([call(i) for i in range(2)])
    batch = max(2, int(0.1 / ((time.perf_counter() - start) / 2)))
    samples, ends = [], time.perf_counter() + seconds
    while time.perf_counter() < ends or len(samples) < 2:
        start = time.perf_counter()
        for i in range(batch):
            last = call(i)
        jax.block_until_ready(last)
        samples.append(1e3 * (time.perf_counter() - start) / batch)
    return {"ms": statistics.median(samples[len(samples) // 2 :]), "first_ms": samples[0], "samples": len(samples)}


@contextlib.contextmanager
def variant(change: dict[str, Any]) -> Iterator[None]:
    """Choose otherwise while a step is compiled."""
    kept = choices.MIN_GATED_ROWS, choices.ROTARY_HEADS, executor_module.compiler_options
    choices.MIN_GATED_ROWS = kept[0] if change.get("gated") else 1 << 40
    choices.ROTARY_HEADS = kept[1] if change.get("rotary") else ()
    executor_module.compiler_options = lambda *_: change.get("options", {})
    try:
        yield
    finally:
        choices.MIN_GATED_ROWS, choices.ROTARY_HEADS, executor_module.compiler_options = kept


Measure = Callable[[str, str, Callable[[], dict[str, Any]]], dict[str, Any]]


def gated_rates(measure: Measure, sustain: float) -> str:
    """The gated product of a 7B layer, 16384 rows, in every configuration; returns the name of the fastest."""
    rows, outputs, inputs = (256, 128, 128) if REHEARSE else (16384, 11008, 4096)
    flops = 4.0 * rows * outputs * inputs
    xs = [normal(i, rows, inputs) for i in (11, 12)]
    weights = [normal(i, 2, outputs, inputs, size=0.02) for i in (13, 14)]

    def rate(function: Callable[..., Any], options: dict[str, str] | None = None) -> dict[str, Any]:
        program = jax.jit(function).lower(xs[0], weights[0]).compile(compiler_options=options)
        value = sustained(lambda i: program(xs[i % 2], weights[i // 2 % 2]), sustain)
        return value | {"tflop_s": flops / value["ms"] / 1e9}

    def product(x: jax.Array, weight: jax.Array) -> jax.Array:
        return linear(x, weight.reshape(2 * outputs, inputs), implementation="dot")

    gate = functools.partial(linear, activation="silu", gated=True, implementation="dot")

    def kernel(name: str) -> Callable[..., Any]:
        config = GatedConfig(**CONFIGS[name])
        return functools.partial(
            gated_gemm, activation="silu", implementation="mosaic", config=config, interpret=REHEARSE
        )

    measure("gated", "cuBLAS product alone", lambda: rate(product, CUBLAS))
    measure("gated", "cuBLAS product, silu * up", lambda: rate(gate, CUBLAS))
    rates = {}
    for name in CONFIGS:
        rates[name] = measure("gated", name, lambda name=name: rate(kernel(name))).get("tflop_s", 0.0)
    best = max(rates, key=lambda name: rates[name])
    measure("gated", "cuBLAS product, silu * up, again", lambda: rate(gate, CUBLAS))
    measure("gated", f"{best}, again", lambda: rate(kernel(best)))
    return best


def steps(measure: Measure, sustain: float, layers: int) -> None:
    """Prefill steps of one engine, each variant compiled once and timed twice."""
    shapes.MODELS["llama-7b"] = shapes.LLAMA | {"num_hidden_layers": layers}
    with tempfile.TemporaryDirectory() as root:
        ctx = table_ours.Context(REHEARSE, Path(root))
        tokens = 120 if REHEARSE else 2040
        longest = 1 << tokens.bit_length()
        sizes = {"max_model_len": longest, "prefill_chunk": longest, "prefill_tokens": 8 * longest}
        with ctx.engine("llama-7b", max_batch=8, **sizes) as engine:
            prompts, params = ctx.prompts(engine, [tokens] * 8), table_ours.greedy(1)
            flops = 8 * tokens * table_ours.layer_flops(engine.plan)
            kept: dict[str, Any] = {}

            def step(name: str) -> dict[str, Any]:
                made = 0.0
                if name not in kept:
                    start = time.perf_counter()
                    with variant(STEPS[name]), _traced(engine) as calls:
                        engine.executor._compiled.clear()
                        drawn = engine.generate(prompts, params)
                    first = [one.outputs[0].token_ids[0] for one in drawn]
                    kept[name] = [call for _, call in calls], dict(engine.executor._compiled), first
                    made = time.perf_counter() - start
                calls, programs, first = kept[name]
                engine.executor._compiled.clear()
                engine.executor._compiled.update(programs)
                samples, ends = [], time.perf_counter() + sustain
                while time.perf_counter() < ends or len(samples) < 3:
                    samples.append(1e3 * _replay(calls))
                ms = statistics.median(samples)
                return {
                    "ms": ms, "ms_a_layer": ms / layers, "tflop_s": flops / ms / 1e9, "calls": len(calls),
                    "compile_s": round(made, 1), "samples": len(samples), "tokens": first,
                }  # fmt: skip

            for turn in (1, 2):
                for name in STEPS:
                    measure("steps", f"{name} ({turn})", functools.partial(step, name))
            for name in ("XLA between", "all"):
                if name in kept:
                    step(name)
                    measure("trace", name, lambda name=name: step_trace.profile(lambda: _replay(kept[name][0]), 1))


def main() -> None:
    """Measure all of it, as far as the time reaches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="after which nothing new is begun")
    parser.add_argument("--sustain", type=float, default=1.0)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rehearse", action="store_true", help="everything small and the kernels interpreted")
    parser.add_argument("--out", type=Path, default=Path("prefill_variants.json"))
    args = parser.parse_args()
    begin = time.time()
    found: dict[str, Any] = {"machine": describe(), "command": " ".join(sys.argv)}

    def measure(section: str, name: str, of: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if time.time() - begin > args.seconds:
            return {}
        try:
            value = of()
        except Exception as error:  # one must not take the others with it
            value = {"error": f"{type(error).__name__}: {error}"[:1000]}
        say(found, args.out, section, name, value | {"at_s": round(time.time() - begin, 1)})
        return value

    m, n, k = (520, 272, 128) if REHEARSE else (16384, 11008, 4096)
    for name, case in {
        "small, ragged": lambda: gated_error(300, 208, 320, "gelu_tanh", group=1),
        "7b": lambda: gated_error(m, n, k, "silu"),
        "7b, lead 2, tile_k 32": lambda: gated_error(m // 2 + 40, n, k, "silu", lead=2, tile_k=32, stages=8),
        "no cluster": lambda: gated_error(1000 if not REHEARSE else 200, n, k, None, cluster=1),
    }.items():
        measure("gated numbers", name, case)
    for name, case in {
        "7b": lambda: rotary_error(8, 2048, 32, 1, 128, starts=[0], lengths=[2040]) if not REHEARSE else {},
        "late starts, grouped": lambda: rotary_error(
            4, 330, 2, 4, 64, starts=[0, 5, 64, 127], lengths=[330, 7, 0, 200]
        ),
        "heads of 256": lambda: rotary_error(2, 130, 2, 8, 256, starts=[33, 64], lengths=[130, 128]),
    }.items():
        measure("rotary numbers", name, case)
    best = gated_rates(measure, args.sustain)
    gated_module.CONFIG = GatedConfig(**CONFIGS[best])
    say(found, args.out, "steps", "gated configuration", {"name": best})
    steps(measure, args.sustain, args.layers)


if __name__ == "__main__":
    main()
