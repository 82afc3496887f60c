"""The configurations of the skinny GEMM that are compiled ahead of time, by :mod:`tests.aot`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.skinny_gemm import InputNorm, Tuning, skinny_gemm

Case = tuple[Callable[..., Any], list[Any]]


def case(
    m: int,
    n: int,
    k: int,
    *,
    gated: bool = False,
    norm: str = "",
    bias: bool = False,
    activation: Any = None,
    residual: bool = False,
    dtype: Any = jnp.bfloat16,
    int8: bool = False,
    fp8: bool = False,
    int4: int = 0,
    tuning: Tuning | None = None,
) -> Case:
    """A product and its operands; ``norm`` is ``rms`` or ``layer``, then ``+scale``, ``+bias``; ``int4`` a group."""
    halves = (2,) if gated else ()
    shapes = {"x": (m, k), "weight": (*halves, n, k)}
    kind, *has = norm.split("+")
    shapes |= {name: (k,) for name in has}
    if bias:
        shapes["b"] = (*halves, n)
    if residual:
        shapes["residual"] = (m, n)

    if int8 or fp8:
        shapes["weight_scale"] = (*halves, n)
    if int4:
        shapes["weight_scale"] = (*halves, k // int4, n)
    dtypes: dict[str, Any] = dict.fromkeys(shapes, dtype)
    if int8 or fp8 or int4:
        narrow = jnp.int8 if int8 else jnp.float8_e4m3fn if fp8 else jnp.int4
        dtypes |= {"weight": narrow, "weight_scale": jnp.float32}

    def product(*arrays: jax.Array, kernel: bool) -> jax.Array:
        given = dict(zip(shapes, arrays, strict=True))
        normed: Any = None
        if kind:
            normed = InputNorm(kind=kind, eps=1e-5, scale=given.get("scale"), bias=given.get("bias"))  # type: ignore[arg-type]
        rest = {"norm": normed, "bias": given.get("b"), "activation": activation, "residual": given.get("residual")}
        rest["weight_scale"] = given.get("weight_scale")
        if kernel:
            rest |= {"implementation": "mosaic", "tuning": tuning}
        return skinny_gemm(given["x"], given["weight"], **rest)

    run: Any = lambda *arrays: product(*arrays, kernel=True)  # noqa: E731
    run.reference = lambda *arrays: product(*arrays, kernel=False)
    return run, [jax.ShapeDtypeStruct(shape, dtypes[name]) for name, shape in shapes.items()]


def operands_of(shapes: list[Any]) -> list[jax.Array]:
    """Random operands; the second, the weight, is small enough that results are about one."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    made = []
    for i, (key, shape) in enumerate(zip(keys, shapes, strict=True)):
        if shape.dtype == jnp.int4:
            made.append(jax.random.randint(key, shape.shape, -8, 8, jnp.int8).astype(jnp.int4))
        elif shape.dtype == jnp.int8:
            made.append(jax.random.randint(key, shape.shape, -127, 128, jnp.int8))
        elif shape.dtype == jnp.float8_e4m3fn:  # of every finite value as many, subnormal ones too
            value = lax.bitcast_convert_type(jax.random.bits(key, shape.shape, jnp.uint8), shape.dtype)
            made.append(jnp.where(jnp.isnan(value), jnp.zeros((), shape.dtype), value))
        elif shape.dtype == jnp.float32:  # the factors of the weight
            wide = {"int8": 73, "float8_e4m3fn": 100}.get(shapes[1].dtype.name, 4.6)
            made.append(jax.random.uniform(key, shape.shape, minval=0.5) / (wide * shapes[1].shape[-1] ** 0.5))
        else:
            normal = jax.random.normal(key, shape.shape, shape.dtype)
            made.append(normal * jnp.asarray(shape.shape[-1] ** -0.5 if i == 1 else 1.0, shape.dtype))
    return made


