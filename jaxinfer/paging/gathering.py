"""Whether prefill gathers the weights of a layer on every device: by what the devices send each other for either.

Every device fetches its part of a layer over its own link. Then either all devices compute all tokens with their part
of the weights, which takes two all-reduces of hidden states a layer; or each gathers the whole layer once a pass and
computes its part of the tokens, which takes two exchanges a layer about attention, whose heads and cache stay divided.
All of it goes over the same links between the devices, so bytes decide, and how many tokens share the weights.
Where both send the same, two H200 took 0.77 s either way (``offload_two_h200.json``).

Quantized weights are widened besides, by each piece of a pass anew: gathered, a device widens a whole layer where it
would widen its part. Pieces are as many times larger then as there are devices, so that a pass of whole pieces widens
no more. Others stay sharded: for 4096 tokens, half a layer of OPT-13B more is about 0.15 ms (of int8 or int4, by what
one H200 takes longer than in bfloat16), and the exchanges save 0.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax.numpy as jnp

from jaxinfer.sizes import size

if TYPE_CHECKING:
    from jaxinfer.paging.tiers import Tiers
    from jaxinfer.plan import Plan

COPIES = 3
"""Of a gathered layer on a device, at most: parameters as they come, device by device, while they are put in order, and
as they are computed with. XLA for CPUs takes 2.3, for GPUs 1.3, which leaves room for the layer before, while it
computes still."""
SHARE = 16
"""Gathered layers take this fraction of a device's memory at most: the KV cache has more use of it."""


@dataclass(frozen=True, kw_only=True)
class Gathering:
    """Whether prefill passes gather weights.

    Attributes:
        tokens: prompt tokens of a pass on each data shard, padding included, from which they do; None: never.
        nbytes: memory of each device for that.
        widened: every piece of a pass widens all of a layer, because weights are quantized; a pass then gathers only
            where it takes ``tensor`` times fewer pieces.
        why: in words.
    """

    tokens: int | None = None
    nbytes: int = 0
    widened: bool = False
    why: str = "one device on the tensor axis"


def exchanged_bytes(plan: Plan, layer_bytes: float, tokens: int) -> tuple[float, float]:
    """Bytes that a device sends to others of the ``tensor`` axis for a layer of a pass: sharded, and gathered.

    Args:
        plan: the plan.
        layer_bytes: of a layer on each device.
        tokens: of the pass, on each data shard.
    """
    tensor, spec, groups = plan.mesh.get("tensor", 1), plan.spec, plan.layout.kv_groups
    itemsize, others = jnp.dtype(plan.dtype).itemsize, (tensor - 1) / tensor
    # An all-reduce sends what a reduce-scatter and an all-gather do.
    sharded = 2 * tokens * spec.hidden * itemsize * 2 * others
    # Queries, keys and values of a device's tokens, and as many results as queries.
    heads = 2 * spec.heads + 2 * groups
    exchanged = tokens / tensor * heads * spec.head_dim * itemsize * others
    return sharded, layer_bytes * tensor * others + exchanged


def choose(plan: Plan, tiers: Tiers) -> Gathering:
    """Decide from how many tokens on a pass of a plan with these tiers gathers weights."""
    tensor = plan.mesh.get("tensor", 1)
    if tensor == 1:
        return Gathering()
    mean = sum(tiers.layer_bytes) / len(tiers.layer_bytes)
    weights = exchanged_bytes(plan, mean, 0)[1]
    sharded, gathered = exchanged_bytes(plan, 0, 1)
    if sharded <= gathered:
        return Gathering(why="attention's exchanges would be more than the all-reduces that they replace")
    tokens, widened = math.ceil(weights / (sharded - gathered)), plan.quantize is not None
    if widened:
        tokens = max(tokens, tensor * tiers.micro_tokens)
    if tokens > plan.prefill_tokens:
        return Gathering(why=f"it would pay from {tokens:,} tokens a pass, which takes {plan.prefill_tokens:,} at most")
    nbytes = COPIES * max(tiers.buffer_bytes)
    if tiers.device_memory is not None and nbytes > tiers.device_memory // SHARE:
        return Gathering(
            why=f"{size(nbytes)} for a whole layer are more than 1/{SHARE} of the {size(tiers.device_memory)}"
        )
    most = plan.prefill_tokens
    before, after = exchanged_bytes(plan, mean, most)
    why = f"a layer of {most:,} tokens sends {size(round(after))}, all-reduces would {size(round(before))}"
    if widened:
        pieces = f"{tensor * tiers.micro_tokens:,} tokens at a time, a part of one for {tiers.micro_tokens:,}"
        why += f"; a whole layer is widened for {pieces}"
    return Gathering(tokens=tokens, nbytes=nbytes, widened=widened, why=why)


def micro_batches(plan: Plan, tiers: Tiers, rows: int, tokens: int, blocks: int, gathered: bool) -> tuple[int, int]:
    """In how many pieces a layer computes a prefill pass.

    Args:
        plan, tiers: of the executor.
        rows: of the pass, on each data shard.
        tokens: of each row, padding included.
        blocks: KV blocks that each row reads.
        gathered: whether weights are; the devices then divide each piece's tokens, and pieces are as many times larger.

    Returns:
        Groups of rows, and pieces along the tokens of each row.
    """
    ways = plan.mesh.get("tensor", 1) if gathered else 1
    most = tiers.micro_tokens * ways
    fit = max(1, min(most // tokens, plan.micro_blocks // blocks))
    groups = next(count for count in range(1, rows + 1) if rows % count == 0 and rows // count <= fit)
    return groups, next(n for n in range(1, tokens + 1) if tokens % (n * ways) == 0 and tokens // n <= most)


def gathers(plan: Plan, tiers: Tiers, rows: int, tokens: int, blocks: int) -> bool:
    """Whether a prefill pass gathers weights; arguments as of :func:`micro_batches`."""
    found, ways = tiers.gathering, plan.mesh.get("tensor", 1)
    if found.tokens is None or rows * tokens < found.tokens or tokens % ways:
        return False
    whole, parts = (math.prod(micro_batches(plan, tiers, rows, tokens, blocks, way)) for way in (True, False))
    return not found.widened or whole * ways <= parts


def rows(plan: Plan) -> list[tuple[str, str, str]]:
    """The line of a plan that tells of it; none with one device on the ``tensor`` axis."""
    if plan.tiers is None or plan.mesh.get("tensor", 1) == 1:
        return []
    found = plan.tiers.gathering
    what = "sharded" if found.tokens is None else f"gathered from {found.tokens:,} tokens a pass, else sharded"
    return [("weights in prefill", what, found.why)]
