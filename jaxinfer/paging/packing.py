"""How a layer's parameters lie in one host buffer, what of it travels as one array, and how a step takes it apart.

A buffer holds what one device needs of a layer. Each large parameter is an array of its own on its way and on the
device, since a step would copy what it cuts out of a larger one. The small ones, norms and biases, travel together as
bytes: a transfer costs time however little it carries. Values of 4 bits travel two to a byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import PartitionSpec

from jaxinfer.models.parameter import ParameterInfo
from sharding import ShardingRules, all_gather

SMALL_BYTES = 1 << 20
"""Parameters below this travel together."""
PAGE = 4096
"""Alignment of arrays in a buffer: what O_DIRECT and the registration of memory want."""
_ALIGNMENT = 64  # of the small ones within their bytes
_FOUR_BITS = np.dtype(ml_dtypes.int4)


@dataclass(frozen=True)
class Leaf:
    """A parameter in a buffer.

    Attributes:
        name: its path within the layer.
        shape, dtype: of one device's part.
        axis: the dimension that the ``tensor`` axis divides, or None.
        segment: the array that it travels in.
        offset: bytes from the buffer's start.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    axis: int | None
    segment: int
    offset: int

    @property
    def host_dtype(self) -> np.dtype:
        """What a buffer holds: unsigned bytes, each of two values, where the dtype has 4 bits."""
        return np.dtype(np.uint8) if self.dtype == _FOUR_BITS else self.dtype

    @property
    def host_shape(self) -> tuple[int, ...]:
        """The shape in a buffer: half the last axis where the dtype has 4 bits."""
        return (*self.shape[:-1], self.shape[-1] // 2) if self.dtype == _FOUR_BITS else self.shape

    @property
    def nbytes(self) -> int:
        """Bytes in a buffer."""
        return math.prod(self.host_shape) * self.host_dtype.itemsize


@dataclass(frozen=True)
class Segment:
    """One array that travels: its global shape, dtype and placement, and where it starts in a buffer."""

    shape: tuple[int, ...]
    local: tuple[int, ...]
    dtype: np.dtype
    spec: PartitionSpec
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes on each device."""
        return math.prod(self.local) * self.dtype.itemsize


@dataclass(frozen=True)
class Packing:
    """The layout of a layer's buffer.

    Attributes:
        leaves: the parameters, in the order of the module's flat leaves.
        segments: the arrays that travel.
        nbytes: bytes of a buffer, those of one device.
        parts: distinct buffers of a layer: devices along ``tensor``.
    """

    leaves: tuple[Leaf, ...]
    segments: tuple[Segment, ...]
    nbytes: int
    parts: int

    @classmethod
    def of(cls, infos: Mapping[str, ParameterInfo], rules: ShardingRules, mesh: Mapping[str, int]) -> Packing:
        """Lay out the parameters of a layer.

        Args:
            infos: path within the layer -> parameter, in the order of the module's flat leaves.
            rules: logical axis -> mesh axis.
            mesh: size of each mesh axis.
        """
        parts = mesh.get("tensor", 1)
        leaves: list[Leaf] = []
        segments: list[Segment] = []
        offset = small = 0
        packed: list[Leaf] = []
        for name, info in infos.items():
            spec = rules.spec(info.axes)
            axis = next((i for i, one in enumerate(spec) if one is not None), None)
            local = tuple(size // parts if i == axis else size for i, size in enumerate(info.shape))
            leaf = Leaf(name, local, np.dtype(info.dtype), axis, len(segments), offset)
            if leaf.nbytes < SMALL_BYTES:
                leaf = Leaf(name, local, leaf.dtype, axis, -1, small)
                small += -(-leaf.nbytes // _ALIGNMENT) * _ALIGNMENT
                packed.append(leaf)
            else:
                shape = tuple(s * parts if i == axis else s for i, s in enumerate(leaf.host_shape))
                segments.append(Segment(shape, leaf.host_shape, leaf.host_dtype, spec, offset))
                offset += -(-leaf.nbytes // PAGE) * PAGE
            leaves.append(leaf)
        if packed:
            last, start = len(segments), offset
            segments.append(Segment((parts * small,), (small,), np.dtype(np.uint8), PartitionSpec("tensor"), start))
            offset += -(-small // PAGE) * PAGE
            leaves = [
                leaf if leaf.segment >= 0
                else Leaf(leaf.name, leaf.shape, leaf.dtype, leaf.axis, last, start + leaf.offset)
                for leaf in leaves
            ]  # fmt: skip
        return cls(tuple(leaves), tuple(segments), offset, parts)

    @property
    def moved_bytes(self) -> int:
        """Bytes that travel to each device, without what only aligns."""
        return sum(segment.nbytes for segment in self.segments)

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """The parameters in a buffer of bytes: name -> view of :attr:`Leaf.host_shape` and dtype."""
        return {leaf.name: _view(buffer, leaf.offset, leaf.host_shape, leaf.host_dtype) for leaf in self.leaves}

    def arrays(self, buffer: np.ndarray) -> list[np.ndarray]:
        """The segments in a buffer of bytes, as views."""
        return [_view(buffer, segment.offset, segment.local, segment.dtype) for segment in self.segments]

    def unpack(self, segments: Sequence[jax.Array]) -> list[jax.Array]:
        """The parameters of the segments that one device holds; traced within a step."""
        found = []
        for leaf in self.leaves:
            values = segments[leaf.segment]
            found.append(_values(leaf, values if self._alone(leaf) else self._cut(leaf, values)))
        return found

    def gather(self, segments: Sequence[jax.Array]) -> list[jax.Array]:
        """The whole parameters, of the segments that the devices along ``tensor`` hold; traced within a step.

        One collective for each parameter that is divided and travels alone, and one for all small ones.
        """
        found, together = [], {}
        for leaf in self.leaves:
            values = segments[leaf.segment]
            if self._alone(leaf):
                values = values if leaf.axis is None else _gathered_bits(values, leaf.axis)
            elif leaf.axis is None:
                values = self._cut(leaf, values)
            else:
                if leaf.segment not in together:
                    together[leaf.segment] = jnp.split(all_gather(values, "tensor", 0), self.parts)
                values = jnp.concatenate([self._cut(leaf, part) for part in together[leaf.segment]], axis=leaf.axis)
            found.append(_values(leaf, values))
        return found

    def _alone(self, leaf: Leaf) -> bool:
        segment = self.segments[leaf.segment]
        return (segment.local, segment.dtype) == (leaf.host_shape, leaf.host_dtype)

    def _cut(self, leaf: Leaf, values: jax.Array) -> jax.Array:
        """A parameter of :attr:`Leaf.host_shape`, out of the bytes in which it travels with others."""
        start, size = leaf.offset - self.segments[leaf.segment].offset, leaf.host_dtype.itemsize
        values = jax.lax.slice(values, (start,), (start + leaf.nbytes,))
        if size > 1:
            values = jax.lax.bitcast_convert_type(values.reshape(-1, size), jnp.dtype(leaf.host_dtype))
        elif leaf.host_dtype != np.uint8:
            values = jax.lax.bitcast_convert_type(values, jnp.dtype(leaf.host_dtype))
        return values.reshape(leaf.host_shape)


def _gathered_bits(values: jax.Array, axis: int) -> jax.Array:
    """All parts of a parameter. As plain integers: where a collective lacks a dtype, XLA would send a wider one."""
    unsigned = jnp.dtype(f"uint{8 * values.dtype.itemsize}")
    whole = all_gather(jax.lax.bitcast_convert_type(values, unsigned), "tensor", axis)
    return jax.lax.bitcast_convert_type(whole, values.dtype)


def _values(leaf: Leaf, values: jax.Array) -> jax.Array:
    """A parameter of its own dtype, out of what travelled of it."""
    if leaf.dtype != _FOUR_BITS:
        return values
    return jax.lax.bitcast_convert_type(values, jnp.int4).reshape(*values.shape[:-1], 2 * values.shape[-1])


def two_to_a_byte(values: np.ndarray, out: np.ndarray) -> None:
    """Pack values of 4 bits [..., n], one to a byte, into bytes [..., n / 2], the first of two in the low half."""
    raw = values.view(np.uint8)
    np.left_shift(raw[..., 1::2], 4, out=out)
    out |= raw[..., 0::2] & 15


def _view(buffer: np.ndarray, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    found: np.ndarray = buffer[offset : offset + count].view(dtype)
    return found.reshape(shape)
