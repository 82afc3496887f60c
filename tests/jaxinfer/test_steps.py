"""Inputs of a step in one array: each shard gets its own rows back, bit by bit."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.generation.sampling import pack
from jaxinfer.steps import DecodeInputs, InputLayout, PrefillInputs

DTYPES = [np.dtype(name) for name in ("int32", "uint32", "float32", "bool")]
shapes = st.lists(st.integers(0, 4), max_size=2).map(tuple)


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Any bits, so NaNs of any payload and denormal numbers too."""
    if dtype.kind == "b":
        return rng.integers(0, 2, shape).astype(bool)
    return rng.integers(0, 2**32, shape, np.uint32).view(dtype)


def bits(array: jax.Array | np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    return array if array.dtype.kind == "b" else array.view(np.uint32)


@given(
    leaves=st.lists(st.tuples(st.integers(1, 3), shapes, st.sampled_from(DTYPES)), min_size=1, max_size=6),
    shards=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_every_shard_gets_its_rows(leaves: list, shards: int, seed: int):
    rng = np.random.default_rng(seed)
    inputs = {
        f"{place}": None if place == 1 else draw(rng, (rows * shards, *rest), dtype)
        for place, (rows, rest, dtype) in enumerate(leaves)
    }
    layout = InputLayout.of(inputs, shards)
    packed = layout.pack(inputs)
    assert packed.dtype == np.int32
    assert packed.shape[0] == shards
    for shard in range(shards):
        own = layout.unpack(jax.numpy.asarray(packed[shard : shard + 1]))
        assert own.keys() == inputs.keys()
        for name, given_ in inputs.items():
            if given_ is None:
                assert own[name] is None
                continue
            rows = len(given_) // shards
            assert own[name].dtype == given_.dtype
            np.testing.assert_array_equal(bits(own[name]), bits(given_[shard * rows : (shard + 1) * rows]))


def test_a_layout_is_of_shapes_and_kinds():
    """What tells compiled steps apart: not the values, but shapes, dtypes, which inputs there are, and shards."""

    def decode(rows: int, width: int, long: bool) -> DecodeInputs:
        zeros = np.zeros(rows, np.int32)
        tables = np.full((rows, width), rows, np.int32)
        return DecodeInputs(
            zeros, zeros, zeros, zeros, tables, pack([None] * rows), long=np.zeros(rows, bool) if long else None
        )

    same = InputLayout.of(decode(4, 2, False), 2)
    other = decode(4, 2, False)
    other.tables[:] = 7
    assert same == InputLayout.of(other, 2)
    assert hash(same) == hash(InputLayout.of(other, 2))
    zeros, square = np.zeros(4, np.int32), np.zeros((4, 2), np.int32)
    prompts = PrefillInputs(square, square, square, zeros, zeros, zeros, pack([None] * 4))
    different = [decode(8, 2, False), decode(4, 3, False), decode(4, 2, True), prompts]
    found = {same, InputLayout.of(decode(4, 2, False), 1), *(InputLayout.of(inputs, 2) for inputs in different)}
    assert len(found) == 6
