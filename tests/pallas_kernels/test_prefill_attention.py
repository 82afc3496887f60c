from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BLOCK_SIZE
from pallas_kernels import prefill_attention as module
from pallas_kernels.choices import PREFILL_HEADS, Device, compiling_for
from pallas_kernels.prefill_attention import SMEM_BYTES, prefill_attention, prefill_config
from pallas_kernels.prefill_kernel import PrefillConfig
from tests.decode_oracle import arguments, noise
from tests.prefill_oracle import filled, naive_chunk

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 70},
    {"softcap": 2.0, "sinks": True},
    {"slopes": True, "scaled": True, "softcap": 5.0, "window": 200, "sinks": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("as_positions", [True, False])
def test_the_reference_is_the_naive_one(options, as_positions):
    batch, tokens, groups, heads, dim, width = 4, 130, 2, 3, 8, 5
    starts, lengths = np.asarray([0, 7, 64, 150], np.int32), np.asarray([130, 1, 0, 100], np.int32)
    order = np.random.default_rng(0).permutation(batch * width) + 1
    keys, values, tables = filled(batch, groups, dim, order.reshape(batch, width).astype(np.int32), starts, lengths)
    theirs, ours = arguments(options, groups, heads)
    query = noise(batch, tokens, groups, heads, dim)
    places = np.arange(tokens, dtype=np.int32)
    real = places < lengths[:, None]
    where = np.where(real, starts[:, None] + places, -1) if as_positions else (starts, lengths)
    found = prefill_attention(query, keys, values, tables, where, implementation="reference", **ours)
    expected = naive_chunk(query, keys, values, tables, starts, lengths, **theirs)
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=2e-5, atol=2e-5)


def shapes(**changes: Any) -> list[Any]:
    given = {
        "query": ((2, 5, 2, 4, 64), jnp.bfloat16), "keys": ((9, 2, 64, 64), jnp.bfloat16),
        "values": ((9, 2, 64, 64), jnp.bfloat16), "tables": ((2, 3), jnp.int32), "positions": ((2, 5), jnp.int32),
    } | changes  # fmt: skip
    return [jnp.zeros(shape, dtype) for shape, dtype in given.values()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": ((2, 2, 4, 64), jnp.bfloat16)}, r"query must be \[B, T, G, R, D\]"),
        ({"keys": ((9, 2, 32, 64), jnp.bfloat16)}, r"key_blocks must be \[N, 2, 64, 64\].*got \(9, 2, 32, 64\)"),
        ({"values": ((8, 2, 64, 64), jnp.bfloat16)}, "differ"),
        ({"tables": ((2, 0), jnp.int32)}, r"tables must be int32 \[2, W\]"),
        ({"positions": ((2, 4), jnp.int32)}, r"positions must be int32 \[2, 5\], got int32 \(2, 4\)"),
        ({"positions": ((2, 5), jnp.float32)}, r"positions must be int32 \[2, 5\], got float32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        prefill_attention(*shapes(**changes), scale=1.0)


def test_starts_lengths_and_own_keys_that_do_not_fit_are_refused():
    *given, _ = shapes()
    right, wrong = jnp.zeros((2,), jnp.int32), jnp.zeros((3,), jnp.int32)
    with pytest.raises(ValueError, match=r"starts must be int32 \[2\]"):
        prefill_attention(*given, (wrong, right), scale=1.0)
    with pytest.raises(ValueError, match=r"lengths must be int32 \[2\]"):
        prefill_attention(*given, (right, wrong), scale=1.0)
    good, bad = jnp.zeros((2, 5, 2, 64), jnp.bfloat16), jnp.zeros((2, 5, 2, 64), jnp.float32)
    with pytest.raises(ValueError, match=r"own values must be bfloat16 \[2, 5, 2, 64\], got float32"):
        prefill_attention(*given, (right, right), scale=1.0, own=(good, bad))


@pytest.mark.parametrize(
    ("dim", "dtype", "problem"),
    [(64, jnp.float32, "dtype float32"), (72, jnp.bfloat16, "head_dim 72"), (512, jnp.bfloat16, "head_dim 512")],
)
def test_what_the_kernel_does_not_run_is_refused_by_name(dim, dtype, problem):
    given = shapes(query=((2, 5, 2, 4, dim), dtype), keys=((9, 2, 64, dim), dtype), values=((9, 2, 64, dim), dtype))
    with pytest.raises(ValueError, match=f"'mosaic' does not run {problem}; mosaic runs on Hopper"):
        prefill_attention(*given, scale=1.0, implementation="mosaic")
    assert prefill_attention(*given, scale=1.0, implementation="reference").shape == (2, 5, 2, 4, dim)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "chunks without their own keys and values"),
        ({"own": True, "softcap": 2.0}, "a softcap"),
        ({"own": True, "sinks": jnp.zeros((2, 4))}, "sinks"),
    ],
)
def test_what_cudnn_does_not_run_is_refused_by_name(options, problem):
    own = jnp.zeros((2, 5, 2, 64), jnp.bfloat16)
    options = options | ({"own": (own, own)} if options.get("own") else {})
    with pytest.raises(ValueError, match=f"'cudnn' does not run {problem}; cudnn runs on a GPU"):
        prefill_attention(*shapes(), scale=1.0, implementation="cudnn", **options)


