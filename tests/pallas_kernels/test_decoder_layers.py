"""Whole decoder layers: the reference beside a textbook in float64, what is refused, and how launches are divided."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Device, compiling_for, layer_mosaic
from pallas_kernels import decoder_layers as exported
from pallas_kernels.decoder_layers import decoder_layers, dtype_problem, plan_of
from pallas_kernels.layer_plan import PARAMETERS
from tests.pallas_kernels.layer_cases import LARGE, LLAMA, SMALL, operands, static
from tests.pallas_kernels.textbook import exact


def attended(query, keys, values, table, length, scale, window):
    """Attention of one token over its blocks: query [G, R, D]."""
    keys, values = (np.concatenate(list(np.asarray(blocks, np.float64)[table]), axis=1) for blocks in (keys, values))
    first = 0 if window is None else max(0, length - window)
    scores = scale * np.einsum("grd,gkd->grk", query, keys[:, first:length])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("grk,gkd->grd", weights / weights.sum(-1, keepdims=True), values[:, first:length])


def textbook(x, layers, caches, tables, positions, rotary, scale, window):
    """The layers, in float64."""
    caches = [[np.array(blocks, np.float64) for blocks in cache] for cache in caches]
    x = np.asarray(x, np.float64)
    for layer, cache in zip(layers, caches, strict=True):
        qkv, out, up, down = layer.weights
        channels = qkv.shape[:-1]
        scales = [
            None if s is None else s.reshape(*s.shape[:-3], -1) if i == 0 else s for i, s in enumerate(layer.scales)
        ]

        def product(h, which, weight, layer=layer, scales=scales, **rest):
            bias = layer.biases[which]
            bias = bias if bias is None or which else bias.reshape(-1)
            return exact(h, weight, bias=bias, weight_scale=scales[which], **rest)

        y = product(x, 0, qkv.reshape(-1, qkv.shape[-1]), norm=layer.norms[0]).reshape(-1, *channels)
        if rotary is not None:
            cos, sin = (np.asarray(angle, np.float64)[:, None, None] for angle in rotary)
            first, second = np.split(y[:, :, :-1], 2, axis=-1)
            y[:, :, :-1] = np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
        inner = np.zeros((len(x), out.shape[-1]))
        for row, place in enumerate(np.asarray(positions)):
            if place >= 0:
                table = np.asarray(tables)[row]
                for blocks, new in zip(cache, (y[row, :, -2], y[row, :, -1]), strict=True):
                    blocks[table[place // 64], :, place % 64] = new
                found = attended(y[row, :, :-2], *cache, table, place + 1, scale, window)
                inner[row] = found.reshape(-1)
        x = product(inner, 1, out, residual=x)
        h = product(x, 2, up, norm=layer.norms[1], activation=layer.activation)
        x = product(h, 3, down, residual=x)
    return x, caches


@pytest.mark.parametrize("name", SMALL)
def test_the_reference_is_what_the_textbook_says(name):
    case = dataclasses.replace(SMALL[name], dtype="float32")
    arguments, rotary = operands(case)
    got, caches = decoder_layers(*arguments, rotary=rotary, **static(case))
    expected, written = textbook(*arguments, rotary, **static(case))
    real = np.asarray(arguments[-1]) >= 0
    np.testing.assert_allclose(np.asarray(got)[real], expected[real], atol=2e-4, rtol=1e-4)
    for mine, theirs in zip(jax.tree.leaves(caches), jax.tree.leaves(written), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-4, rtol=1e-4)


def broken(**changes):
    (x, layers, caches, tables, positions), rotary = operands(SMALL["plain"])
    given = {"x": x, "layers": layers, "caches": caches, "tables": tables, "positions": positions, "rotary": rotary}
    given |= static(SMALL["plain"])
    return given | {name: change(given[name]) for name, change in changes.items()}


def with_weight(which, change):
    def changed(layers):
        weights = list(layers[0].weights)
        weights[which] = change(weights[which])
        return [dataclasses.replace(layer, weights=tuple(weights)) for layer in layers]

    return changed


WRONG = {
    "no layers": ({"layers": lambda _: []}, "there must be layers and a cache for each, got 0, 2"),
    "a cache too few": ({"caches": lambda caches: caches[:1]}, "got 2, 1"),
    "x": ({"x": lambda x: x[0]}, r"x must be \[B, H\]"),
    "out": ({"layers": with_weight(1, lambda w: w[:, :-1])}, r"out must be \[256, 128\], got \[256, 127\]"),
    "down": ({"layers": with_weight(3, lambda w: w[:-1])}, r"down must be \[256, 352\], got \[255, 352\]"),
    "tables": ({"tables": lambda t: t[:0]}, r"tables must be \[1, 4\], got \[0, 4\]"),
    "positions": ({"positions": lambda p: p[None]}, r"positions must be \[1\], got \[1, 1\]"),
    "angles": ({"rotary": lambda r: (r[0][:, :-1], r[1])}, r"cos must be \[1, 32\], got \[1, 31\]"),
    "window": ({"window": lambda _: 0}, "window must be at least 1, got 0"),
    "no scale": ({"layers": with_weight(0, lambda w: w.astype(jnp.int8))}, "qkv of int8 without a scale"),
    "unlike": (
        {"layers": lambda layers: [layers[0], dataclasses.replace(layers[1], activation="relu")]},
        "layer 1 is not of the shapes, dtypes and kinds of the first",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error_that_names_it(name):
    changes, words = WRONG[name]
    with pytest.raises(ValueError, match=words):
        decoder_layers(**broken(**changes))


UNABLE = {
    "float32": ({"dtype": "float32"}, "x of float32"),
    "heads of 80": ({"dim": 80}, "head_dim 80"),
    "heads of 512": ({"dim": 512, "groups": 1}, "head_dim 512"),
    "many query heads": ({"per_group": 9}, "9 query heads a key head"),
    "odd inputs": ({"hidden": 260}, "260 inputs of query, key and value"),
    "channels": ({"gated": False, "wide": 360}, "360 channels of up, which 16 does not divide"),
    "many sequences": ({"lengths": (5,) * 40, "hidden": 4096, "wide": 11008}, "40 sequences"),
}


@pytest.mark.parametrize("name", UNABLE)
def test_what_the_kernel_cannot_run_is_an_error_that_names_it(name):
    changes, words = UNABLE[name]
    case = dataclasses.replace(SMALL["plain"], **changes)
    arguments, rotary = jax.eval_shape(lambda: operands(case, None))

    def run(arguments, rotary):
        return decoder_layers(*arguments, rotary=rotary, implementation="mosaic", **static(case))

    with pytest.raises(ValueError, match=f"implementation 'mosaic' cannot run .*{words}"):
        jax.eval_shape(run, arguments, rotary)


def test_a_gpu_with_fewer_sms_than_blocks_is_refused():
    arguments, rotary = jax.eval_shape(lambda: operands(SMALL["plain"], None))
    with compiling_for(Device("gpu", "9.0", 114)), pytest.raises(ValueError, match="cannot run on 114 SMs"):
        jax.eval_shape(
            lambda a, r: decoder_layers(*a, rotary=r, implementation="mosaic", **static(SMALL["plain"])),
            arguments, rotary,
        )  # fmt: skip


def test_an_unknown_implementation_is_an_error():
    with pytest.raises(ValueError, match="'triton' is none of 'mosaic', 'reference'"):
        decoder_layers(**broken(), implementation="triton")


def test_dtypes_that_differ_are_named():
    (x, layers, caches, _, _), _ = operands(SMALL["plain"])
    assert dtype_problem(x, layers, caches) is None
    wide = [(keys, values.astype(jnp.float32)) for keys, values in caches]
    assert "values of float32" in dtype_problem(x, layers, wide)
    mixed = with_weight(3, lambda w: w.astype(jnp.int8))(layers)
    assert "bfloat16 and int8" in dtype_problem(x, mixed, caches)
    biased = [
        dataclasses.replace(layer, biases=(layer.biases[0], x[0].astype(jnp.float32), None, None)) for layer in layers
    ]
    assert "a bias of float32" in dtype_problem(x, biased, caches)


@pytest.mark.parametrize("name", ["llama", "opt", "llama int8"])
def test_a_launch_is_given_no_more_arrays_than_it_can_take(name, monkeypatch):
    """And the stream goes from one launch to the next."""
    case, seen = LARGE[name], []

    def run(x, layers, caches, *_, plan):
        assert plan.layers == len(layers) == len(caches)
        seen.append(len(layers))
        return x + 1, caches, None

    monkeypatch.setattr(layer_mosaic, "run", run)
    arguments, rotary = jax.eval_shape(lambda: operands(case, None, 80))
    plan = plan_of(*arguments[:4], rotary=rotary, **static(case))

    def whole(arguments, rotary):
        return decoder_layers(*arguments, rotary=rotary, implementation="mosaic", **static(case))

    y, caches = jax.eval_shape(whole, arguments, rotary)
    assert sum(seen) == len(caches) == 80
    assert y.shape == arguments[0].shape
    assert max(seen) * len(plan.parameters) <= PARAMETERS
    assert max(seen) - min(seen) <= len(seen)


def test_it_is_exported():
    assert exported is decoder_layers
    assert LLAMA.wide == 11008
