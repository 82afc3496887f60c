from __future__ import annotations

import contextlib
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.errors import CapacityError
from jaxinfer.generation.kv_cache import blocks_for
from jaxinfer.generation.scheduler import (
    LEAST_PACKED,
    DecodeStep,
    MustDrain,
    Packing,
    PrefillStep,
    Scheduler,
    Sequence,
    Status,
    decode_rows,
    power_of_two,
    prefill_shape,
)
from tests.jaxinfer.generation.scheduled import Device, Text


class Serving(RuleBasedStateMachine):
    """Random arrivals, lengths, ends and aborts on a tight cache, with steps handed out before results are known."""

    @initialize(
        shards=st.integers(1, 3),
        slots=st.integers(1, 4),
        num_blocks=st.integers(2, 9),
        decode_chunk=st.sampled_from([1, 4, 16, 70]),
        prefill_chunk=st.sampled_from([16, 50, 128]),
        prefill_tokens=st.sampled_from([16, 100, 512, 1000]),
        prefill_blocks=st.sampled_from([1, 4, 64]),
        packing=st.sampled_from([None, Packing(), Packing(64), Packing(128)]),
        ahead=st.integers(0, 2),
        own=st.booleans(),
    )
    def start(self, num_blocks, ahead, own, **sizes):
        self.slot_blocks = num_blocks - 1 if own else None
        num_blocks = 1 + sizes["slots"] * (num_blocks - 1) if own else num_blocks
        self.scheduler = Scheduler(num_blocks=num_blocks, slot_blocks=self.slot_blocks, **sizes)
        self.device = Device(self.scheduler, num_blocks)
        self.ahead, self.decode_chunk = ahead, sizes["decode_chunk"]
        self.pending: deque[tuple[PrefillStep | DecodeStep, list[tuple[Text, list[Any]]]]] = deque()
        self.texts: list[Text] = []
        self.aborted: set[Text] = set()
        self.failures = 0

    @rule(
        prompt=st.one_of(st.integers(1, 20), st.integers(1, 300)),
        max_tokens=st.one_of(st.integers(0, 5), st.integers(1, 200)),
        ends_at=st.one_of(st.just(1 << 30), st.integers(1, 100)),
        packable=st.booleans(),
    )
    def arrive(self, prompt, max_tokens, ends_at, packable):
        name = len(self.texts)
        tokens: list[Any] = [(name, "prompt", i) for i in range(prompt)]
        text = Text(prompt=tokens, max_tokens=max_tokens, name=name, ends_at=ends_at, packable=packable)
        capacity = self.slot_blocks or self.scheduler.allocators[0].capacity
        if blocks_for(prompt + max(max_tokens - 1, 0)) > capacity:
            with pytest.raises(CapacityError, match=f"prompt of {prompt} tokens with max_tokens={max_tokens} needs"):
                self.scheduler.add(text)
        else:
            self.scheduler.add(text)
            self.texts.append(text)

    @precondition(lambda self: self.texts)
    @rule(data=st.data())
    def abort(self, data):
        text = data.draw(st.sampled_from(self.texts))
        if text.status is not Status.ENDED:
            self.aborted.add(text)
        self.scheduler.abort([text])
        assert text.status is Status.ENDED

    @rule(turns=st.integers(1, 20))
    def work(self, turns):
        for _ in range(turns):
            self.turn()

    @rule(handed_out=st.booleans())
    def fail(self, handed_out):
        """A step cannot be handed out, or its results are an error; the device has lost whatever it held."""
        if handed_out and self.scheduler.next_prefill() is None:
            with contextlib.suppress(MustDrain):
                self.scheduler.next_decode(outstanding=bool(self.pending))
        self.pending.clear()
        fresh = self.scheduler.start_over()
        self.device = Device(self.scheduler, self.device.num_blocks)
        self.failures += 1
        assert all(text.status is Status.WAITING for text in self.texts if text.status is not Status.ENDED)
        assert set(fresh) == {text for text in self.texts if text.status is Status.WAITING and not text.output}
        assert not any(text.preemptions for text in fresh)

    def turn(self) -> bool:
        """One turn of the loop, as the runner takes it; whether it did anything."""
        oldest = next((t for t in self.texts if t.status is not Status.ENDED), None)
        computed_again = oldest.preemptions if oldest else 0
        before = {text for text in self.texts if text.status is Status.WAITING}
        step: PrefillStep | DecodeStep | None = self.scheduler.next_prefill()
        self.check_admission(before)
        if step is None:
            try:
                step = self.scheduler.next_decode(outstanding=bool(self.pending))
            except MustDrain:
                assert self.pending
        if oldest is not None:
            assert oldest.preemptions == computed_again, "the oldest sequence lost its blocks"
        if step is not None:
            self.check(step)
            self.pending.append((step, self.device.run(step)))
        worked = step is not None or bool(self.pending)
        while len(self.pending) > (self.ahead if step is not None else 0):
            self.take_in(*self.pending.popleft())
        return worked

    def check_admission(self, before: set[Text]) -> None:
        left = [text for text in self.texts if text.status is Status.WAITING]
        entered = [text for text in before if text.status is Status.RUNNING]
        if left and entered:
            assert max(t.arrival for t in entered) < min(t.arrival for t in left), "somebody was overtaken"

    def check(self, step: PrefillStep | DecodeStep) -> None:
        assert len(step.rows) == self.scheduler.shards
        assert any(step.rows)
        for rows in step.rows:
            texts = [row.sequence for row in rows]
            assert len(set(map(id, texts))) == len(texts)
            assert [t.arrival for t in texts] == sorted(t.arrival for t in texts)
        if isinstance(step, PrefillStep):
            sizes = [row.stop - row.start for rows in step.rows for row in rows]
            assert 0 < min(sizes) <= max(sizes) <= self.scheduler.prefill_chunk
            if step.packed is not None:
                self.check_packed(step, sizes)
                return
            count, length = prefill_shape(max(map(len, step.rows)), max(sizes))
            blocks = power_of_two(max(len(row.sequence.blocks) for rows in step.rows for row in rows))
            assert len(sizes) == 1 or count * length <= self.scheduler.prefill_tokens
            assert len(sizes) == 1 or count * blocks <= self.scheduler.prefill_blocks
        else:
            assert all(0 < row.steps <= self.decode_chunk for rows in step.rows for row in rows)

    def check_packed(self, step: PrefillStep, sizes: list[int]) -> None:
        packing, tokens = self.scheduler.packing, step.packed
        assert packing is not None
        assert tokens is not None
        assert LEAST_PACKED <= tokens <= self.scheduler.prefill_tokens
        assert tokens & (tokens - 1) == 0
        assert all(row.sequence.packable for rows in step.rows for row in rows)
        assert all(sum(row.stop - row.start for row in rows) <= tokens for rows in step.rows)
        needed = max(sum(packing.needed(row.stop - row.start) for row in rows) for rows in step.rows)
        count, length = packing.shape(tokens, needed, max(sizes))
        assert needed <= count
        assert packing.piece is not None or max(sizes) <= length
        # Never with more padding than rows would have.
        padded_count, padded_length = prefill_shape(max(map(len, step.rows)), max(sizes))
        assert tokens <= padded_count * padded_length

    def take_in(self, step: PrefillStep | DecodeStep, drawn: list[tuple[Text, list[Any]]]) -> None:
        last = {row.sequence: row.last for rows in step.rows for row in rows} if isinstance(step, PrefillStep) else {}
        for text, tokens in drawn:
            if text.status is Status.ENDED:
                continue
            for token in tokens:
                assert token == (text.name, len(text.output)), "an output token is lost, twice or out of order"
                text.output.append(token)
                if len(text.output) >= text.wanted:
                    break
            if len(text.output) >= text.wanted and last.get(text, True):
                self.scheduler.finish(text)

    @invariant()
    def books_balance(self):
        if not hasattr(self, "scheduler"):
            return
        for shard, allocator in enumerate(self.scheduler.allocators):
            running = self.scheduler.running(shard)
            blocks = [block for text in running for block in text.blocks]
            assert len(set(blocks)) == len(blocks), "a block is owned twice"
            if self.slot_blocks is None:
                assert allocator.free + len(blocks) == allocator.capacity, "a block is lost"
            for text in running if self.slot_blocks is not None else []:
                first = 1 + text.slot * self.slot_blocks
                assert text.blocks == [*range(first, first + len(text.blocks))]
                assert len(text.blocks) <= self.slot_blocks, "a block of another slot is written"
                assert text.preemptions <= self.failures
            slots = [text.slot for text in running]
            assert len(set(slots)) == len(slots)
            assert all(slot in range(self.scheduler.slots) for slot in slots)
            assert all(text.shard == shard for text in running)
        waiting = [text for text in self.texts if text.status is Status.WAITING]
        assert self.scheduler.waiting == len(waiting)
        assert not any(text.blocks for text in self.texts if text.status is not Status.RUNNING)
        assert len(self.scheduler.running()) == sum(text.status is Status.RUNNING for text in self.texts)

    def teardown(self):
        if not hasattr(self, "scheduler"):
            return
        # A turn hands out a step, takes results in, or both; each text needs finitely many, however often it loses.
        for _ in range(20_000):
            if self.scheduler.idle:
                break
            assert self.turn(), "there is work, and a turn does none"
        assert self.scheduler.idle
        for text in self.texts:
            assert text.status is Status.ENDED
            if text not in self.aborted:
                assert text.output == [(text.name, i) for i in range(text.wanted)]
        assert all(allocator.free == allocator.capacity for allocator in self.scheduler.allocators)
        self.books_balance()


