"""OPT-13B with its layers in host memory on one device, and on two with a link each: decode, prefill, a batch of one.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=.95
    python benchmarks/offload.py two --out benchmarks/results/offload_two_h200.json --seconds 290

Limits: transfers alone, to each device alone and to both at once. Prefill is done the way that the plan chooses and the
other way as well, with all prompts and with an eighth of them, so that the choice by the number of tokens can be told
right from wrong. In rehearsal: ``XLA_FLAGS=--xla_force_host_platform_device_count=2 NPROC=16``.
"""

from __future__ import annotations

import dataclasses
import functools
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.bench import time_chain
from sharding import TensorLimits, all_gather, all_to_all, make_mesh, psum

SECONDS = {"bfloat16": (75, 50), "int8": (25, 25), "int4": (25, 25)}
"""What one device takes, and what two take; the first registers the memory."""


def measure(bench: Any) -> None:
    """Measure it all, the most important figures first."""
    if len(jax.devices()) < 2:
        bench.note("two_left_out", f"needs two devices, there are {len(jax.devices())}")
        return
    limits = TensorLimits(heads=2, kv_heads=2, intermediate=2)
    first, second = (make_mesh({"tensor": 1}, limits, [device]) for device in jax.devices()[:2])
    both = make_mesh({"tensor": 2}, limits, jax.devices()[:2])
    if not bench.rehearse:
        bench.note("topology", _topology())
    bench.limits()
    bench.note("collectives", _collectives(both, 512 if bench.rehearse else 5120))
    for weights in bench.given.weights:
        names = f"one_{weights}", f"two_{weights}"
        more = weights == "bfloat16"
        if bench.late(names[0], sum(SECONDS[weights])):
            continue
        with bench.measured(names[0], weights, first) as engine:
            rate = bench.link(engine.executor.pager.packings[0], second)
            bench.note(f"link_second_device_{weights}_gb_s", rate / 1e9)
            said = bench.said
            if more:
                bench.note(f"{names[0]}_batch_1", _alone(bench, engine, names[0]))
        if bench.late(names[1], SECONDS[weights][1]):
            continue
        with bench.measured(names[1], weights, both) as engine:
            bench.note(f"ratio_{weights}", _ratio(bench, *names, _agreement(said, bench.said)))
            if more:
                bench.note(f"{names[1]}_batch_1", _alone(bench, engine, names[1]))
                alone = [bench.found[f"{name}_batch_1"]["step_ms"] for name in names]
                bench.note("ratio_batch_1", {"step": alone[0] / alone[1]})
            if not any(f"two_{other}" in bench.found for other in bench.given.weights if other != weights):
                # The peak is of the whole run.
                memory = {"planned": engine.plan.total_bytes_per_device, "peak": _peak(both)}
                bench.note(f"memory_of_two_{weights}", memory | {"gathering": engine.plan.tiers.gathering.nbytes})
            counts = (bench.batch, max(1, bench.batch // 8)) if more else (bench.batch,)
            _both_ways(bench, engine, weights, counts)


def _collectives(mesh: Mesh, hidden: int) -> dict[str, Any]:
    """Microseconds of what layers send, and the bytes that a device sends in them by the second."""
    cases: dict[str, tuple[Callable[[jax.Array], jax.Array], tuple[int, ...], float]] = {
        # As of 64 sequences in decode and a piece of 4096 tokens in prefill: each device sends as much as it has.
        "all_reduce_64": (functools.partial(psum, axis="tensor"), (64, hidden), 1.0),
        "all_reduce_4096": (functools.partial(psum, axis="tensor"), (4096, hidden), 1.0),
        # The larger of the gathered parameters, of which each device has half, in both layouts.
        "all_gather_rows": (functools.partial(all_gather, axis="tensor", dim=0), (2 * hidden, hidden), 1.0),
        "all_gather_columns": (functools.partial(all_gather, axis="tensor", dim=1), (hidden, 2 * hidden), 1.0),
        # Queries, keys and values of half of 4096 tokens.
        "all_to_all_2048": (functools.partial(all_to_all, axis="tensor", split=1, concat=0), (2048, 3 * hidden), 0.5),
    }
    found: dict[str, Any] = {}
    for name, (body, shape, sent) in cases.items():
        whole = NamedSharding(mesh, PartitionSpec())
        mapped = jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
        x = jax.device_put(np.zeros(shape, jnp.bfloat16), whole)
        run = jax.jit(mapped)

        def step(_: Any, run: Any = run, x: jax.Array = x) -> Any:
            return run(x)

        seconds = time_chain(step, None)
        found[name] = {"us": 1e6 * seconds, "sent_gb_s": sent * x.nbytes / 1e9 / seconds}
    return found


def _alone(bench: Any, engine: Any, name: str) -> dict[str, Any]:
    """One sequence."""
    found: dict[str, Any] = bench.timed(engine, 1, bench.steps)
    limit = bench.found[name]["step_limit_ms"]
    return found | {"step_limit_ms": limit, "step_share": limit / found["step_ms"]}


def _ratio(bench: Any, one: str, two: str, agreement: dict[str, float]) -> dict[str, Any]:
    """How many times as fast two devices are, beside how many times as fast their links are."""
    alone, together = bench.found[one], bench.found[two]
    return {
        "step": alone["step_ms"] / together["step_ms"],
        "prefill": alone["prefill_s"] / together["prefill_s"],
        "link": 2 * together["link_gb_s"] / alone["link_gb_s"],
        "link_gb_s_together": 2 * together["link_gb_s"],
        "moved_gb_s_together": 2 * together["moved_bytes"] / 1e6 / together["step_ms"],
        "step_share_of_limit": together["step_share"],
        "step_ms_at_twice_one_link": alone["step_limit_ms"] / 2,
    } | agreement


def _agreement(said: list[list[int]], others: list[list[int]]) -> dict[str, float]:
    """Of two runs of the same prompts: sums are in another order, so that near ties may fall otherwise."""
    pairs = list(zip(said, others, strict=True))
    return {
        "same_first_token": sum(one[0] == other[0] for one, other in pairs) / len(pairs),
        "same_tokens": sum(one == other for one, other in pairs) / len(pairs),
    }


def _both_ways(bench: Any, engine: Any, weights: str, counts: tuple[int, ...]) -> None:
    """Prefill with weights gathered and with weights sharded, whatever the plan chose."""
    executor, asked = engine.executor, bench.prompts(engine, bench.batch)
    chosen, gather, gathered = executor.tiers, executor._gather, []

    def watched(*given: Any) -> Any:
        gathered.append(given[0])
        return gather(*given)

    least = chosen.gathering.tokens
    executor._gather = watched
    for count in dict.fromkeys(counts):
        tokens = count * bench.prompt
        found: dict[str, Any] = {"tokens": tokens, "from": least, "why": chosen.gathering.why}
        found["chosen"] = "gathered" if least is not None and tokens >= least else "sharded"
        # With gathered weights a device computes as many tokens of a piece as with sharded ones; or half as many, as
        # until 2026-11-29, whose ``gathered_twice_the_piece`` is now ``gathered``.
        ways = {"gathered": (1, 1), "sharded": (None, 1), "gathered_half_the_piece": (1, 2)}
        for way, (forced, parts) in ways.items():
            name = f"prefill_{weights}_{tokens}_{way}"
            if (parts > 1 and (count < bench.batch or weights == "int4")) or bench.late(name, 12):
                continue
            gathering = dataclasses.replace(chosen.gathering, tokens=forced, widened=False)
            executor.tiers = dataclasses.replace(chosen, gathering=gathering, micro_tokens=chosen.micro_tokens // parts)
            gathered.clear()
            first = bench.run(engine, asked[:count], 1)
            if bool(gathered) != (forced is not None):
                raise RuntimeError(f"{name}: {len(gathered)} layers were gathered")
            engine.executor.pager.timeline.clear()
            seconds = [bench.run(engine, asked[:count], 1) for _ in range(3)]
            waited = dict(engine.executor.pager.timeline.waited)
            found[way] = {"first_s": first, "seconds": min(seconds), "all_s": seconds, "waited_s_of_all": waited}
            bench.note(name, found[way])
        if "gathered" in found and "sharded" in found:
            found["sharded_over_gathered"] = found["sharded"]["seconds"] / found["gathered"]["seconds"]
            found["faster"] = "gathered" if found["sharded_over_gathered"] > 1 else "sharded"
        bench.note(f"prefill_{weights}_{tokens}_both_ways", found)
    executor.tiers = chosen
    del executor._gather


def _peak(mesh: Mesh) -> int | None:
    """Most bytes that were in use on the last device, which held no model alone."""
    stats = mesh.devices.flat[-1].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def _topology() -> list[str]:
    """How the devices are linked with each other and with the processors."""
    command = ["nvidia-smi", "topo", "-m"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    except OSError as error:
        return [str(error)]
