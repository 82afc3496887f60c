"""The generation loop: takes requests, keeps the device busy, and turns what it draws into text.

Each turn hands the device one step and then looks at the results of the step before, so the host works while the device
does. A sequence that turns out to have ended may thus be advanced for one more step; those tokens are dropped.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from jaxinfer.executor import Executor
from jaxinfer.generation import scheduler as scheduling
from jaxinfer.generation.kv_cache import NULL_BLOCK, blocks_for
from jaxinfer.generation.params import MAX_LOGPROBS, ResolvedParams
from jaxinfer.generation.requests import FinishReason, Logprob, logprob_dict
from jaxinfer.generation.sampling import PAD, SamplerFeatures, SamplingRows, features_of, pack
from jaxinfer.generation.scheduler import (
    DecodeStep,
    MustDrain,
    Packing,
    PrefillStep,
    Scheduler,
    decode_rows,
    power_of_two,
    prefill_shape,
)
from jaxinfer.generation.text import TextStream
from jaxinfer.plan import Plan
from jaxinfer.steps import ERROR_TOKEN, DecodeInputs, Drawn, PrefillInputs, PromptReport, PromptWish

NOT_FINITE = "the model's logits were not finite (NaN or infinity), or every token was forbidden"
PIECE = 128
"""Tokens of a row of attention in a packed step: a tile of the prefill kernel."""
PACKED_BLOCKS = 8
"""Least width of a packed step's block tables, where a kernel reads them: the prompts of most crowds, one program."""


@dataclass(eq=False)
class Running(scheduling.Sequence):
    """One output in the making; the scheduler's sequence with what becomes of its tokens.

    Attributes:
        params: its sampling parameters.
        text: decoder of its tokens, or None where nobody asks for text.
        wish: what to report of the prompt.
        on_end: called when it has ended.
        logprobs: of each output token, where asked.
        prompt_logprobs: of each prompt token after the first, where asked: (logprob, rank, top ids, top logprobs).
        prompt_logits: chunks of [tokens, V], where asked.
        finish_reason, stop_reason, error: how it ended.
        submitted, started, first_token, last_token: times in seconds of ``time.perf_counter``.
    """

    params: ResolvedParams = None  # type: ignore[assignment]
    text: TextStream | None = None
    wish: PromptWish = field(default_factory=PromptWish)
    long: bool = False
    decode_token: Callable[[int], str] = str
    on_end: Callable[[], None] = lambda: None
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    prompt_logprobs: list[tuple[float, int, Any, Any]] = field(default_factory=list)
    prompt_logits: list[np.ndarray] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    submitted: float = 0.0
    started: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __post_init__(self) -> None:
        """What a prompt is to report is reported by rows."""
        self.packable = not self.wish.logits and self.wish.logprobs is None

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class _Pending:
    """A step whose results have not been looked at, and the rows of its results that belong to sequences."""

    step: PrefillStep | DecodeStep
    drawn: Drawn
    report: PromptReport | None
    rows: list[tuple[int, Any]]


@dataclass
class Counters:
    """What the loop has done, for reports and tests: steps, tokens, and seconds the host kept the device waiting."""

    prefill_steps: int = 0
    decode_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    preemptions: int = 0


