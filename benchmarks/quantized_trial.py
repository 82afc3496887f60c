"""A trial of the kernel for quantized weights: numerics, times of many ways to divide, and a chain of layers.

    python benchmarks/quantized_trial.py --out OUT.json [--seconds 80]

``graph`` times are with XLA's command buffers, ``free`` ones without them, where dependent launch acts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
from skinny_gemm import SHAPES, chain, error, exact, operands, seconds_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pallas_kernels import skinny_gemm_quantized
from pallas_kernels.skinny_gemm import InputNorm, Tuning, skinny_gemm

FP8 = jnp.float8_e4m3fn
# rows, stages, splits
WAYS = {
    "qkv": [(32, 4, 1), (32, 6, 1), (16, 6, 1), (64, 3, 1), (64, 4, 2), (16, 4, 1)],
    "out": [(16, 8, 1), (16, 16, 1), (16, 4, 1), (16, 8, 2), (32, 8, 2), (32, 4, 4), (64, 4, 8)],
    "gate and up": [(32, 3, 1), (16, 4, 1), (16, 6, 1), (32, 2, 1), (64, 2, 1), (32, 4, 2)],
    "down": [(16, 8, 1), (16, 16, 1), (32, 4, 2), (32, 8, 2), (64, 4, 4), (16, 4, 2)],
}
MANY = {"qkv": (64, 3, 2), "out": (64, 4, 4), "gate and up": (32, 3, 2), "down": (64, 4, 8)}
LIMIT = 4.2e12
OPTIONS = {"graph": {}, "free": {"xla_gpu_enable_command_buffer": ""}}


def product(shape, way, overlap=True):
    def run(weight, x, scale=None, residual=None, weight_scale=None):
        norm = InputNorm(kind="rms", eps=1e-5, scale=scale) if shape.normed else None
        rest = {"norm": norm, "activation": "silu" if shape.gated else None, "residual": residual}
        if way is None:
            return skinny_gemm(x, weight, implementation="mosaic", weight_scale=weight_scale, **rest)
        tuning = Tuning(rows=way[0], stages=way[1], splits=way[2], overlap=overlap)
        whole = weight if shape.gated else weight[None]
        factors = weight_scale if shape.gated else weight_scale[None]
        return skinny_gemm_quantized.run(x, whole, bias=None, weight_scale=factors, tuning=tuning, **rest)

    return run


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=80)
    parser.add_argument("--compile", action="store_true", help="compile for an H200 without one")
    parser.add_argument("--old", action="store_true", help="the chain with what skinny_gemm chooses, too")
    arguments = parser.parse_args()
    start = time.perf_counter()
    found = {"products": [], "chains": []}
    best = {}

    def say(line):
        print(f"{time.perf_counter() - start:6.1f} {line}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(found, indent=1))

    def late(share=1.0):
        return time.perf_counter() - start > share * arguments.seconds

    def trial(shape, rows, ways, share):
        if late(share):
            return
        count = min(24, max(4, -(-(1 << 29) // shape.nbytes)))
        keys = jax.random.split(jax.random.key(rows), count)
        make = jax.jit(shape.make)
        weights = [make(key) for key in keys]
        given = [operands(shape, rows, key) for key in keys]
        wanted = exact(shape, weights[0], given[0])
        limit = shape.nbytes / LIMIT * 1e6
        say(f"{shape.name}, {rows} rows: limit {limit:.1f} us")

        def build(job):
            way, mode = job
            try:
                lowered = jax.jit(chain(product(shape, way), count)).lower(weights, given)
                return lowered.compile(compiler_options=OPTIONS[mode])
            except Exception as failure:
                return f"{type(failure).__name__}: {failure}"[:300]

        jobs = [(way, mode) for way in ways for mode in OPTIONS if mode == "free" or way == ways[0]]
        with ThreadPoolExecutor(8) as pool:
            for (way, mode), compiled in zip(jobs, pool.map(build, jobs), strict=True):
                if late(share):
                    break
                entry = {"shape": shape.name, "rows": rows, "way": way, "mode": mode, "limit_us": limit}
                try:
                    if isinstance(compiled, str):
                        raise RuntimeError(compiled)
                    entry["error"] = error(compiled(weights, given)[0], wanted)
                    entry["us"] = seconds_of(compiled, weights, given, repeats=8) / count * 1e6
                except Exception as failure:
                    entry["failure"] = f"{type(failure).__name__}: {failure}"[:300]
                found["products"].append(entry)
                say(f"  {mode} {way}: {entry.get('us', 0):.2f} us, error {entry.get('error')} {entry.get('failure', '')}")
                if entry.get("error", 1) < 0.01 and mode == "free":
                    kept = best.get((shape.name, rows))
                    if kept is None or entry["us"] < kept[0]:
                        best[shape.name, rows] = (entry["us"], way)

    def layers(dtype, rows, old=False):
        shapes = [shape.quantized(dtype) for shape in SHAPES]
        ways = [None if old else best.get((shape.name, rows), (0, None))[1] for shape in shapes]
        if not old and None in ways:
            return
        runs = [product(shape, way) for shape, way in zip(shapes, ways, strict=True)]
        keys = jax.random.split(jax.random.key(1), 4)
        makers = [jax.jit(shape.make) for shape in shapes]
        weights = [[make(key) for make in makers] for key in keys]
        given = []
        for key in keys:
            made = [operands(shape, rows, key) for shape in shapes]
            given.append([{n: a for n, a in one.items() if n not in ("x", "residual")} for one in made])

        def step(weights, given, x):
            for weight, beside in zip(weights, given, strict=True):
                q = runs[0](weight[0], x=x, **beside[0])[:, :4096]
                x = runs[1](weight[1], x=q, residual=x, **beside[1])
                h = runs[2](weight[2], x=x, **beside[2])
                x = runs[3](weight[3], x=h, residual=x, **beside[3])
            return x

        x = jnp.ones((rows, 4096), jnp.bfloat16)
        if arguments.compile:
            compile_one(step, [weights, given, x])
            return
        limit = sum(shape.nbytes for shape in shapes) / LIMIT * 1e6
        for mode, options in OPTIONS.items():
            compiled = jax.jit(step).lower(weights, given, x).compile(compiler_options=options)
            us = seconds_of(compiled, weights, given, x, repeats=16) / len(keys) * 1e6
            entry = {"dtype": jnp.dtype(dtype).name, "rows": rows, "mode": mode, "us": us, "limit_us": limit, "old": old}
            found["chains"].append(entry)
            say(f"layer {entry['dtype']} {rows} rows {mode} {'old' if old else ways}: {us:.1f} us (limit {limit:.1f})")

    if arguments.compile:
        from tests.aot import compiler

        compile_one = compiler()
        for dtype in (jnp.int8, jnp.int4, FP8):
            for shape in SHAPES:
                quantized = shape.quantized(dtype)
                for way in WAYS[shape.name][:1]:
                    weight = jax.ShapeDtypeStruct(quantized.weight, quantized.dtype)
                    given = jax.eval_shape(lambda key, shape=quantized: operands(shape, 1, key), jax.random.key(0))
                    print(f"case {quantized.name} {way}", flush=True)
                    compile_one(lambda w, g, r=product(quantized, way): r(w, **g), [weight, given])
                    best[quantized.name, 1] = (0, way)
        for shape in SHAPES:
            for dtype in (jnp.int8, jnp.int4):
                best[shape.quantized(dtype).name, 8] = (0, MANY[shape.name])
        jax.eval_shape(lambda: layers(jnp.int8, 1))
        jax.eval_shape(lambda: layers(jnp.int4, 8))
        return
    for dtype, share in ((jnp.int8, 0.4), (jnp.int4, 0.75)):
        for shape in SHAPES:
            trial(shape.quantized(dtype), 1, WAYS[shape.name], share)
        layers(dtype, 1)
        if arguments.old:
            layers(dtype, 1, old=True)
    for shape in SHAPES:
        eight = shape.quantized(jnp.int8)
        if (eight.name, 1) in best:
            trial(shape.quantized(FP8), 1, [best[eight.name, 1][1]], 0.85)
    layers(FP8, 1)
    for dtype in (jnp.int8, jnp.int4):
        for shape in SHAPES:
            trial(shape.quantized(dtype), 8, [MANY[shape.name], None], 1.0)
        layers(dtype, 8)
    say("done")


if __name__ == "__main__":
    main()
