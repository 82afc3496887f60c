"""What is chosen is what runs, and the table says so."""

from __future__ import annotations

import contextlib
import json

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pallas_kernels
from pallas_kernels.choices import (
    DECODE_HEADS,
    DECODE_NARROW_HEADS,
    MAX_LINEAR_ROWS,
    MAX_REDUCE_HEADS,
    Device,
    Shapes,
    attention_choice,
    choices,
    compiling_for,
    device,
    linear_choice,
)
from pallas_kernels.decode_attention import decode_attention
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
        (HOPPER, 2, 1, 128, "bfloat16", None, True, "dot"),
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
    st.sampled_from(["bfloat16", "float16", "float32"]), st.sampled_from(["bfloat16", "float16", "int8", "int4"]),
)  # fmt: skip
def test_the_kernel_of_products_is_chosen_only_where_it_accepts_the_operands(rows, k, n, unit, dtype, weight):
    """And refused only where it would refuse them."""
    inputs, outputs, groups = k * unit, 8 * n if unit > 1 else n, weight == "int4"
    if groups:
        inputs = -(-inputs // 64) * 64
    chosen = linear_choice(HOPPER, rows=rows, inputs=inputs, outputs=outputs, dtype=dtype, weight_dtype=weight)
    shapes = {"x": ((rows, inputs), dtype), "weight": ((outputs, inputs), weight)}
    if weight in ("int8", "int4"):
        shapes["weight_scale"] = ((inputs // 64, outputs) if groups else (outputs,), "float32")
    operands = {name: jax.ShapeDtypeStruct(*given) for name, given in shapes.items()}
    with (
        contextlib.nullcontext() if chosen.implementation == "mosaic" else pytest.raises(ValueError, match="cannot run")
    ):
        jax.eval_shape(lambda kw: skinny_gemm(**kw, implementation="mosaic"), operands)


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
    assert ("decode_attention_kernel" in chosen) == (said == "mosaic")
    if said != "mosaic":
        assert chosen == program(said)
        assert program("dot") != program("reduce")


def test_the_kernel_is_asked_for_one_token_only():
    arrays = [jnp.zeros((1, 2, 1, 1, 64)), jnp.zeros((2, 1, 64, 64)), jnp.zeros((2, 1, 64, 64))]
    with pytest.raises(ValueError, match="'mosaic' runs one query token a sequence, got 2"):
        pallas_kernels.paged_attention(
            *arrays, jnp.zeros((1, 1), jnp.int32), jnp.arange(2)[None], scale=1.0, implementation="mosaic"
        )


def test_the_target_is_the_default_device_unless_another_is_named():
    assert device() == Device.of(jax.devices()[0]) == CPU
    with compiling_for(HOPPER):
        with compiling_for(AMPERE):
            assert device() == AMPERE
        assert device() == HOPPER
    assert device() == CPU
    assert [on.hopper for on in (CPU, AMPERE, HOPPER, BLACKWELL, Device("gpu"))] == [False, False, True, False, False]


def test_the_table_lists_every_case_where_there_is_no_model():
    assert [c.op for c in choices(AMPERE) if "decode" in c.op] == [
        "decode attention with up to 2 query heads a key",
        "decode attention with more",
    ]
    assert [c.op for c in choices(CPU) if "decode" in c.op] == ["decode attention"]
    assert not [c for c in choices() if c.compiler != "XLA"], "this is a CPU"


def test_the_table_of_a_model_says_which_product_is_apart_and_why():
    products = (("attention.qkv", 4096, 12288, "int8"), ("mlp.up", 4096, 11007, "int8"))
    model = Shapes(dtype="bfloat16", heads_per_key=1, head_dim=128, products=products, norm="layer")
    said = {choice.op: choice for choice in choices(HOPPER, model)}
    assert said["products of up to 64 rows (attention.qkv)"].implementation == "mosaic"
    odd = said["products of up to 64 rows (mlp.up)"]
    assert odd.implementation == "dot"
    assert "does not run 11007 outputs, which 8 does not divide" in odd.reason
    assert said["products of more rows"].implementation == "dot"
    older = {choice.op: choice for choice in choices(AMPERE, model)}
    assert "the kernel is made for Hopper, and this is gpu of compute capability 8.0" in str(
        older["products of up to 64 rows"]
    )


def test_the_table_says_where_norms_are_computed():
    def norms(on: Device, kind: str) -> str:
        model = Shapes(dtype="bfloat16", heads_per_key=1, head_dim=128, norm=kind)
        return next(choice.implementation for choice in choices(on, model) if choice.op.startswith("norms"))

    assert norms(HOPPER, "rms") == "mosaic"
    assert norms(AMPERE, "rms") == norms(CPU, "layer") == "jnp"


def test_a_choice_reads_as_a_sentence_and_is_json():
    choice = attention_choice(AMPERE, query_tokens=1, heads_per_key=1, head_dim=128, dtype="bfloat16")
    assert str(choice).startswith("decode attention: reduce (XLA), because the kernel is made for Hopper")
    assert json.loads(json.dumps(choice.to_dict()))["implementation"] == "reduce"
