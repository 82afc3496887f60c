from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import BLOCK_SIZE, Bias, attention, paged_attention, read_blocks, write_blocks, write_cache
from pallas_kernels.attention import MASKED, quantize_rows, query_tile

IMPLEMENTATIONS = ("dot", "reduce")


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def naive(
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    positions: np.ndarray,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: np.ndarray | None = None,
    bias_scaled: bool = False,
) -> np.ndarray:
    """One query at a time, over the keys that it may see and no others, in float64."""
    out = np.full(query.shape, np.nan)
    for b, t, g, r in np.ndindex(query.shape[:4]):
        last = positions[b, t]
        if last < 0:
            continue
        first = 0 if window is None else max(last - window + 1, 0)
        keys = key[b, g, first : last + 1].astype(np.float64)
        scores = keys @ query[b, t, g, r].astype(np.float64)
        bias = 0.0 if slopes is None else slopes[g, r] * np.arange(first, last + 1)
        scores = (scores + (bias if bias_scaled else 0.0)) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        scores = scores + (0.0 if bias_scaled else bias)
        weights = np.exp(scores - scores.max())
        out[b, t, g, r] = (weights / weights.sum()) @ value[b, g, first : last + 1].astype(np.float64)
    return out


def assert_close(found: Any, expected: np.ndarray, positions: np.ndarray, tolerance: float = 2e-5) -> None:
    real = positions >= 0
    np.testing.assert_allclose(np.asarray(found)[real], expected[real], rtol=tolerance, atol=tolerance)