CASES: dict[str, Callable[[], Case]] = {}
for rows in (1, 16, 33, 64):
    CASES |= {
        f"7b qkv {rows}": functools.partial(case, rows, 12288, 4096, norm="rms+scale"),
        f"7b out {rows}": functools.partial(case, rows, 4096, 4096, residual=True),
        f"7b gate {rows}": functools.partial(case, rows, 11008, 4096, gated=True, norm="rms+scale", activation="silu"),
        f"7b down {rows}": functools.partial(case, rows, 4096, 11008, residual=True),
    }
    if rows != 33:
        CASES |= {
            f"7b int8 qkv {rows}": functools.partial(case, rows, 12288, 4096, norm="rms+scale", int8=True),
            f"7b int8 out {rows}": functools.partial(case, rows, 4096, 4096, residual=True, int8=True),
            f"7b int8 gate {rows}": functools.partial(
                case, rows, 11008, 4096, gated=True, norm="rms+scale", activation="silu", int8=True
            ),
            f"7b int8 down {rows}": functools.partial(case, rows, 4096, 11008, residual=True, int8=True),
        }
        CASES |= {
            f"7b fp8 qkv {rows}": functools.partial(case, rows, 12288, 4096, norm="rms+scale", fp8=True),
            f"7b fp8 out {rows}": functools.partial(case, rows, 4096, 4096, residual=True, fp8=True),
            f"7b fp8 gate {rows}": functools.partial(
                case, rows, 11008, 4096, gated=True, norm="rms+scale", activation="silu", fp8=True
            ),
            f"7b fp8 down {rows}": functools.partial(case, rows, 4096, 11008, residual=True, fp8=True),
        }
        CASES |= {
            f"7b int4 qkv {rows}": functools.partial(case, rows, 12288, 4096, norm="rms+scale", int4=128),
            f"7b int4 out {rows}": functools.partial(case, rows, 4096, 4096, residual=True, int4=128),
            f"7b int4 gate {rows}": functools.partial(
                case, rows, 11008, 4096, gated=True, norm="rms+scale", activation="silu", int4=128
            ),
            f"7b int4 down {rows}": functools.partial(case, rows, 4096, 11008, residual=True, int4=128),
        }
CASES |= {
    "int4 groups of 64": functools.partial(
        case, 3, 1000, 832, norm="layer+scale+bias", bias=True, residual=True, activation="gelu", int4=64
    ),
    "int8 ragged": functools.partial(
        case, 3, 1000, 800, norm="layer+scale+bias", bias=True, residual=True, activation="gelu", int8=True
    ),
    "fp8 ragged": functools.partial(
        case, 3, 1000, 800, norm="layer+scale+bias", bias=True, residual=True, activation="gelu", fp8=True
    ),
    "fp8 float16": functools.partial(case, 5, 1024, 1024, norm="rms+scale", dtype=jnp.float16, fp8=True),
    "int8 float16": functools.partial(
        case, 1, 1024, 1024, norm="layer+scale+bias", dtype=jnp.float16, int8=True, bias=True, activation="gelu_tanh"
    ),
    "int4 float16, gated, split": functools.partial(
        case, 2, 1024, 2048, gated=True, norm="rms+scale", dtype=jnp.float16, int4=64, activation="silu"
    ),
    "int8, K of 32 bytes": functools.partial(case, 1, 64, 32, int8=True),
    "int8, one row, wgmma": functools.partial(case, 1, 4096, 4096, norm="rms+scale", int8=True, tuning=Tuning()),
    "int4, gated, 8 rows, wgmma": functools.partial(
        case, 8, 11008, 4096, gated=True, activation="silu", int4=128, tuning=Tuning(stages=3)
    ),
    "gpt2-xl qkv": functools.partial(case, 1, 4800, 1600, norm="layer+scale+bias", bias=True),
    "gpt2-xl up": functools.partial(
        case, 8, 6400, 1600, norm="layer+scale+bias", bias=True, activation="gelu_tanh"
    ),
    "gpt2-xl head": functools.partial(case, 1, 50257, 1600, norm="layer+scale+bias"),
    "odd vocabulary, int8": functools.partial(case, 2, 32003, 4096, norm="rms+scale", int8=True),
    "odd vocabulary, fp8": functools.partial(case, 1, 250002, 1024, fp8=True),
    "odd vocabulary, int4": functools.partial(case, 1, 32003, 4096, norm="rms+scale", int4=128),
    "int8, K a multiple of 16": functools.partial(case, 3, 1000, 1008, norm="rms+scale", int8=True),
    "ragged": functools.partial(case, 3, 1000, 144, bias=True, residual=True, activation="gelu"),
    "gated gelu bias": functools.partial(
        case, 16, 4096, 2048, gated=True, norm="rms+scale", bias=True, activation="gelu", residual=True
    ),
    "float16": functools.partial(
        case, 4, 4096, 4096, norm="rms+scale", activation="relu", bias=True, dtype=jnp.float16
    ),
    "tensor parallel": functools.partial(case, 20, 4096, 1376, residual=True),
    "48 rows": functools.partial(case, 48, 1600, 800, norm="layer+scale+bias", bias=True, activation="gelu"),
    "quick_gelu": functools.partial(case, 4, 3072, 768, norm="layer+scale+bias", activation="quick_gelu", bias=True),
}  # fmt: skip
