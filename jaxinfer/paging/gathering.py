"""Whether prefill gathers the weights of a layer on every device: by what the devices send each other for either.

Every device fetches its part of a layer over its own link. Then either all devices compute all tokens with their part
of the weights, which takes two all-reduces of hidden states a layer; or each gathers the whole layer once a pass and
computes its part of the tokens, which takes two exchanges a layer about attention, whose heads and cache stay divided.
All of it goes over the same links between the devices, so bytes alone decide, and how many tokens share the weights.
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
        why: in words.
    """

    tokens: int | None = None
    nbytes: int = 0
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
    tokens = math.ceil(weights / (sharded - gathered))
    if tokens > plan.prefill_tokens:
        return Gathering(why=f"it would pay from {tokens:,} tokens a pass, which takes {plan.prefill_tokens:,} at most")
    nbytes = COPIES * max(tiers.buffer_bytes)
    if tiers.device_memory is not None and nbytes > tiers.device_memory // SHARE:
        return Gathering(
            why=f"{size(nbytes)} for a whole layer are more than 1/{SHARE} of the {size(tiers.device_memory)}"
        )
    most = plan.prefill_tokens
    before, after = exchanged_bytes(plan, mean, most)
    return Gathering(
        tokens=tokens,
        nbytes=nbytes,
        why=f"a layer of {most:,} tokens sends {size(round(after))}, all-reduces would {size(round(before))}",
    )


def rows(plan: Plan) -> list[tuple[str, str, str]]:
    """The line of a plan that tells of it; none with one device on the ``tensor`` axis."""
    if plan.tiers is None or plan.mesh.get("tensor", 1) == 1:
        return []
    found = plan.tiers.gathering
    what = "sharded" if found.tokens is None else f"gathered from {found.tokens:,} tokens a pass, else sharded"
    return [("weights in prefill", what, found.why)]