SHAPES = [(2, 3, 2, 3, 8, 24), (3, 1, 1, 4, 4, 9), (1, 5, 3, 1, 8, 24)]
OPTIONS = [
    {},
    {"window": 1},
    {"window": 7},
    {"window": 100, "softcap": 0.8},
    {"softcap": 20.0},
    {"slopes": True},
    {"slopes": True, "bias_scaled": True, "window": 7},
    {"slopes": True, "bias_scaled": True, "softcap": 5.0},
    {"slopes": True, "softcap": 5.0},
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("number", range(len(OPTIONS)))
def test_attention_is_the_naive_one(implementation, number):
    options: dict[str, Any] = dict(OPTIONS[number])
    b, t, g, r, d, s = SHAPES[number % len(SHAPES)]
    slopes = noise(g, r) / 4 if options.pop("slopes", False) else None
    scaled = options.get("bias_scaled", False)
    ours = {name: value for name, value in options.items() if name != "bias_scaled"}
    query, key, value = noise(b, t, g, r, d), noise(b, g, s, d, seed=1), noise(b, g, s, d, seed=2)

    @jax.jit
    def run(positions: jax.Array) -> jax.Array:
        bias = None if slopes is None else Bias(slopes=jnp.asarray(slopes), scaled=scaled)
        return attention(query, key, value, positions, scale=0.35, bias=bias, implementation=implementation, **ours)

    @given(positions=st.lists(st.integers(-1, s - 1), min_size=b * t, max_size=b * t))
    @settings(max_examples=15)
    def check(positions: list[int]) -> None:
        places = np.asarray(positions, np.int32).reshape(b, t)
        found = np.asarray(run(places))
        assert np.isfinite(found).all()
        assert_close(found, naive(query, key, value, places, 0.35, slopes=slopes, **options), places)

    check()


def test_attention_is_torchs():
    query, key, value = noise(2, 9, 2, 3, 8), noise(2, 2, 9, 8, seed=1), noise(2, 2, 9, 8, seed=2)
    positions = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    heads = torch.tensor(np.moveaxis(query.reshape(2, 9, 6, 8), 1, 2))
    expected = torch.nn.functional.scaled_dot_product_attention(
        heads, torch.tensor(key), torch.tensor(value), is_causal=True, enable_gqa=True
    )
    expected = np.moveaxis(expected.numpy(), 2, 1).reshape(query.shape)
    found = attention(query, key, value, positions, scale=8**-0.5)
    assert_close(found, expected, positions)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16_scores_and_softmax_are_float32(implementation):
    arrays = noise(1, 4, 2, 2, 16), noise(1, 2, 30, 16, seed=1), noise(1, 2, 30, 16, seed=2)
    query, key, value = (jnp.asarray(array, jnp.bfloat16) for array in arrays)
    positions = np.asarray([[3, 11, 29, -1]], np.int32)
    found = attention(query, key, value, positions, scale=0.25, implementation=implementation)
    assert found.dtype == jnp.bfloat16
    exact = naive(*(np.asarray(array, np.float32) for array in (query, key, value)), positions, 0.25)
    # Weights and the result are rounded to 8 bits once each.
    assert_close(np.asarray(found, np.float32), exact, positions, tolerance=2**-7)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_bfloat16_bias_is_rounded_as_torch_rounds_it(scaled):
    slopes, positions = np.abs(noise(2, 3)) / 3, np.arange(300)
    bias = Bias(slopes=jnp.asarray(slopes), scaled=scaled, bfloat16=True)
    found = np.asarray(jax.jit(lambda: bias.scores(jnp.asarray(positions)))())
    expected = torch.tensor(slopes).bfloat16()[..., None] * torch.tensor(positions).bfloat16()
    np.testing.assert_array_equal(found[:, :, 0], expected.float().numpy())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_lies_past_a_sequence_is_never_used(implementation):
    """Blocks hold what was left in them, also NaN: a weight of zero times NaN is NaN."""
    query, key, value = noise(2, 3, 2, 2, 8), noise(2, 2, 20, 8, seed=1), noise(2, 2, 20, 8, seed=2)
    positions = np.asarray([[3, 4, 5], [11, 12, -1]], np.int32)
    clean = attention(query, key, value, positions, scale=0.3, implementation=implementation)
    for poison in (np.nan, np.inf, -np.inf):
        for array in (key, value):
            array[0, :, 6:], array[1, :, 13:] = poison, poison
        found = attention(query, key, value, positions, scale=0.3, implementation=implementation)
        real = positions >= 0
        np.testing.assert_array_equal(np.asarray(found)[real], np.asarray(clean)[real])


def test_an_unknown_implementation_is_refused():
    x = noise(1, 1, 1, 1, 4)
    with pytest.raises(ValueError, match="must be 'dot', 'reduce' or None, got 'fast'"):
        attention(x, x[:, 0], x[:, 0], np.zeros((1, 1), np.int32), scale=1.0, implementation="fast")  # type: ignore[arg-type]


def test_the_mask_is_finite_and_below_every_score():
    assert np.isfinite(np.float32(MASKED))
    assert MASKED < -1e38


BATCH, WIDTH, TOKENS, GROUPS, BLOCKS = 3, 2, 70, 2, 9


@st.composite
def cache_writes(draw: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tables of several sequences, no block shared, and the consecutive positions each writes, padded with -1."""
    order = draw(st.permutations(range(1, BLOCKS)))
    tables = np.asarray(order[: BATCH * WIDTH], np.int32).reshape(BATCH, WIDTH)
    positions = np.full((BATCH, TOKENS), -1, np.int32)
    for row in range(BATCH):
        count = draw(st.integers(0, TOKENS))
        start = draw(st.integers(0, WIDTH * BLOCK_SIZE - count))
        positions[row, :count] = np.arange(start, start + count)
        tables[row, -(-(start + count) // BLOCK_SIZE) :] = 0  # past its end a table names the null block
    return tables, positions


write, read = jax.jit(write_blocks), jax.jit(read_blocks)


@given(cache_write=cache_writes())
def test_writes_go_where_tables_say_and_nowhere_else(cache_write):
    tables, positions = cache_write
    blocks, values = noise(BLOCKS, GROUPS, BLOCK_SIZE, 4), noise(BATCH, TOKENS, GROUPS, 4)
    expected = blocks.copy()
    for row, column in zip(*np.nonzero(positions >= 0), strict=True):
        position = positions[row, column]
        expected[tables[row, position // BLOCK_SIZE], :, position % BLOCK_SIZE] = values[row, column]
    np.testing.assert_array_equal(np.asarray(write(blocks, values, tables, positions)), expected)
    np.testing.assert_array_equal(expected[0], blocks[0])


@given(cache_write=cache_writes())
def test_reading_gives_each_sequence_its_positions_in_order(cache_write):
    tables, _ = cache_write
    blocks = noise(BLOCKS, GROUPS, BLOCK_SIZE, 4)
    found = np.asarray(read(blocks, tables))
    assert found.shape == (BATCH, GROUPS, WIDTH * BLOCK_SIZE, 4)
    for row, table in enumerate(tables):
        for group in range(GROUPS):
            np.testing.assert_array_equal(found[row, group], np.concatenate([blocks[block, group] for block in table]))


def test_written_values_take_the_dtype_of_the_blocks():
    blocks = jnp.zeros((2, 1, BLOCK_SIZE, 4), jnp.bfloat16)
    values = noise(1, 1, 1, 4)
    found = write_blocks(blocks, values, np.asarray([[1]], np.int32), np.asarray([[5]], np.int32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found[1, 0, 5]), np.asarray(values[0, 0, 0], jnp.bfloat16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_over_shuffled_blocks_is_attention_over_the_keys(implementation):
    """Sequences of 130, 64 and 1 tokens, written in two steps, beside blocks that are full of NaN."""
    lengths, groups, dim = (130, 64, 1), 2, 8
    keys, values = noise(3, 130, groups, dim), noise(3, 130, groups, dim, seed=1)
    tables = np.asarray([[5, 2, 7], [3, 0, 0], [6, 0, 0]], np.int32)
    blocks = [jnp.full((9, groups, BLOCK_SIZE, dim), jnp.nan) for _ in range(2)]
    everywhere = np.arange(130, dtype=np.int32)
    for start, stop in ((0, 60), (60, 130)):
        part = np.broadcast_to(everywhere[start:stop], (3, stop - start))
        positions = np.where(part < np.asarray(lengths)[:, None], part, -1)
        blocks = [
            write_blocks(b, new[:, start:stop], tables, positions)
            for b, new in zip(blocks, (keys, values), strict=True)
        ]
    query = noise(3, 1, groups, 2, dim, seed=3)
    positions = np.asarray(lengths, np.int32)[:, None] - 1
    found = paged_attention(
        query, *blocks, tables, positions, scale=0.3, window=100, implementation=implementation
    )  # fmt: skip
    expected = naive(query, np.moveaxis(keys, 1, 2), np.moveaxis(values, 1, 2), positions, 0.3, window=100)
    assert_close(found, expected, positions)


def test_a_donated_write_copies_no_cache():
    """The compiled write is in place: nothing of the cache's size beside the cache itself."""
    shape = (64, 2, BLOCK_SIZE, 16)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((4, 1, 2, 16), jnp.float32),
        jax.ShapeDtypeStruct((4, 3), jnp.int32), jax.ShapeDtypeStruct((4, 1), jnp.int32),
    ]  # fmt: skip
    memory = jax.jit(write_blocks, donate_argnums=0).lower(*arguments).compile().memory_analysis()
    cache = 4 * int(np.prod(shape))
    assert memory.alias_size_in_bytes == cache
    assert memory.temp_size_in_bytes < cache // 8


@pytest.mark.parametrize("options", [{}, {"window": 5}, {"softcap": 4.0}])
def test_queries_in_tiles_get_what_all_at_once_get(options, monkeypatch):
    query, key, value = noise(2, 16, 2, 2, 8), noise(2, 2, 40, 8, seed=1), noise(2, 2, 40, 8, seed=2)
    positions = np.stack([np.arange(16), np.where(np.arange(16) < 9, np.arange(16) + 20, -1)]).astype(np.int32)
    whole = attention(query, key, value, positions, scale=0.3, **options)
    # By its place among modules: the package's attribute of that name is the function.
    monkeypatch.setattr(sys.modules["pallas_kernels.attention"], "SCORE_BYTES", 4 * 2 * 2 * 2 * 4 * 40)
    assert query_tile(8, 16, 40) == 4
    tiled = attention(query, key, value, positions, scale=0.3, **options)
    np.testing.assert_allclose(tiled, whole, rtol=1e-6, atol=1e-6)
    assert_close(tiled, naive(query, key, value, positions, 0.3, **options), positions)


@given(rows=st.integers(1, 512), log=st.integers(0, 11), keys=st.integers(1, 1 << 17))
def test_tiles_divide_the_queries_and_are_no_smaller_than_they_must(rows, log, keys):
    tile = query_tile(rows, 1 << log, keys)
    assert (1 << log) % tile == 0
    assert tile == 1 or 4 * rows * tile * keys <= 512 << 20
    assert tile == 1 << log or 4 * rows * 2 * tile * keys > 512 << 20


EIGHT_BITS = (jnp.int8, jnp.float8_e4m3fn)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=lambda dtype: dtype.__name__)
@given(size=st.integers(-40, 38), seed=st.integers(0, 1000))
def test_a_row_of_8_bits_is_nearly_the_row(dtype, size, seed):
    """By the definition: half a step of int8; of e4m3, three bits of mantissa, or half its least subnormal."""
    rows = np.random.default_rng(seed).standard_normal((3, 5, 8)).astype(np.float32) * np.float32(10.0) ** (size - 1)
    rows[0, 0] = 0.0
    values, factors = (np.asarray(array) for array in quantize_rows(rows, dtype))
    assert (values.dtype, factors.dtype, factors.shape) == (dtype, np.float32, (3, 5))
    assert np.isfinite(factors).all()
    wide, factor = values.astype(np.float64), factors[..., None].astype(np.float64)
    step = 0.5 * factor if dtype == jnp.int8 else np.maximum(np.abs(rows) / 16, factor * 2.0**-10)
    # What is left of a number that float32 has only as a subnormal, XLA may flush.
    assert (np.abs(wide * factor - rows) <= step * (1 + 1e-5) + 2 * np.finfo(np.float32).tiny).all()
    assert (wide[0, 0] == 0).all()


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_stays_so(dtype, bad):
    rows = noise(2, 8)
    rows[1, 3] = bad
    _, factors = quantize_rows(rows, dtype)
    np.testing.assert_array_equal(np.isfinite(factors), [True, False])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=lambda dtype: dtype.__name__)
