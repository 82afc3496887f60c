"""The configurations of query, key and value that are compiled ahead of time, by :mod:`tests.aot`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.qkv_gemm import Tuning, qkv_gemm
from pallas_kernels.skinny_gemm import InputNorm
from tests.pallas_kernels import skinny_gemm_cases

Case = tuple[Callable[..., Any], list[Any]]
NARROW = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}
WIDTH = 2
"""Blocks of a sequence."""


def case(
    rows: int,
    groups: int,
    per_group: int,
    dim: int,
    k: int,
    *,
    rotary: bool = True,
    norm: str = "rms+scale",
    bias: bool = False,
    dtype: Any = jnp.bfloat16,
    weight: str = "",
    group: int = 128,
    tuning: Tuning | None = None,
) -> Case:
    """One token of each of ``rows`` sequences; ``weight`` is empty or a key of :data:`NARROW`."""
    channels, blocks = (groups, per_group + 2, dim), (rows * WIDTH + 1, groups, 64, dim)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "x": ((rows, 1, k), dtype), "weight": ((*channels, k), NARROW.get(weight, dtype)),
        "keys": (blocks, dtype), "values": (blocks, dtype),
        "tables": ((rows, WIDTH), jnp.int32), "positions": ((rows, 1), jnp.int32),
    }  # fmt: skip
    kind, *has = norm.split("+")
    shapes |= {name: ((k,), dtype) for name in has}
    if bias:
        shapes["b"] = (channels, dtype)
    if rotary:
        shapes |= {name: ((rows, 1, dim // 2), jnp.float32) for name in ("cos", "sin")}
    if weight:
        shapes["weight_scale"] = ((k // group, *channels) if weight == "int4" else channels, jnp.float32)

    def compute(*arrays: jax.Array, kernel: bool) -> Any:
        given = dict(zip(shapes, arrays, strict=True))
        normed: Any = None
        if kind:
            normed = InputNorm(kind=kind, eps=1e-5, scale=given.get("scale"), bias=given.get("bias"))  # type: ignore[arg-type]
        return qkv_gemm(
            given["x"], given["weight"], (given["keys"], given["values"]), given["tables"], given["positions"],
            norm=normed, bias=given.get("b"), rotary=(given["cos"], given["sin"]) if rotary else None,
            weight_scale=given.get("weight_scale"), tuning=tuning, implementation="mosaic" if kernel else "reference",
        )  # fmt: skip

    run: Any = functools.partial(compute, kernel=True)
    run.names = list(shapes)
    run.reference = functools.partial(compute, kernel=False)
    return run, [jax.ShapeDtypeStruct(shape, kept) for shape, kept in shapes.values()]


def operands_of(names: list[str], shapes: list[Any], seed: int = 0) -> list[jax.Array]:
    """Random operands; every third sequence from the second on is idle."""
    rng = np.random.default_rng(seed)
    asked = dict(zip(names, shapes, strict=True))
    real = {name: shape for name, shape in asked.items() if shape.dtype != jnp.int32}
    made = dict(zip(real, skinny_gemm_cases.operands_of(list(real.values())), strict=True))
    (rows, width), blocks = asked["tables"].shape, made["keys"].shape[0]
    made["tables"] = jnp.asarray(rng.permutation(blocks)[: rows * width].reshape(rows, width), jnp.int32)
    places = rng.integers(0, width * 64, (rows, 1))
    places[1::3] = -1
    made["positions"] = jnp.asarray(places, jnp.int32)
    if "cos" in made:
        angle = jnp.asarray(rng.uniform(-3, 3, made["cos"].shape), jnp.float32)
        made |= {"cos": jnp.cos(angle), "sin": jnp.sin(angle)}
    return [made[name] for name in names]


layer = {"norm": "layer+scale+bias", "bias": True, "rotary": False}
CASES: dict[str, Callable[[], Case]] = {}
for rows in (1, 16, 64):
    CASES |= {
        f"7b {rows}": functools.partial(case, rows, 32, 1, 128, 4096),
        f"8 key heads {rows}": functools.partial(case, rows, 8, 4, 128, 4096),
        f"opt-6.7b {rows}": functools.partial(case, rows, 32, 1, 128, 4096, **layer),  # type: ignore[arg-type]
        f"int8 {rows}": functools.partial(case, rows, 32, 1, 128, 4096, weight="int8"),
        f"int4 {rows}": functools.partial(case, rows, 32, 1, 128, 4096, weight="int4"),
    }
CASES |= {
    "gpt2-xl": functools.partial(case, 3, 25, 1, 64, 1600, **layer),  # type: ignore[arg-type]
    "gemma, heads of 256": functools.partial(case, 5, 8, 2, 256, 3584),
    "fp8": functools.partial(case, 2, 8, 4, 128, 4096, weight="fp8"),
    "int4, groups of 64, bias": functools.partial(case, 9, 4, 2, 128, 832, weight="int4", group=64, bias=True),
    "int8, heads of 256": functools.partial(case, 8, 2, 2, 256, 2048, weight="int8", bias=True),
    "float16, bias": functools.partial(case, 7, 4, 7, 128, 3584, dtype=jnp.float16, bias=True),
    "tensor parallel": functools.partial(case, 20, 1, 8, 128, 8192),
    "K a multiple of 16": functools.partial(case, 4, 2, 1, 128, 336),
    "no norm": functools.partial(case, 8, 2, 1, 128, 512, norm=""),
    "32 rows": functools.partial(case, 32, 8, 4, 128, 4096),
    "fused LayerNorm": functools.partial(
        case, 2, 32, 1, 128, 4096, **layer, tuning=Tuning(rows=64, tile_k=256, stages=2, splits=2)  # type: ignore[arg-type]
    ),
    "no overlap": functools.partial(
        case, 1, 32, 1, 128, 4096, tuning=Tuning(rows=64, tile_k=128, stages=2, splits=4, overlap=False)
    ),
}  # fmt: skip
