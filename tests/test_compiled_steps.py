"""The steps that an H200 would run, compiled here: the kernels that are in them, and that no cache is copied."""

from __future__ import annotations

import functools

import pytest

from tests import aot, steps

LAYERS = 2
WHOLE = [name for name in steps.CASES if name.startswith("whole")]


@functools.cache
def compiled(few: bool) -> dict[str, steps.Step]:
    """Steps of one or two rows, or the others: each as many as a process compiles in its time."""
    return steps.compile_steps([name for name in steps.CASES if name.startswith(("whole", "one row")) == few])


@pytest.fixture
def step(name: str) -> steps.Step:
    why = aot.missing()
    if why:
        pytest.skip(why)
    return compiled(name.startswith(("whole", "one row")))[name]


@pytest.mark.parametrize("name", [name for name in steps.CASES if "prefill" not in name and name not in WHOLE])
def test_a_layer_of_a_decode_step_is_five_kernels(name: str, step: steps.Step):
    """Products with query, key and value, out, up and down, and attention; in float32 none. One row is no exception.

    Where heads are of 128, or not rotated, the first of them writes the cache as well. Quantized weights have a kernel
    of their own, which does not.
    """
    products, attention = {"llama, float32": (0, 0), "odd heads": (4, 0)}.get(name, (4, 1))
    writes = name in ("llama, heads of 128", "gpt2", "falcon")
    product = "skinny_gemm_quantized" if "weights" in name else "skinny_gemm"
    found = step.kernels
    assert found.get("qkv_gemm", 0) == writes * LAYERS
    assert found.get(product, 0) == (products - writes) * LAYERS
    assert found.get("decode_attention_kernel", 0) == attention * LAYERS
    assert sum(found.values()) == (products + attention) * LAYERS


@pytest.mark.parametrize("name", WHOLE)
def test_a_decode_step_of_few_rows_is_one_kernel(name: str, step: steps.Step):
    """For all layers, if a kernel may be given the addresses of so many; and no weight is copied for it."""
    assert step.kernels == {"decoder_layers": 2 if "64" in name else 1}
    if "7B" in name:  # small, a weight is less than what blocks hand on
        assert step.temporary < step.weight // 4


@pytest.mark.parametrize("name", [name for name in steps.CASES if "prefill" in name])
def test_a_layer_of_a_prefill_step_is_two_kernels(name: str, step: steps.Step):
    """Rotation with cache write, but not of packed prompts, and attention; in float32 and over 8 bits neither.

    The last layer's products after attention are of one token a sequence, so as few rows as those of decode.
    """
    layers = 16 if "two programs" in name else LAYERS
    kernels = {"rotary_cache": layers, "prefill_attention_kernel": layers, "skinny_gemm": 3}
    left_out = {
        "llama, packed prefill": ["rotary_cache"],
        "int8 cache, prefill": ["rotary_cache", "prefill_attention_kernel"],
        "float32, prefill": list(kernels),
    }
    assert step.kernels == {kernel: n for kernel, n in kernels.items() if kernel not in left_out.get(name, [])}


@pytest.mark.parametrize("name", steps.CASES)
def test_caches_are_written_in_place(name: str, step: steps.Step):
    assert step.aliased >= step.caches
    if step.kernels.get("decode_attention_kernel") or name in WHOLE:
        assert step.temporary < step.caches // (2 * LAYERS), "more than a cache's blocks are held"
