"""A decode step of one engine under different choices: command buffers, rows of the product kernel, norms inside it.

    python benchmarks/decode_variants.py --cases llama-7b:1,llama-7b:16,opt-6.7b:1 --out variants.json

Each case is a model, a batch and, where it is quantized, how: ``llama-7b:1:int8``. Steps are handed out back to back
over a cache full of noise at a mean context of ``--context`` tokens; weights are drawn on the device. For every case
one engine compiles its step for each variant, so that figures of a case differ in nothing else. ``--prompt N`` times
the prefill of prompts of N tokens instead, each waited for, and how long handing it out takes.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import recorder  # noqa: E402
import table_ours  # noqa: E402
from machine import describe  # noqa: E402

import jaxinfer.executor as executor_module  # noqa: E402
from jaxinfer.bench import _traced  # noqa: E402

# The package's own attributes of these names are functions.
choices = importlib.import_module("pallas_kernels.choices")
linear_module = importlib.import_module("pallas_kernels.linear")

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "command buffers": {"buffers": True},
    "no command buffers": {"buffers": False},
    "rows 64": {"rows": 64},
    "rows 64, no command buffers": {"rows": 64, "buffers": False},
    "xla products": {"rows": 0},
    "xla products, no command buffers": {"rows": 0, "buffers": False},
    "norms outside": {"norms": ()},
    "norms outside, no command buffers": {"norms": (), "buffers": False},
    "update all but temporaries": {"update": "SKIP_TEMP"},
    "update what has moved before": {"update": "SKIP_PROFILED"},
}


@contextlib.contextmanager
def variant(change: dict[str, Any]) -> Iterator[None]:
    """Choose otherwise while a step is compiled."""
    kept = choices.MAX_LINEAR_ROWS, linear_module.FUSED_NORMS, executor_module.compiler_options
    choices.MAX_LINEAR_ROWS = change.get("rows", kept[0])
    linear_module.FUSED_NORMS = change.get("norms", kept[1])
    options = {} if change.get("buffers", True) else {"xla_gpu_enable_command_buffer": ""}
    if "update" in change:
        options["xla_gpu_command_buffer_update_mode"] = change["update"]
    executor_module.compiler_options = lambda *given: kept[2](*given) | options
    try:
        yield
    finally:
        choices.MAX_LINEAR_ROWS, linear_module.FUSED_NORMS, executor_module.compiler_options = kept


def measure(engine: Any, inputs: Any, features: Any, change: dict[str, Any]) -> dict[str, Any]:
    """Compile the step and time it."""
    executor, chunk = engine.executor, engine.plan.decode_chunk
    executor._compiled.clear()
    begin = time.perf_counter()
    with variant(change):
        step = recorder.Recorder(engine.plan)
        step.decode(inputs, features)
        recorder.compile_all(engine, step.steps)
    compiled = time.perf_counter() - begin

    def run(count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            last = executor.decode(inputs, features)
        np.asarray(last.tokens)
        return 1e3 * (time.perf_counter() - start) / count / chunk

    run(1)
    samples = [run(6) for _ in range(3)]
    return {"ms": statistics.median(samples), "samples_ms": samples, "compile_s": compiled}


def measure_prompts(engine: Any, prompts: list[list[int]], change: dict[str, Any]) -> dict[str, Any]:
    """Compile the prefill step and time it alone, as whoever waits for a first token sees it."""
    executor, params = engine.executor, table_ours.greedy(1)
    executor._compiled.clear()
    with variant(change):
        made = recorder.ready(engine, prompts, params)
    for _ in range(3):  # imports, first calls, and what XLA makes of a step only when it has run
        engine.generate(prompts, params, progress=False)
    with _traced(engine) as calls:
        engine.generate(prompts, params, progress=False)
    handed, waited = [], []
    for _ in range(20):
        start = time.perf_counter()
        results = [call() for _, call in calls]
        handed.append(1e3 * (time.perf_counter() - start))
        jax.block_until_ready(results)
        waited.append(1e3 * (time.perf_counter() - start))
    return {
        "ms": statistics.median(waited), "least_ms": min(waited), "handed_out_ms": statistics.median(handed),
        "compile_s": made["compile_s"],
    }  # fmt: skip


def main() -> None:
    """Measure every case under every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="llama-7b:1,llama-7b:16")
    parser.add_argument("--variants", default="all", help="names divided by ';'")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=0, help="tokens of prompts to prefill, instead of decode steps")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--rehearse", action="store_true", help="tiny models, for a run on a CPU")
    parser.add_argument("--out", type=Path, default=Path("decode_variants.json"))
    args = parser.parse_args()
    ends = time.time() + args.seconds
    names = list(VARIANTS) if args.variants == "all" else args.variants.split(";")
    found: dict[str, Any] = {"machine": describe(), "command": " ".join(sys.argv), "context": args.context, "cases": {}}
    with tempfile.TemporaryDirectory() as root:
        ctx = table_ours.Context(args.rehearse, Path(root))
        for case in args.cases.split(","):
            model, batch, *quantize = case.split(":")
            context = 64 if args.rehearse else args.context
            options = {"quantize": quantize[0]} if quantize else {}
            longest = max(context, args.prompt) + 64
            with ctx.engine(model, max_batch=int(batch), max_model_len=longest, **options) as engine:
                if args.prompt:
                    prompts = ctx.prompts(engine, [args.prompt] * int(batch))
                    step = functools.partial(measure_prompts, engine, prompts)
                else:
                    noise = table_ours._noise(engine, int(batch), context + engine.plan.decode_chunk // 2)
                    step = functools.partial(measure, engine, *noise)
                results = found["cases"][case] = {}
                for name in names:
                    if time.time() > ends:
                        break
                    try:
                        results[name] = step(VARIANTS[name])
                        shown = f"{results[name]['ms']:.3f} ms"
                    except Exception as error:  # one variant must not take the others with it
                        results[name] = {"error": f"{type(error).__name__}: {error}"[:1000]}
                        shown = results[name]["error"][:300]
                    print(f"{case}, {name}: {shown}", flush=True)
                    args.out.write_text(json.dumps(found, indent=1) + "\n")
            jax.clear_caches()


if __name__ == "__main__":
    main()
