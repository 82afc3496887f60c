"""How a parameter is filled from the tensors of a checkpoint file.

A family names, for each parameter path, the pieces it is made of. A piece is a region of the parameter and a view of
one file tensor. Views are lazy (the file is mapped), so a reader can slice a piece down to one device's shard and touch
only the bytes of that shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxinfer.models.spec import Layout, ModelSpec, Norm

View = Callable[[np.ndarray], np.ndarray]


def _same(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclass(frozen=True)
class Piece:
    """One region of a parameter, filled from one tensor of the file.

    Attributes:
        name: the tensor's name in the file.
        shape: the shape that the file must have for it.
        view: file tensor -> array with the region's shape, by reshape, transpose or slice only (no copies).
        region: where the piece lies in the parameter; None is all of it.
    """

    name: str
    shape: tuple[int, ...]
    view: View = _same
    region: tuple[slice, ...] | None = None


Sources = dict[str, tuple[Piece, ...]]
"""Parameter path -> pieces. What no piece covers is zero (padding of the vocabulary)."""


class SourceTable:
    """Builds the sources of a model; one method for each kind of parameter, so that a family only names tensors.

    Args:
        spec: the architecture.
        layout: how it is laid out over devices.
    """

    def __init__(self, spec: ModelSpec, layout: Layout) -> None:
        """Start with no sources."""
        self.spec, self.layout = spec, layout
        self.sources: Sources = {}

    def whole(self, path: str, name: str, shape: tuple[int, ...], view: View = _same) -> None:
        """A parameter that is one tensor of the file, seen through ``view``."""
        self.sources[path] = (Piece(name, shape, view),)

    def transposed(self, path: str, name: str, shape: tuple[int, int]) -> None:
        """A matrix [out, in] = ``shape`` that the file stores as [in, out] (GPT-2)."""
        self.sources[path] = (Piece(name, (shape[1], shape[0]), np.transpose),)

    def vocab(self, path: str, name: str, width: int | None = None) -> None:
        """The embedding or head [V, width] (a bias where ``width`` is 0), padded to the layout's rows."""
        rows = self.spec.vocab_size
        shape = (rows,) if width == 0 else (rows, width or self.spec.hidden)
        self.sources[path] = (Piece(name, shape, region=tuple(slice(0, size) for size in shape)),)

    def norm(self, path: str, name: str, norm: Norm | None = None, size: int | None = None) -> None:
        """A norm's ``name.weight`` and ``name.bias``, of which it may lack either."""
        shape, norm = (size or self.spec.hidden,), norm or self.spec.norm
        if norm.weight:
            self.whole(f"{path}.scale", f"{name}.weight", shape)
        if norm.bias:
            self.whole(f"{path}.bias", f"{name}.bias", shape)

    def learned_positions(self, name: str) -> None:
        """The position table, with the rows that its offset leaves unused."""
        rows = (self.spec.learned_positions or 0) + self.spec.position_offset
        self.whole("embed.positions", name, (rows, self.spec.hidden))

    def up(self, path: str, name: str, *, transposed: bool = False) -> None:
        """The first matrix of a plain MLP ``name.weight``, and its bias."""
        shape = (self.spec.intermediate, self.spec.hidden)
        (self.transposed if transposed else self.whole)(f"{path}.up", f"{name}.weight", shape)
        if self.spec.mlp_bias:
            self.whole(f"{path}.up_bias", f"{name}.bias", shape[:1])

    def gate_up(self, path: str, gate: str, up: str) -> None:
        """The first matrices of a gated MLP, two tensors into one parameter [2, F, H]; and their biases."""
        width, hidden = self.spec.intermediate, self.spec.hidden
        for suffix, target, shape in (("weight", "up", (width, hidden)), ("bias", "up_bias", (width,))):
            if suffix == "weight" or self.spec.mlp_bias:
                self.sources[f"{path}.{target}"] = tuple(
                    Piece(f"{name}.{suffix}", shape, _lead, (slice(i, i + 1), *(slice(0, size) for size in shape)))
                    for i, name in enumerate((gate, up))
                )

    def gate_up_fused(self, path: str, name: str) -> None:
        """The first matrices of a gated MLP without biases as one tensor, gate first."""
        width, hidden = self.spec.intermediate, self.spec.hidden
        self.whole(f"{path}.up", f"{name}.weight", (2 * width, hidden), lambda t: t.reshape(2, width, hidden))

    def down(self, path: str, name: str, *, transposed: bool = False) -> None:
        """The last matrix of an MLP, and its bias."""
        shape = (self.spec.hidden, self.spec.intermediate)
        (self.transposed if transposed else self.whole)(f"{path}.down", f"{name}.weight", shape)
        if self.spec.mlp_bias:
            self.whole(f"{path}.down_bias", f"{name}.bias", shape[:1])

    def out(self, path: str, name: str, *, transposed: bool = False) -> None:
        """The output projection of attention [H, heads * D], and its bias."""
        spec = self.spec
        groups, dim = self.layout.kv_groups, spec.head_dim
        target, width = (spec.hidden, groups, spec.heads // groups, dim), spec.heads * dim
        shape = (width, spec.hidden) if transposed else (spec.hidden, width)
        self.whole(f"{path}.out", f"{name}.weight", shape, lambda t: (t.T if transposed else t).reshape(target))
        if spec.out_bias:
            self.whole(f"{path}.out_bias", f"{name}.bias", (spec.hidden,))

    def qk_norms(self, path: str, query: str, key: str) -> None:
        """The norms over each head's query and key, where the spec has them."""
        if self.spec.qk_norm is not None:
            self.norm(f"{path}.query_norm", query, self.spec.qk_norm, self.spec.head_dim)
            self.norm(f"{path}.key_norm", key, self.spec.qk_norm, self.spec.head_dim)

    def qkv_separate(self, path: str, query: str, key: str, value: str) -> None:
        """Query, key and value as three tensors ``[heads * D, H]``; and their biases."""
        spec, kv, dim = self.spec, self.spec.kv_heads, self.spec.head_dim
        for suffix, target, tail in self._qkv_targets():
            q = (f"{query}.{suffix}", (spec.heads * dim, *tail), lambda t: t.reshape(kv, -1, dim, *t.shape[1:]))
            k = (f"{key}.{suffix}", (kv * dim, *tail), lambda t: t.reshape(kv, dim, *t.shape[1:]))
            self._qkv(f"{path}.{target}", tail, q, k, (f"{value}.{suffix}", k[1], k[2]))

    def qkv_concatenated(self, path: str, name: str, *, transposed: bool = False) -> None:
        """Query, key and value as one tensor, all queries first, then keys, then values; stored [in, out] by GPT-2."""
        spec, kv, dim = self.spec, self.spec.kv_heads, self.spec.head_dim
        rows = spec.heads * dim
        for suffix, target, tail in self._qkv_targets():
            shape: tuple[int, ...] = (rows + 2 * kv * dim, *tail)
            shape = shape[::-1] if transposed else shape

            def part(start: int, stop: int, turn: bool, heads: tuple[int, ...]) -> View:
                return lambda t: (t.T if turn else t)[start:stop].reshape(*heads, dim, *(t.T if turn else t).shape[1:])

            parts = [
                (f"{name}.{suffix}", shape, part(start, stop, transposed, heads))
                for start, stop, heads in (
                    (0, rows, (kv, spec.heads // kv)),
                    (rows, rows + kv * dim, (kv,)),
                    (rows + kv * dim, rows + 2 * kv * dim, (kv,)),
                )
            ]
            self._qkv(f"{path}.{target}", tail, *parts)

    def qkv_grouped(self, path: str, name: str) -> None:
        """Query, key and value as one tensor, for each key/value head its queries, its key and its value."""
        spec, kv, dim = self.spec, self.spec.kv_heads, self.spec.head_dim
        per_head = spec.heads // kv

        def part(index: slice | int) -> View:
            return lambda t: t.reshape(kv, per_head + 2, dim, *t.shape[1:])[:, index]

        for suffix, target, tail in self._qkv_targets():
            shape = (kv * (per_head + 2) * dim, *tail)
            parts = [(f"{name}.{suffix}", shape, part(i)) for i in (slice(0, per_head), per_head, per_head + 1)]
            self._qkv(f"{path}.{target}", tail, *parts)

    def _qkv_targets(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """File suffix, parameter and trailing shape of the fused weight and, where there is one, its bias."""
        weight = ("weight", "qkv", (self.spec.hidden,))
        return [weight, ("bias", "qkv_bias", ())] if self.spec.qkv_bias else [weight]

    def _qkv(
        self,
        path: str,
        tail: tuple[int, ...],
        query: tuple[str, tuple[int, ...], View],
        key: tuple[str, tuple[int, ...], View],
        value: tuple[str, tuple[int, ...], View],
    ) -> None:
        """Lay out [G, R + 2, D, ...] from views of the queries [kv, heads / kv, D, ...], keys and values [kv, D, ...].

        With more groups than key/value heads, neighbouring groups share a head: each takes its part of the head's
        queries, and a copy of its key and value.
        """
        spec, groups = self.spec, self.layout.kv_groups
        per_group, copies = spec.heads // groups, groups // spec.kv_heads
        rest = tuple(slice(0, size) for size in (spec.head_dim, *tail))

        def taken(view: View, head: slice, rows: slice | None) -> View:
            return lambda t: view(t)[head, rows] if rows is not None else view(t)[head, None]

        pieces: list[Piece] = []
        spans = [(slice(0, groups), slice(0, groups), slice(0, per_group))]
        if copies > 1:
            spans = [
                (
                    slice(g, g + 1),
                    slice(g // copies, g // copies + 1),
                    slice(g % copies * per_group, (g % copies + 1) * per_group),
                )
                for g in range(groups)
            ]
        for group, head, rows in spans:
            for (name, shape, view), where, taken_rows in (
                (query, slice(0, per_group), rows),
                (key, slice(per_group, per_group + 1), None),
                (value, slice(per_group + 1, per_group + 2), None),
            ):
                pieces.append(Piece(name, shape, taken(view, head, taken_rows), (group, where, *rest)))
        self.sources[path] = tuple(pieces)


def _lead(tensor: np.ndarray) -> np.ndarray:
    return tensor[None]
