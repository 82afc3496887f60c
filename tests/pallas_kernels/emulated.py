"""The instructions of :class:`pallas_kernels.registers.Registers` in numpy, for all threads of some blocks at once.

A register is an array [blocks, threads]. Where only some threads do something, what the others would store or copy is
left out. Copies that are asynchronous are made when they are waited for, no earlier; shared
memory starts as NaN, so that what is read too early shows.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


class Emulated:
    """Blocks of threads: those of a cluster, or of a grid whose blocks wait for one another."""

    def __init__(self, blocks, shared, threads=128):
        self.blocks, self.threads = blocks, threads
        self.thread = np.tile(np.arange(threads, dtype=np.uint32), (blocks, 1))
        self.lane, self.warp = self.thread % np.uint32(32), self.thread // np.uint32(32)
        self.row = np.arange(blocks)[:, None]
        self.block = np.tile(np.arange(blocks, dtype=np.uint32)[:, None], (1, threads))
        self.active = np.ones((blocks, threads), bool)
        self.smem = np.full((blocks, shared), 0xFF, np.uint8)
        self.used = 0
        self.gmem = np.zeros(0, np.uint8)
        self.open, self.groups = [], []
        self.barriers, self.rows, self.time = {}, [], 0

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
        return np.full((self.blocks, self.threads), value, kind)

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

    def fresh(self):
        return self

    def equal(self, a, b):
        return a == np.asarray(b, a.dtype)

    def address(self, low, high):
        return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)

    def halves(self, value):
        return value.astype(np.uint32), (value >> np.uint64(32)).astype(np.uint32)

    def when(self, condition, body):
        before, self.active = self.active, self.active & condition
        if self.active.any():
            body()
        self.active = before

    def branch(self, condition, yes, no, like):
        before, found = self.active, [np.zeros_like(value) for value in like]
        for body, self.active in ((yes, before & condition), (no, before & ~condition)):
            if self.active.any():
                values = body()
                assert [v.dtype for v in values] == [v.dtype for v in like]
                found = [np.where(self.active, new, old) for new, old in zip(values, found, strict=True)]
        self.active = before
        return found

    def loop(self, count, carry, body):
        if not isinstance(count, np.ndarray):
            for i in range(count):
                carry = body(self.constant(i), list(carry))
            return carry
        before = self.active
        for i in range(int(count[before].max(initial=0))):
            self.active = before & (i < count)
            found = body(self.constant(i), list(carry))
            carry = [np.where(self.active, new, old).astype(old.dtype) for new, old in zip(found, carry, strict=True)]
        self.active = before
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
        return np.maximum(value, np.asarray(least, np.float32))

    def exp2(self, value):
        return np.exp2(value)

    def divide(self, a, b):
        return np.where(self.active & (b != 0), a / np.where(b == 0, 1, b), np.nan).astype(np.float32)

    def fma(self, a, b, c):
        return (a.astype(np.float64) * b + c).astype(np.float32)

    def mma(self, kind, a, b, c):
        g, q = np.divmod(np.arange(32), 4)
        count = self.threads // 32
        left, right = (np.zeros((self.blocks, count, 16, size), np.float32) for size in (16, 8))
        warps = lambda value: value.reshape(self.blocks, count, 32)  # noqa: E731
        for i in range(4):
            for j, value in enumerate(self.unpack(kind, a[i])):
                left[:, :, g + 8 * (i % 2), 2 * q + j + 8 * (i // 2)] = warps(value)
        for i in range(2):
            for j, value in enumerate(self.unpack(kind, b[i])):
                right[:, :, 2 * q + j + 8 * i, g] = warps(value)
        product = left @ right
        return [
            c[i] + product[:, :, g + 8 * (i // 2), 2 * q + i % 2].reshape(self.blocks, -1).astype(np.float32)
            for i in range(4)
        ]

    def mma_integers(self, a, b, c):
        g, q = np.divmod(np.arange(32), 4)
        count = self.threads // 32
        left, right = (np.zeros((self.blocks, count, *shape), np.int64) for shape in ((16, 32), (32, 8)))

        def signed(value):
            return np.ascontiguousarray(value).view(np.int8).reshape(self.blocks, count, 32, 4)

        for j in range(4):
            for i in range(4):
                left[:, :, g + 8 * (i % 2), 4 * q + j + 16 * (i // 2)] = signed(a[i])[..., j]
            for i in range(2):
                right[:, :, 4 * q + j + 16 * i, g] = signed(b[i])[..., j]
        product = left @ right
        found = []
        for i in range(4):
            more = product[:, :, g + 8 * (i // 2), 2 * q + i % 2].reshape(self.blocks, -1)
            found.append(self._fits(c[i].view(np.int32) + more))
        return found

    def _fits(self, value):
        assert (abs(value) < 1 << 31)[self.active].all()
        return value.astype(np.int32).view(np.uint32)

    def rounded(self, value):
        return self._fits(np.rint(np.nan_to_num(value, posinf=0, neginf=0)).astype(np.int64))

    def as_float(self, value):
        return value.view(np.int32).astype(np.float32)

    def across(self, value, lanes):
        return value[:, np.arange(self.threads) ^ lanes]

    def copy_async(self, target, source, size, valid):
        self.open.append((target, source, size, valid))

    def commit_copies(self):
        self.groups.append((self.open, self.active))
        self.open = []

    def wait_copies(self, groups):
        # Of the threads that are here: others may be behind in their groups.
        behind = np.zeros((self.blocks, self.threads), int)
        for number in range(len(self.groups) - 1, -1, -1):
            copies, left = self.groups[number]
            now = left & self.active & (behind >= groups)
            behind += left
            for target, source, size, valid in copies:
                for i in range(size):
                    own = now & (i < valid)
                    at = np.where(own, source + np.uint64(i), 0).astype(np.int64)
                    assert (at < self.gmem.size).all()
                    value = np.where(own, self.gmem[at], 0).astype(np.uint8)
                    self.smem[np.where(now, self.row, 0)[now], (target + np.uint32(i))[now]] = value[now]
            self.groups[number] = copies, left & ~now
        self.groups = [group for group in self.groups if group[1].any()]

    def note_time(self, address):
        self.time += 1
        self._store_memory(address, [self.constant(self.time), self.constant(1000 * self.time)])

    def init_barriers(self, address, number, arrivals):
        for block, thread in np.argwhere(self.active):
            for i in range(number):
                self.barriers[block, int(address[block, thread]) + 8 * i] = [arrivals, arrivals, 0]

    def publish_to_copies(self):
        pass

    def copy_rows(self, copies, barrier):
        for value in (*(value for copy in copies for value in copy), barrier):
            assert (value.reshape(self.blocks, -1, 32) == value.reshape(self.blocks, -1, 32)[..., :1]).all()
        for block, thread in np.argwhere(self.active & (self.lane == 0)):
            for copy in copies:
                one = [int(value[block, thread]) for value in copy]
                assert not any(value % 16 for value in one)
                self.rows.append((block, *one, int(barrier[block, thread])))
        self.arrive(barrier)

    def arrive(self, barrier):
        for block, thread in np.argwhere(self.active & (self.lane == 0)):
            state = self.barriers[block, int(barrier[block, thread])]
            state[1] -= 1
            if state[1] == 0:
                state[1:] = state[0], state[2] + 1

    def await_barrier(self, barrier, parity):
        """The rows that a barrier waits for come now, and no earlier."""
        waited = {(block, int(barrier[block, thread])) for block, thread in np.argwhere(self.active)}
        for block, thread in np.argwhere(self.active & (self.lane == 0)):
            phase = self.barriers[block, int(barrier[block, thread])][2]
            assert phase % 2 != parity[block, thread]
        for block, target, source, size, at in self.rows:
            if (block, at) in waited:
                assert source + size <= self.gmem.size
                self.smem[block, target : target + size] = self.gmem[source : source + size]
        self.rows = [row for row in self.rows if (row[0], row[-1]) not in waited]

    def load_shared(self, address, count=1):
        address = np.where(self.active, address, 0).astype(np.uint32)
        assert (address % (4 * count) == 0).all()
        return [self._words(lambda at: self.smem[self.row, at], address + np.uint32(4 * i)) for i in range(count)]

    def load_memory(self, address, count=1):
        address = np.where(self.active, address, 0).astype(np.uint64)
        assert (address % (4 * count) == 0).all()
        return [self._words(lambda at: self.gmem[at], (address + np.uint64(4 * i)).astype(int)) for i in range(count)]

    def _words(self, read, address):
        data = np.stack([read(address + i) for i in range(4)], axis=-1)
        return np.ascontiguousarray(data).view(np.uint32)[..., 0]

    def load_other(self, address, block):
        word = self._words(lambda at: self.smem[block][at], address)
        return self.float_of(word)

    def load_half(self, kind, address, *, fresh=False):
        at = np.where(self.active, address, 0).astype(int)
        data = np.ascontiguousarray(np.stack((self.gmem[at], self.gmem[at + 1]), axis=-1))
        return data.view(KINDS[kind])[..., 0].astype(np.float32)

    def store_half(self, kind, address, value, condition):
        halves = np.ascontiguousarray(value.astype(KINDS[kind])).view(np.uint8).reshape(self.blocks, self.threads, 2)
        condition = condition & self.active
        for i in range(2):
            self.gmem[(address + np.uint64(i))[condition].astype(int)] = halves[..., i][condition]

    def store_shared(self, address, values):
        assert (address % (4 * len(values)) == 0).all()
        for i, value in enumerate(values):
            data = np.ascontiguousarray(value).view(np.uint8).reshape(self.blocks, self.threads, 4)
            for j in range(4):
                at = (address + np.uint32(4 * i + j))[self.active]
                rows = np.broadcast_to(self.row, self.active.shape)[self.active]
                self.smem[rows, at] = data[..., j][self.active]

    def _store_memory(self, address, values):
        assert (address[self.active] % (4 * len(values)) == 0).all()
        for i, value in enumerate(values):
            data = np.ascontiguousarray(value).view(np.uint8).reshape(self.blocks, self.threads, 4)
            for j in range(4):
                self.gmem[(address + np.uint64(4 * i + j))[self.active].astype(int)] = data[..., j][self.active]

    def prefetch(self, address):
        assert (address[self.active] < self.gmem.size).all()

    def send(self, address, word, number):
        assert (address[self.active] % 8 == 0).all()
        self._store_memory(address, [word, number])

    def receive(self, addresses, number, pairs=False):
        """All blocks take the same step at the same time, so what is waited for must be there."""
        words = []
        for address in addresses:
            found = self.load_memory(address, 4 if pairs else 2)
            for word, got in zip(found[::2], found[1::2], strict=True):
                assert (got == number)[self.active].all()
                words.append(word)
        return words

    def sync(self):
        pass

    sync_cluster = sync
