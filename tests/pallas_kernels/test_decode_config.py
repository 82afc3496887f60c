from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BLOCK_SIZE
from pallas_kernels.decode_config import DecodeConfig, block_range, decode_config, resident_config


@pytest.mark.parametrize("splits", [1, 3, 8])
@pytest.mark.parametrize("window", [None, 1, 64, 100, 2**31 - 1])
def test_splits_take_every_block_that_is_seen_once(window, splits):
    width = 7
    for length in (0, 1, 63, 64, 65, 300, 447, 448):
        first, last = (int(x) for x in block_range(jnp.int32(length), width=width, window=window))
        taken = sorted(block for split in range(splits) for block in range(first + split, last, splits))
        seen = np.arange(0 if window is None else max(length - window, 0), length)
        assert taken == sorted(set((seen // BLOCK_SIZE).tolist()))


@pytest.mark.parametrize(
    ("batch", "groups", "width", "splits"),
    [
        (8, 32, 8, 1),  # 512 tokens
        (16, 8, 8, 1),
        (32, 8, 64, 1),  # 4096 tokens
        (1, 8, 64, 4),  # few programs and a long context
        (1, 8, 512, 32),
        (32, 8, 512, 8),  # one of 32 could be long alone
    ],
)
def test_a_sequence_is_split_where_there_are_few_programs_and_a_long_context(batch, groups, width, splits):
    chosen = decode_config(batch=batch, groups=groups, heads_per_key=4, width=width, head_dim=128)
    assert chosen == DecodeConfig(splits=splits, stages=3, overlap=True)


@pytest.mark.parametrize(
    ("batch", "groups", "dim", "width", "splits", "stages"),
    [
        (1, 32, 128, 9, 4, 3),  # Llama 7B, 512 tokens
        (2, 32, 128, 9, 2, 5),
        (4, 32, 128, 9, None, None),  # nine blocks do not fit into an SM, and its cluster would find none free
        (1, 8, 128, 9, 8, 2),
        (1, 32, 128, 3, 2, 2),  # OPT-6.7B, 130 tokens
        (4, 32, 128, 3, 1, 3),
        (16, 32, 128, 3, None, None),
        (1, 25, 64, 3, 2, 2),  # GPT-2 XL
        (1, 32, 128, 64, None, None),
    ],
)
def test_little_work_over_short_tables_is_held_at_once(batch, groups, dim, width, splits, stages):
    shape = {"batch": batch, "groups": groups, "heads_per_key": 1, "width": width, "head_dim": dim}
    held = None if splits is None else DecodeConfig(splits=splits, stages=stages, resident=True)
    assert resident_config(**shape) == held
    assert (decode_config(**shape) == held) == (held is not None)
    assert not decode_config(**shape, kv_bytes=1).resident


@pytest.mark.parametrize("kv_bytes", [1, 2])
@pytest.mark.parametrize("batch", [1, 16, 64])
@pytest.mark.parametrize("width", [1, 8, 64, 2048])
@pytest.mark.parametrize(("dim", "heads"), [(64, 1), (64, 80), (128, 4), (128, 64), (256, 1), (256, 32)])
def test_a_chosen_configuration_fits_the_machine(batch, width, dim, heads, kv_bytes):
    chosen = decode_config(batch=batch, groups=8, heads_per_key=heads, width=width, head_dim=dim, kv_bytes=kv_bytes)
    assert 1 <= chosen.splits <= width
    shared = chosen.stages * 2 * kv_bytes * BLOCK_SIZE * dim + -(-heads // 8) * 8 * (dim * 6 + 128)
    if kv_bytes == 1:
        shared += chosen.stages * 8 * BLOCK_SIZE + 4 * BLOCK_SIZE * dim
    assert chosen.stages >= 1
    assert shared <= 220 * 1024
