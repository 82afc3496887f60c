"""Continuous batching: which sequence sits in which slot, owns which blocks, and runs in the next step.

Pure host bookkeeping. The scheduler hands out :class:`PrefillStep` and :class:`DecodeStep` descriptions; whoever runs
them reports back which sequences ended. Steps may be handed out before the results of earlier ones are known: device
work runs in the order in which it was handed out, so blocks and slots of a sequence that turns out to have ended may be
given to another at once, and those of one whose last step has been handed out before its results are there.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from enum import Enum

from jaxinfer.errors import CapacityError
from jaxinfer.generation.kv_cache import BlockAllocator, blocks_for


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
    LEAVING = "leaving"
    """Its last step has been handed out: slot and blocks are free, its last tokens are not yet known."""
    ENDED = "ended"


@dataclass(eq=False)
class Sequence:
    """One running text, as the scheduler sees it.

    Attributes:
        prompt: token ids of the prompt.
        max_tokens: output tokens after which it ends; 0 for a prompt that is only scored.
        arrival: order of arrival, set by :meth:`Scheduler.add`; later is younger.
        output: output tokens that are known.
        dispatched: output tokens that steps were handed out for, known or not.
        computed: tokens whose keys and values are in the cache or will be by steps handed out.
        slot: place in the decode batch of its shard, or None.
        shard: data shard, or None.
        blocks: its blocks in order.
        preemptions: how often it lost its blocks and was computed again.
        packable: whether its prompt may be computed in a packed step.
    """

    prompt: list[int]
    max_tokens: int
    arrival: int = -1
    output: list[int] = field(default_factory=list)
    dispatched: int = 0
    computed: int = 0
    target: int = 0
    slot: int | None = None
    shard: int | None = None
    blocks: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    preemptions: int = 0
    packable: bool = True

    @property
    def prefilling(self) -> bool:
        """Whether part of what it has to say so far is not yet in the cache."""
        return self.computed < self.target

    @property
    def most_tokens(self) -> int:
        """Tokens that its cache may have to hold; the last output token is never written."""
        return len(self.prompt) + max(self.max_tokens - 1, 0)


@dataclass(frozen=True)
class PrefillRow:
    """A chunk of one sequence: its tokens ``start`` to ``stop``; the last chunk also samples the next token."""

    sequence: Sequence
    start: int
    stop: int
    last: bool


@dataclass(frozen=True)
class PrefillStep:
    """Chunks to compute together, by data shard.

    ``packed`` is None where each chunk is a row, padded to the longest; else the chunks of a shard lie one behind the
    other in so many tokens, and the padding is at the end.
    """

    rows: tuple[tuple[PrefillRow, ...], ...]
    packed: int | None = None


@dataclass(frozen=True)
class DecodeRow:
    """``steps`` tokens of one sequence, the first of them output token number ``step``.

    ``position`` is the place of the token that is fed first, which is the last one sampled.
    """

    sequence: Sequence
    position: int
    step: int
    steps: int


@dataclass(frozen=True)
class DecodeStep:
    """Sequences to advance together, by data shard."""

    rows: tuple[tuple[DecodeRow, ...], ...]


def prefill_shape(rows: int, tokens: int) -> tuple[int, int]:
    """Rows and tokens that a prefill step is padded to: powers of two, and at least 16 tokens, so few are compiled."""
    return power_of_two(rows), max(16, power_of_two(tokens))


@dataclass(frozen=True)
class Packing:
    """How prompts are packed: products see the tokens of all chunks in a row, attention sees rows of its own.

    Attributes:
        piece: tokens of a row of attention; a longer chunk has several, a shorter one is padded to it. A step has a row
            for every half of it, which chunks of half a piece on average fill. None: a row for each chunk, padded to
            the longest.
    """

    piece: int | None = None

    def needed(self, size: int) -> int:
        """Rows of attention that a chunk takes."""
        return 1 if self.piece is None else -(-size // self.piece)

    def shape(self, tokens: int, rows: int, longest: int) -> tuple[int, int]:
        """Rows of attention, and tokens of each, of a step of ``tokens`` that needs ``rows`` on its fullest shard."""
        return prefill_shape(rows, longest) if self.piece is None else (-(-2 * tokens // self.piece), self.piece)


LEAST_PACKED = 256
"""Tokens of the smallest packed step: with fewer, reading the weights takes longer than what is computed with them."""
LITTLE_PADDING = 0.9
"""Share of tokens that are no padding from which rows are good enough, and need no other program."""


def decode_rows(active: int, slots: int) -> int:
    """Rows that a decode step is padded to: 8, 32, whole 64s, or all slots if they are fewer; so few are compiled.

    Up to 8 rows products take as long as for one; from about 64 on they take longer with every row.
    """
    return min(slots, next((rows for rows in (8, 32) if active <= rows), -(-active // 64) * 64))


def power_of_two(count: int) -> int:
    """The power of two that is at least ``count``."""
    return 1 << max(count - 1, 0).bit_length()


class MustDrain(Exception):
    """Blocks have run out while results are outstanding: they may free some, so look at them and ask again."""


class Scheduler:
    """Keeps slots full from a queue in order of arrival.

    When blocks run out the youngest sequence gives its own back and waits; it is computed again, prompt and output,
    when there is room. The oldest one always finds room, so there is no deadlock, and nothing is lost.

    Args:
        shards: data shards, each with its own slots and blocks.
        slots: slots of one shard.
        num_blocks: KV blocks of one shard, the null block included.
        decode_chunk: tokens that a decode step advances each sequence by.
        prefill_chunk: most tokens of one sequence in a prefill step.
        prefill_tokens: most tokens of one shard in a prefill step of several rows, counted as they are padded.
        prefill_blocks: most blocks that such a step reads on one shard, counted likewise.
        packing: how prompts of unequal length are packed, or None where every chunk is a row of its own.
        slot_blocks: where given, every slot has this many blocks of its own, in order, from block 1 on: those of slot
            ``s`` begin at ``1 + s * slot_blocks``. None: any block may be anybody's.
    """

    def __init__(
        self,
        *,
        shards: int,
        slots: int,
        num_blocks: int,
        decode_chunk: int,
        prefill_chunk: int,
        prefill_tokens: int,
        prefill_blocks: int,
        packing: Packing | None = None,
        slot_blocks: int | None = None,
    ) -> None:
        """Start empty."""
        self.packing = packing
        self.shards, self.slots, self.decode_chunk = shards, slots, decode_chunk
        self.prefill_chunk, self.prefill_tokens, self.prefill_blocks = prefill_chunk, prefill_tokens, prefill_blocks
        self.slot_blocks = slot_blocks
        self.allocators = [BlockAllocator(num_blocks) for _ in range(shards)]
        self._waiting: list[Sequence] = []
        self._running: list[dict[int, Sequence]] = [{} for _ in range(shards)]
        self._leaving: set[Sequence] = set()
        self._arrivals = 0

    @property
    def waiting(self) -> int:
        """Sequences that have no slot."""
        return len(self._waiting)

    def running(self, shard: int | None = None) -> list[Sequence]:
        """Sequences that have a slot, oldest first."""
        shards = self._running if shard is None else [self._running[shard]]
        return sorted((s for slots in shards for s in slots.values()), key=lambda s: s.arrival)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._waiting and not any(self._running) and not self._leaving

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            CapacityError: it could never fit, even alone.
        """
        need, have = blocks_for(sequence.most_tokens), self.slot_blocks or self.allocators[0].capacity
        if need > have:
            raise CapacityError(
                f"a prompt of {len(sequence.prompt)} tokens with max_tokens={sequence.max_tokens} needs {need} KV "
                f"blocks, and the cache has {have}; give init_inference more kv_blocks, or ask for fewer tokens"
            )
        sequence.arrival = self._arrivals
        self._arrivals += 1
        self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; its slot and blocks are free again."""
        if sequence.status is Status.WAITING:
            self._waiting.remove(sequence)
        elif sequence.status is Status.RUNNING:
            self._release(sequence)
        self._leaving.discard(sequence)
        sequence.status = Status.ENDED

    def next_prefill(self) -> PrefillStep | None:
        """Admit waiting sequences and hand out the next chunks of those whose prompt is not yet computed."""
        self._let_go()
        self._admit()
        waiting = [sequence for sequence in self.running() if sequence.prefilling]
        if not waiting:
            return None
        rows, share = self._in_rows(waiting)
        packed = None
        # The oldest is served at every step, so nobody waits for ever beside prompts that are packed.
        if self.packing is not None and len(waiting) > 1 and share < LITTLE_PADDING and waiting[0].packable:
            found, tokens, filled = self._best_pack(waiting)
            # Where few blocks may be gathered, rows would be several small steps; no one step is larger than theirs.
            if found and filled >= share and tokens <= self._padded(found):
                rows, packed = found, tokens
        return PrefillStep(tuple(tuple(map(self._chunk, each)) for each in rows), packed)

    def _padded(self, rows: Series[Series[Sequence]]) -> int:
        """Tokens of a shard in a step that pads every one of these to the longest."""
        count, length = prefill_shape(max(map(len, rows)), max(self._size(each) for own in rows for each in own))
        return count * length

    def _in_rows(self, waiting: Series[Sequence]) -> tuple[list[list[Sequence]], float]:
        """Who fits in a step that pads every row to the longest one, and the share that is not padding."""
        rows: list[list[Sequence]] = [[] for _ in range(self.shards)]
        full: set[int] = set()
        most = longest = widest = total = 0
        for sequence in waiting:
            shard = sequence.shard
            assert shard is not None
            if shard in full:
                continue
            size = self._size(sequence)
            # Every row of every shard is padded to the longest one, so what counts is the padded step.
            count, length = prefill_shape(max(most, len(rows[shard]) + 1), max(longest, size))
            blocks = power_of_two(max(widest, len(sequence.blocks)))
            if most and (count * length > self.prefill_tokens or count * blocks > self.prefill_blocks):
                full.add(shard)
                continue
            most, longest = max(most, len(rows[shard]) + 1), max(longest, size)
            widest, total = max(widest, len(sequence.blocks)), total + size
            rows[shard].append(sequence)
        count, length = prefill_shape(most, longest)
        return rows, total / (self.shards * count * length)

    def _best_pack(self, waiting: Series[Sequence]) -> tuple[list[list[Sequence]], int, float]:
        """Who goes into a packed step of how many tokens, and the share that is not padding.

        The largest step that is three quarters full, since what it leaves costs one more read of the weights; else the
        fullest.
        """
        tokens = power_of_two(self.prefill_tokens + 1) // 2  # rounded down
        best: tuple[list[list[Sequence]], int, float] = ([], tokens, 0.0)
        while tokens >= LEAST_PACKED:
            rows, share = self._in_pack(waiting, tokens)
            if share > best[2]:
                best = rows, tokens, share
            if share >= 0.75:
                break
            tokens //= 2
        return best

    def _in_pack(self, waiting: Series[Sequence], tokens: int) -> tuple[list[list[Sequence]], float]:
        """Who fits in a packed step of so many tokens, and the share that is not padding."""
        assert self.packing is not None
        rows: list[list[Sequence]] = [[] for _ in range(self.shards)]
        used, needed = [0] * self.shards, [0] * self.shards
        longest = widest = 0
        for sequence in waiting:
            shard, size = sequence.shard, self._size(sequence)
            assert shard is not None
            taken = needed[shard] + self.packing.needed(size)
            most, blocks = max(*needed, taken), power_of_two(max(widest, len(sequence.blocks)))
            count, length = self.packing.shape(tokens, most, max(longest, size))
            fits = used[shard] + size <= tokens and most <= count
            if self.packing.piece is None:
                # Attention without a kernel pads rows, and gathers the blocks of each.
                fits = fits and count * length <= 4 * tokens and count * blocks <= self.prefill_blocks
            if not fits or not sequence.packable:
                continue
            rows[shard].append(sequence)
            used[shard], needed[shard] = used[shard] + size, taken
            longest, widest = max(longest, size), max(widest, len(sequence.blocks))
        return rows, sum(used) / (self.shards * tokens)

    def _size(self, sequence: Sequence) -> int:
        """Tokens of a sequence's next chunk."""
        return min(sequence.target - sequence.computed, self.prefill_chunk)

    def _chunk(self, sequence: Sequence) -> PrefillRow:
        """Hand out the next chunk of a sequence."""
        start = sequence.computed
        stop = sequence.computed = start + self._size(sequence)
        last = stop == sequence.target
        if last and sequence.max_tokens:
            sequence.dispatched += 1
        return PrefillRow(sequence, start, stop, last)

    def next_decode(self, *, outstanding: bool) -> DecodeStep | None:
        """Hand out the next tokens of every sequence that has some to come.

        Args:
            outstanding: results of earlier steps are not yet known.

        Raises:
            MustDrain: blocks have run out and ``outstanding`` is true.
        """
        self._let_go()
        rows: list[tuple[DecodeRow, ...]] = []
        for shard in range(self.shards):
            for sequence in self.running(shard):
                if sequence.status is Status.RUNNING and self._steps(sequence):
                    self._grow(sequence, outstanding)
        # Only now: growing one sequence may have taken the blocks of a younger one.
        for shard in range(self.shards):
            chosen = []
            for sequence in self.running(shard):
                steps = self._steps(sequence)
                if not steps:
                    continue
                position = len(sequence.prompt) + sequence.dispatched - 1
                chosen.append(DecodeRow(sequence, position, sequence.dispatched, steps))
                sequence.dispatched += steps
                sequence.computed = sequence.target = position + steps
            rows.append(tuple(chosen))
        return DecodeStep(tuple(rows)) if any(rows) else None

    def _steps(self, sequence: Sequence) -> int:
        """Tokens that the next decode step advances a sequence by."""
        if sequence.prefilling or not sequence.dispatched:
            return 0
        return min(self.decode_chunk, sequence.max_tokens - sequence.dispatched)

    def _grow(self, sequence: Sequence, outstanding: bool) -> None:
        """Give a sequence the blocks its next decode step writes, taking them from younger ones if need be."""
        assert sequence.shard is not None
        allocator = self.allocators[sequence.shard]
        tokens = len(sequence.prompt) + sequence.dispatched - 1 + self._steps(sequence)
        missing = blocks_for(tokens) - len(sequence.blocks)
        while missing > allocator.free:
            if outstanding:
                raise MustDrain
            youngest = self.running(sequence.shard)[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return
        sequence.blocks += self._blocks(sequence, max(missing, 0))

    def _admit(self) -> None:
        """Give slots and blocks to waiting sequences, in order; the first that finds no room holds back the rest."""
        while self._waiting:
            sequence = self._waiting[0]
            target = len(sequence.prompt) + len(sequence.output)
            # Room for a first decode step as well, or it would be admitted only to be preempted.
            need = blocks_for(min(target + self.decode_chunk, sequence.most_tokens))
            open_shards = [s for s in range(self.shards) if len(self._running[s]) < self.slots]
            # Where slots have blocks of their own, none is ever taken: the emptiest shard then.
            shard = max(open_shards, key=lambda s: (self.allocators[s].free, -len(self._running[s]), -s), default=None)
            if shard is None or self.allocators[shard].free < need:
                return
            self._waiting.pop(0)
            sequence.shard = shard
            sequence.slot = min(set(range(self.slots)) - self._running[shard].keys())
            sequence.blocks = self._blocks(sequence, need)
            sequence.computed, sequence.target = 0, target
            sequence.dispatched = len(sequence.output)
            sequence.status = Status.RUNNING
            self._running[shard][sequence.slot] = sequence

    def _let_go(self) -> None:
        """Free slots and blocks of sequences of which nothing is left to hand out."""
        for sequence in self.running():
            if not sequence.prefilling and sequence.dispatched >= sequence.max_tokens:
                self._release(sequence)
                sequence.status = Status.LEAVING
                self._leaving.add(sequence)

    def _blocks(self, sequence: Sequence, count: int) -> list[int]:
        """The next blocks of a sequence that has a slot."""
        assert sequence.shard is not None and sequence.slot is not None
        if self.slot_blocks is None:
            return self.allocators[sequence.shard].allocate(count)
        start = 1 + sequence.slot * self.slot_blocks + len(sequence.blocks)
        return list(range(start, start + count))

    def start_over(self) -> list[Sequence]:
        """Take back all steps whose results are not known: who had a slot or was leaving waits to be computed again.

        Returns:
            Those of which nothing was known. They are as new; for the others it counts as a preemption.
        """
        for sequence in self.running():
            self._preempt(sequence)
        for sequence in list(self._leaving):
            self._wait_again(sequence)
        fresh = [sequence for sequence in self._waiting if not sequence.output]
        for sequence in fresh:
            sequence.preemptions = 0
        return fresh

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
        self._wait_again(sequence)

    def _wait_again(self, sequence: Sequence) -> None:
        self._leaving.discard(sequence)
        sequence.status = Status.WAITING
        sequence.preemptions += 1
        bisect.insort(self._waiting, sequence, key=lambda s: s.arrival)

    def _release(self, sequence: Sequence) -> None:
        assert sequence.shard is not None and sequence.slot is not None
        if self.slot_blocks is None:
            self.allocators[sequence.shard].release(sequence.blocks)
        del self._running[sequence.shard][sequence.slot]
        sequence.blocks, sequence.slot, sequence.shard = [], None, None
        sequence.computed = sequence.target = 0

    def abort(self, sequences: Iterable[Sequence]) -> None:
        """Finish those that have not ended."""
        for sequence in sequences:
            if sequence.status is not Status.ENDED:
                self.finish(sequence)
