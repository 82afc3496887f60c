"""Frequencies against transformers' own functions, rotation against complex numbers, slopes against transformers."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from jaxinfer.errors import ConfigError
from jaxinfer.models.positions import ROPE_KEYS, alibi_slopes, angles, rotary, rotate

CONTEXT = 4096
theta = st.floats(100.0, 1e7)
factor = st.floats(1.0, 64.0)
original = st.sampled_from([16, 256, 2048])
half_dim = st.integers(2, 64)


def reference(values, dim, length=None):
    """transformers' frequencies and attention factor."""
    config = LlamaConfig(
        hidden_size=4 * dim, num_attention_heads=4, head_dim=dim, max_position_embeddings=CONTEXT,
        rope_parameters=dict(values),
    )  # fmt: skip
    found, scaling = ROPE_INIT_FUNCTIONS[values["rope_type"]](config, seq_len=length)
    return found.numpy(), scaling


def agree(values, dim, rtol=1e-6):
    ours = rotary(values, dim, CONTEXT, partial="partial_rotary_factor" in values)
    wanted, scaling = reference(values, dim)
    np.testing.assert_allclose(np.float32(ours.inv_freq), wanted, rtol=rtol)
    assert ours.attention_factor == pytest.approx(scaling, rel=1e-6)
    return ours


@given(theta, factor, half_dim)
def test_linear(base, by, half):
    agree({"rope_type": "linear", "rope_theta": base, "factor": by}, 2 * half)


@given(theta, factor, half_dim)
def test_dynamic_within_the_context_is_default(base, by, half):
    ours = agree({"rope_type": "dynamic", "rope_theta": base, "factor": by}, 2 * half)
    assert ours == rotary({"rope_theta": base}, 2 * half, CONTEXT)


@given(theta, factor, half_dim, original, st.floats(0.5, 2.0), st.floats(2.5, 8.0))
def test_llama3(base, by, half, first, low, high):
    agree(
        {"rope_type": "llama3", "rope_theta": base, "factor": by, "low_freq_factor": low, "high_freq_factor": high,
         "original_max_position_embeddings": first},
        2 * half,
        rtol=5e-5,  # the blend takes a difference of float32 numbers, and divides it by the factor
    )  # fmt: skip


@given(theta, factor, half_dim, original, st.fixed_dictionaries({}, optional={
    "attention_factor": st.floats(0.5, 2.0), "beta_fast": st.floats(16.0, 64.0), "beta_slow": st.floats(0.5, 8.0),
    "mscale": st.floats(0.1, 2.0), "mscale_all_dim": st.floats(0.1, 2.0), "truncate": st.booleans(),
}))  # fmt: skip
def test_yarn(base, by, half, first, extra):
    values = {"rope_type": "yarn", "rope_theta": base, "factor": by, "original_max_position_embeddings": first}
    agree(values | extra, 2 * half)


@given(theta, st.one_of(st.none(), factor), st.sampled_from([16, 64]), original, st.sampled_from([0.5, 0.75, 1.0]))
def test_longrope(base, by, dim, first, fraction):
    rng = np.random.default_rng(dim)
    count = int(dim * fraction) // 2
    values = {
        "rope_type": "longrope", "rope_theta": base, "original_max_position_embeddings": first,
        "partial_rotary_factor": fraction, "short_factor": rng.uniform(1, 2, count).tolist(),
        "long_factor": rng.uniform(1, 20, count).tolist(),
    }  # fmt: skip
    if by is not None:
        values["factor"] = by
    ours = agree(values, dim)
    assert ours.long_from == first
    np.testing.assert_allclose(np.float32(ours.long_inv_freq), reference(values, dim, first + 1)[0], rtol=1e-6)


def test_what_is_none_counts_as_unset():
    assert rotary({"rope_type": "default", "rope_theta": 1e4, "factor": None}, 8, 64) == rotary(None, 8, 64)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"rope_type": "su"}, "rope_type"),
        ({"rope_type": "linear"}, "factor is missing"),
        ({"rope_type": "linear", "factor": 0.0}, "factor"),
        ({"rope_type": "linear", "factor": True}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        ({"rope_type": "default", "factor": 2.0}, "factor not implemented"),
        ({"rope_type": "default", "mrope_section": [1, 2]}, "mrope_section"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
          "original_max_position_embeddings": 64}, "must differ"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}, "short_factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 1.0, 0.0, 1.0]}, "long_factor"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(values, named):
    with pytest.raises(ConfigError, match=named):
        rotary(values, 8, 64)


def test_an_odd_part_of_a_head_is_refused():
    with pytest.raises(ConfigError, match="even"):
        rotary({"partial_rotary_factor": 0.4}, 8, 64, partial=True)


def test_sizes_of_no_model_are_refused_before_an_array_is_made():
    with pytest.raises(ConfigError, match="65536"):
        rotary(None, 1 << 30, 64)
    with pytest.raises(ConfigError, match="65536"):
        alibi_slopes(1 << 30)


def test_every_kind_is_one_of_transformers():
    assert set(ROPE_KEYS) - {"default"} <= set(ROPE_INIT_FUNCTIONS)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_multiplies_pairs_by_a_phase(interleaved):
    turn = rotary({"partial_rotary_factor": 0.5}, 12, 64, partial=True, interleaved=interleaved)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 2, 12)).astype(np.float32)
    places = rng.integers(0, 1000, (2, 5))
    cos, sin = angles(turn, jnp.asarray(places), None)
    got = np.asarray(rotate(jnp.asarray(x), cos, sin, interleaved=interleaved))
    phase = np.exp(1j * (places[..., None] * np.asarray(turn.inv_freq)))[:, :, None, None]
    first, second = (x[..., 0:6:2], x[..., 1:6:2]) if interleaved else (x[..., :3], x[..., 3:6])
    turned = (first + 1j * second) * phase
    halves = (got[..., 0:6:2], got[..., 1:6:2]) if interleaved else (got[..., :3], got[..., 3:6])
    np.testing.assert_allclose(halves[0] + 1j * halves[1], turned, atol=2e-4)
    np.testing.assert_array_equal(got[..., 6:], x[..., 6:])


def test_each_sequence_takes_its_own_frequencies():
    turn = rotary(
        {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 1.0,
         "original_max_position_embeddings": 32}, 8, 64,
    )  # fmt: skip
    places = jnp.asarray([[6], [6], [3]])
    cos, sin = angles(turn, places, jnp.asarray([False, True, False]))
    np.testing.assert_allclose(cos[1], cos[2], rtol=1e-6)
    np.testing.assert_allclose(sin[1], sin[2], rtol=1e-6)
    assert np.abs(cos[0] - cos[1]).max() > 0.1


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 14, 16, 20, 32, 40, 64, 71, 112])
def test_alibi_slopes_are_those_of_transformers(heads):
    wanted = build_alibi_tensor(torch.ones(1, 2, dtype=torch.long), heads, torch.float32)[:, 0, 1]
    np.testing.assert_allclose(alibi_slopes(heads), wanted, rtol=1e-6)