Serving.TestCase.settings = settings(max_examples=150, stateful_step_count=25, deadline=None)
TestServing = Serving.TestCase


def scheduler(**changes: int) -> Scheduler:
    sizes = {
        "shards": 1,
        "slots": 4,
        "num_blocks": 9,
        "decode_chunk": 8,
        "prefill_chunk": 64,
        "prefill_tokens": 256,
        "prefill_blocks": 64,
    }
    return Scheduler(**(sizes | changes))


def text(prompt: int, max_tokens: int = 1) -> Sequence:
    return Sequence(prompt=[5] * prompt, max_tokens=max_tokens)


def test_slots_with_blocks_of_their_own_get_them_in_order():
    plan = scheduler(slots=3, num_blocks=1 + 3 * 4, slot_blocks=4, decode_chunk=64)
    texts = [text(10, 200), text(100, 100), text(64, 140), text(1, 256)]
    for one in texts:
        plan.add(one)
    while plan.next_prefill() is not None:
        pass
    plan.next_decode(outstanding=False)
    plan.next_decode(outstanding=False)
    assert [one.slot for one in texts] == [0, 1, 2, None]
    assert [one.blocks for one in texts] == [[1, 2, 3], [5, 6, 7, 8], [9, 10, 11], []]
    plan.next_prefill()  # all of the second has been handed out: its place is another's before its results are known
    assert texts[1].status is Status.LEAVING
    assert texts[3].slot == 1
    assert texts[3].blocks[0] == 5
    plan.finish(texts[1])
    assert texts[3].slot == 1
    assert all(one.preemptions == 0 for one in texts)
    with pytest.raises(CapacityError, match="needs 5 KV blocks, and the cache has 4"):
        plan.add(text(100, 200))


