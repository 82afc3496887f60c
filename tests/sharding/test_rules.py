"""Logical axes to PartitionSpecs, and the placements they cause."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from sharding.mesh import MeshError, TensorLimits, make_mesh
from sharding.rules import ShardingRules

NAMES = [field.name for field in dataclasses.fields(ShardingRules)]


@pytest.mark.parametrize(
    ("axes", "spec"),
    [
        (("vocab", "hidden"), PartitionSpec("tensor", None)),
        (("heads", "hidden"), PartitionSpec("tensor", None)),
        (("hidden", "mlp"), PartitionSpec(None, "tensor")),
        (("blocks", "kv_heads", "block_tokens", "head_dim"), PartitionSpec("data", "tensor", None, None)),
        (("batch", "positions", "vocab"), PartitionSpec("data", None, "tensor")),
        ((None, "mlp"), PartitionSpec(None, "tensor")),
        ((), PartitionSpec()),
    ],
)
def test_specs_of_parameters_and_caches(axes, spec):
    assert ShardingRules().spec(axes) == spec


@given(axes=st.lists(st.sampled_from([*NAMES, None]), max_size=5))
def test_a_spec_has_one_entry_a_dimension_or_there_is_a_collision(axes):
    rules = ShardingRules()
    expected = [None if name is None else getattr(rules, name) for name in axes]
    used = [axis for axis in expected if axis is not None]
    if len(used) == len(set(used)):
        assert tuple(rules.spec(axes)) == tuple(expected)
    else:
        with pytest.raises(MeshError, match="both lie on mesh axis"):
            rules.spec(axes)


def test_the_table_stays_small():
    assert len(NAMES) <= 25


def test_unknown_names_are_refused():
    with pytest.raises(MeshError, match=r"unknown logical axis 'width' in \('vocab', 'width'\)"):
        ShardingRules().spec(("vocab", "width"))
    with pytest.raises(MeshError, match="got the string 'vocab'"):
        ShardingRules().spec("vocab")
    with pytest.raises(MeshError, match="rule vocab: expected None or one of data, pipe, expert, tensor, got 'model'"):
        ShardingRules(vocab="model")


def test_two_dimensions_on_one_mesh_axis_are_refused():
    with pytest.raises(MeshError, match=r"'heads' and 'mlp' .* mesh axis 'tensor'"):
        ShardingRules().spec(("heads", "mlp"))


def test_a_rule_can_be_replaced():
    rules = dataclasses.replace(ShardingRules(), vocab=None)
    assert rules.spec(("vocab", "mlp")) == PartitionSpec(None, "tensor")


def test_rules_are_frozen_and_hashable():
    rules = ShardingRules()
    assert hash(rules) == hash(ShardingRules())
    with pytest.raises(dataclasses.FrozenInstanceError):
        rules.vocab = None


def test_a_spec_places_shards():
    mesh = make_mesh({"data": 2, "tensor": 4}, TensorLimits(heads=4, kv_heads=4, intermediate=8))
    spec = ShardingRules().spec(("blocks", "kv_heads", "block_tokens", "head_dim"))
    cache = jax.device_put(jnp.zeros((6, 4, 64, 8)), NamedSharding(mesh, spec))
    assert {shard.data.shape for shard in cache.addressable_shards} == {(3, 1, 64, 8)}
