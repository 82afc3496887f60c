from __future__ import annotations

import dataclasses

import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.models.spec import Alibi, LayerSpec, Layout, Rotary
from tests.modules import small_spec

SIZES = ("vocab_size", "hidden", "intermediate", "heads", "kv_heads", "head_dim", "context_length")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2**31, 1.5, True, "8"])
def test_a_size_must_be_a_positive_integer(name, value):
    with pytest.raises(ConfigError, match=f"{name} must be a positive integer"):
        small_spec(**{name: value})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": ()}, "no layers"),
        ({"heads": 4, "kv_heads": 3}, "multiple"),
        ({"layers": (LayerSpec(scale=1.0, window=0),)}, "window of layer 0"),
        ({"layers": (LayerSpec(scale=1.0, rotary=Rotary(inv_freq=(1.0,) * 5)),)}, "rotates 10 entries of a head of 8"),
        ({"alibi": Alibi(slopes=(0.5,) * 3)}, "3 ALiBi slopes for 4 heads"),
    ],
)
def test_what_no_model_can_have_is_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        small_spec(**changes)


def test_a_spec_is_frozen_and_hashable():
    spec = small_spec()
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.hidden = 1
    assert hash(spec) == hash(small_spec())
    assert spec.replace(hidden=32) != spec


def test_the_switch_of_longrope_is_found_in_any_layer():
    plain = LayerSpec(scale=1.0, rotary=Rotary(inv_freq=(1.0,)))
    long = LayerSpec(scale=1.0, rotary=Rotary(inv_freq=(1.0,), long_inv_freq=(0.5,), long_from=32))
    assert small_spec().long_from is None
    assert small_spec(layers=(plain,)).long_from is None
    assert small_spec(layers=(plain, long)).long_from == 32
    assert small_spec(layers=(plain, long)).num_layers == 2


@pytest.mark.parametrize(
    ("kv_heads", "tensor", "groups", "rows"),
    [(4, 1, 4, 37), (4, 2, 4, 38), (2, 4, 4, 40), (1, 4, 4, 40), (4, 4, 4, 40)],
)
def test_a_layout_shares_heads_and_pads_the_vocabulary(kv_heads, tensor, groups, rows):
    layout = Layout.of(small_spec(kv_heads=kv_heads), tensor)
    assert (layout.kv_groups, layout.vocab_rows) == (groups, rows)