def test_slots_with_blocks_of_their_own_fill_all_shards():
    plan = scheduler(shards=2, slots=3, num_blocks=1 + 3 * 4, slot_blocks=4)
    texts = [text(10, 20) for _ in range(4)]
    for one in texts:
        plan.add(one)
    plan.next_prefill()
    assert [(one.shard, one.slot) for one in texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]


def test_a_long_prompt_is_computed_in_consecutive_chunks_and_the_last_one_draws():
    plan, sequence = scheduler(), text(150, 3)
    plan.add(sequence)
    chunks = []
    while (step := plan.next_prefill()) is not None:
        ((row,),) = step.rows
        chunks.append((row.start, row.stop, row.last))
    assert chunks == [(0, 64, False), (64, 128, False), (128, 150, True)]
    decode = plan.next_decode(outstanding=True)
    assert decode is not None
    ((row,),) = decode.rows
    assert (row.position, row.step, row.steps) == (150, 1, 2)
    assert plan.next_decode(outstanding=True) is None  # all its tokens are on their way


def test_nobody_decodes_that_is_not_through_its_prompt():
    plan, sequence = scheduler(), text(150, 3)
    plan.add(sequence)
    plan.next_prefill()
    assert plan.next_decode(outstanding=False) is None


def test_a_prompt_that_is_only_scored_draws_nothing():
    plan, sequence = scheduler(), text(20, 0)
    plan.add(sequence)
    assert plan.next_prefill() is not None
    assert sequence.dispatched == 0
    assert plan.next_decode(outstanding=False) is None


def test_a_long_prompt_does_not_blow_a_step_of_short_ones_up():
    """Rows are padded to the longest: 1 of 64 tokens and 15 of 4 would be 1024 tokens, four times what is allowed."""
    plan = scheduler(slots=16, num_blocks=40)
    for prompt in (64, *[4] * 15):
        plan.add(text(prompt))
    rows = []
    while (step := plan.next_prefill()) is not None:
        rows.append(len(step.rows[0]))
    assert rows == [4, 12]


@given(rows=st.integers(1, 300), tokens=st.integers(1, 5000))
def test_prefill_shapes_are_few_and_hold_what_they_must(rows, tokens):
    count, length = prefill_shape(rows, tokens)
    assert rows <= count < 2 * rows
    assert tokens <= length < max(2 * tokens, 17)
    assert count & (count - 1) == length & (length - 1) == 0


def test_a_long_prompt_does_not_widen_the_tables_of_short_ones():
    several = scheduler(num_blocks=40, slots=8, prefill_chunk=1024, prefill_tokens=16384, prefill_blocks=16)
    long, *short = texts = [text(1000), *(text(10) for _ in range(4))]
    for each in texts:
        several.add(each)
    first, second = several.next_prefill(), several.next_prefill()
    assert [row.sequence for row in first.rows[0]] == [long]
    assert [row.sequence for row in second.rows[0]] == short


