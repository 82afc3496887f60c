"""The rows of the table as jaxinfer runs them; :mod:`table` starts this in a process of its own.

Every row has ``value``, its ``unit``, and ``limit``: what the device's measured rates allow for the bytes and
operations that the row cannot do without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

SAMPLES = 3


@dataclass
class Context:
    """What every row is given.

    Attributes:
        rehearse: tiny models, for a run on a CPU.
        root: where the configurations are written.
        profile: trace the kernels of decode steps.
        options: further arguments of ``init_inference``.
        slots: of the row of many requests.
        limits: what the device reaches, measured when the process starts.
    """

    rehearse: bool
    root: Path
    profile: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    slots: int = 256
    limits: Any = None

    def engine(self, model: str, **options: Any) -> Any:
        """An engine of a model with random parameters."""
        import shapes

        import jaxinfer

        folder = shapes.folder(model, self.root, tiny=self.rehearse)
        options = options | self.options
        unknown = set(options) - set(inspect.signature(jaxinfer.init_inference).parameters)
        if unknown:
            raise ValueError(f"init_inference has no {', '.join(sorted(unknown))}")
        return jaxinfer.init_inference(folder, {"tensor": 1}, load_format="dummy", progress=False, **options)

    def prompts(self, engine: Any, lengths: Any) -> list[list[int]]:
        """Random prompts."""
        rng = np.random.default_rng(0)
        return [rng.integers(3, engine.spec.vocab_size, int(length)).tolist() for length in lengths]


def greedy(tokens: int) -> Any:
    """Greedy decoding of exactly so many tokens."""
    from jaxinfer import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)


def weight_bytes(plan: Any) -> float:
    """Bytes of parameters that a decode step reads: all but table rows that no token asks for."""
    import jax.numpy as jnp

    def bits(dtype: Any) -> int:
        dtype = jnp.dtype(dtype)
        kind = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
        return int(kind(dtype).bits)

    skipped = {"embed.positions"} | (set() if plan.spec.tied_head else {"embed.tokens"})
    return sum(
        math.prod(info.shape) * bits(info.dtype) / 8 for path, info in plan.parameters.items() if path not in skipped
    )


def token_bytes(engine: Any) -> float:
    """Bytes of cached keys and values of one token, all layers together."""
    arrays = [array for layer in engine.executor.caches for array in layer]
    return sum(array.nbytes for array in arrays) / (engine.plan.num_blocks * 64)


def layer_flops(plan: Any) -> float:
    """Operations of a token in the products with weights of all layers, a multiply-add counted as two."""
    return _product_flops(plan, "layers.")


def spared_flops(plan: Any) -> float:
    """Those that only a prompt's last token needs, since nobody asks for what the last layer makes of the others."""
    last = f"layers.{plan.spec.num_layers - 1}."
    return _product_flops(plan, last) - _product_flops(plan, f"{last}attention.qkv")


def _product_flops(plan: Any, start: str) -> float:
    return 2.0 * sum(
        math.prod(info.shape)
        for path, info in plan.parameters.items()
        if path.startswith(start) and len(info.shape) > 1 and not path.endswith(("_scale", "_bias"))
    )


def head_flops(plan: Any) -> float:
    """Operations of a token in the product with the head."""
    return 2.0 * float(plan.spec.hidden * plan.spec.vocab_size)


@contextlib.contextmanager
def plain_xla(on: bool) -> Iterator[None]:
    """Choose implementations as for a GPU that is not a Hopper, for which there are no kernels of our own."""
    import jaxinfer.executor as module

    if not on or not hasattr(module, "compiling_for"):
        yield
        return
    kept = module.compiling_for
    module.compiling_for = lambda device: kept(dataclasses.replace(device, capability=None))
    try:
        yield
    finally:
        module.compiling_for = kept


