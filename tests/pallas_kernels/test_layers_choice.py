"""When all layers are one kernel, and that this is when the kernel accepts them."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.choices import Device
from pallas_kernels.decoder_layers import decoder_layers
from pallas_kernels.layers_choice import MAX_LAYER_ROWS, MAX_LAYER_TOKENS, layers_choice, layers_problem
from tests.pallas_kernels.layer_cases import Case, operands, static

CPU, AMPERE, HOPPER, BLACKWELL = Device("cpu"), Device("gpu", "8.0"), Device("gpu", "9.0"), Device("gpu", "10.0")


def test_few_rows_on_hopper():
    assert layers_choice(HOPPER, rows=MAX_LAYER_ROWS, problem=None).implementation == "mosaic"
    for on, rows, why in (
        (HOPPER, MAX_LAYER_ROWS + 1, "rows"), (HOPPER, 0, "there are no rows"), (CPU, 1, "this is cpu"),
        (AMPERE, 1, "8.0"), (BLACKWELL, 1, "10.0"),
    ):  # fmt: skip
        chosen = layers_choice(on, rows=rows, problem=None)
        assert (chosen.implementation, chosen.compiler) == ("apart", "XLA")
        assert why in chosen.reason


def test_long_contexts_are_served_operation_by_operation():
    assert layers_choice(HOPPER, rows=1, problem=None, tokens=MAX_LAYER_TOKENS).implementation == "mosaic"
    chosen = layers_choice(HOPPER, rows=1, problem=None, tokens=MAX_LAYER_TOKENS + 64)
    assert chosen.implementation == "apart"
    assert "beyond 4096 tokens" in chosen.reason


def test_a_problem_is_the_reason():
    chosen = layers_choice(HOPPER, rows=1, problem="a softcap of scores")
    assert chosen.implementation == "apart"
    assert "the kernel does not run a softcap of scores" in str(chosen)


def test_a_smaller_gpu_would_wait_for_ever():
    for cores, wanted in ((132, "mosaic"), (144, "mosaic"), (114, "apart"), (None, "mosaic")):
        chosen = layers_choice(Device("gpu", "9.0", cores), rows=1, problem=None)
        assert chosen.implementation == wanted
    assert "on 114 SMs" in layers_choice(Device("gpu", "9.0", 114), rows=1, problem=None).reason


PROBLEMS = {
    "none": (Case(), None),
    "int4": (Case(weight="int4", wide=384), None),
    "float32": (Case(dtype="float32"), "float32"),
    "narrow heads": (Case(dim=32), "head_dim 32"),
    "heads that no plan is made for": (Case(dim=512), "head_dim 512"),
    "many queries a key": (Case(per_group=9), "9 query heads a key head"),
    "odd inputs": (Case(hidden=260), "260 inputs"),
    "wide": (Case(wide=1 << 17), "262144 channels"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernel_accepts_just_what_has_no_problem(name):
    case, wanted = PROBLEMS[name]
    arguments, rotary = jax.eval_shape(lambda: operands(case, None))
    problem = layers_problem(*arguments[:4], rotary=rotary, **static(case))
    assert problem is None if wanted is None else wanted in problem

    def run(arguments, rotary):
        return decoder_layers(*arguments, rotary=rotary, implementation="mosaic", **static(case))

    # Of heads that it does not know no plan can be made at all.
    with contextlib.nullcontext() if wanted is None else pytest.raises((ValueError, ZeroDivisionError)):
        jax.eval_shape(run, arguments, rotary)


def test_a_cache_of_8_bits_is_a_problem():
    case = Case()
    (x, layers, caches, tables, _), rotary = jax.eval_shape(lambda: operands(case, None))
    narrow = jax.tree.map(lambda like: jax.ShapeDtypeStruct(like.shape, jnp.int8), caches)
    assert "int8" in layers_problem(x, layers, narrow, tables, rotary=rotary, **static(case))