def test_attention_over_8_bits_is_that_over_what_they_stand_for(dtype, number, implementation):
    """Written in two steps into blocks whose factors are NaN where nothing was written."""
    options: dict[str, Any] = dict(OPTIONS[number])
    lengths, groups, dim = np.asarray([100, 64, 1], np.int32), 2, 8
    slopes = noise(groups, 2) / 16 if options.pop("slopes", False) else None
    scaled = options.get("bias_scaled", False)
    ours = {name: value for name, value in options.items() if name != "bias_scaled"}
    keys, values = 3 * noise(3, 100, groups, dim), 5 * noise(3, 100, groups, dim, seed=1)
    tables = np.asarray([[5, 2], [3, 0], [6, 0]], np.int32)
    blocks = jnp.zeros((9, groups, BLOCK_SIZE, dim), dtype)
    cache: Any = (blocks, blocks, *[jnp.full((9, groups, BLOCK_SIZE), jnp.nan)] * 2)
    for start, stop in ((0, 60), (60, 100)):
        part = np.broadcast_to(np.arange(start, stop, dtype=np.int32), (3, stop - start))
        positions = np.where(part < lengths[:, None], part, -1)
        cache = write_cache(cache, keys[:, start:stop], values[:, start:stop], tables, positions)
    assert [(array.shape, array.dtype) for array in cache] == [
        *[((9, groups, BLOCK_SIZE, dim), dtype)] * 2, *[((9, groups, BLOCK_SIZE), jnp.float32)] * 2
    ]  # fmt: skip
    query, positions = noise(3, 1, groups, 2, dim, seed=3), lengths[:, None] - 1
    bias = None if slopes is None else Bias(slopes=jnp.asarray(slopes), scaled=scaled)
    found = paged_attention(
        query, *cache[:2], tables, positions, scale=0.3, bias=bias, implementation=implementation,
        key_scales=cache[2], value_scales=cache[3], **ours,
    )  # fmt: skip
    held = [np.moveaxis(_undone(*quantize_rows(rows, dtype)), 1, 2) for rows in (keys, values)]
    assert_close(found, naive(query, *held, positions, 0.3, slopes=slopes, **options), positions)


def _undone(values: jax.Array, factors: jax.Array) -> np.ndarray:
    return np.asarray(values, np.float32) * np.asarray(factors)[..., None]


def test_a_donated_write_of_8_bits_copies_no_cache():
    shape = (64, 2, BLOCK_SIZE, 16)
    cache = [jax.ShapeDtypeStruct(shape, jnp.int8)] * 2 + [jax.ShapeDtypeStruct(shape[:3], jnp.float32)] * 2
    new = jax.ShapeDtypeStruct((4, 1, 2, 16), jnp.float32)
    places = jax.ShapeDtypeStruct((4, 3), jnp.int32), jax.ShapeDtypeStruct((4, 1), jnp.int32)
    memory = jax.jit(write_cache, donate_argnums=0).lower(tuple(cache), new, new, *places).compile().memory_analysis()
    size = 2 * int(np.prod(shape)) + 2 * 4 * int(np.prod(shape[:3]))
    assert memory.alias_size_in_bytes == size
    assert memory.temp_size_in_bytes < size // 8