class Runner:
    """Runs sequences to their end.

    Args:
        executor: runs the steps.
    """

    def __init__(self, executor: Executor) -> None:
        """Start with nothing to do."""
        plan = executor.plan
        self.executor, self.plan = executor, plan
        self.scheduler = Scheduler(
            shards=plan.shards,
            slots=plan.slots,
            num_blocks=plan.num_blocks,
            decode_chunk=plan.decode_chunk,
            prefill_chunk=plan.prefill_chunk,
            prefill_tokens=plan.prefill_tokens,
            prefill_blocks=plan.prefill_blocks,
            packing=packing_of(plan),
            slot_blocks=plan.slot_blocks,
        )
        self.counters = Counters()
        self._pending: deque[_Pending] = deque()
        self._seated: tuple[Any, ...] = ()
        self._seated_rows: tuple[SamplingRows, SamplerFeatures] | None = None

    def submit(self, running: Running) -> None:
        """Queue a sequence.

        Raises:
            CapacityError: it could never fit.
        """
        running.submitted = time.perf_counter()
        self.scheduler.add(running)

    def abort(self, sequences: Iterable[Running]) -> None:
        """Drop sequences that have not ended, and what was computed of them."""
        self.scheduler.abort(sequences)
        if self.scheduler.idle:
            self._pending.clear()

    def turn(self) -> None:
        """Hand out one step and take in the results of the one before.

        Where that fails, the caller gets the error and nobody else is harmed: whoever had a part in a step whose
        results are not known, this caller or another, waits and is computed again, prompt and output.
        """
        try:
            dispatched = self._dispatch()
            while len(self._pending) > (1 if dispatched else 0):
                self._take_in(self._pending.popleft())
        except BaseException:
            self._start_over()
            raise

    def _start_over(self) -> None:
        """Forget what was handed out: of a step that failed half-way nobody knows what it wrote."""
        self._pending.clear()
        for sequence in self.scheduler.start_over():
            assert isinstance(sequence, Running)
            sequence.prompt_logprobs.clear()
            sequence.prompt_logits.clear()
        self.executor.recover()

    def _dispatch(self) -> bool:
        prefill = self.scheduler.next_prefill()
        if prefill is not None:
            self._prefill(prefill)
            return True
        try:
            decode = self.scheduler.next_decode(outstanding=bool(self._pending))
        except MustDrain:
            return False
        if decode is None:
            return False
        self._decode(decode)
        return True

    def _prefill(self, step: PrefillStep) -> None:
        plan = self.plan
        layout = _packed(step, plan, self.scheduler.packing) if step.packed else _in_rows(step, plan)
        size, per_shard = len(layout.tables), len(layout.tables) // plan.shards
        last, number = np.zeros(size, np.int32), np.zeros(size, np.int32)
        slots = np.full(size, plan.slots, np.int32)
        params: list[ResolvedParams | None] = [None] * size
        placed: list[tuple[int, Any]] = []
        now = time.perf_counter()
        wishes: list[PromptWish] = []
        long = np.zeros(size, bool)
        for shard, rows in enumerate(step.rows):
            for index, row in enumerate(rows, start=shard * per_shard):
                sequence = row.sequence
                assert isinstance(sequence, Running)
                sequence.started = sequence.started or now
                last[index], number[index], long[index] = layout.last[index], len(sequence.output), sequence.long
                if row.last and sequence.max_tokens and sequence.slot is not None:
                    slots[index] = sequence.slot
                params[index] = sequence.params
                if not sequence.preemptions:
                    wishes.append(sequence.wish)
                placed.append((index, row))
                self.counters.prefill_tokens += row.stop - row.start
        features = features_of(params)
        asked = [wish.logprobs for wish in wishes if wish.logprobs is not None]
        wish = PromptWish(
            logits=any(wish.logits for wish in wishes),
            logprobs=min((n for n in (0, 1, 5, MAX_LOGPROBS) if n >= max(asked)), default=None) if asked else None,
        )
        inputs = PrefillInputs(
            tokens=layout.tokens,
            positions=layout.positions,
            tables=layout.tables,
            last=last,
            slots=slots,
            step=number,
            rows=pack(params),
            long=long if plan.spec.long_from is not None else None,
            targets=layout.targets if wish.logprobs is not None else None,
            history=_history(size, placed) if features.penalties else None,
            pieces=layout.pieces,
        )
        drawn, report = self.executor.prefill(inputs, features, wish)
        self.counters.prefill_steps += 1
        self._pending.append(_Pending(step, drawn, report, placed))

    def _decode(self, step: DecodeStep) -> None:
        plan = self.plan
        per_shard = decode_rows(max(map(len, step.rows)), plan.slots)
        size = per_shard * plan.shards
        slots = np.full(size, plan.slots, np.int32)
        positions, steps, number = (np.zeros(size, np.int32) for _ in range(3))
        blocks = bucket_width(max(len(row.sequence.blocks) for rows in step.rows for row in rows))
        tables = np.full((size, blocks), NULL_BLOCK, np.int32)
        long = np.zeros(size, bool)
        placed: list[tuple[int, Any]] = []
        for shard, rows in enumerate(step.rows):
            for index, row in enumerate(rows, start=shard * per_shard):
                sequence = row.sequence
                assert isinstance(sequence, Running) and sequence.slot is not None
                slots[index] = sequence.slot
                positions[index], steps[index], number[index] = row.position, row.steps, row.step
                tables[index, : len(sequence.blocks)] = sequence.blocks
                long[index] = sequence.long
                placed.append((index, row))
                self.counters.decode_tokens += row.steps
        sampling, features = self._sampling(placed, size)
        inputs = DecodeInputs(
            slots=slots,
            positions=positions,
            steps=steps,
            step=number,
            tables=tables,
            rows=sampling,
            long=long if plan.spec.long_from is not None else None,
        )
        drawn = self.executor.decode(inputs, features)
        self.counters.decode_steps += 1
        self._pending.append(_Pending(step, drawn, None, placed))

    def _sampling(self, placed: Sequence[tuple[int, Any]], size: int) -> tuple[SamplingRows, SamplerFeatures]:
        """The sampling parameters of so many rows, packed anew only when other sequences have them."""
        seated = size, *((index, row.sequence.arrival) for index, row in placed)
        if self._seated_rows is None or seated != self._seated:
            params: list[ResolvedParams | None] = [None] * size
            for index, row in placed:
                params[index] = row.sequence.params
            self._seated, self._seated_rows = seated, (pack(params), features_of(params))
        return self._seated_rows

    def _take_in(self, pending: _Pending) -> None:
        """Look at a step's results."""
        drawn: Drawn = jax.device_get(pending.drawn)
        report: PromptReport | None = jax.device_get(pending.report)
        now = time.perf_counter()
        for index, row in pending.rows:
            sequence: Running = row.sequence
            if sequence.ended or sequence.status is scheduling.Status.ENDED:
                continue
            if isinstance(pending.step, PrefillStep):
                if report is not None and not sequence.preemptions:
                    _collect_prompt(sequence, row, index, report)
                if not row.last:
                    continue
                if not sequence.max_tokens:
                    failed = drawn.tokens[index] == ERROR_TOKEN or not all(
                        math.isfinite(logprob) for logprob, *_ in sequence.prompt_logprobs
                    )
                    self._end(sequence, "error" if failed else "length", error=NOT_FINITE if failed else None)
                    continue
                picked = jax.tree.map(lambda values: values[index : index + 1], drawn)  # noqa: B023
            else:
                picked = jax.tree.map(lambda values: values[: row.steps, index], drawn)  # noqa: B023
            self._accept(sequence, picked, now)

    def _accept(self, sequence: Running, drawn: Drawn, now: float) -> None:
        """Add newly drawn tokens to a sequence, up to where it ends."""
        params = sequence.params
        before = len(sequence.output)
        reason: FinishReason | None = None
        stop: str | int | None = None
        shown: list[int] = []
        for token in drawn.tokens.tolist():
            if token == ERROR_TOKEN:
                reason = "error"
                break
            sequence.output.append(token)
            if token in params.end_token_ids:
                reason, stop = "stop", (token if token in params.stop_token_ids else None)
                if params.include_stop_str_in_output:
                    shown.append(token)
                break
            shown.append(token)
            if len(sequence.output) >= sequence.max_tokens:
                reason = "length"
                break
        if sequence.text is not None:
            sequence.pieces.append(sequence.text.push(shown))
            if sequence.text.stopped is not None:
                reason, stop = "stop", sequence.text.stopped
                del sequence.output[sequence.text.token_count_at_stop :]
        taken = len(sequence.output) - before
        if params.logprobs is not None:
            self._collect_logprobs(sequence, drawn, taken)
        if taken:
            sequence.first_token = sequence.first_token or now
            sequence.last_token = now
        if reason is not None:
            self._end(sequence, reason, stop, NOT_FINITE if reason == "error" else None)

    def _collect_logprobs(self, sequence: Running, drawn: Drawn, count: int) -> None:
        assert sequence.params.logprobs is not None
        assert drawn.logprob is not None and drawn.rank is not None
        assert drawn.top_ids is not None and drawn.top_logprobs is not None
        for i in range(count):
            sequence.cumulative_logprob += float(drawn.logprob[i])
            sequence.logprobs.append(
                logprob_dict(
                    int(drawn.tokens[i]), float(drawn.logprob[i]), int(drawn.rank[i]), drawn.top_ids[i].tolist(),
                    drawn.top_logprobs[i].tolist(), sequence.params.logprobs, sequence.decode_token,
                )
            )  # fmt: skip

    def _end(
        self, sequence: Running, reason: FinishReason, stop: str | int | None = None, error: str | None = None
    ) -> None:
        if sequence.text is not None:
            sequence.pieces.append(sequence.text.finish())
        sequence.finish_reason, sequence.stop_reason, sequence.error = reason, stop, error
        self.counters.preemptions += sequence.preemptions
        self.scheduler.finish(sequence)
        sequence.on_end()


