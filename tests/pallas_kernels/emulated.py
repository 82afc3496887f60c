"""The instructions of :class:`pallas_kernels.registers.Registers` in numpy, for all threads of a cluster at once.

A register is an array [blocks, 128]. Copies that are asynchronous are made when they are waited for, no earlier; shared
memory starts as NaN, so that what is read too early shows.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


class Emulated:
    """A cluster of blocks of 128 threads."""

    def __init__(self, blocks, shared):
        self.blocks = blocks
        self.thread = np.tile(np.arange(128, dtype=np.uint32), (blocks, 1))
        self.lane, self.warp = self.thread % np.uint32(32), self.thread // np.uint32(32)
        self.block = np.arange(blocks)[:, None]
        self.smem = np.full((blocks, shared), 0xFF, np.uint8)
        self.used = 0
        self.gmem = np.zeros(0, np.uint8)
        self.open, self.groups = [], []

    def place(self, array):
        """Put an array into global memory; its address stands for the reference."""
        at = self.gmem.size
        data = np.frombuffer(array.tobytes(), np.uint8)
        self.gmem = np.concatenate((self.gmem, data, np.full(-data.size % 256, 0xFF, np.uint8)))
        return at

    def reserve(self, size):
        """Reserve shared memory; its address stands for the reference."""
        at = self.used
        self.used += -(-size // 1024) * 1024
        assert self.used <= self.smem.shape[1]
        return at

    def constant(self, value):
        kind = np.uint32 if isinstance(value, int) else np.float32
        return np.full((self.blocks, 128), value, kind)

    def shared(self, ref):
        return self.constant(ref)

    def memory(self, ref):
        return self.constant(0).astype(np.uint64) + np.uint64(ref)

    def wide(self, value):
        assert value.dtype == np.uint32
        return value.astype(np.uint64)

    def select(self, condition, yes, no):
        kind = yes.dtype if isinstance(yes, np.ndarray) else no.dtype if isinstance(no, np.ndarray) else np.uint32
        return np.where(condition, yes, no).astype(kind)

    def loop(self, count, carry, body):
        for i in range(count):
            carry = body(self.constant(i), list(carry))
        return carry

    def merge(self, a, mask, b, *, toggle=False):
        a = a & np.uint32(mask)
        return a ^ b if toggle else a | b

    def bytes_of(self, a, b, selector):
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        found = np.zeros_like(both)
        for i in range(4):
            byte = both >> np.uint64(8 * (selector >> (4 * i) & 7)) & np.uint64(255)
            found |= byte << np.uint64(8 * i)
        return found.astype(np.uint32)

    def unpack(self, kind, pair):
        halves = np.ascontiguousarray(pair).view(np.uint16).view(KINDS[kind]).astype(np.float32)
        return halves[:, 0::2], halves[:, 1::2]

    def pack(self, kind, low, high):
        halves = np.stack((low, high), axis=-1).astype(KINDS[kind])
        return np.ascontiguousarray(halves).view(np.uint32)[..., 0]

    def _pairwise(self, kind, a, b, do):
        return self.pack(kind, *(do(x, y) for x, y in zip(self.unpack(kind, a), self.unpack(kind, b), strict=True)))

    def subtract(self, kind, a, b):
        return self._pairwise(kind, a, b, np.subtract)

    def multiply(self, kind, a, b):
        return self._pairwise(kind, a, self.constant(b), np.multiply)

    def float_of(self, bits):
        return np.ascontiguousarray(bits).view(np.float32)

    def rsqrt(self, value):
        return (1 / np.sqrt(value)).astype(np.float32)

    def maximum(self, value, least):
        return np.maximum(value, np.float32(least))

    def mma(self, kind, a, b, c):
        g, q = np.divmod(np.arange(32), 4)
        left, right = np.zeros((self.blocks, 4, 16, 16), np.float32), np.zeros((self.blocks, 4, 16, 8), np.float32)
        warps = lambda value: value.reshape(self.blocks, 4, 32)  # noqa: E731
        for i in range(4):
            for j, value in enumerate(self.unpack(kind, a[i])):
                left[:, :, g + 8 * (i % 2), 2 * q + j + 8 * (i // 2)] = warps(value)
        for i in range(2):
            for j, value in enumerate(self.unpack(kind, b[i])):
                right[:, :, 2 * q + j + 8 * i, g] = warps(value)
        product = left @ right
        return [
            c[i] + product[:, :, g + 8 * (i // 2), 2 * q + i % 2].reshape(self.blocks, 128).astype(np.float32)
            for i in range(4)
        ]

    def across(self, value, lanes):
        return value[:, np.arange(128) ^ lanes]

    def copy_async(self, target, source, size, valid):
        self.open.append((target, source, size, valid))

    def commit_copies(self):
        self.groups.append(self.open)
        self.open = []

    def wait_copies(self, groups):
        while len(self.groups) > groups:
            for target, source, size, valid in self.groups.pop(0):
                for i in range(size):
                    own = i < valid
                    at = np.where(own, source + np.uint64(i), 0).astype(np.int64)
                    assert (at < self.gmem.size).all()
                    self.smem[self.block, target + np.uint32(i)] = np.where(own, self.gmem[at], 0)

    def load_shared(self, address, count=1):
        assert (address % (4 * count) == 0).all()
        return [self._words(lambda at: self.smem[self.block, at], address + np.uint32(4 * i)) for i in range(count)]

    def load_memory(self, address, count=1):
        assert (address % (4 * count) == 0).all()
        return [self._words(lambda at: self.gmem[at], (address + np.uint64(4 * i)).astype(int)) for i in range(count)]

    def _words(self, read, address):
        data = np.stack([read(address + i) for i in range(4)], axis=-1)
        return np.ascontiguousarray(data).view(np.uint32)[..., 0]

    def load_other(self, address, block):
        word = self._words(lambda at: self.smem[block][at], address)
        return self.float_of(word)

    def load_half(self, kind, address):
        at = address.astype(int)
        data = np.ascontiguousarray(np.stack((self.gmem[at], self.gmem[at + 1]), axis=-1))
        return data.view(KINDS[kind])[..., 0].astype(np.float32)

    def store_half(self, kind, address, value, condition):
        halves = np.ascontiguousarray(value.astype(KINDS[kind])).view(np.uint8).reshape(self.blocks, 128, 2)
        for i in range(2):
            self.gmem[(address + np.uint64(i))[condition].astype(int)] = halves[..., i][condition]

    def store_shared(self, address, values):
        assert (address % (4 * len(values)) == 0).all()
        for i, value in enumerate(values):
            data = np.ascontiguousarray(value).view(np.uint8).reshape(self.blocks, 128, 4)
            for j in range(4):
                self.smem[self.block, address + np.uint32(4 * i + j)] = data[..., j]

    def sync(self):
        pass

    sync_cluster = sync
