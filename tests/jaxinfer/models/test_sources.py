"""How files fill parameters: what comes out of the fused weight is what separate projections would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.models.sources import Piece, SourceTable
from jaxinfer.models.spec import Layout, Norm
from tests.bare import fill
from tests.modules import small_spec

HIDDEN, DIM = 6, 2


@st.composite
def shapes(draw):
    """kv_heads, query heads per kv head, and devices that the heads can be split over."""
    kv, per_head = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2, 3, 4, 8]))
    fit = [t for t in (1, 2, 4, 8) if kv * per_head % t == 0 and (kv % t == 0 or t % kv == 0)]
    return kv, per_head, draw(st.sampled_from(fit))


def table_for(kv, per_head, tensor, biased):
    spec = small_spec(hidden=HIDDEN, heads=kv * per_head, kv_heads=kv, head_dim=DIM, qkv_bias=biased, out_bias=biased)
    return SourceTable(spec, Layout.of(spec, tensor))


def projections(kv, per_head, seed=0):
    """Weights [heads, D, H] and biases [heads, D] of queries, keys and values."""
    rng = np.random.default_rng(seed)
    heads = (kv * per_head, kv, kv)
    return [(rng.standard_normal((n, DIM, HIDDEN)), rng.standard_normal((n, DIM))) for n in heads]


def expected(kv, per_head, tensor, parts, bias):
    """The fused parameter, written head by head: group ``g`` serves query heads ``g * R`` to ``(g + 1) * R``."""
    groups = max(kv, tensor)
    rows = kv * per_head // groups
    query, key, value = (part[1] if bias else part[0] for part in parts)
    fused = np.zeros((groups, rows + 2, *query.shape[1:]))
    for head in range(kv * per_head):
        fused[head // rows, head % rows] = query[head]
    for group in range(groups):
        fused[group, rows] = key[group * rows // per_head]
        fused[group, rows + 1] = value[group * rows // per_head]
    return fused


def check(table, tensors, kv, per_head, tensor, biased):
    groups = max(kv, tensor)
    shape = (groups, kv * per_head // groups + 2, DIM)
    wanted = {"a.qkv": (*shape, HIDDEN)} | ({"a.qkv_bias": shape} if biased else {})
    filled = fill(wanted, table.sources, tensors)
    parts = projections(kv, per_head)
    np.testing.assert_array_equal(filled["a.qkv"], expected(kv, per_head, tensor, parts, False))
    if biased:
        np.testing.assert_array_equal(filled["a.qkv_bias"], expected(kv, per_head, tensor, parts, True))


@given(shapes(), st.booleans())
def test_separate_projections(shape, biased):
    kv, per_head, tensor = shape
    tensors = {}
    for name, (weight, bias) in zip("qkv", projections(kv, per_head), strict=True):
        tensors |= {f"{name}.weight": weight.reshape(-1, HIDDEN), f"{name}.bias": bias.reshape(-1)}
    table = table_for(kv, per_head, tensor, biased)
    table.qkv_separate("a", "q", "k", "v")
    check(table, tensors, kv, per_head, tensor, biased)


@given(shapes(), st.booleans(), st.booleans())
def test_concatenated_projections(shape, biased, transposed):
    kv, per_head, tensor = shape
    parts = projections(kv, per_head)
    weight = np.concatenate([weight.reshape(-1, HIDDEN) for weight, _ in parts])
    tensors = {
        "c.weight": np.ascontiguousarray(weight.T) if transposed else weight,
        "c.bias": np.concatenate([bias.reshape(-1) for _, bias in parts]),
    }
    table = table_for(kv, per_head, tensor, biased)
    table.qkv_concatenated("a", "c", transposed=transposed)
    check(table, tensors, kv, per_head, tensor, biased)


@given(shapes(), st.booleans())
def test_grouped_projections(shape, biased):
    kv, per_head, tensor = shape
    parts = projections(kv, per_head)
    tensors = {}
    for suffix, place in (("weight", 0), ("bias", 1)):
        rows = []
        for group in range(kv):
            rows += [parts[0][place][group * per_head + r] for r in range(per_head)]
            rows += [parts[1][place][group], parts[2][place][group]]
        tensors[f"c.{suffix}"] = np.concatenate(rows)
    table = table_for(kv, per_head, tensor, biased)
    table.qkv_grouped("a", "c")
    check(table, tensors, kv, per_head, tensor, biased)


@given(shapes(), st.booleans())
def test_the_output_projection(shape, transposed):
    kv, per_head, tensor = shape
    groups = max(kv, tensor)
    weight = np.random.default_rng(0).standard_normal((HIDDEN, kv * per_head * DIM))
    table = table_for(kv, per_head, tensor, True)
    table.out("a", "o", transposed=transposed)
    tensors = {"o.weight": np.ascontiguousarray(weight.T) if transposed else weight, "o.bias": np.arange(HIDDEN)}
    shape_out = (HIDDEN, groups, kv * per_head // groups, DIM)
    filled = fill({"a.out": shape_out, "a.out_bias": (HIDDEN,)}, table.sources, tensors)
    np.testing.assert_array_equal(filled["a.out"].reshape(HIDDEN, -1), weight)


def test_a_vocabulary_is_padded_with_zeros():
    spec = small_spec(vocab_size=5, hidden=3)
    table = SourceTable(spec, Layout.of(spec, 4))
    table.vocab("embed.tokens", "e")
    table.vocab("head.tokens", "h", 2)
    table.vocab("head.bias", "b", width=0)
    tensors = {"e": np.ones((5, 3)), "h": np.ones((5, 2)), "b": np.ones(5)}
    filled = fill({"embed.tokens": (8, 3), "head.tokens": (8, 2), "head.bias": (8,)}, table.sources, tensors)
    for value in filled.values():
        np.testing.assert_array_equal(
            value, np.r_[np.ones(5), np.zeros(3)].reshape(-1, *[1] * (value.ndim - 1)) + 0 * value
        )


def test_gate_and_up_fused_or_apart_are_one_parameter():
    spec = small_spec(hidden=3, intermediate=4, gated_mlp=True)
    gate, up = np.arange(12.0).reshape(4, 3), -np.arange(12.0).reshape(4, 3)
    apart, fused = SourceTable(spec, Layout.of(spec)), SourceTable(spec, Layout.of(spec))
    apart.gate_up("m", "g", "u")
    fused.gate_up_fused("m", "gu")
    one = fill({"m.up": (2, 4, 3)}, apart.sources, {"g.weight": gate, "u.weight": up})
    other = fill({"m.up": (2, 4, 3)}, fused.sources, {"gu.weight": np.concatenate([gate, up])})
    np.testing.assert_array_equal(one["m.up"], np.stack([gate, up]))
    np.testing.assert_array_equal(other["m.up"], one["m.up"])


@pytest.mark.parametrize("gated", [False, True])
def test_biases_of_an_mlp(gated):
    spec = small_spec(gated_mlp=gated, mlp_bias=True)
    table = SourceTable(spec, Layout.of(spec))
    if gated:
        table.gate_up("m", "g", "u")
    else:
        table.up("m", "u")
    table.down("m", "d")
    assert set(table.sources) == {"m.up", "m.up_bias", "m.down", "m.down_bias"}


@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_norm_names_what_it_has(weight, bias):
    spec = small_spec(norm=Norm(kind="layer", eps=1.0, weight=weight, bias=bias))
    table = SourceTable(spec, Layout.of(spec))
    table.norm("n", "file")
    assert [pieces[0].name for pieces in table.sources.values()] == ["file.weight"] * weight + ["file.bias"] * bias


def test_norms_on_queries_and_keys_have_the_size_of_a_head():
    spec = small_spec(qk_norm=Norm(kind="rms", eps=1.0))
    table = SourceTable(spec, Layout.of(spec))
    table.qk_norms("a", "q_norm", "k_norm")
    assert {path: pieces[0].shape for path, pieces in table.sources.items()} == {
        "a.query_norm.scale": (8,), "a.key_norm.scale": (8,)
    }  # fmt: skip
    plain = SourceTable(small_spec(), Layout.of(small_spec()))
    plain.qk_norms("a", "q_norm", "k_norm")
    assert not plain.sources


def test_learned_positions_include_the_rows_of_the_offset():
    spec = small_spec(learned_positions=10, position_offset=2)
    table = SourceTable(spec, Layout.of(spec))
    table.learned_positions("p")
    assert table.sources["embed.positions"] == (Piece("p", (12, 16), table.sources["embed.positions"][0].view),)
