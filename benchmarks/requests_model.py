"""What many requests at once should take on one H200, step by step, without a GPU.

    python benchmarks/requests_model.py --slots 256 --prefill-tokens 8192

The real scheduler and runner hand out the steps (:mod:`recorder`); each is costed by the device's rates. It is a
prediction, to be held against the row ``requests`` of :mod:`table`; the host's seconds alone are measured, on the
machine that this runs on.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import recorder
import shapes
import table_ours

PREFILL = 5.9e14
"""Operations per second of a prefill step, everything in it counted as time: 587 to 593 TFLOP/s at 8 x 2040 tokens."""
SPREAD = 0.03
"""More time of a packed step, for the queries and results that are moved to rows and back: bytes, not measured."""
CACHE = 4.24e12
"""Bytes per second at which decode attention reads keys and values: 64 sequences of 512 tokens."""
ROWS, STEP_MS = (1, 16, 64), (3.47, 3.25, 4.47)
"""Milliseconds of a decode step without its attention, at so many rows: kernels of traces, 7B in bfloat16."""
DECODE_PRODUCTS = 5.5e14
"""Operations per second of products with more rows than that, an assumption."""
AROUND_MS = 0.0075
"""Milliseconds of a decode step for each row beyond those of ROWS: what runs between products, an assumption."""
IDLE_MS = 0.22
"""Milliseconds of a decode step in which no kernel runs: 8.74 ms against 8.52 of kernels."""
LAUNCH = 1e-3
"""Seconds of a step's fixed costs, an assumption."""


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


def cost(step: recorder.Step, plan: Any) -> float:
    """Seconds of a step."""
    if step.kind == "prefill":
        work = step.padded * table_ours.layer_flops(plan) / PREFILL * (1 + SPREAD * (step.rows == 1))
        return LAUNCH + max(work, table_ours.weight_bytes(plan) / CACHE / 0.85)
    token = 2 * plan.spec.num_layers * plan.layout.kv_groups * plan.spec.head_dim * 2
    most = ROWS[-1]
    products = float(np.interp(step.rows, ROWS, STEP_MS))
    if step.rows > most:
        work = step.rows * (table_ours.layer_flops(plan) + table_ours.head_flops(plan)) / DECODE_PRODUCTS
        products = max(products, 1e3 * work) + AROUND_MS * (step.rows - most)
    return LAUNCH + plan.decode_chunk * 1e-3 * (products + IDLE_MS) + step.context * token / CACHE


def predict(slots: int, prefill_tokens: int, chunk: int) -> dict[str, Any]:
    """Run the requests through the scheduler and cost what it hands out."""
    made = engine(slots, prefill_tokens, chunk)
    asked, wanted = table_ours.lengths(512, tiny=False)
    ctx = table_ours.Context(False, Path())
    prompts, params = ctx.prompts(made, asked), [table_ours.greedy(int(n)) for n in wanted]
    recorder.rehearse(made, prompts, params)
    noted, host = recorder.rehearse(made, prompts, params)
    plan = made.plan
    seconds = {
        kind: sum(cost(step, plan) for step in noted.steps if step.kind == kind) for kind in ("prefill", "decode")
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
    args = parser.parse_args()
    start = time.perf_counter()
    found = predict(args.slots, args.prefill_tokens, args.chunk)
    print(json.dumps(found | {"took_s": time.perf_counter() - start}, indent=1))


if __name__ == "__main__":
    main()
