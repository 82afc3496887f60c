"""Code for single threads inside a Mosaic GPU kernel: 32-bit registers, and the instructions that Pallas does not name.

Pallas describes what a warpgroup does with whole arrays. Where the speed is in which register holds what, a kernel says
what one thread does, through :func:`jax.experimental.pallas.mosaic_gpu.inline_mgpu` and the operations of
:class:`Registers`. Values are :class:`Reg`; integers are unsigned. A kernel that uses nothing else of a value than
Python's operators, and nothing of the machine but :class:`Registers`, also runs on anything else with these methods:
the tests have them in numpy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
from jax._src.lib.mlir import ir  # type: ignore[attr-defined]
from jax._src.lib.mlir.dialects import arith, llvm, scf
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils

WARPGROUP = 128
"""Threads of a block."""

PAUSE = 32
"""Nanoseconds between two looks for a packet."""


def publish_to_cluster() -> None:
    """Make what this warpgroup wrote to its shared memory visible to the other blocks of the cluster.

    To be called before the arrival at a cluster barrier. That arrival is one thread's, and it orders what came before
    it for its own block only (``mbarrier.arrive`` without a scope, JAX 0.11.2): another block may read the memory
    before the last stores of the other warps are in it.
    """

    @plgpu.inline_mgpu()  # type: ignore[untyped-decorator]
    def fence(_: Any) -> None:
        llvm.inline_asm(None, [], "fence.acq_rel.cluster;", "~{memory}", has_side_effects=True, asm_dialect=0)
        utils.warpgroup_barrier()

    fence()


@dataclass(frozen=True)
class Reg:
    """A value of a thread: i1, i32, i64 or f32. An ``int`` or ``float`` beside it becomes a constant of its type."""

    value: Any

    @property
    def floating(self) -> bool:
        """Whether it is a float."""
        return isinstance(self.value.type, ir.F32Type)

    def of(self, other: Any) -> Any:
        """``other`` as a value of the same type."""
        return other.value if isinstance(other, Reg) else _constant(other, self.value.type)

    def __add__(self, other: Any) -> Reg:
        return Reg((arith.addf if self.floating else arith.addi)(self.value, self.of(other)))

    def __sub__(self, other: Any) -> Reg:
        return Reg((arith.subf if self.floating else arith.subi)(self.value, self.of(other)))

    def __mul__(self, other: Any) -> Reg:
        return Reg((arith.mulf if self.floating else arith.muli)(self.value, self.of(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __and__(self, other: Any) -> Reg:
        return Reg(arith.andi(self.value, self.of(other)))

    def __or__(self, other: Any) -> Reg:
        return Reg(arith.ori(self.value, self.of(other)))

    def __xor__(self, other: Any) -> Reg:
        return Reg(arith.xori(self.value, self.of(other)))

    def __lshift__(self, bits: int) -> Reg:
        return Reg(arith.shli(self.value, self.of(bits)))

    def __rshift__(self, bits: int) -> Reg:
        return Reg(arith.shrui(self.value, self.of(bits)))

    def __floordiv__(self, other: Any) -> Reg:
        return Reg(arith.divui(self.value, self.of(other)))

    def __mod__(self, other: Any) -> Reg:
        return Reg(arith.remui(self.value, self.of(other)))

    def __lt__(self, other: Any) -> Reg:
        if self.floating:
            return Reg(arith.cmpf(arith.CmpFPredicate.OLT, self.value, self.of(other)))
        return Reg(arith.cmpi(arith.CmpIPredicate.ult, self.value, self.of(other)))


def _constant(value: int | float, kind: Any) -> Any:
    if isinstance(value, int):  # MLIR has signed ones only
        bits = ir.IntegerType(kind).width
        value = (value + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)
    return utils.c(value, kind)


def _type(name: str) -> Any:
    return ir.F32Type.get() if name == "f32" else ir.IntegerType.get_signless(int(name[1:]))


def _asm(text: str, *inputs: Reg, results: Sequence[str] = (), effects: bool = True, convergent: bool = False) -> Any:
    """An instruction; ``$0`` and on are its results and then its inputs."""
    values = [i.value for i in inputs]
    if not results:
        utils.inline_ptx(text, *values, convergent=convergent)
        return None
    types = [_type(name) for name in results]
    found = utils.inline_ptx(text, *values, result_types=types, has_side_effects=effects, convergent=convergent)
    return [Reg(value) for value in found]


class Registers:
    """The instructions. Addresses in shared memory are i32, in global memory i64; both count bytes."""

    def __init__(self, threads: int = WARPGROUP) -> None:
        """Of a block of so many threads, or of a warpgroup of its own."""
        self.threads, self.known = threads, True
        self.thread = Reg(utils.thread_idx()) % threads
        self.lane = self.thread % 32
        self.warp = Reg(utils.warp_idx()) % (threads // 32)

    @property
    def block(self) -> Reg:
        """The number of the block in a grid of one axis."""
        return _asm("mov.u32 $0, %ctaid.x;", results=["i32"], effects=not self.known)[0]

    def fresh(self) -> Registers:
        """The same thread, for a part of a loop's body of which nothing should be computed before the loop.

        What depends on the thread alone is the same every time, so that the compiler would keep it all in registers.
        """
        found = copy.copy(self)
        found.known = False
        found.thread = _asm("mov.u32 $0, %tid.x;", results=["i32"])[0] % self.threads
        found.lane, found.warp = found.thread % 32, found.thread // 32
        return found

    def constant(self, value: int | float) -> Reg:
        """A constant: i32 of an ``int``, f32 of a ``float``."""
        return Reg(_constant(value, _type("i32" if isinstance(value, int) else "f32")))

    def scalar(self, array: Any) -> Reg:
        """A scalar argument of ``inline_mgpu``."""
        return Reg(array.registers.item())

    def shared(self, ref: Any) -> Reg:
        """The address of an array in shared memory."""
        return Reg(llvm.ptrtoint(_type("i32"), utils.memref_ptr(ref)))

    def memory(self, ref: Any) -> Reg:
        """The address of an array in global memory."""
        return Reg(llvm.ptrtoint(_type("i64"), utils.memref_ptr(ref)))

    def wide(self, value: Reg) -> Reg:
        """An i32 as i64."""
        return Reg(arith.extui(_type("i64"), value.value))

    def select(self, condition: Reg, yes: Any, no: Any) -> Reg:
        """One of two, of which one may be an ``int``."""
        yes = yes if isinstance(yes, Reg) else Reg(no.of(yes)) if isinstance(no, Reg) else self.constant(yes)
        return Reg(arith.select(condition.value, yes.value, yes.of(no)))

    def equal(self, a: Reg, b: Any) -> Reg:
        """Whether two integers are."""
        return Reg(arith.cmpi(arith.CmpIPredicate.eq, a.value, a.of(b)))

    def when(self, condition: Reg, body: Callable[[], None]) -> None:
        """Do something where a condition holds."""
        made: Any = scf.IfOp  # whose declared arguments are those of the class that it extends
        branch = made(condition.value)
        with ir.InsertionPoint(branch.then_block):
            body()
            scf.yield_([])

    def branch(
        self, condition: Reg, yes: Callable[[], Sequence[Reg]], no: Callable[[], Sequence[Reg]], like: Sequence[Reg]
    ) -> list[Reg]:
        """What ``yes()`` or ``no()`` returns, values of the types of ``like``; only one of them is done."""
        kinds = [value.value.type for value in like]
        made: Any = scf.IfOp
        op = made(condition.value, kinds, has_else=True)
        for block, body in ((op.then_block, yes), (op.else_block, no)):
            with ir.InsertionPoint(block):
                scf.yield_([value.value for value in body()])
        return [Reg(value) for value in op.results]

    def loop(
        self, count: int | Reg, carry: Sequence[Reg], body: Callable[[Reg, list[Reg]], Sequence[Reg]]
    ) -> list[Reg]:
        """Call ``body(i, carry)`` for ``i`` from 0 to ``count``; it returns what it is given next."""
        i32 = _type("i32")
        bounds: Any = [utils.c(0, i32), count.value if isinstance(count, Reg) else utils.c(count, i32), utils.c(1, i32)]
        loop: Any = scf.ForOp  # whose declared arguments are those of the class that it extends
        op = loop(*bounds, [value.value for value in carry])
        with ir.InsertionPoint(op.body):
            given = [Reg(value) for value in op.inner_iter_args]
            scf.yield_([value.value for value in body(Reg(op.induction_variable), given)])
        return [Reg(value) for value in op.results]

    def address(self, low: Reg, high: Reg) -> Reg:
        """An i64 of two i32."""
        return self.wide(low) | (self.wide(high) << 32)

    def halves(self, value: Reg) -> tuple[Reg, Reg]:
        """The low and the high i32 of an i64."""
        i32 = _type("i32")
        return Reg(arith.trunci(i32, value.value)), Reg(arith.trunci(i32, (value >> 32).value))

    # Bits.

    def merge(self, a: Reg, mask: int, b: int | Reg, *, toggle: bool = False) -> Reg:
        """``(a & mask) | b``, or with ``^`` for ``|``: one instruction."""
        table = (0xF0 & 0xCC) ^ 0xAA if toggle else (0xF0 & 0xCC) | 0xAA
        b = b if isinstance(b, Reg) else self.constant(b)
        text = f"lop3.b32 $0, $1, $2, $3, {table:#x};"
        return _asm(text, a, self.constant(mask), b, results=["i32"], effects=False)[0]

    def bytes_of(self, a: Reg, b: Reg, selector: int) -> Reg:
        """Four bytes of eight, those of ``a`` numbered 0 to 3 and of ``b`` 4 to 7; the lowest first in ``selector``."""
        return _asm("prmt.b32 $0, $1, $2, $3;", a, b, self.constant(selector), results=["i32"], effects=False)[0]

    # Pairs of bfloat16 or float16 in a register, ``kind`` being bf16 or f16.

    def subtract(self, kind: str, a: Reg, b: Reg) -> Reg:
        """``a - b``."""
        return _asm(f"sub.rn.{kind}x2 $0, $1, $2;", a, b, results=["i32"], effects=False)[0]

    def multiply(self, kind: str, a: Reg, b: int) -> Reg:
        """``a * b``, where ``b`` is the bits of a pair."""
        return _asm(f"mul.rn.{kind}x2 $0, $1, $2;", a, self.constant(b), results=["i32"], effects=False)[0]

    def pack(self, kind: str, low: Reg, high: Reg) -> Reg:
        """Round two f32."""
        return _asm(f"cvt.rn.{kind}x2.f32 $0, $1, $2;", high, low, results=["i32"], effects=False)[0]

    def unpack(self, kind: str, pair: Reg) -> tuple[Reg, Reg]:
        """The two as f32."""
        if kind == "bf16":
            return self.float_of(pair << 16), self.float_of(pair & 0xFFFF0000)
        text = "{ .reg .b16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"
        low, high = _asm(text, pair, results=["f32", "f32"], effects=False)
        return low, high

    def float_of(self, bits: Reg) -> Reg:
        """An f32 of its bits."""
        return Reg(arith.bitcast(_type("f32"), bits.value))

    def rounded(self, value: Reg) -> Reg:
        """The nearest signed integer to an f32; 0 of what is not a number."""
        return _asm("cvt.rni.s32.f32 $0, $1;", value, results=["i32"], effects=False)[0]

    def as_float(self, value: Reg) -> Reg:
        """A signed integer as f32."""
        return Reg(arith.sitofp(_type("f32"), value.value))

    def rsqrt(self, value: Reg) -> Reg:
        """``1 / sqrt(value)``, to 2 units in the last place."""
        return _asm("rsqrt.approx.f32 $0, $1;", value, results=["f32"], effects=False)[0]

    def exp2(self, value: Reg) -> Reg:
        """Two to the power of an f32, to 2 units in the last place."""
        return _asm("ex2.approx.ftz.f32 $0, $1;", value, results=["f32"], effects=False)[0]

    def divide(self, a: Reg, b: Reg) -> Reg:
        """``a / b`` of f32, to 2 units in the last place."""
        return _asm("div.full.f32 $0, $1, $2;", a, b, results=["f32"], effects=False)[0]

    def fma(self, a: Reg, b: Reg, c: Reg) -> Reg:
        """``a * b + c`` of f32, rounded once."""
        return _asm("fma.rn.f32 $0, $1, $2, $3;", a, b, c, results=["f32"], effects=False)[0]

    def maximum(self, value: Reg, least: float | Reg) -> Reg:
        """The larger of two f32."""
        return Reg(arith.maximumf(value.value, value.of(least)))

    def mma(self, kind: str, a: Sequence[Reg], b: Sequence[Reg], c: Sequence[Reg]) -> list[Reg]:
        """Warp: [16, 16] by [16, 8] plus [16, 8], in the fragments of ``mma.m16n8k16``."""
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        return _asm(text, *a, *b, *c, results=["f32"] * 4, effects=False, convergent=True)

    def mma_integers(self, a: Sequence[Reg], b: Sequence[Reg], c: Sequence[Reg]) -> list[Reg]:
        """Warp: [16, 32] by [32, 8] plus [16, 8], signed bytes and i32, in the fragments of ``mma.m16n8k32``."""
        text = (
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        return _asm(text, *a, *b, *c, results=["i32"] * 4, effects=False, convergent=True)

    def across(self, value: Reg, lanes: int) -> Reg:
        """Warp: the f32 of the lane whose number differs in the bits ``lanes``."""
        text = f"shfl.sync.bfly.b32 $0, $1, {lanes}, 0x1f, 0xffffffff;"
        return _asm(text, value, results=["f32"], convergent=True)[0]

    # Memory.

    def copy_async(self, target: Reg, source: Reg, size: int, valid: Reg) -> None:
        """Start to copy ``valid`` bytes from global to shared memory, and zeros up to ``size``, 4 or 16."""
        way = "cg.shared.global.L2::128B" if size == 16 else "ca.shared.global"
        _asm(f"cp.async.{way} [$0], [$1], {size}, $2;", target, source, valid)

    def commit_copies(self) -> None:
        """Make the copies since the last call a group."""
        _asm("cp.async.commit_group;")

    def wait_copies(self, groups: int) -> None:
        """Wait until at most so many groups of this thread's copies are under way."""
        _asm(f"cp.async.wait_group {groups};")

    def copy_rows(self, copies: Sequence[tuple[Reg, Reg, Reg]], barrier: Reg) -> None:
        """Warp: start copies by the copy engine: to shared memory, from global memory, of so many bytes, 16 or more.

        All lanes name the same. The warp arrives at the barrier, which then waits for the bytes as well. Those of the
        first copy are marked as the first that the L2 cache may forget.
        """
        total = copies[0][2]
        for _, _, size in copies[1:]:
            total = total + size
        lines = []
        for i in range(len(copies)):
            at, start, number = (f"${3 * i + j + 3}" for j in range(3))
            hint, policy = (".L2::cache_hint", ", $2") if i == 0 else ("", "")
            lines.append(
                f"setp.ne.and.u32 some, {number}, 0, one; @some cp.async.bulk.shared::cluster.global"
                f".mbarrier::complete_tx::bytes{hint} [{at}], [{start}], {number}, [$0]{policy};"
            )
        first = Reg(_constant(0x12F0000000000000, _type("i64")))
        _asm(
            "{ .reg .pred one, some; elect.sync _|one, 0xffffffff; "
            f"@one mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], $1; {' '.join(lines)} }}",
            barrier, total, first, *(value for copy in copies for value in copy), convergent=True,
        )  # fmt: skip

    def init_barriers(self, address: Reg, number: int, arrivals: int) -> None:
        """Make barriers of 8 bytes each in shared memory; by one thread, before all others meet."""
        for i in range(number):
            _asm(f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", address + 8 * i)

    def publish_to_copies(self) -> None:
        """Let the copy engine see what this thread has written to shared memory, its barriers included."""
        _asm("fence.proxy.async.shared::cta;")
        _asm("fence.mbarrier_init.release.cluster;")

    def arrive(self, barrier: Reg) -> None:
        """Warp: arrive once, after what all its threads have read and written in shared memory."""
        _asm(
            "{ .reg .pred one; bar.warp.sync 0xffffffff; elect.sync _|one, 0xffffffff; "
            "@one mbarrier.arrive.shared::cta.b64 _, [$0]; }",
            barrier, convergent=True,
        )  # fmt: skip

    def await_barrier(self, barrier: Reg, parity: Reg) -> None:
        """Wait until the barrier's phase of a parity has ended."""
        _asm(
            "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra AGAIN; }",
            barrier, parity,
        )  # fmt: skip

    def load_shared(self, address: Reg, count: int = 1) -> list[Reg]:
        """Load i32."""
        return self._load("shared", address, count)

    def load_memory(self, address: Reg, count: int = 1) -> list[Reg]:
        """Load i32."""
        return self._load("global", address, count)

    def load_other(self, address: Reg, block: int) -> Reg:
        """Load an f32 at an address in the shared memory of another block of the cluster."""
        text = "{ .reg .b32 a; mapa.shared::cluster.u32 a, $1, $2; ld.shared::cluster.f32 $0, [a]; }"
        return _asm(text, address, self.constant(block), results=["f32"])[0]

    def load_half(self, kind: str, address: Reg, *, fresh: bool = False) -> Reg:
        """Load a bfloat16 or float16 of global memory as f32; ``fresh``, past what the SM may have kept of it."""
        way = "relaxed.gpu.global" if fresh else "global"
        raw = _asm(f"{{ .reg .b16 h; ld.{way}.b16 h, [$1]; cvt.u32.u16 $0, h; }}", address, results=["i32"])[0]
        return self.unpack(kind, raw)[0]

    def _load(self, space: str, address: Reg, count: int) -> list[Reg]:
        names = ", ".join(f"${i}" for i in range(count))
        vector = "" if count == 1 else f".v{count}"
        text = f"ld.{space}{vector}.b32 {names if count == 1 else f'{{{names}}}'}, [${count}];"
        return _asm(text, address, results=["i32"] * count)

    def store_shared(self, address: Reg, values: Sequence[Reg]) -> None:
        """Store i32 or f32, one or four."""
        names = ", ".join(f"${i + 1}" for i in range(len(values)))
        where = "[$0], " + (names if len(values) == 1 else f"{{{names}}}")
        vector = "" if len(values) == 1 else f".v{len(values)}"
        kind = "f32" if values[0].floating else "b32"
        _asm(f"st.shared{vector}.{kind} {where};", address, *values)

    def store_half(self, kind: str, address: Reg, value: Reg, condition: Reg) -> None:
        """Round an f32 to bfloat16 or float16 and store it in global memory, where ``condition`` holds."""
        chosen = self.select(condition, self.constant(1), 0)
        text = (
            f"{{ .reg .pred p; .reg .b16 h; setp.ne.u32 p, $2, 0; cvt.rn.{kind}.f32 h, $1; @p st.global.b16 [$0], h; }}"
        )
        _asm(text, address, value, chosen)

    def prefetch(self, address: Reg) -> None:
        """Bring 128 bytes of global memory into the L2 cache, without waiting for them."""
        _asm("prefetch.global.L2 [$0];", address)

    # Packets, by which blocks of one grid hand on what they have computed: a word and the number of what it is of. They
    # are written and read as one, so that who finds the number has the word: no fence, and no waiting for other words.

    def send(self, address: Reg, word: Reg, number: Reg) -> None:
        """Write a packet of 8 bytes into global memory."""
        word = Reg(llvm.bitcast(_type("i32"), word.value)) if word.floating else word
        _asm("st.relaxed.gpu.global.v2.b32 [$0], {$1, $2};", address, word, number)

    def receive(self, addresses: Sequence[Reg], number: Reg, pairs: bool = False) -> list[Reg]:
        """Wait until the packets at all addresses have a number, and return their words.

        With ``pairs`` there are two packets at each, in 16 bytes.
        """
        each = 1 + pairs
        words = each * len(addresses)
        lines = []
        for i in range(len(addresses)):
            names = ", ".join(f"${i * each + j}, flag{i * each + j}" for j in range(each))
            lines.append(f"ld.relaxed.gpu.global.v{2 * each}.b32 {{{names}}}, [${words + 1 + i}];")
        lines.append(f"setp.ne.u32 wrong, flag0, ${words};")
        lines += [f"setp.ne.or.u32 wrong, flag{i}, ${words}, wrong;" for i in range(1, words)]
        flags = ", ".join(f"flag{i}" for i in range(words))
        # Who has to wait does so for a while before asking again, for the sake of those who load weights.
        text = (
            f"{{ .reg .pred wrong; .reg .b32 {flags}; bra ASK; AGAIN: nanosleep.u32 {PAUSE}; "
            f"ASK: {' '.join(lines)} @wrong bra AGAIN; }}"
        )
        found: list[Reg] = _asm(text, number, *addresses, results=["i32"] * words)
        return found

    def note_time(self, address: Reg) -> None:
        """Write the SM's cycles and the GPU's nanoseconds, the low 32 bits of each, into 8 bytes of global memory."""
        text = (
            "{ .reg .b32 cycles, nanoseconds; mov.u32 cycles, %clock; mov.u32 nanoseconds, %globaltimer_lo; "
            "st.global.v2.b32 [$0], {cycles, nanoseconds}; }"
        )
        _asm(text, address)

    # Waiting for others.

    def sync(self) -> None:
        """Wait for the threads of the block."""
        if self.threads == WARPGROUP:
            utils.warpgroup_barrier()
        else:
            _asm(f"bar.sync 0, {self.threads};", convergent=True)

    def sync_cluster(self) -> None:
        """Wait for the threads of the cluster."""
        _asm("barrier.cluster.arrive.release.aligned;", convergent=True)
        _asm("barrier.cluster.wait.acquire.aligned;", convergent=True)

    # Arrays of Pallas.

    def strided(self, values: Sequence[Reg], shape: tuple[int, int]) -> Any:
        """An array in the layout ``WG_STRIDED(shape, vec_size=1)``: thread ``t`` has the entries ``t + 128 i``."""
        import numpy as np

        vector = ir.VectorType.get((1,), _type("f32"))
        registers = np.array([None] * len(values), dtype=object)
        for i, value in enumerate(values):
            registers[i] = llvm.bitcast(vector, value.value)
        layout = mgpu.WGStridedFragLayout(shape=shape, vec_size=1)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    def entries(self, array: Any) -> list[Reg]:
        """What a thread has of such an array."""
        return [Reg(llvm.bitcast(_type("f32"), value)) for value in array.registers.flat]
