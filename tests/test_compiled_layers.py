"""The layers that an H200 would run when they are paged: the resident step's kernels, and no copy of a weight."""

from __future__ import annotations

import pytest

from tests import aot, paged_steps


@pytest.fixture(scope="module")
def compiled() -> dict[str, paged_steps.Compiled]:
    why = aot.missing()
    if why:
        pytest.skip(why)
    return paged_steps.compile_layers([*paged_steps.CASES, *paged_steps.TWO])


@pytest.mark.parametrize("name", [*paged_steps.CASES, *paged_steps.TWO])
def test_decode_has_the_kernels_of_a_resident_layer(name, compiled):
    """Quantized weights have a kernel of their own, beside which the cache is written."""
    quantized = "quantize" in (paged_steps.CASES | paged_steps.TWO)[name]
    writes = {"skinny_gemm_quantized": 4} if quantized else {"qkv_gemm": 1, "skinny_gemm": 3}
    assert compiled[name].decode == {**writes, "decode_attention_kernel": 1}


@pytest.mark.parametrize("name", [*paged_steps.CASES, *paged_steps.TWO])
def test_what_travelled_is_used_where_it_lies(name, compiled):
    """Packed bytes and bytes of two values become weights without a copy."""
    found = compiled[name]
    assert found.temporary[0] < found.layer // 50
    assert all(aliased >= found.cache for aliased in found.aliased)


@pytest.mark.parametrize("name", paged_steps.TWO)
def test_two_devices_sum_in_decode_and_exchange_where_weights_are_gathered(name, compiled):
    found = compiled[name]
    decode, prefill, gathered, gather = found.sent
    assert decode == prefill == {"all-reduce": 2}
    assert gathered == {"all-to-all": 2}
    assert set(gather) == {"all-gather"}
    result, besides, planned = found.gathering
    assert result + besides <= planned
    if "int4" not in name:  # of which small factors are much, in this size
        assert 2 * result + besides <= planned, "the layer before may still be there"
