"""From parameters laid out for one device to those laid out for many: which region goes where.

Layouts differ in two ways only (see :class:`Layout`): the vocabulary is padded, and a key/value head that several
devices share is stored once for each of them. Factors of int4 weights differ in a third: where a group of 128 inputs
would lie on two devices, there are two groups of 64 with the same factor.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxinfer.models.spec import Layout, ModelSpec

Box = tuple[slice, ...]


@dataclass(frozen=True)
class Move:
    """A region of the parameter at the one-device layout, and the region of the same shape that it fills."""

    source: Box
    target: Box


def moves(path: str, shape: tuple[int, ...], spec: ModelSpec, layout: Layout) -> tuple[Move, ...]:
    """Say how a parameter of a layout is filled; what no move covers is zero (padding of the vocabulary).

    Args:
        path: the parameter's dotted path.
        shape: its shape at the one-device layout.
        spec: the architecture.
        layout: the layout to fill.
    """
    copies = layout.kv_groups // spec.kv_heads
    name = path.rsplit(".", 1)[-1]
    if copies == 1 or name not in ("qkv", "qkv_bias", "qkv_scale", "out"):
        everything = tuple(slice(0, size) for size in shape)
        return (Move(everything, everything),)
    # Neighbouring groups share a head: each takes its part of the head's queries, and a copy of its key and value.
    rows = spec.heads // layout.kv_groups
    found = []
    lead: Box = ()
    rest = tuple(slice(0, size) for size in shape[2:])
    for group in range(layout.kv_groups):
        head, first = group // copies, group % copies * rows
        spans = [(slice(first, first + rows), slice(0, rows))]
        if name == "out":
            lead, rest = (slice(0, shape[0]),), (slice(0, shape[3]),)
        else:
            queries = spec.heads // spec.kv_heads
            spans += [(slice(queries + i, queries + i + 1), slice(rows + i, rows + i + 1)) for i in range(2)]
        for source, target in spans:
            found.append(
                Move((*lead, slice(head, head + 1), source, *rest), (*lead, slice(group, group + 1), target, *rest))
            )
    return tuple(found)


def scale_moves(
    path: str, shape: tuple[int, ...], target: tuple[int, ...], spec: ModelSpec, layout: Layout
) -> tuple[Move, ...]:
    """Say how the factors of an int4 weight of a layout are filled.

    Args:
        path: their dotted path.
        shape: theirs at the one-device layout.
        target: theirs at the layout to fill, whose groups are not larger.
        spec: the architecture.
        layout: the layout to fill.
    """
    name = path.rsplit(".", 1)[-1]
    if name == "qkv_scale":
        whole = (slice(0, shape[0]),)
        return tuple(Move((*whole, *m.source), (*whole, *m.target)) for m in moves(path, shape[1:], spec, layout))
    if shape == target:
        return moves(path, shape, spec, layout)
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]]
    if name == "down_scale":
        finer = target[0] // shape[0]
        pairs = [((g // finer,), (g,)) for g in range(target[0])]
    else:  # out_scale: groups [G, R * D / g] of key/value heads, each of which several devices may share
        copies = layout.kv_groups // spec.kv_heads
        finer = copies * target[1] // shape[1]
        pairs = [
            ((g // copies, (g % copies * target[1] + i) // finer), (g, i))
            for g in range(target[0])
            for i in range(target[1])
        ]

    def row(place: tuple[int, ...]) -> Box:
        return (*(slice(i, i + 1) for i in place), slice(0, shape[-1]))

    return tuple(Move(row(source), row(place)) for source, place in pairs)
