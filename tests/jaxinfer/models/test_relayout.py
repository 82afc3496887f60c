"""Moves from the one-device layout, against what the files' own sources give for the layout of many devices."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.families import load_spec, sources_of
from jaxinfer.models.relayout import moves, scale_moves
from jaxinfer.models.spec import Layout
from jaxinfer.quantization import dequantize
from tests.bare import fill, read_tensors
from tests.cases import case
from tests.oracle import checkpoint, shared_root
from tests.wide import wide


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


@pytest.mark.parametrize("family", ["llama", "falcon", "gpt2"])
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_each_weight_keeps_its_factor(family, method, tmp_path_factory):
    spec = load_spec(checkpoint(wide(family), shared_root(tmp_path_factory)))

    def quantized(layout):
        infos = parameters(abstract(spec, layout, jnp.dtype("float32"), method))
        return {path: (info, infos[f"{path}_scale"]) for path, info in infos.items() if info.quantization}

    def moved(values, shape, all_moves):
        found = np.zeros(shape, np.float32)
        for move in all_moves:
            found[move.target] = values[move.source]
        return found

    one = quantized(Layout.of(spec))
    for tensor in (1, 2, 4):
        layout = Layout.of(spec, tensor)
        for path, (info, scale) in quantized(layout).items():
            whole, factors = one[path]
            numbers = np.arange(1, 1 + np.prod(factors.shape), dtype=np.float32).reshape(factors.shape)
            each = dequantize(np.ones(whole.shape, np.int8), numbers, whole.quantization)
            expected = moved(each, info.shape, moves(path, whole.shape, spec, layout))
            if method == "int4":
                found = scale_moves(f"{path}_scale", factors.shape, scale.shape, spec, layout)
            else:
                found = moves(f"{path}_scale", factors.shape, spec, layout)
            got = dequantize(np.ones(info.shape, np.int8), moved(numbers, scale.shape, found), info.quantization)
            np.testing.assert_array_equal(got, expected, err_msg=f"{path}, tensor={tensor}")
