"""Which forms of the skinny GEMM are right on this GPU, and whether a transposed iota is: about 30 s.

    PYTHONPATH=$PWD python skinny_diag.py
"""

import os
import sys
import time

sys.path[:0] = os.environ.get("PYTHONPATH", os.getcwd()).split(os.pathsep)

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from tests.pallas_kernels.skinny_gemm_cases import case, operands_of

START = time.perf_counter()
TRANSPOSED, ACC = plgpu.Layout.WGMMA_TRANSPOSED, plgpu.Layout.WGMMA


def say(name, text):
    print(f"{time.perf_counter() - START:5.1f} s  {name}: {text}", flush=True)


def wide(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def error(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.sqrt(((a - b) ** 2).mean() / (b**2).mean()))


def gemm(name, *args, **kwargs):
    try:
        run, shapes = case(*args, **kwargs)
        given = operands_of(shapes)
        y = jax.jit(run)(*given)
        with jax.default_matmul_precision("highest"):
            wanted = jax.jit(run.reference)(*wide(given))
        e, r = error(y, wanted), error(run.reference(*given), wanted)
        say(name, f"{'right' if e < 2 * r + 1e-3 else 'WRONG'} {e:.2e} (reference {r:.2e})")
    except Exception as failure:
        say(name, f"FAILED {type(failure).__name__}: {failure}"[:400])


def small(name, body, wanted, out):
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
    try:
        got = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(*out), compiler_params=params)()
        bad = int((np.asarray(got) != wanted).sum())
        say(name, f"{'right' if not bad else 'WRONG'}, {bad} of {wanted.size} differ")
    except Exception as failure:
        say(name, f"FAILED {type(failure).__name__}: {failure}"[:400])


def iota_matrix(o):
    v = plgpu.broadcasted_iota(jnp.int32, (64, 8), 1, layout=TRANSPOSED)
    o[...] = plgpu.layout_cast(v, ACC)


def iota_vector(o):
    v = jax.lax.broadcast_in_dim(jax.lax.broadcasted_iota(jnp.int32, (8,), 0), (64, 8), (1,))
    o[...] = plgpu.layout_cast(plgpu.layout_cast(v, TRANSPOSED), ACC)


tokens = np.broadcast_to(np.arange(8, dtype=np.int32), (64, 8))
print("predicted: the iota of a matrix in the transposed layout is WRONG in 256 of 512 (Mosaic's), all else right")
small("iota of a matrix, transposed", iota_matrix, tokens, ((64, 8), jnp.int32))
small("iota of a vector, broadcast, transposed", iota_vector, tokens, ((64, 8), jnp.int32))
rest = {"bias": True, "residual": True, "activation": "gelu"}
gemm("layer+scale+bias", 3, 1000, 832, norm="layer+scale+bias", **rest)
gemm("layer+scale", 3, 1000, 832, norm="layer+scale", **rest)
gemm("layer", 3, 1000, 832, norm="layer", **rest)
gemm("rms+scale+bias", 3, 1000, 832, norm="rms+scale+bias", **rest)
gemm("rms", 3, 1000, 832, norm="rms", **rest)
gemm("layer+scale+bias int4 g64", 3, 1000, 832, norm="layer+scale+bias", int4=64, **rest)
gemm("layer+scale+bias int8", 3, 1000, 800, norm="layer+scale+bias", int8=True, **rest)
gemm("int8", 3, 1000, 800, int8=True, **rest)
gemm("int4 g64", 3, 1000, 832, int4=64, **rest)
gemm("int4 g128", 3, 1000, 896, int4=128, **rest)
gemm("gated int4 g128 rms", 5, 1024, 1024, int4=128, gated=True, norm="rms+scale", activation="silu")
gemm("gated int8 rms", 5, 1024, 1024, int8=True, gated=True, norm="rms+scale", activation="silu")
gemm("48 rows", 48, 1600, 800, bias=True, activation="gelu")
gemm("48 rows layer", 48, 1600, 800, norm="layer+scale+bias", bias=True, activation="gelu")
gemm("quick_gelu", 4, 3072, 768, bias=True, activation="quick_gelu")
gemm("quick_gelu layer", 4, 3072, 768, norm="layer+scale+bias", bias=True, activation="quick_gelu")
gemm("gpt2-xl qkv", 1, 4800, 1600, norm="layer+scale+bias", bias=True)
gemm("gpt2-xl up", 8, 6400, 1600, norm="layer+scale+bias", bias=True, activation="gelu_tanh")
