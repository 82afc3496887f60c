"""Continuous batching: which sequence sits in which slot, owns which blocks, and runs in the next step.

Pure host bookkeeping. The scheduler hands out :class:`PrefillStep` and :class:`DecodeStep` descriptions; whoever runs
them reports back which sequences ended. Steps may be handed out before the results of earlier ones are known: device
work runs in the order in which it was handed out, so blocks and slots of a sequence that turns out to have ended may be
given to another at once.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum

from jaxinfer.errors import CapacityError
from jaxinfer.generation.kv_cache import BlockAllocator, blocks_for


class Status(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    RUNNING = "running"
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
    """Chunks to compute together, by data shard."""

    rows: tuple[tuple[PrefillRow, ...], ...]


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
        slot_blocks: int | None = None,
    ) -> None:
        """Start empty."""
        self.shards, self.slots, self.decode_chunk = shards, slots, decode_chunk
        self.prefill_chunk, self.prefill_tokens, self.prefill_blocks = prefill_chunk, prefill_tokens, prefill_blocks
        self.slot_blocks = slot_blocks
        self.allocators = [BlockAllocator(num_blocks) for _ in range(shards)]
        self._waiting: list[Sequence] = []
        self._running: list[dict[int, Sequence]] = [{} for _ in range(shards)]
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
        return not self._waiting and not any(self._running)

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
        sequence.status = Status.ENDED

    def next_prefill(self) -> PrefillStep | None:
        """Admit waiting sequences and hand out the next chunks of those whose prompt is not yet computed."""
        self._admit()
        rows: list[list[PrefillRow]] = [[] for _ in range(self.shards)]
        full: set[int] = set()
        most = longest = widest = 0
        for sequence in self.running():
            shard = sequence.shard
            assert shard is not None
            if not sequence.prefilling or shard in full:
                continue
            size = min(sequence.target - sequence.computed, self.prefill_chunk)
            # Every row of every shard is padded to the longest one, so what counts is the padded step.
            count, length = prefill_shape(max(most, len(rows[shard]) + 1), max(longest, size))
            blocks = power_of_two(max(widest, len(sequence.blocks)))
            if most and (count * length > self.prefill_tokens or count * blocks > self.prefill_blocks):
                full.add(shard)
                continue
            most, longest = max(most, len(rows[shard]) + 1), max(longest, size)
            widest = max(widest, len(sequence.blocks))
            start, stop = sequence.computed, sequence.computed + size
            last = stop == sequence.target
            rows[shard].append(PrefillRow(sequence, start, stop, last))
            sequence.computed = stop
            if last and sequence.max_tokens:
                sequence.dispatched += 1
        return PrefillStep(tuple(map(tuple, rows))) if most else None

    def next_decode(self, *, outstanding: bool) -> DecodeStep | None:
        """Hand out the next tokens of every sequence that has some to come.

        Args:
            outstanding: results of earlier steps are not yet known.

        Raises:
            MustDrain: blocks have run out and ``outstanding`` is true.
        """
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
            shard = max(open_shards, key=lambda s: (self.allocators[s].free, -s), default=None)
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

    def _blocks(self, sequence: Sequence, count: int) -> list[int]:
        """The next blocks of a sequence that has a slot."""
        assert sequence.shard is not None and sequence.slot is not None
        if self.slot_blocks is None:
            return self.allocators[sequence.shard].allocate(count)
        start = 1 + sequence.slot * self.slot_blocks + len(sequence.blocks)
        return list(range(start, start + count))

    def _preempt(self, sequence: Sequence) -> None:
        self._release(sequence)
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
