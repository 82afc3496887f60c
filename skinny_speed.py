"""First look at the kernel with large tiles: one row, four products, int8, int4, bf16, fp8.

PYTHONPATH=$PWD python skinny_speed.py [seconds] [out.json]
"""

import itertools
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "benchmarks")]

import jax.numpy as jnp
import skinny_gemm as bench

seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 45.0
run = bench.Bench(Path(sys.argv[2]) if len(sys.argv) > 2 else None, seconds, rehearse=False)
run.limits()
from tests.pallas_kernels.skinny_gemm_cases import CASES, operands_of
import jax

qkv, out, up, down = bench.SHAPES
for count in (2, 5, 10):
    for dtype in (bench.BF16, jnp.int8, jnp.int4):
        total = 0.0
        first = {2: 0, 5: 2, 10: 5}[count]
        for shape in (qkv, out, up, down):
            if run.late():
                break
            s = shape if dtype == bench.BF16 else shape.quantized(dtype)
            run.products(s, 1, itertools.islice(bench.tunings(s, 1), first, count))
            found = run.found["products"][s.name][-1]
            total += found.get("best", {}).get("us", float("nan"))
        run.save(f"== {jnp.dtype(dtype).name}: four products {total:.1f} us")
for name in ("gpt2-xl up", "int4 groups of 64"):
    if not run.late():
        go, shapes = CASES[name]()
        given = operands_of(shapes)
        with jax.default_matmul_precision("highest"):
            wanted = jax.jit(go.reference)(*bench.widened(given))
        run.save(
            f"{name}: error {bench.error(jax.jit(go)(*given), wanted):.2e}, reference {bench.error(go.reference(*given), wanted):.2e}"
        )
