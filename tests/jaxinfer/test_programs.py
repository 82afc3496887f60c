"""The parts of a prefill step, and the options of its programs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.programs import MANY_TOKENS, PARTED_LAYERS, compiler_options, prefill_parts
from pallas_kernels import Device

H200 = Device("gpu", "9.0")


def paths_of(layers: int) -> list[str]:
    names = ["embed.tokens", "head.norm.scale", "head.tokens"]
    names += [f"layers.{index}.{name}" for index in range(layers) for name in ("attention.qkv", "mlp.up")]
    return sorted(names)  # as nnx does: layers.10 before layers.2


@given(st.integers(1, 200))
def test_parts_are_all_layers_in_order_with_their_own_parameters(layers):
    paths = paths_of(layers)
    parts = prefill_parts(paths, layers)
    assert len(parts) == (2 if layers >= PARTED_LAYERS else 1)
    assert [index for part in parts for index in part.layers] == list(range(layers))
    for number, part in enumerate(parts):
        read = part.of(paths)
        wanted = {f"layers.{index}" for index in part.layers}
        assert {path for path in paths if path.rsplit(".", 2)[0] in wanted} <= set(read)
        rest = [path for path in read if path.rsplit(".", 2)[0] not in wanted]
        end = ["head.norm.scale", "head.tokens"] if number == len(parts) - 1 else []
        assert rest == ["embed.tokens", *end]


def test_a_part_puts_what_it_reads_back_in_its_place():
    paths = paths_of(PARTED_LAYERS)
    for part in prefill_parts(paths, PARTED_LAYERS):
        found = part.among(part.of(paths))
        assert len(found) == len(paths)
        assert [path for path in found if path is not None] == part.of(paths)
        assert all(path in (None, wanted) for path, wanted in zip(found, paths, strict=True))


@pytest.mark.parametrize(
    ("device", "tokens", "triton"),
    [(H200, MANY_TOKENS, False), (H200, MANY_TOKENS - 1, True), (H200, 0, True), (Device("cpu"), MANY_TOKENS, True)],
)
def test_triton_products_are_left_out_of_long_prompts_on_hopper(device, tokens, triton):
    options = compiler_options(device, tokens)
    assert options == ({} if triton else {"xla_gpu_enable_triton_gemm": "False"})
