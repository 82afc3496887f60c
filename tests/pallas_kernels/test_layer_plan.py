"""How the kernel of decoder layers divides its work."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.decoder_layers import plan_of
from pallas_kernels.layer_plan import LAG, ROOM, Product, divided
from tests.pallas_kernels.layer_cases import LARGE, SMALL, operands, static


def plan(case):
    arguments, rotary = jax.eval_shape(lambda: operands(case, None))
    return plan_of(*arguments[:4], rotary=rotary, **static(case))


@pytest.mark.parametrize("name", SMALL | LARGE)
def test_a_plan_fits_and_serves_everything_once(name):
    found = plan((SMALL | LARGE)[name])
    assert found.problem() is None
    assert found.shared <= ROOM
    assert found.stages > LAG
    for which, product in enumerate(found.products):
        shares = [found.share(which, block) for block in range(found.blocks)]
        assert [first for first, _ in shares[1:]] == [last for _, last in shares[:-1]]
        assert (shares[0][0], shares[-1][1]) == (0, product.tiles)
        assert max(last - first for first, last in shares) == found.most[which]


@given(tiles=st.integers(1, 2000), blocks=st.integers(1, 140))
def test_shares_differ_by_one_tile_at_most(tiles, blocks):
    product = Product(channels=16 * tiles, inputs=256, apart=8, halves=1, bits=16, group=0)
    found = dataclasses.replace(plan(SMALL["plain"]), products=(product,) * 4, blocks=blocks)
    sizes = [last - first for first, last in (found.share(0, block) for block in range(blocks))]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) == found.most[0]
    assert sum(sizes) == tiles


@pytest.mark.parametrize("name", SMALL)
def test_packets_do_not_overlap(name):
    found = plan(SMALL[name])
    end = 0
    for start, count in found.packets.values():
        assert start == end
        end = start + found.m * count
    assert found.exchange == 2 * end


def test_splits_have_blocks_of_their_own():
    """The first of a head's splits waits for the others."""
    many = divided(dataclasses.replace(plan(SMALL["plain"]), m=4, groups=40))
    assert many.splits == 1
    forced = dataclasses.replace(many, splits=2)
    assert "wait for each other" in forced.problem()
    few = divided(dataclasses.replace(plan(SMALL["plain"]), width=64))
    assert 1 < few.splits * few.m * few.groups <= few.blocks


def test_groups_that_a_chunk_does_not_hold_are_named():
    product = Product(channels=64, inputs=512, apart=8, halves=1, bits=4, group=96)
    assert product.problem("up") == "groups of 96 inputs of up"


def test_more_than_there_is_room_for_is_named():
    long = dataclasses.replace(LARGE["opt"], lengths=(512,) * 4, wide=24576)
    found = plan(long)
    assert found.shared > ROOM
    assert found.problem() == "4 sequences with 24576 inputs"
    assert plan(dataclasses.replace(long, lengths=(512,) * 2)).problem() is None


def test_weights_of_integers_have_no_more_columns():
    for weight in ("int8", "int4"):
        case = dataclasses.replace(SMALL["plain"], weight=weight, wide=384, lengths=(9,) * 5)
        assert plan(case).problem() == f"5 sequences with weights of {weight}"
        assert plan(dataclasses.replace(case, lengths=(9,) * 4)).problem() is None


def test_groups_may_differ_between_products():
    found = plan(SMALL["int4, groups of 64 and of 128"])
    assert {product.group for product in found.products} == {64, 128}
    assert found.factors == 2
