"""How decode attention divides its work: the configuration of its kernel, and what chooses one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import BLOCK_SIZE

SMEM_BYTES = 227 * 1024
"""Shared memory that a Hopper SM gives to programs."""
SMS = 132


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """How the kernel divides its work.

    Attributes:
        splits: programs that share the blocks of one sequence and head.
        stages: blocks of keys, and as many of values, in flight in each program.
        consumers: warpgroups of a program that compute, each on blocks of its own; they divide ``stages``.
        overlap: let the kernel behind this one start at once, where it may fetch what does not depend on this one, and
            start itself while the kernel before is still running; it waits for that one before it reads anything.
            Interpret mode cannot run it.
        ahead: with ``overlap``, wait only before what belongs to the newest token is read, its block and the query.
            Lengths, tables and all blocks before must then have been written before the kernel before this one began.
        resident: the kernel of :mod:`pallas_kernels.decode_resident`, whose programs have a stage for each block that
            they serve; its splits are always a cluster, which interpret mode cannot run, and ``consumers``,
            ``overlap`` and ``ahead`` are not for it.
    """

    splits: int
    stages: int
    consumers: int = 1
    overlap: bool = False
    ahead: bool = False
    resident: bool = False


def decode_config(
    *, batch: int, groups: int, heads_per_key: int, width: int, head_dim: int, kv_bytes: int = 2, sms: int = SMS
) -> DecodeConfig:
    """Choose splits and stages.

    Little work over short tables is :func:`resident_config`'s. Else splits cost a second kernel and float32 partial
    results. So a sequence is split only where there are fewer programs than SMs, into no more programs than two an SM
    and none of fewer than 16 blocks; and where tables are so wide that one long sequence in a batch of short ones would
    run on alone, into parts of 64 blocks. Measured on an H200 with ``benchmarks/decode_attention.py``: 32 programs of 8
    blocks take 12.2 us in one split and 15.6 or more in four and eight; 256 programs of 64 blocks 143 us in one and 154
    in four; 16 sequences of 8 blocks the same in one and two. The bounds of 16 and 64 blocks are derived from that and
    were not measured themselves.

    Stages take half of an SM's shared memory: 96 KiB in flight in each of two programs, where 23 KiB an SM hide the
    latency of HBM in the mean; 3 stages of 32 KiB, which this gives for heads of 128, were the best measured.

    Args:
        batch, groups: sequences, and key/value heads of each.
        heads_per_key: query heads that share a key head.
        width: blocks that a table row has room for, which is the longest context and not each sequence's own.
        head_dim: entries of a head.
        kv_bytes: bytes of an entry of keys and values: 2, or 1, which also takes a factor a row and room to widen.
        sms: multiprocessors of the device.
    """
    if kv_bytes == 2:
        resident = resident_config(
            batch=batch, groups=groups, heads_per_key=heads_per_key, width=width, head_dim=head_dim, sms=sms
        )
        if resident is not None:
            return resident
    programs = batch * groups
    splits = min(2 * sms // programs, width // 16) if programs < sms else 1
    splits = max(1, min(max(splits, width // 64), 32))
    columns = columns_of(heads_per_key)
    fixed = columns * (head_dim * 6 + 2 * BLOCK_SIZE) + 4096
    stage = 2 * kv_bytes * BLOCK_SIZE * head_dim
    if kv_bytes == 1:
        fixed += 4 * BLOCK_SIZE * head_dim
        stage += 8 * BLOCK_SIZE
    stages = (SMEM_BYTES // 2 - 1024 - fixed) // stage
    if stages < 2:
        stages = (SMEM_BYTES - 1024 - fixed) // stage
    return DecodeConfig(splits=splits, stages=max(1, min(stages, 8, math.ceil(width / splits))), overlap=True)


def resident_config(
    *, batch: int, groups: int, heads_per_key: int, width: int, head_dim: int, sms: int = SMS
) -> DecodeConfig | None:
    """Choose a division whose programs hold all their blocks, or None where there is too much work for one.

    All programs must run at once, each alone on its SM, and share a sequence's blocks by as many as that allows: 1, 2,
    4 or 8 of a cluster. Arguments as of :func:`decode_config`.
    """
    for splits in (8, 4, 2, 1):
        stages = math.ceil(width / splits)
        columns = columns_of(heads_per_key)
        needed = stages * (4 * BLOCK_SIZE * head_dim + 2 * BLOCK_SIZE * columns)
        # The query, the result, what a cluster sends (two parts of 64 rows where those do not divide the head).
        rows = head_dim if head_dim % BLOCK_SIZE == 0 else 2 * BLOCK_SIZE
        needed += columns * (4 * head_dim + 2 * rows) + 8192
        needed += 8 * splits * rows * columns if splits > 1 else 0
        if splits <= width and batch * groups * splits <= sms and needed <= SMEM_BYTES:
            return DecodeConfig(splits=splits, stages=stages, resident=True)
    return None


def columns_of(heads_per_key: int) -> int:
    """Columns of wgmma that the query heads of a key head take."""
    return -(-heads_per_key // 8) * 8


def cdiv(a: Any, b: int) -> Any:
    """Divide, rounding up."""
    return lax.div(a + (b - 1), jnp.int32(b))


def block_range(lengths: Any, *, width: int, window: int | None) -> tuple[Any, Any]:
    """First block that is read, and the block after the last, for sequences of these lengths.

    The kernel and the combination of its splits both ask here, so that they agree on which splits there are: split
    ``s`` of ``S`` takes blocks ``first + s``, ``first + s + S`` and so on. Without a window none of them depends on the
    length, which the table's first entries then need not wait for.
    """
    last = jnp.minimum(cdiv(lengths, BLOCK_SIZE), width)
    first: Any = 0  # not an array: Mosaic cannot capture a scalar that it finds to be constant
    if window is not None:
        # Compared before subtracted: a window may be as large as int32 goes.
        first = lax.div(jnp.maximum(lengths - min(window, width * BLOCK_SIZE), 0), jnp.int32(BLOCK_SIZE))
        first = jnp.minimum(first, last)
    return first, last
