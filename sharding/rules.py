"""Which mesh axis each logical axis of a parameter or cache lies on: one table, used by everything that is placed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from jax.sharding import PartitionSpec

from sharding.mesh import AXES, MeshError


@dataclass(frozen=True, kw_only=True)
class ShardingRules:
    """Logical axis -> mesh axis, or None for an axis of which every device holds all.

    Replace one with ``dataclasses.replace(rules, vocab=None)``.

    Attributes:
        vocab: rows of the embedding and of the output head, and the last axis of logits.
        heads: query heads, and fused rows of query, key and value that are grouped by device.
        kv_heads: key and value heads, in weights and in the cache.
        head_dim: width of one head.
        hidden: width of the residual stream.
        mlp: width of the MLP.
        positions: learned positions, and the tokens of a sequence.
        batch: rows of a batch (prompts in prefill, slots in decode).
        blocks: blocks of the key and value cache.
        block_tokens: tokens of one block.

    Raises:
        MeshError: a value that is neither None nor one of the mesh's axes.
    """

    vocab: str | None = "tensor"
    heads: str | None = "tensor"
    kv_heads: str | None = "tensor"
    head_dim: str | None = None
    hidden: str | None = None
    mlp: str | None = "tensor"
    positions: str | None = None
    batch: str | None = "data"
    blocks: str | None = "data"
    block_tokens: str | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            axis = getattr(self, field.name)
            if axis is not None and axis not in AXES:
                raise MeshError(f"rule {field.name}: expected None or one of {', '.join(AXES)}, got {axis!r}")

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Return the PartitionSpec of an array whose dimensions have these logical axes.

        Args:
            axes: for each dimension a logical name, or None to keep it whole.

        Raises:
            MeshError: an unknown logical name, or two dimensions on one mesh axis.
        """
        if isinstance(axes, str):
            raise MeshError(f"logical axes: expected a tuple with one name a dimension, got the string {axes!r}")
        known = tuple(field.name for field in dataclasses.fields(self))
        placed: dict[str, str] = {}
        entries: list[str | None] = []
        for name in axes:
            if name is None:
                entries.append(None)
                continue
            if name not in known:
                raise MeshError(f"unknown logical axis {name!r} in {tuple(axes)}; the rules have {', '.join(known)}")
            axis: str | None = getattr(self, name)
            if axis in placed:
                raise MeshError(
                    f"logical axes {placed[axis]!r} and {name!r} of {tuple(axes)} both lie on mesh axis {axis!r}"
                )
            if axis is not None:
                placed[axis] = name
            entries.append(axis)
        return PartitionSpec(*entries)
