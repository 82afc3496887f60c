"""What is chosen is what runs, and the table says so."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels.choice_table import Shapes, choices
from pallas_kernels.choices import (
    DECODE_HEADS,
    DECODE_NARROW_HEADS,
    MAX_LINEAR_ROWS,
    MAX_REDUCE_HEADS,
    PREFILL_HEADS,
    Device,
    attention_choice,
    compiling_for,
    device,
    linear_choice,
    linear_problem,
    qkv_choice,
    qkv_problem,
)
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.qkv_gemm import qkv_gemm
from pallas_kernels.skinny_gemm import skinny_gemm

CPU, AMPERE, HOPPER, BLACKWELL = Device("cpu"), Device("gpu", "8.0"), Device("gpu", "9.0"), Device("gpu", "10.0")
MANY = MAX_REDUCE_HEADS + 1


@pytest.mark.parametrize(
    ("on", "tokens", "heads", "dim", "dtype", "kv_dtype", "paged", "expected"),
    [
        (HOPPER, 1, 1, 128, "bfloat16", None, True, "mosaic"),
        (HOPPER, 1, 8, 80, "float16", "float16", True, "mosaic"),
        (HOPPER, 1, 1, 128, "float32", None, True, "reduce"),
        (HOPPER, 1, MANY, 128, "float32", None, True, "dot"),
        (HOPPER, 1, 1, 72, "bfloat16", None, True, "reduce"),
        (HOPPER, 1, 65, 128, "bfloat16", None, True, "dot"),
        (HOPPER, 1, 1, 128, "bfloat16", "float16", True, "reduce"),
        (HOPPER, 1, 48, 128, "bfloat16", "int8", True, "mosaic"),
        (HOPPER, 1, 49, 128, "bfloat16", "int8", True, "dot"),
        (HOPPER, 1, 4, 64, "float16", "float8_e4m3fn", True, "mosaic"),
        (HOPPER, 1, 1, 96, "bfloat16", "int8", True, "reduce"),
        (HOPPER, 2, 1, 128, "bfloat16", "int8", True, "dot"),
        (AMPERE, 1, 1, 128, "bfloat16", "int8", True, "reduce"),
        (HOPPER, 1, 1, 128, "bfloat16", None, False, "reduce"),
        (HOPPER, 2, 1, 128, "bfloat16", None, True, "mosaic"),
        (HOPPER, 512, 71, 256, "float16", "float16", True, "mosaic"),
        (HOPPER, 512, 1, 72, "bfloat16", None, True, "dot"),
        (HOPPER, 512, 1, 128, "float32", None, True, "dot"),
        (HOPPER, 512, 1, 128, "bfloat16", "float16", True, "dot"),
        (HOPPER, 512, 1, 128, "bfloat16", None, False, "dot"),
        (AMPERE, 512, 1, 128, "bfloat16", None, True, "dot"),
        (BLACKWELL, 512, 1, 128, "bfloat16", None, True, "dot"),
        (AMPERE, 1, MAX_REDUCE_HEADS, 128, "bfloat16", None, True, "reduce"),
        (AMPERE, 1, MANY, 128, "bfloat16", None, True, "dot"),
        (BLACKWELL, 1, 1, 128, "bfloat16", None, True, "reduce"),
        (CPU, 1, 1, 128, "bfloat16", None, True, "dot"),
        (CPU, 16, 8, 128, "bfloat16", None, True, "dot"),
    ],
)
def test_attention_is_chosen_by_device_and_shape(on, tokens, heads, dim, dtype, kv_dtype, paged, expected):
    chosen = attention_choice(
        on, query_tokens=tokens, heads_per_key=heads, head_dim=dim, dtype=dtype, kv_dtype=kv_dtype, paged=paged
    )
    assert chosen.implementation == expected


@pytest.mark.parametrize(
    ("on", "rows", "inputs", "outputs", "dtype", "weight", "expected"),
    [
        (HOPPER, 1, 4096, 12288, "bfloat16", "bfloat16", "mosaic"),
        (HOPPER, MAX_LINEAR_ROWS, 4096, 12288, "float16", "float16", "mosaic"),
        (HOPPER, MAX_LINEAR_ROWS + 1, 4096, 12288, "bfloat16", "bfloat16", "dot"),
        (HOPPER, 1, 4096, 12288, "bfloat16", "int8", "mosaic"),
        (HOPPER, 8, 4096, 12288, "bfloat16", "float8_e4m3fn", "mosaic"),
        (HOPPER, 1, 4112, 12288, "bfloat16", "float8_e4m3fn", "dot"),
        (HOPPER, 1, 4096, 12288, "bfloat16", "int4", "mosaic"),
        (HOPPER, 1, 4096, 12288, "float32", "float32", "dot"),
        (HOPPER, 1, 4096, 12288, "float16", "bfloat16", "dot"),
        (HOPPER, 1, 4096, 12284, "bfloat16", "bfloat16", "dot"),
        (HOPPER, 1, 4104, 12288, "bfloat16", "bfloat16", "dot"),
        (HOPPER, 0, 4096, 12288, "bfloat16", "bfloat16", "dot"),
        (AMPERE, 1, 4096, 12288, "bfloat16", "bfloat16", "dot"),
        (BLACKWELL, 1, 4096, 12288, "bfloat16", "bfloat16", "dot"),
        (CPU, 1, 4096, 12288, "bfloat16", "bfloat16", "dot"),
    ],
)
def test_products_are_chosen_by_device_shape_and_dtype(on, rows, inputs, outputs, dtype, weight, expected):
    chosen = linear_choice(on, rows=rows, inputs=inputs, outputs=outputs, dtype=dtype, weight_dtype=weight)
    assert chosen.implementation == expected
    assert chosen.compiler == {"mosaic": "Mosaic GPU", "dot": "XLA"}[expected]


@given(
    st.integers(1, 80), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 16, 64]),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.sampled_from(["bfloat16", "float16", "int8", "int4", "float8_e4m3fn"]),
)  # fmt: skip
def test_the_kernel_of_products_is_chosen_only_where_it_accepts_the_operands(rows, k, n, unit, dtype, weight):
    """And not chosen only for more rows than it has been timed with, or for what is named."""
    inputs, outputs, groups = k * unit, 8 * n if unit > 1 else n, weight == "int4"
    if groups:
        inputs = -(-inputs // 64) * 64
    chosen = linear_choice(HOPPER, rows=rows, inputs=inputs, outputs=outputs, dtype=dtype, weight_dtype=weight)
    shapes = {"x": ((rows, inputs), dtype), "weight": ((outputs, inputs), weight)}
    if weight in ("int8", "int4", "float8_e4m3fn"):
        shapes["weight_scale"] = ((inputs // 64, outputs) if groups else (outputs,), "float32")
    operands = {name: jax.ShapeDtypeStruct(*given) for name, given in shapes.items()}
    if chosen.implementation == "mosaic":
        jax.eval_shape(lambda kw: skinny_gemm(**kw, implementation="mosaic"), operands)
    else:
        problem = linear_problem(dtype, weight, inputs=inputs, outputs=outputs)
        assert rows > MAX_LINEAR_ROWS or (problem is not None and problem in chosen.reason)


@pytest.mark.parametrize(
    ("on", "changes", "why"),
    [
        (HOPPER, {}, None),
        (HOPPER, {"rotary": None, "head_dim": 64}, None),
        (HOPPER, {"rows": MAX_LINEAR_ROWS}, None),
        (HOPPER, {"weight_dtype": "int8"}, "quantized weights has a kernel of its own"),
        (HOPPER, {"weight_dtype": "float8_e4m3fn"}, "quantized weights has a kernel of its own"),
        (HOPPER, {"weight_dtype": "int4", "rows": 8}, "which does not write the cache"),
        (HOPPER, {"weight_dtype": "int4", "rows": 17}, "beyond 16 rows the product is XLA's"),
        (HOPPER, {"rows": MAX_LINEAR_ROWS + 1}, f"beyond {MAX_LINEAR_ROWS} rows the product is XLA's"),
        (HOPPER, {"rows": 0}, "there are no rows"),
        (HOPPER, {"kv_dtype": "int8"}, "keys and values of int8 with x of bfloat16"),
        (HOPPER, {"head_dim": 64}, "rotated heads of 64, which 128 does not divide"),
        (HOPPER, {"head_dim": 80, "rotary": None}, "heads of 80, which 64 does not divide"),
        (HOPPER, {"rotary": "partial"}, "partial rotary embedding"),
        (HOPPER, {"rotary": "interleaved"}, "interleaved rotary embedding"),
        (HOPPER, {"head_norms": True}, "norms of queries and keys"),
        (HOPPER, {"inputs": 4104}, "4104 inputs, which 16 does not divide"),
        (AMPERE, {}, "the kernel is made for Hopper, and this is gpu of compute capability 8.0"),
    ],
    ids=str,
)
def test_query_key_and_value_are_one_kernel_or_the_choice_says_why_not(on, changes, why):
    asked = {"rows": 1, "inputs": 4096, "head_dim": 128, "dtype": "bfloat16", "weight_dtype": "bfloat16",
             "kv_dtype": "bfloat16", "rotary": "halves"}  # fmt: skip
    chosen = qkv_choice(on, **asked | changes)
    assert chosen.implementation == ("apart" if why else "mosaic")
    assert (why or "the kernel of the product rotates and writes") in chosen.reason
    assert chosen.compiler == ("XLA" if why else "Mosaic GPU")


@given(
    st.integers(1, 80), st.integers(1, 40), st.integers(1, 5), st.sampled_from([16, 64]), st.sampled_from([32, 64]),
    st.booleans(), st.sampled_from(["bfloat16", "float32"]), st.sampled_from(["bfloat16", "int8", "int4"]),
)  # fmt: skip
def test_that_kernel_is_chosen_only_where_it_accepts_the_operands(rows, k, heads, unit, half, turned, dtype, weight):
    inputs, dim = k * unit, half * heads
    inputs = -(-inputs // 64) * 64 if weight == "int4" else inputs
    about = {"inputs": inputs, "head_dim": dim, "rotary": "halves" if turned else None}
    chosen = qkv_choice(HOPPER, rows=rows, dtype=dtype, weight_dtype=weight, kv_dtype=dtype, **about)
    if chosen.implementation == "apart":
        problem = qkv_problem(dtype, weight, dtype, **about)
        quantized = problem is None and weight != dtype and rows <= 8 and "a kernel of its own" in chosen.reason
        assert rows > MAX_LINEAR_ROWS or quantized or (problem is not None and problem in chosen.reason)
        return
    assert weight == dtype or rows > 8
    f = jax.ShapeDtypeStruct
    cache, channels = (f((9, 2, 64, dim), dtype),) * 2, (2, 3, dim)
    scale = {} if weight == dtype else {
        "weight_scale": f((*((inputs // 64,) if weight == "int4" else ()), *channels), "float32")
    }  # fmt: skip
    angle = f((rows, 1, dim // 2), "float32")
    jax.eval_shape(
        lambda *a, rest: qkv_gemm(*a, **rest, implementation="mosaic"),
        f((rows, 1, inputs), dtype), f((*channels, inputs), weight), cache, f((rows, 2), "int32"),
        f((rows, 1), "int32"), rest=scale | ({"rotary": (angle, angle)} if turned else {}),
    )  # fmt: skip


@pytest.mark.parametrize("kv", [None, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 72, 80, 256])
@pytest.mark.parametrize("heads", [1, 32, 33, 65, 80, 81])
def test_the_kernel_of_decode_attention_is_chosen_only_where_it_accepts_the_operands(dtype, kv, dim, heads):
    chosen = attention_choice(HOPPER, query_tokens=1, heads_per_key=heads, head_dim=dim, dtype=dtype, kv_dtype=kv)
    blocks = (9, 2, 64, dim)
    shapes = [((2, 2, heads, dim), dtype), *[(blocks, kv or dtype)] * 2, ((2, 3), jnp.int32), ((2,), jnp.int32)]
    operands = [jax.ShapeDtypeStruct(*given) for given in shapes]
    factors = {} if kv is None else {f"{name}_scales": jnp.ones(blocks[:3]) for name in ("key", "value")}
    runs = dtype == jnp.bfloat16 and heads <= (DECODE_HEADS if kv is None else DECODE_NARROW_HEADS).get(dim, 0)
    assert (chosen.implementation == "mosaic") == runs
    with contextlib.nullcontext() if runs else pytest.raises(ValueError, match="does not run"):
        jax.eval_shape(lambda *a: decode_attention(*a, scale=1.0, implementation="mosaic", **factors), *operands)


@pytest.mark.parametrize("on", [CPU, AMPERE, HOPPER], ids=str)
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 4), (8, 1), (8, 4)])
def test_attention_runs_what_the_table_says(on, tokens, heads):
    shapes = [(1, tokens, 2, heads, 64), (3, 2, 64, 64), (3, 2, 64, 64)]
    arrays = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
    rest = [jnp.zeros((1, 2), jnp.int32), jnp.arange(tokens)[None]]

    def program(implementation: str | None) -> str:
        run = lambda *a: pallas_kernels.paged_attention(*a, scale=1.0, implementation=implementation)  # noqa: E731
        with compiling_for(on):
            return str(jax.make_jaxpr(run)(*arrays, *rest))

    op = "decode attention" if tokens == 1 else "prefill attention"
    model = Shapes(dtype="bfloat16", heads_per_key=heads, head_dim=64)
    said = {choice.op: choice.implementation for choice in choices(on, model)}[op]
    chosen = program(None)
    assert (op.replace(" ", "_") + "_kernel" in chosen) == (said == "mosaic")
    if said != "mosaic":
        assert chosen == program(said)
        assert program("dot") != program("reduce")


@pytest.mark.parametrize("kv", [None, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("dim", [64, 72, 80, 96, 256, 512])
def test_the_kernel_of_prefill_attention_is_chosen_only_where_it_accepts_the_operands(dtype, kv, dim):
    chosen = attention_choice(HOPPER, query_tokens=5, heads_per_key=3, head_dim=dim, dtype=dtype, kv_dtype=kv)
    blocks = (9, 2, 64, dim)
    shapes = [((2, 5, 2, 3, dim), dtype), *[(blocks, kv or dtype)] * 2, ((2, 3), jnp.int32), ((2, 5), jnp.int32)]
    operands = [jax.ShapeDtypeStruct(*given) for given in shapes]
    factors = {} if kv is None else {f"{name}_scales": jnp.ones(blocks[:3]) for name in ("key", "value")}
    runs = dtype != jnp.float32 and kv is None and dim in PREFILL_HEADS
    assert (chosen.implementation == "mosaic") == runs
    run = functools.partial(pallas_kernels.paged_attention, scale=1.0, implementation="mosaic", **factors)
    with contextlib.nullcontext() if runs else pytest.raises(ValueError, match="does not run"):
        jax.eval_shape(run, *operands)


def test_the_kernel_of_prefill_attention_can_be_switched_off(monkeypatch):
    asked = {"query_tokens": 5, "heads_per_key": 1, "head_dim": 128, "dtype": "bfloat16"}
    module = importlib.import_module("pallas_kernels.choices")  # by its name: the package has a function of that name
    monkeypatch.setattr(module, "PREFILL_KERNEL", True)
    assert attention_choice(HOPPER, **asked).implementation == "mosaic"
    monkeypatch.setattr(module, "PREFILL_KERNEL", False)
    chosen = attention_choice(HOPPER, **asked)
    assert chosen.implementation == "dot"
    assert "the kernel is switched off" in chosen.reason


def test_the_target_is_the_default_device_unless_another_is_named():
    assert device() == Device.of(jax.devices()[0]) == CPU
    with compiling_for(HOPPER):
        with compiling_for(AMPERE):
            assert device() == AMPERE
        assert device() == HOPPER
    assert device() == CPU
    assert [on.hopper for on in (CPU, AMPERE, HOPPER, BLACKWELL, Device("gpu"))] == [False, False, True, False, False]


def test_a_choice_reads_as_a_sentence_and_is_json():
    choice = attention_choice(AMPERE, query_tokens=1, heads_per_key=1, head_dim=128, dtype="bfloat16")
    assert str(choice).startswith("decode attention: reduce (XLA), because the kernel is made for Hopper")
    assert json.loads(json.dumps(choice.to_dict()))["implementation"] == "reduce"
