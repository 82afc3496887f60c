"""Moves from the one-device layout, against what the files' own sources give for the layout of many devices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.families import load_spec, sources_of
from jaxinfer.models.relayout import moves
from jaxinfer.models.spec import Layout
from tests.bare import fill, read_tensors
from tests.cases import case
from tests.oracle import checkpoint, shared_root


@pytest.mark.parametrize("name", ["llama-plain", "falcon-multi-query", "gpt2-plain", "qwen2-plain"])
def test_moves_fill_what_the_sources_fill(name, tmp_path_factory):
    folder = checkpoint(case(name), shared_root(tmp_path_factory))
    spec, tensors = load_spec(folder), read_tensors(folder)

    def filled(layout):
        shapes = {path: info.shape for path, info in parameters(abstract(spec, layout, jnp.dtype("float32"))).items()}
        return fill(shapes, sources_of(spec, layout, tensors), tensors)

    one = filled(Layout.of(spec))
    for tensor in (1, *case(name).tensor):
        layout = Layout.of(spec, tensor)
        for path, expected in filled(layout).items():
            got = np.zeros_like(expected)
            written = np.zeros(expected.shape, int)
            for move in moves(path, one[path].shape, spec, layout):
                got[move.target] = one[path][move.source]
                written[move.target] += 1
            np.testing.assert_array_equal(got, expected, err_msg=f"{path}, tensor={tensor}")
            assert written.max() == 1