def packing_of(plan: Plan) -> Packing | None:
    """How a plan's prompts are packed; None where they are not: paged layers, and two sets of rotary frequencies."""
    if plan.tiers is not None or plan.spec.long_from is not None:
        return None
    kernel = any(c.op == "prefill attention" and c.implementation == "mosaic" for c in plan.implementations)
    return Packing(PIECE if kernel else None)


@dataclass(frozen=True)
class _Prompts:
    """The part of a prefill step's inputs that depends on how it is laid out; see :class:`PrefillInputs`."""

    tokens: np.ndarray
    positions: np.ndarray
    tables: np.ndarray
    last: np.ndarray
    targets: np.ndarray | None = None
    pieces: np.ndarray | None = None


def _in_rows(step: PrefillStep, plan: Plan) -> _Prompts:
    """Every chunk a row."""
    per_shard, length = prefill_shape(max(map(len, step.rows)), _longest(step))
    # As far as these tokens see: a sequence has blocks for what it will say as well.
    blocks = power_of_two(max(blocks_for(row.stop) for rows in step.rows for row in rows))
    size = per_shard * plan.shards
    tokens, positions = np.zeros((size, length), np.int32), np.full((size, length), -1, np.int32)
    tables, last = np.full((size, blocks), NULL_BLOCK, np.int32), np.zeros(size, np.int32)
    targets = np.zeros((size, length), np.int32)
    for shard, rows in enumerate(step.rows):
        for index, row in enumerate(rows, start=shard * per_shard):
            said, count = _said(row, row.stop + 1), row.stop - row.start
            tokens[index, :count] = said[:count]
            positions[index, :count] = np.arange(row.start, row.stop)
            targets[index, : len(said) - 1] = said[1:]
            seen = row.sequence.blocks[:blocks]
            tables[index, : len(seen)] = seen
            last[index] = count - 1
    return _Prompts(tokens, positions, tables, last, targets)