@pytest.mark.parametrize("window", [None, 3])
def test_cudnn_is_asked_what_the_reference_computes(monkeypatch, window):
    """What JAX gives to cuDNN, computed by XLA in its place: there is no cuDNN without a GPU."""
    batch, tokens, groups, heads, dim = 2, 70, 2, 3, 16
    lengths, starts = np.asarray([70, 33], np.int32), np.zeros(2, np.int32)
    order = np.arange(1, 5, dtype=np.int32).reshape(2, 2)
    keys, values, tables = (jnp.asarray(a) for a in filled(batch, groups, dim, order, starts, lengths))
    own = [jnp.moveaxis(blocks[tables], 2, 3).reshape(batch, 128, groups, dim)[:, :tokens] for blocks in (keys, values)]
    own = [jnp.nan_to_num(array).astype(jnp.float16) for array in own]
    query = jnp.asarray(noise(batch, tokens, groups, heads, dim), jnp.float16)
    attend = jax.nn.dot_product_attention
    asked: list[str] = []

    def xla(*given: Any, implementation: str, **options: Any) -> jax.Array:
        asked.append(implementation)
        return attend(*given, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", xla)
    options: dict[str, Any] = {"scale": 0.2, "window": window}
    found = prefill_attention(
        query, keys.astype(jnp.float16), values.astype(jnp.float16), tables, (starts, lengths),
        own=tuple(own), implementation="cudnn", **options,
    )  # fmt: skip
    exact = [np.asarray(array, np.float32) for array in (query, keys, values)]
    expected = naive_chunk(*exact, np.asarray(tables), starts, lengths, **options)
    real = np.arange(tokens) < lengths[:, None]
    np.testing.assert_allclose(np.asarray(found, np.float64)[real], expected[real], rtol=5e-3, atol=5e-3)
    assert asked == ["cudnn"]


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="must be 'mosaic', 'cudnn', 'reference' or None, got 'fast'"):
        prefill_attention(*shapes(), scale=1.0, implementation="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window must be at least 1"):
        prefill_attention(*shapes(), scale=1.0, window=0)
    with pytest.raises(ValueError, match=r"sinks must be \[2, 4\]"):
        prefill_attention(*shapes(), scale=1.0, sinks=jnp.zeros((8,)))
    with pytest.raises(ValueError, match="does not run queries of float16 with keys and values of bfloat16"):
        prefill_attention(*shapes(query=((2, 5, 2, 4, 64), jnp.float16)), scale=1.0, implementation="mosaic")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefillConfig(keys=96), "keys must be 64, 128, 192 or 256"),
        (PrefillConfig(stages=0), "stages and programs must be at least 1"),
        (PrefillConfig(programs=0), "stages and programs must be at least 1"),
        (PrefillConfig(staged=False, programs=132), "need a program for each tile"),
        (PrefillConfig(stages=20), "bytes of shared memory at head_dim 64"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        prefill_attention(*shapes(), scale=1.0, implementation="mosaic", config=config)


@pytest.mark.parametrize("dim", PREFILL_HEADS)
@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize(("heads", "tokens", "width"), [(256, 2040, 32), (256, 512, 32), (32, 512, 8), (1, 5, 1)])
def test_a_chosen_configuration_fits_the_machine(dim, shaped, heads, tokens, width):
    chosen = prefill_config(heads=heads, tokens=tokens, width=width, head_dim=dim, shaped=shaped)
    assert chosen.keys % BLOCK_SIZE == 0
    assert 2 <= chosen.stages <= 4
    assert chosen.shared_bytes(dim) <= SMEM_BYTES - 2048
    assert chosen.registers
    module._check_config(chosen, dim)


@pytest.mark.parametrize(
    ("heads", "tokens", "width", "dim", "expected"),
    [
        (256, 2040, 32, 128, {"keys": 128, "stages": 2, "programs": 132, "turns": True}),
        (32, 8192, 128, 128, {"keys": 128, "stages": 2, "programs": 132, "turns": True}),
        (256, 512, 32, 128, {"keys": 128, "stages": 2, "programs": None, "turns": True}),
        (32, 512, 8, 128, {"keys": 64, "stages": 2, "programs": 132, "turns": True}),
        (32, 512, 128, 128, {"keys": 128, "stages": 2, "programs": None, "turns": True}),
        (256, 2048, 32, 64, {"keys": 128, "stages": 4, "programs": 132, "turns": True}),
        (128, 2048, 32, 256, {"keys": 64, "stages": 2, "programs": None, "turns": False, "staged": False}),
    ],
)
def test_a_configuration_is_the_best_that_was_measured(heads, tokens, width, dim, expected):
    chosen = prefill_config(heads=heads, tokens=tokens, width=width, head_dim=dim)
    assert chosen == PrefillConfig(**expected)


@pytest.mark.parametrize(
    ("on", "dtype", "dim", "expected"),
    [
        (Device("gpu", "9.0"), jnp.bfloat16, 64, True),
        (Device("gpu", "9.0"), jnp.bfloat16, 72, False),
        (Device("gpu", "9.0"), jnp.float32, 64, False),
        (Device("gpu", "8.0"), jnp.bfloat16, 64, False),
        (Device("cpu"), jnp.bfloat16, 64, False),
    ],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_is_chosen_is_what_runs(on, dtype, dim, expected, tokens):
    blocks = ((9, 2, 64, dim), dtype)
    given = shapes(
        query=((2, tokens, 2, 4, dim), dtype), keys=blocks, values=blocks, positions=((2, tokens), jnp.int32)
    )
    with compiling_for(on):
        program = str(jax.make_jaxpr(lambda *a: prefill_attention(*a, scale=1.0))(*given))
        named = str(jax.make_jaxpr(lambda *a: prefill_attention(*a, scale=1.0, implementation="reference"))(*given))
    assert ("prefill_attention_kernel" in program) == expected
    assert "attention_kernel" not in named
    assert (program == named) == (not expected)
