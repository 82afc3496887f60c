"""Which channels a block of the grid takes: each is taken once, and what goes with it is that channel's."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gemm_channels import Heads, Matrix, tiled, whole_tiles

K, GROUPS = 8, 2


class Ref:
    """An array that is indexed as a reference is, and cuts off what a copy would: entries past the end."""

    def __init__(self, array):
        self.array = array
        self.at = self

    def __getitem__(self, index):
        def plain(one):
            return slice(int(one.start), int(one.start) + one.size) if hasattr(one, "size") and hasattr(
                one, "start") else one if isinstance(one, slice) else int(one)  # fmt: skip

        index = index if isinstance(index, tuple) else (index,)
        return Ref(self.array[tuple(map(plain, index))])


def copied(copies, shape):
    """Shared memory after the copies; -1 where nothing came."""
    memory = np.full(shape, -1)
    for source, target in copies(Ref(memory)):
        target.array[tuple(slice(n) for n in source.array.shape)] = source.array
    return memory


def matrix(n, rows, parts):
    own = Matrix(parts, n, rows=rows, tokens=8, held=8, dtype=jnp.bfloat16, activation=None, residual=None)
    channels = np.arange(parts * n)
    return own, channels.reshape(parts, n), channels.reshape(parts, 1, n), channels


def heads(groups, per_group, dim, rows, parts):
    own = Heads(
        groups, per_group, dim, parts=parts, rows=rows, m=3, tokens=8, held=3, dtype=jnp.bfloat16,
        blocks=(None, None), slots=jnp.zeros(8, jnp.int32),
        rotary=(jnp.zeros((dim // 2, 8)), jnp.zeros((dim // 2, 8))) if parts == 2 else None,
    )  # fmt: skip
    count = groups * (per_group + 2)
    channels = np.arange(count * dim)
    return own, channels.reshape(count * parts, -1), channels.reshape(1, count, dim), channels


LAYOUTS = {
    "matrix": (matrix, 192, 64, 1),
    "ragged": (matrix, 200, 64, 1),
    "gated": (matrix, 200, 64, 2),
    "heads": (heads, 2, 3, 64, 64, 1),
    "wide blocks": (heads, 2, 1, 128, 128, 1),
    "halves": (heads, 2, 1, 128, 64, 2),
    "halves of halves": (heads, 1, 2, 256, 64, 2),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_channel_is_taken_once_with_what_is_its_own(name):
    make, *sizes = LAYOUTS[name]
    own, weight, factors, channels = make(*sizes)
    rows, inputs = own.rows, slice(0, K)
    taken = []
    for tile in range(own.blocks):
        copies = own.weight(Ref(np.repeat(weight[..., None], K, -1)), None, tile, inputs)
        assert len(copies) == own.weight_copies
        tiles = copied(lambda to, t=tile: own.weight(Ref(np.repeat(weight[..., None], K, -1)), to, t, inputs),
                       (own.parts, rows, K))  # fmt: skip
        assert (tiles == tiles[..., :1]).all()
        found = tiles[..., 0]
        # The factors of two groups of inputs differ by a constant.
        grouped = np.concatenate([factors, factors + 10**6], axis=own.groups_axis)
        scales = copied(lambda to, t=tile, g=grouped: own.factors(Ref(g), to, t, slice(0, GROUPS)),
                        (own.parts, GROUPS, rows))  # fmt: skip
        np.testing.assert_array_equal(scales[:, 0], found)
        np.testing.assert_array_equal(scales[:, 1], np.where(found < 0, -1, found + 10**6))
        for part in range(own.parts):
            vector = copied(lambda to, t=tile, p=part: own.vector(Ref(channels), to, t, p), (rows,))
            there = found[part] >= 0
            np.testing.assert_array_equal(vector[there], found[part][there])
        taken += found[found >= 0].tolist()
    assert sorted(taken) == channels.tolist()


def test_the_parts_of_rotated_heads_are_their_halves():
    own, weight, *_ = heads(1, 2, 256, 64, 2)
    for tile in range(own.blocks):
        first, second = copied(
            lambda to, t=tile: own.weight(Ref(weight[..., None]), to, t, slice(0, 1)), (2, 64, 1)
        )  # fmt: skip
        np.testing.assert_array_equal(second - first, 128)
        assert (first % 256 < 128).all()
        assert len(set((first // 256).ravel())) == 1


def test_angles_of_few_tokens_are_fetched_ahead():
    for tokens, ahead in ((8, True), (64, False)):
        angle = jnp.zeros((64, tokens))
        own = Heads(
            1, 1, 128, parts=2, rows=64, m=tokens, tokens=tokens, held=tokens, dtype=jnp.bfloat16,
            blocks=(None, None), slots=jnp.zeros(tokens, jnp.int32), rotary=(angle, angle),
        )  # fmt: skip
        assert own.fetched == (("slots", "cos", "sin") if ahead else ("slots",))


@pytest.mark.parametrize(("rows", "padded"), [(1, 1), (7, 7), (8, 8), (9, 16), (64, 64)])
def test_rows_are_whole_tiles(rows, padded):
    x = jnp.ones((rows, 16))
    found = whole_tiles(x)
    assert found.shape == (padded, 16)
    assert float(found.sum()) == rows * 16


def test_tiles_divide_rows_in_both_memories():
    for columns, divides, dtype in itertools.product((64, 48, 128), (64, 336, 32), (jnp.bfloat16, jnp.int8)):
        width = tiled(columns, dtype, divides)[0].tiling[1]
        assert columns % width == divides % width == 0
