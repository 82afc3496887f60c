"""Boxes against numpy's own indexing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.checkpoints.boxes import (
    ALIGNMENT,
    aligned,
    concrete,
    intersection,
    nbytes_of,
    relative,
    shape_of,
    size_of,
    view,
)

SHAPE = (7, 5, 3)
boxes = st.tuples(*(st.tuples(st.integers(0, n), st.integers(0, n)) for n in SHAPE)).map(
    lambda sides: tuple(slice(min(side), max(side)) for side in sides)
)


def marked(box):
    array = np.zeros(SHAPE, bool)
    array[box] = True
    return array


@given(a=boxes, b=boxes)
def test_an_intersection_is_what_both_hold(a, b):
    common = intersection(a, b)
    np.testing.assert_array_equal(marked(common), marked(a) & marked(b))
    assert size_of(common) == (marked(a) & marked(b)).sum()
    if size_of(common):
        values = np.arange(105).reshape(SHAPE)
        np.testing.assert_array_equal(view(view(values, a), relative(common, a)), values[common])
        assert view(values, common).shape == shape_of(common)


def test_an_index_becomes_a_box_of_all_axes():
    assert concrete((slice(None, 3), slice(1, None)), SHAPE) == (slice(0, 3), slice(1, 5), slice(0, 3))
    with pytest.raises(ValueError, match="steps of 1"):
        concrete((slice(0, 4, 2),), SHAPE)
    with pytest.raises(ValueError, match="3 axes"):
        concrete((slice(None),) * 4, SHAPE)


def test_buffers_are_aligned():
    for size in (1, 63, 4097):
        buffer = aligned(size)
        assert buffer.nbytes == size
        assert buffer.ctypes.data % ALIGNMENT == 0
    assert nbytes_of((3, 5), np.dtype(ml_dtypes.bfloat16)) == 30
