"""What many requests at once should take on one H200, step by step, without a GPU.

    python benchmarks/requests_model.py --slots 256 --prefill-tokens 8192

The real scheduler and runner hand out the steps (:mod:`recorder`); each is costed by the device's rates. ``--packed``,
``--compact`` and ``--early`` cost changes that the engine does not have. It is a prediction, to be held against the row
``requests`` of :mod:`table`; the host's seconds alone are measured, on the machine that this runs on.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import recorder
import shapes
import table_ours

COPY, PRODUCTS = 4.22e12, 6.0e14
"""Bytes per second of a copy, measured; operations per second of XLA's products in a prefill, 540 to 620 measured."""
DECODE_PRODUCTS = 5.5e14
"""The same with a few hundred rows, an assumption."""
WEIGHTS_SHARE = 0.85
"""Share of the copy bandwidth at which products of few rows read weights, an assumption for the kernels' aim."""
LAUNCH = 3e-3
"""Seconds of a step's fixed costs."""


def engine(slots: int, prefill_tokens: int, chunk: int) -> Any:
    """An engine with a recorder for its executor, planned for an H200 that need not be here."""
    from transformers import AutoConfig

    from jaxinfer.engine import InferenceEngine
    from jaxinfer.generation.params import GenerationDefaults
    from jaxinfer.generation.runner import Runner
    from jaxinfer.hardware import named
    from jaxinfer.models.families import spec_of
    from jaxinfer.plan import make_plan

    config = shapes.config("llama-7b", tiny=False)
    spec = spec_of(AutoConfig.for_model(**config))
    plan = make_plan(
        spec, {"tensor": 1}, "bfloat16", named("H200"), max_batch=slots, max_model_len=768,
        prefill_tokens=prefill_tokens, decode_chunk=chunk,
    )  # fmt: skip
    made: Any = object.__new__(InferenceEngine)
    made.plan, made.tokenizer, made.name = plan, None, "llama-7b"
    made.defaults, made.eos_token_ids, made.progress = GenerationDefaults(), (2,), False
    made._seed, made._requests, made._lock = 0, 0, threading.RLock()
    made._runner = Runner(recorder.Recorder(plan))
    return made


def release_early(runner: Any) -> None:
    """Free the slot and blocks of a sequence when its last token is handed out, not when it is seen."""
    scheduler, decode = runner.scheduler, runner._decode
    release = scheduler._release

    def once(sequence: Any) -> None:
        if sequence.slot is not None:
            release(sequence)

    def decode_then_release(step: Any) -> None:
        decode(step)
        for rows in step.rows:
            for row in rows:
                if row.sequence.dispatched >= row.sequence.max_tokens:
                    release(row.sequence)

    scheduler._release, runner._decode = once, decode_then_release


def cost(step: recorder.Step, plan: Any, *, kernels: bool, packed: bool, compact: bool) -> float:
    """Seconds of a step.

    Args:
        step: the step.
        plan: the plan.
        kernels: attention reads the blocks that sequences have, not a table's width for every slot.
        packed: prefill computes no padding but that to whole rows of 128 tokens.
        compact: decode computes the slots in use, rounded up to 32, not all of them.
    """
    per_token = table_ours.layer_flops(plan)
    weights = table_ours.weight_bytes(plan) / COPY / WEIGHTS_SHARE
    token = 2 * plan.spec.num_layers * plan.layout.kv_groups * plan.spec.head_dim * 2
    if step.kind == "prefill":
        tokens = -(-step.real // 128) * 128 if packed else step.padded
        return LAUNCH + max(tokens * per_token / PRODUCTS, weights)
    chunk = plan.decode_chunk
    count = -(-step.active // 32) * 32 if compact else step.rows
    rows = count * (per_token + table_ours.head_flops(plan)) / DECODE_PRODUCTS
    cached = step.context if kernels else chunk * count * step.width * 64
    return chunk * max(rows, weights) + cached * token / COPY / 0.9 + LAUNCH


def predict(
    slots: int, prefill_tokens: int, chunk: int, *, kernels: bool, packed: bool, compact: bool, early: bool
) -> dict[str, Any]:
    """Run the requests through the scheduler and cost what it hands out."""
    made = engine(slots, prefill_tokens, chunk)
    if early:
        release_early(made._runner)
    asked, wanted = table_ours.lengths(512, tiny=False)
    ctx = table_ours.Context(False, Path())
    prompts, params = ctx.prompts(made, asked), [table_ours.greedy(int(n)) for n in wanted]
    recorder.rehearse(made, prompts, params)
    noted, host = recorder.rehearse(made, prompts, params)
    plan = made.plan
    seconds = {
        kind: sum(cost(s, plan, kernels=kernels, packed=packed, compact=compact) for s in noted.steps if s.kind == kind)
        for kind in ("prefill", "decode")
    }
    total = sum(seconds.values())
    return {
        "slots": plan.slots, "kv_blocks": plan.num_blocks, "prefill_tokens": prefill_tokens, "decode_chunk": chunk,
        "prefill_s": seconds["prefill"], "decode_s": seconds["decode"], "total_s": total,
        "tokens_per_second": int(wanted.sum()) / total, "host_alone_s": host, "programs": len(noted.programs()),
        "preemptions": made._open().counters.preemptions, **table_ours.account(noted, int(wanted.sum())),
    }  # fmt: skip


def main() -> None:
    """Print one prediction as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=256)
    parser.add_argument("--prefill-tokens", type=int, default=8192)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--no-kernels", action="store_true", help="attention reads a table's width for every slot")
    parser.add_argument("--packed", action="store_true", help="prefill without padding, which is not implemented")
    parser.add_argument("--compact", action="store_true", help="decode of the slots in use, which is not implemented")
    parser.add_argument("--early", action="store_true", help="slots free when a last token is handed out, the same")
    args = parser.parse_args()
    start = time.perf_counter()
    changes = {name: getattr(args, name) for name in ("packed", "compact", "early")}
    found = predict(args.slots, args.prefill_tokens, args.chunk, kernels=not args.no_kernels, **changes)
    print(json.dumps(found | {"took_s": time.perf_counter() - start}, indent=1))


if __name__ == "__main__":
    main()
