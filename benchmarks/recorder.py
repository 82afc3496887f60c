"""An executor that computes nothing: it knows which programs a run needs, and what the host alone costs."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxinfer.steps import Drawn, InputLayout, PromptReport

THREADS = 8


@dataclass(frozen=True)
class Step:
    """A step that was handed out.

    Attributes:
        kind: ``prefill`` or ``decode``.
        padded: tokens that are computed, those of padding and of idle slots included.
        real: tokens of sequences.
        context: cached tokens that the real ones of a decode step read, summed over steps and sequences.
        width: blocks of a table row.
        rows: rows of the step, those of padding and idle slots included.
        active: rows that hold a sequence.
        key: what one compiled program serves.
        arguments: of the executor's method.
    """

    kind: str
    padded: int
    real: int
    context: int
    width: int
    rows: int
    active: int
    key: Any
    arguments: tuple[Any, ...]


@dataclass
class Recorder:
    """Stands where the executor stands, and gives token 0 for every token.

    Attributes:
        plan: the plan.
        steps: what was handed out.
    """

    plan: Any
    steps: list[Step] = field(default_factory=list)
    trace: Any = None

    @property
    def batch(self) -> int:
        """Slots of all data shards."""
        return int(self.plan.slots * self.plan.shards)

    def prefill(self, inputs: Any, features: Any, wish: Any) -> tuple[Drawn, PromptReport]:
        """Note a prefill step."""
        rows, tokens = inputs.tokens.shape
        real = int((inputs.positions >= 0).sum())
        key = ("prefill", InputLayout.of(inputs, self.plan.shards), features, wish)
        width = inputs.tables.shape[1]
        self.steps.append(
            Step(
                "prefill",
                rows * tokens,
                real,
                0,
                width,
                rows,
                int((inputs.positions[:, 0] >= 0).sum()),
                key,
                (inputs, features, wish),
            )
        )
        return Drawn(np.zeros(len(inputs.last), np.int32)), PromptReport()

    def decode(self, inputs: Any, features: Any) -> Drawn:
        """Note a decode step of several tokens."""
        chunk = self.plan.decode_chunk
        steps, positions = inputs.steps.astype(np.int64), inputs.positions.astype(np.int64)
        context = int((steps * (positions + 1) + steps * (steps - 1) // 2).sum())
        key = ("decode", InputLayout.of(inputs, self.plan.shards), features)
        width = inputs.tables.shape[1]
        self.steps.append(
            Step(
                "decode",
                chunk * len(inputs.slots),
                int(steps.sum()),
                context,
                width,
                len(inputs.slots),
                int((steps > 0).sum()),
                key,
                (inputs, features),
            )
        )
        return Drawn(np.zeros((chunk, len(inputs.slots)), np.int32))

    def programs(self) -> list[Step]:
        """One step for each program that the run needs."""
        return list({step.key: step for step in self.steps}.values())


class _CompiledError(Exception):
    """Raised in place of running a step; all of its programs have been compiled by then."""


def rehearse(engine: Any, prompts: Sequence[list[int]], params: Any) -> tuple[Recorder, float]:
    """Run requests without a device; return what was handed out, and the seconds that the host took.

    What is handed out depends on lengths alone where nothing ends a sequence early, so it is what a run will hand out.
    """
    from jaxinfer.generation.runner import Counters

    runner = engine._open()
    executor, recorder = runner.executor, Recorder(engine.plan)
    runner.executor = recorder
    start = time.perf_counter()
    try:
        outputs = engine.generate(prompts, params, progress=False)
    finally:
        runner.executor, runner.counters = executor, Counters()
    seconds = time.perf_counter() - start
    failed = [output.error for output in outputs if output.error is not None]
    if failed:
        raise ValueError(f"requests cannot be served: {failed[0]}")
    return recorder, seconds


def compile_all(engine: Any, steps: Sequence[Step], threads: int = THREADS) -> float:
    """Compile the programs of steps without running them, XLA's part at the same time; return the seconds.

    Where layers are paged a step is a program for each kind of layer, found as it runs: there steps do run.
    """
    executor = engine.executor
    finish: Callable[..., Any] = executor._finish
    # Tracing and lowering hold Python's lock anyway, and one at a time they are as they are in any other run.
    tracing = threading.Lock()

    def finish_unlocked(*arguments: Any) -> None:
        tracing.release()
        try:
            finish(*arguments)
        finally:
            tracing.acquire()
        raise _CompiledError

    def one(step: Step) -> None:
        with tracing, contextlib.suppress(_CompiledError):
            getattr(executor, step.kind)(*step.arguments)

    start = time.perf_counter()
    executor._finish = finish_unlocked if engine.plan.tiers is None else finish
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, [step for step in steps if step.key not in executor._compiled]))
    finally:
        del executor._finish
    return time.perf_counter() - start


def ready(engine: Any, prompts: Sequence[list[int]], params: Any) -> dict[str, Any]:
    """Compile all that a run needs; return how many programs, and the seconds of compiling and of the host."""
    recorder, host = rehearse(engine, prompts, params)
    programs = recorder.programs()
    return {"programs": len(programs), "compile_s": compile_all(engine, programs), "host_s": host}