def _packed(step: PrefillStep, plan: Plan, packing: Packing | None) -> _Prompts:
    """The chunks of a shard one behind the other, and rows of pieces of them for attention."""
    assert packing is not None and step.packed is not None
    shards, total = plan.shards, step.packed
    needed = max(sum(packing.needed(row.stop - row.start) for row in rows) for rows in step.rows)
    per_shard, length = packing.shape(total, needed, _longest(step))
    blocks = power_of_two(max(blocks_for(row.stop) for rows in step.rows for row in rows))
    if packing.piece is not None:
        blocks = max(blocks, PACKED_BLOCKS)
    tokens, positions = np.zeros((shards, total), np.int32), np.full((shards, total), -1, np.int32)
    tables = np.full((shards * per_shard, blocks), NULL_BLOCK, np.int32)
    pieces = np.full((shards * per_shard, length), total, np.int32)
    last = np.zeros(shards * per_shard, np.int32)
    for shard, rows in enumerate(step.rows):
        used, piece = 0, shard * per_shard
        for index, row in enumerate(rows, start=shard * per_shard):
            count = row.stop - row.start
            tokens[shard, used : used + count] = _said(row, row.stop)
            positions[shard, used : used + count] = np.arange(row.start, row.stop)
            seen = row.sequence.blocks[:blocks]
            for first in range(0, count, length):
                part = min(length, count - first)
                pieces[piece, :part] = np.arange(used + first, used + first + part)
                tables[piece, : len(seen)] = seen
                piece += 1
            used += count
            last[index] = used - 1
    return _Prompts(tokens, positions, tables, last, pieces=pieces)


def _said(row: Any, stop: int) -> np.ndarray:
    """A sequence's tokens from the row's first one to before ``stop``, or to the last that there is."""
    sequence = row.sequence
    said = sequence.prompt + sequence.output if stop > len(sequence.prompt) else sequence.prompt
    return np.fromiter(said[row.start : stop], np.int32)  # a quarter less of the host's time than np.array


def _longest(step: PrefillStep) -> int:
    return max(row.stop - row.start for rows in step.rows for row in rows)


def _collect_prompt(sequence: Running, row: Any, index: int, report: PromptReport) -> None:
    """Keep what a prefill step reports of a sequence's prompt."""
    count = row.stop - row.start
    if sequence.wish.logits and report.logits is not None:
        sequence.prompt_logits.append(np.asarray(report.logits[index, :count]))
    if sequence.wish.logprobs is not None and report.logprob is not None:
        assert report.rank is not None and report.top_ids is not None and report.top_logprobs is not None
        known = min(count, len(sequence.prompt) - 1 - row.start)
        for i in range(known):
            sequence.prompt_logprobs.append(
                (
                    float(report.logprob[index, i]), int(report.rank[index, i]), report.top_ids[index, i].tolist(),
                    report.top_logprobs[index, i].tolist(),
                )
            )  # fmt: skip


def _history(size: int, placed: Sequence[tuple[int, Any]]) -> np.ndarray:
    """Prompt and output tokens of each row, padded, for the penalties."""
    longest = max(max(len(row.sequence.prompt), len(row.sequence.output)) for _, row in placed)
    history = np.full((size, 2, max(64, power_of_two(longest))), PAD, np.int32)
    for index, row in placed:
        history[index, 0, : len(row.sequence.prompt)] = row.sequence.prompt
        history[index, 1, : len(row.sequence.output)] = row.sequence.output
    return history


def bucket_width(count: int) -> int:
    """Table widths that decode is compiled for: quarter octaves, so at most a quarter of what is read is padding."""
    if count <= 4:
        return count
    step = 1 << (count - 1).bit_length() - 3
    return -(-count // step) * step