def decode(
    ctx: Context, *, batch: int, model: str = "llama-7b", context: int = 512, steps: int = 128, xla: bool = False,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Decode as the engine runs it, host included, at a mean context."""
    import recorder

    from jaxinfer.bench import bench

    if ctx.rehearse:
        context, steps = 64, 32
    prompt = context - steps // 2
    length = prompt + steps + 1
    with plain_xla(xla), ctx.engine(model, max_batch=batch, max_model_len=length, **options) as engine:
        made = recorder.ready(engine, ctx.prompts(engine, [prompt] * batch), greedy(steps + 1))
        found = bench(
            engine, batches=(batch,), prompt_tokens=prompt, decode_tokens=steps, limits=ctx.limits,
            repeats=SAMPLES if batch < 32 else 2,
        ).decode[0]  # fmt: skip
        nbytes = weight_bytes(engine.plan) + batch * context * token_bytes(engine)
        result = _decode_result(ctx, engine, found.ms, nbytes, made)
        result |= {"device_ms": found.device_ms, "host_share": found.host_share, "context": found.context}
        result["xla_alone"] = xla
        if ctx.profile:
            result["trace"] = _trace(engine, batch, context)
        return result


def decode_steps(
    ctx: Context, *, batch: int, context: int, model: str = "llama-7b-gqa8", xla: bool = False, **options: Any
) -> dict[str, Any]:
    """Decode steps handed out back to back, over a cache filled with noise: no prefill of what is to be read."""
    import recorder

    if ctx.rehearse:
        batch, context = 2, 128
    with plain_xla(xla), ctx.engine(model, max_batch=batch, max_model_len=context, **options) as engine:
        inputs, features = _noise(engine, batch, context)
        step = recorder.Recorder(engine.plan)
        step.decode(inputs, features)
        seconds = recorder.compile_all(engine, step.steps)
        chunk = engine.plan.decode_chunk

        def run(count: int) -> float:
            start = time.perf_counter()
            for _ in range(count):
                last = engine.executor.decode(inputs, features)
            np.asarray(last.tokens)
            return 1e3 * (time.perf_counter() - start) / count / chunk

        run(1)
        samples = [run(4) for _ in range(SAMPLES)]
        nbytes = weight_bytes(engine.plan) + batch * (context - chunk / 2) * token_bytes(engine)
        made = {"programs": 1, "compile_s": seconds}
        result = _decode_result(ctx, engine, statistics.median(samples), nbytes, made)
        result |= {"samples_ms": samples, "context": context - chunk / 2, "xla_alone": xla}
        if ctx.profile:
            result["trace"] = _trace(engine, batch, context)
        return result


def _decode_result(ctx: Context, engine: Any, ms: float, nbytes: float, made: dict[str, Any]) -> dict[str, Any]:
    limit = 1e3 * nbytes / ctx.limits.bandwidth
    return {
        "value": ms, "unit": "ms a step", "limit": limit, "share": limit / ms, "bytes": nbytes, **made,
        "implementations": [str(choice) for choice in engine.implementations],
    }  # fmt: skip


def _noise(engine: Any, batch: int, context: int) -> tuple[Any, Any]:
    """Fill the cache with noise; return a decode step of sequences whose blocks lie anywhere in it."""
    import jax
    import jax.numpy as jnp

    from jaxinfer.generation.kv_cache import blocks_for
    from jaxinfer.generation.params import GenerationDefaults
    from jaxinfer.generation.sampling import features_of, pack
    from jaxinfer.steps import DecodeInputs

    executor = engine.executor

    def fill(array: Any, key: Any) -> Any:
        noise = jax.random.normal(key, array.shape, jnp.bfloat16)
        if jnp.issubdtype(array.dtype, jnp.integer):
            return jnp.clip(jnp.round(noise * 40), -127, 127).astype(array.dtype)
        return (0.02 * jnp.abs(noise)).astype(array.dtype) if array.ndim < 4 else noise.astype(array.dtype)

    filled = jax.jit(fill, donate_argnums=0)
    keys = iter(jax.random.split(jax.random.key(0), 4 * len(executor.caches)))
    executor.caches = [tuple(filled(array, next(keys)) for array in layer) for layer in executor.caches]
    width = blocks_for(context)
    order = 1 + np.random.default_rng(0).permutation(engine.plan.num_blocks - 1)
    if order.size < batch * width:
        raise ValueError(f"{batch * width} KV blocks are needed, and there are {order.size}")
    chunk = engine.plan.decode_chunk
    params = [greedy(chunk).resolve(GenerationDefaults(), (2,), engine.spec.vocab_size, 1)] * batch
    whole = np.ones(batch, np.int32)
    long = np.zeros(batch, bool) if engine.spec.long_from is not None else None
    tables = order[: batch * width].reshape(batch, width).astype(np.int32)
    inputs = DecodeInputs(
        slots=np.arange(batch, dtype=np.int32),
        positions=whole * (context - chunk),
        steps=whole * chunk,
        step=whole,
        tables=tables,
        rows=pack(params),
        long=long,
    )
    return inputs, features_of(params)


def _trace(engine: Any, batch: int, context: int) -> dict[str, Any]:
    """The kernels of decode steps at a context."""
    import recorder
    import step_trace

    try:
        inputs, features = _noise(engine, batch, context)
        step = recorder.Recorder(engine.plan)
        step.decode(inputs, features)
        recorder.compile_all(engine, step.steps)
        np.asarray(engine.executor.decode(inputs, features).tokens)
        return step_trace.profile(
            lambda: np.asarray(engine.executor.decode(inputs, features).tokens), engine.plan.decode_chunk
        )
    except Exception as error:  # the figure stands without it
        return {"error": f"{type(error).__name__}: {error}"}


def prefill(ctx: Context, *, batch: int = 8, tokens: int = 2040, xla: bool = False) -> dict[str, Any]:
    """Prefill of long prompts, operations of the weights alone: of all tokens in all layers, computed or not."""
    import recorder

    from jaxinfer.bench import _replay, _traced

    if ctx.rehearse:
        tokens = 120
    longest = 1 << tokens.bit_length()
    sizes = {"max_model_len": longest, "prefill_chunk": longest, "prefill_tokens": batch * longest}
    with plain_xla(xla), ctx.engine("llama-7b", max_batch=batch, **sizes) as engine:
        prompts, params = ctx.prompts(engine, [tokens] * batch), greedy(1)
        made = recorder.ready(engine, prompts, params)
        whole, device = [], []
        for _ in range(2 + 2 * SAMPLES):
            start = time.perf_counter()
            with _traced(engine) as calls:
                engine.generate(prompts, params)
            whole.append(1e3 * (time.perf_counter() - start))
            device.append(1e3 * _replay([call for _, call in calls]))
        # The first two are slower, the second by some 20 ms on an H200.
        ms, steps = statistics.median(whole[2:]), statistics.median(device[2:])
        flops = batch * (tokens * layer_flops(engine.plan) + head_flops(engine.plan))
        computed = flops - batch * (tokens - 1) * spared_flops(engine.plan)
        result = {
            "value": flops / ms / 1e9, "unit": "TFLOP/s", "limit": ctx.limits.matmul / 1e12,
            "share": flops / ms * 1e3 / ctx.limits.matmul, "ms": ms, "device_ms": steps,
            "device_tflop_s": flops / steps / 1e9, "computed_tflop_s": computed / ms / 1e9, "steps": len(calls),
            "samples_ms": whole[2:], **made, "implementations": [str(choice) for choice in engine.implementations],
        }  # fmt: skip
        if ctx.profile:
            result["trace"] = _trace_of_prompts(engine, prompts)
        return result


def lengths(count: int, *, tiny: bool) -> tuple[Any, Any]:
    """Prompt and output lengths of many requests: uniform, 32 to 511 and 32 to 255 tokens."""
    rng = np.random.default_rng(0)
    prompts, outputs = rng.integers(32, 512, count), rng.integers(32, 256, count)
    return (prompts // 8, outputs // 8) if tiny else (prompts, outputs)


def requests(ctx: Context, *, count: int = 512) -> dict[str, Any]:
    """Many requests at once through ``generate``, greedy, nothing ending early."""
    import recorder

    from jaxinfer.bench import _replay, _traced

    count = 24 if ctx.rehearse else count
    slots = 8 if ctx.rehearse else ctx.slots
    sizes: dict[str, Any] = {"max_batch": slots, "max_model_len": 768, "prefill_tokens": 8192}
    if ctx.rehearse:
        sizes |= {"max_model_len": 96, "prefill_tokens": 256}
    asked, wanted = lengths(count, tiny=ctx.rehearse)
    with ctx.engine("llama-7b", **sizes) as engine:
        prompts, params = ctx.prompts(engine, asked), [greedy(int(n)) for n in wanted]
        noted, _ = recorder.rehearse(engine, prompts, params)  # imports and first calls
        noted, host = recorder.rehearse(engine, prompts, params)
        programs = noted.programs()
        compile_s = recorder.compile_all(engine, programs)
        seconds, again = [], {}
        with _traced(engine) as calls:
            for _ in range(2):
                calls.clear()
                start = time.perf_counter()
                outputs = engine.generate(prompts, params, progress=False)
                seconds.append(time.perf_counter() - start)
                produced = sum(len(output.outputs[0].token_ids) for output in outputs)
                if produced != int(wanted.sum()):
                    raise ValueError(f"{produced} tokens came, {int(wanted.sum())} were asked for")
        for kind in ("prefill", "decode"):
            again[kind] = _replay([call for name, call in calls if name == kind])
        cached = token_bytes(engine)
        result = request_limits(ctx.limits, engine.plan, asked, wanted, cached)
        best = min(seconds)
        return {
            "value": produced / best, "unit": "output tokens/s", "limit": produced / result["limit_s"],
            "share": result["limit_s"] / best, "seconds": seconds, "output_tokens": produced, **result,
            "prefill_device_s": again["prefill"], "decode_device_s": again["decode"],
            "host_alone_s": host, "waiting_for_host": max(0.0, 1 - sum(again.values()) / best),
            "programs": len(programs), "compile_s": compile_s, **account(noted, produced), "slots": engine.plan.slots,
            "kv_blocks": engine.plan.num_blocks, "preemptions": engine._open().counters.preemptions,
        }  # fmt: skip


def request_limits(limits: Any, plan: Any, asked: Any, wanted: Any, cached: float) -> dict[str, float]:
    """The least seconds of many requests.

    Operations of the prompts, bytes of the keys and values that are read, and the weights once for each token of the
    longest output.
    """
    prompt_flops = float(asked.sum()) * layer_flops(plan) + len(asked) * head_flops(plan)
    reads = float((wanted * asked + wanted * (wanted - 1) // 2).sum()) * cached
    weights = float(wanted.max()) * weight_bytes(plan)
    prefill, kv, weight = prompt_flops / limits.matmul, reads / limits.bandwidth, weights / limits.bandwidth
    return {
        "limit_s": prefill + kv + weight, "limit_prefill_s": prefill, "limit_kv_s": kv, "limit_weights_s": weight,
    }  # fmt: skip


def account(noted: Any, produced: int) -> dict[str, Any]:
    """What was computed beside what was needed."""
    kinds = {kind: [step for step in noted.steps if step.kind == kind] for kind in ("prefill", "decode")}
    prefilled, decoded = ([sum(s.padded for s in steps), sum(s.real for s in steps)] for steps in kinds.values())
    return {
        "prefill_steps": len(kinds["prefill"]), "prompt_tokens": prefilled[1],
        "prefill_useful": prefilled[1] / prefilled[0],
        "decode_chunks": len(kinds["decode"]), "decode_useful": decoded[1] / max(decoded[0], 1),
        "mean_batch": decoded[1] / max(1, len(kinds["decode"]) * noted.plan.decode_chunk),
        "from_prefill": produced - decoded[1],
    }  # fmt: skip


def latency(ctx: Context, *, model: str, batch: int, prompt: int = 128, new: int = 8, **options: Any) -> dict[str, Any]:
    """Some tokens after a prompt, from the call of ``generate`` to its return."""
    import recorder

    from jaxinfer.bench import _replay, _traced

    # The prompt gives the first token; a chunk is a whole number of steps, used or not.
    chunk = new - 1
    with ctx.engine(model, max_batch=batch, max_model_len=256, decode_chunk=chunk, **options) as engine:
        prompts, params = ctx.prompts(engine, [prompt] * batch), greedy(new)
        made = recorder.ready(engine, prompts, params)
        samples = []
        for _ in range(12):
            start = time.perf_counter()
            engine.generate(prompts, params, progress=False)
            samples.append(1e3 * (time.perf_counter() - start))
        ms = statistics.median(samples[2:])
        with _traced(engine) as calls:
            engine.generate(prompts, params, progress=False)
        alone = {
            f"{kind}_device_ms": 1e3 * min(_replay([call for name, call in calls if name == kind]) for _ in range(5))
            for kind in ("prefill", "decode")
        }
        plan, limits = engine.plan, ctx.limits
        flops = batch * (prompt * layer_flops(plan) - (prompt - 1) * spared_flops(plan) + head_flops(plan))
        weights = weight_bytes(plan)
        first = max(flops / limits.matmul, weights / limits.bandwidth)
        read = batch * token_bytes(engine) * sum(prompt + i for i in range(1, new))
        limit = 1e3 * (first + (chunk * weights + read) / limits.bandwidth)
        result = {
            "value": ms, "unit": "ms", "limit": limit, "share": limit / ms, "samples_ms": samples,
            "decode_chunk": chunk, **alone, **made,
            "implementations": [str(choice) for choice in engine.implementations],
        }  # fmt: skip
        if ctx.profile:
            result["trace"] = _trace(engine, batch, prompt)
            result["trace_of_prompts"] = _trace_of_prompts(engine, prompts)
        return result


def _trace_of_prompts(engine: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """The kernels of the prefill steps of some prompts."""
    import step_trace

    from jaxinfer.bench import _replay, _traced

    with _traced(engine) as calls:
        engine.generate(prompts, greedy(1), progress=False)
    return step_trace.profile(lambda: _replay([call for _, call in calls]), 1)


ROWS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "decode1": lambda ctx: decode(ctx, batch=1),
    "decode1_xla": lambda ctx: decode(ctx, batch=1, xla=True),
    "decode16": lambda ctx: decode(ctx, batch=16),
    "decode64": lambda ctx: decode(ctx, batch=64),
    "int8": lambda ctx: decode(ctx, batch=1, quantize="int8"),
    "int4": lambda ctx: decode(ctx, batch=1, quantize="int4"),
    "fp8": lambda ctx: decode(ctx, batch=1, quantize="fp8"),
    "long64": lambda ctx: decode_steps(ctx, batch=64, context=4096),
    "long64_xla": lambda ctx: decode_steps(ctx, batch=64, context=4096, xla=True),
    "prefill": lambda ctx: prefill(ctx),
    "requests": lambda ctx: requests(ctx),
    "opt1": lambda ctx: latency(ctx, model="opt-6.7b", batch=1),
    "opt16": lambda ctx: latency(ctx, model="opt-6.7b", batch=16),
    "gpt2xl": lambda ctx: latency(ctx, model="gpt2-xl", batch=1),
}


def start(ctx: Context) -> dict[str, Any]:
    """Describe the machine and measure its limits."""
    import machine

    from jaxinfer.bench import measure_limits

    ctx.limits = measure_limits()
    return {"machine": machine.describe(), "limits": dataclasses.asdict(ctx.limits)}