def test_shards_fill_evenly():
    plan = scheduler(shards=2)
    for _ in range(4):
        plan.add(text(10))
    plan.next_prefill()
    assert [[s.arrival for s in plan.running(shard)] for shard in range(2)] == [[0, 2], [1, 3]]


def test_the_youngest_gives_its_blocks_to_the_oldest_and_comes_back_with_what_it_said():
    plan = scheduler(num_blocks=5, decode_chunk=64, prefill_chunk=128)
    old, young = text(60, 150), text(60, 100)
    for sequence in (old, young):
        plan.add(sequence)
    plan.next_prefill()
    for sequence in (old, young):
        sequence.output.append(7)
    plan.next_decode(outstanding=False)
    for sequence in (old, young):
        sequence.output += [7] * 64
    with pytest.raises(MustDrain):
        plan.next_decode(outstanding=True)
    assert (old.preemptions, young.preemptions) == (0, 0)
    step = plan.next_decode(outstanding=False)
    assert step is not None
    assert [row.sequence for row in step.rows[0]] == [old]
    assert (old.preemptions, young.preemptions) == (0, 1)
    assert young.status is Status.WAITING
    assert plan.next_prefill() is None  # one block is free, and it needs three
    plan.finish(old)
    again = plan.next_prefill()
    assert again is not None
    ((row,),) = again.rows
    assert (row.sequence, row.start, row.stop, row.last) == (young, 0, 125, True)
    assert young.dispatched == 66


def test_finishing_twice_changes_nothing():
    plan, sequence = scheduler(), text(10)
    plan.add(sequence)
    plan.next_prefill()
    plan.finish(sequence)
    plan.finish(sequence)
    assert plan.idle
    assert plan.allocators[0].free == plan.allocators[0].capacity


def crowd(*prompts: int, **changes: int | Packing) -> Scheduler:
    sizes = {"slots": 64, "num_blocks": 999, "prefill_chunk": 512, "prefill_tokens": 2048, "prefill_blocks": 512}
    plan = scheduler(**(sizes | {"packing": Packing(128)} | changes))
    for prompt in prompts:
        plan.add(text(prompt))
    return plan


def test_prompts_of_unequal_length_are_packed_and_those_of_equal_length_are_not():
    assert crowd(500, 40, 300, 100).next_prefill().packed == 1024  # rows would be 4 x 512
    assert crowd(*[500] * 4).next_prefill().packed is None
    assert crowd(300).next_prefill().packed is None
    assert crowd(30, 9, 20).next_prefill().packed is None  # too few to be worth a program
    assert crowd(500, 40, 300, 100, packing=None).next_prefill().packed is None


def test_a_packed_step_is_the_largest_that_is_three_quarters_full():
    steps, plan = [], crowd(*[300, 20] * 9)
    while (step := plan.next_prefill()) is not None:
        steps.append((step.packed, sum(row.stop - row.start for row in step.rows[0])))
    assert steps == [(2048, 1980), (1024, 900)]


def test_who_is_not_packed_waits_no_longer_than_older_sequences():
    plan = crowd()
    odd = text(100)
    odd.packable = False
    for sequence in (text(500), text(40), odd, text(300), text(30)):
        plan.add(sequence)
    first, second = plan.next_prefill(), plan.next_prefill()
    assert first.packed == 1024
    assert odd not in [row.sequence for row in first.rows[0]]
    assert [row.sequence for row in second.rows[0]] == [odd]


def test_short_prompts_fill_the_rows_of_attention_before_the_tokens():
    """128 chunks of 16 tokens would be 128 rows of attention; a step of 2048 tokens has 32."""
    plan = crowd(500, *[16] * 63)
    step = plan.next_prefill()
    assert step.packed is not None
    chunks = [row.stop - row.start for row in step.rows[0]]
    assert sum(Packing(128).needed(size) for size in chunks) <= 2 * step.packed // 128


def test_a_sequence_leaves_its_slot_when_its_last_step_is_handed_out():
    plan = scheduler(slots=1)
    first, second = text(10, 5), text(10, 1)
    for sequence in (first, second):
        plan.add(sequence)
    plan.next_prefill()
    assert plan.next_decode(outstanding=True) is not None
    assert plan.next_prefill().rows[0][0].sequence is second
    assert first.status is Status.LEAVING
    assert not first.blocks
    plan.finish(second)
    assert not plan.idle  # the results of the first are still to come
    plan.finish(first)
    assert plan.idle


@given(active=st.integers(1, 1000), slots=st.integers(1, 1000))
def test_decode_runs_as_many_rows_as_there_are_sequences_or_a_few_more(active, slots):
    active = min(active, slots)
    rows = decode_rows(active, slots)
    assert active <= rows <= slots
    assert rows == slots or rows in (8, 32) or (rows % 64 == 0 and rows - active < 64)
