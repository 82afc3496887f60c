"""The kernel of whole decoder layers: right beside float32, and its time beside the kernels of its parts and the copy.

    python benchmarks/decoder_layers.py --seconds 150 --out benchmarks/results/decoder_layers_h200.json

First every case of the tests, small and large, against ``jax.numpy`` in float32, two layers one after the other.
Then chains of layers of a 7B Llama with weights of their own, one sequence of 512 tokens: microseconds a layer, as a
CUDA graph handed out back to back; the limit is what its bytes take at the copy bandwidth measured in the same run.
``--ablate`` also times the kernel with parts left out, whose results are wrong, or with another ring; ``--trace`` has
it note when its blocks get where in a layer. Each figure is printed and the file written as soon as it is there;
nothing is begun for which no time is left.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jax
import jax.numpy as jnp
import machine
import numpy as np

import pallas_kernels as ops
from jaxinfer.bench import measure_limits
from pallas_kernels import layer_mosaic, layer_plan, layer_stream, layer_threads
from pallas_kernels.decoder_layers import decoder_layers, plan_of
from pallas_kernels.layer_plan import MARKS
from tests.pallas_kernels.layer_cases import LARGE, LLAMA, SMALL, by_plan, operands, static

LAYERS = 8
ROUNDS = 8
"""Times that a call goes through the layers: the host takes longer to hand out one than a GPU to run it."""


ABLATIONS = (
    "no waiting", "no waiting, no attention", "no copies", "half the ring", "no pause", "long pause", "lag 2",
    "one chain",
)  # fmt: skip


class Bench:
    """Measures, and writes the file after each figure."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.end = given, time.perf_counter() + given.seconds
        self.found: dict[str, Any] = {"machine": machine.describe()}

    def late(self, seconds: float) -> bool:
        """Whether there is no time for more."""
        return time.perf_counter() + seconds > self.end

    def note(self, name: str, value: Any) -> None:
        """Keep a figure."""
        self.found[name] = value
        print(name, json.dumps(value), f"{self.end - time.perf_counter():.0f} s left", flush=True)
        if self.given.out is not None:
            self.given.out.write_text(json.dumps(self.found, indent=1))


def widened(tree: Any) -> Any:
    """Everything that is not quantized in float32."""
    return jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype in (jnp.bfloat16, jnp.float16) else a, tree)


def check(case: Any) -> dict[str, float]:
    """Distances from float32 of two layers, of the kernel and of the reference in the case's dtype; and the cache's."""
    arguments, rotary = operands(case)
    x, layers, caches, tables, positions = arguments
    real = np.asarray(positions) >= 0

    @functools.partial(jax.jit, static_argnames="implementation")
    def run(x: Any, layers: Any, caches: Any, rotary: Any, implementation: str | None = None) -> Any:
        return decoder_layers(
            x, layers, caches, tables, positions, rotary=rotary, implementation=implementation, **static(case)
        )

    got, written = run(x, layers, caches, rotary, "mosaic")
    again, _ = run(x, layers, caches, rotary, "mosaic")
    truth, _ = run(*widened((x, layers, caches, rotary)))
    rough, kept = run(x, layers, caches, rotary)

    def apart(got: Any, wanted: Any) -> float:
        a, b, x_ = (np.asarray(array, np.float64)[real] for array in (got, wanted, x))
        return float(np.linalg.norm(a - b) / np.linalg.norm(b - x_))

    cache = max(
        float(jnp.max(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32))))
        for a, b in zip(jax.tree.leaves(written), jax.tree.leaves(kept), strict=True)
    )
    return {
        "error": apart(got, truth), "reference": apart(rough, truth), "cache": cache,
        "repeats": bool((got == again).all()),
    }  # fmt: skip


def chain(case: Any, whole: bool) -> tuple[Any, Any, float]:
    """A function of layers one after the other, what it is given, and the bytes of a layer."""
    (x, [layer], [cache], _, positions), rotary = operands(case, seed=None, layers=1)
    rest = static(case)

    def fill(array: Any, key: Any) -> Any:
        if array.dtype == jnp.int4:
            return jax.random.randint(key, array.shape, -7, 8, jnp.int8).astype(jnp.int4)
        if array.dtype == jnp.int8:
            return jax.random.randint(key, array.shape, -127, 128, jnp.int8)
        if array.dtype == jnp.int32:
            return array
        if array.dtype == jnp.float32:
            return jnp.full(array.shape, 0.02 / 7, jnp.float32)
        return (0.02 * jax.random.normal(key, array.shape, jnp.bfloat16)).astype(array.dtype)

    @jax.jit
    def drawn(key: Any) -> Any:
        leaves, shape = jax.tree.flatten((layer, cache))
        return jax.tree.unflatten(shape, [fill(a, k) for a, k in zip(leaves, jax.random.split(key, 40), strict=False)])

    layers, caches = zip(*(drawn(jax.random.key(i)) for i in range(LAYERS)), strict=True)
    x = jax.random.normal(jax.random.key(99), x.shape, x.dtype)
    tables = operands(dataclasses.replace(SMALL["plain"], lengths=case.lengths, width=case.width))[0][3]

    @functools.partial(jax.jit, donate_argnums=2)
    def together(x: Any, layers: Any, caches: Any) -> Any:
        for _ in range(ROUNDS):
            x, caches = decoder_layers(
                x, layers, caches, tables, positions, rotary=rotary, implementation="mosaic", **rest
            )
        return x, caches

    @functools.partial(jax.jit, donate_argnums=2)
    def apart(x: Any, layers: Any, caches: Any) -> Any:
        for _ in range(ROUNDS):
            x, caches = once(x, layers, caches)
        return x, caches

    def once(x: Any, layers: Any, caches: Any) -> Any:
        new = []
        for one, cache in zip(layers, caches, strict=True):
            angles = None if rotary is None else tuple(angle[:, None] for angle in rotary)
            query, cache = ops.qkv_gemm(
                x[:, None], one.weights[0], cache, tables, positions[:, None], norm=one.norms[0], bias=one.biases[0],
                rotary=angles, weight_scale=one.scales[0], implementation="mosaic",
            )  # fmt: skip
            y = ops.paged_attention(query, *cache, tables, positions[:, None], scale=rest["scale"])
            x = ops.linear(y.reshape(x.shape[0], -1), one.weights[1], one.scales[1], residual=x, bias=one.biases[1])
            h = ops.linear(
                x, one.weights[2], one.scales[2], norm=one.norms[1], activation=case.activation, gated=case.gated,
                bias=one.biases[2],
            )  # fmt: skip
            x = ops.linear(h, one.weights[3], one.scales[3], residual=x, bias=one.biases[3])
            new.append(cache)
        return x, new

    nbytes = sum(array.nbytes if array.dtype != jnp.int4 else array.size / 2 for array in jax.tree.leaves(layer))
    nbytes += sum(case.lengths) * 2 * case.groups * case.dim * 2
    return (together if whole else apart), (x, list(layers), list(caches)), nbytes


def timed(function: Any, given: Any, calls: int = 4, checked: bool = True) -> tuple[float, Any]:
    """Microseconds a layer, the median of several rounds of calls handed out back to back."""
    x, layers, caches = given
    y, caches = function(x, layers, caches)
    rounds = []
    for _ in range(7):
        jax.block_until_ready(caches)
        begin = time.perf_counter()
        for _ in range(calls):
            y, caches = function(x, layers, caches)
        y.block_until_ready()
        rounds.append(1e6 * (time.perf_counter() - begin) / calls / LAYERS / ROUNDS)
    if checked and not bool(jnp.isfinite(y.astype(jnp.float32)).all()):
        raise ValueError("the result is not finite")
    return float(np.median(rounds)), (x, layers, caches)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kinds", nargs="*", default=["bfloat16", "int8", "int4", "fp8"])
    parser.add_argument("--cases", nargs="*", default=list(SMALL | LARGE), help="to check")
    parser.add_argument("--ablate", nargs="*", default=[], choices=ABLATIONS, help="also time the kernel so")
    parser.add_argument("--trace", action="store_true", help="also say where in a layer the time goes")
    parser.add_argument("--alone", action="store_true", help="without the kernels of the parts")
    bench = Bench(parser.parse_args())
    if bench.given.kinds:
        bench.note("limits", dataclasses.asdict(measure_limits()))
        bandwidth = bench.found["limits"]["bandwidth"]
    for name in bench.given.cases:
        case = (SMALL | LARGE)[name]
        if bench.late(10):
            break
        try:
            bench.note(f"check {name}", check(case))
        except Exception as error:
            bench.note(f"check {name}", f"{type(error).__name__}: {error}"[:600])
    for kind in bench.given.kinds:
        if bench.late(15):
            break
        case = dataclasses.replace(LLAMA, weight=None if kind == "bfloat16" else kind)
        for whole in (True,) if bench.given.alone else (True, False):
            name = f"{kind} {'whole' if whole else 'apart'}"
            try:
                function, given, nbytes = chain(case, whole)
                us, given = timed(function, given)
                limit = 1e6 * nbytes / bandwidth
                bench.note(name, {"us": us, "limit_us": limit, "share": limit / us, "layers": LAYERS})
            except Exception as error:
                bench.note(name, f"{type(error).__name__}: {error}"[:600])
            del given
            if whole and bench.given.trace and not bench.late(10):
                bench.note(f"{kind} trace", trace(case))
            if whole and bench.given.ablate and not bench.late(10):
                ablate(bench, kind, case)


def trace(case: Any) -> dict[str, Any]:
    """Where in a layer the time goes: :func:`phases` of a launch of several."""
    _, (x, layers, caches), _ = chain(case, True)
    small = dataclasses.replace(case, hidden=64, groups=1, wide=64, weight=None)
    (_, _, _, tables, positions), rotary = operands(small, seed=None, layers=1)
    run = jax.jit(functools.partial(by_plan, case=case, traced=True))
    for _ in range(4):
        x, caches, noted = run((x, layers, list(caches), tables, positions), rotary)
    return phases(np.asarray(noted))


def phases(noted: np.ndarray) -> dict[str, Any]:
    """Microseconds from each mark of a layer to the next one, and between the first and the last block at it.

    Means over blocks and over layers but for the first, whose input is there when it begins.

    Args:
        noted: as ``LayerPlan.trace`` has it.
    """
    there = (noted[1:] != 0).any(-1)  # [layer, mark, block]
    cycles, nanoseconds = (noted.view(np.uint32)[1:, :, :, i] for i in (0, 1))
    whole = [(values[-1, -1] - values[0, -1]).astype(np.float64) for values in (cycles, nanoseconds)]
    per_us = float(np.mean(1e3 * whole[0] / whole[1]))
    found: dict[str, Any] = {"cycles per us": per_us}
    before = np.concatenate((np.zeros_like(cycles[:1, -1]), cycles[:-1, -1]))  # of the layer before
    for number, name in enumerate(MARKS):
        now, own = cycles[:, number], there[:, number].copy()
        if number == 0:
            own[0] = False
        late = [row[here] for row, here in zip(nanoseconds[:, number], there[:, number], strict=True) if here.any()]
        taken = (now - before)[own].astype(np.float64) / per_us
        spread = [float((row - row[0]).view(np.int32).max() - (row - row[0]).view(np.int32).min()) for row in late]
        found[name] = {"us": float(taken.mean()), "spread_us": float(np.mean(spread)) / 1e3}
        before = np.where(there[:, number], now, before)
    found["layer_us"] = float(np.mean(whole[1])) / 1e3 / (len(cycles) - 1)
    return found


def ablate(bench: Bench, kind: str, case: Any) -> None:
    """The kernel with parts left out, or with another ring."""
    arguments, rotary = operands(case, seed=None, layers=1)
    plan = plan_of(*arguments[:4], rotary=rotary, **static(case))
    bench.note(f"{kind} plan", {"stages": plan.stages, "splits": plan.splits, "shared": plan.shared})
    from pallas_kernels import registers
    from pallas_kernels.registers import Registers

    pause, lag, chains = registers.PAUSE, layer_plan.LAG, layer_threads.CHAINS
    receive, attend, by_stages = Registers.receive, layer_mosaic.attend, plan.stages
    copy_rows = Registers.copy_rows

    def glance(self: Any, addresses: Any, number: Any, pairs: bool = False) -> Any:
        return [word for at in addresses for word in self.load_memory(at, 4 if pairs else 2)[::2]]

    for name in bench.given.ablate:
        jax.clear_caches()
        if name.startswith("no waiting"):
            Registers.receive = glance  # type: ignore[method-assign]
        if name.endswith("no attention"):
            layer_mosaic.attend = lambda *_: None
        if name.endswith("pause"):
            registers.PAUSE = 0 if name == "no pause" else 200
        if name == "lag 2":
            layer_plan.LAG = layer_stream.LAG = 2
        if name == "one chain":
            layer_threads.CHAINS = 1
        if name == "no copies":
            Registers.copy_rows = lambda self, copies, barrier: self.arrive(barrier)  # type: ignore[method-assign]
        if name == "half the ring":
            module = sys.modules["pallas_kernels.decoder_layers"]  # the name is the function's
            stages = by_stages // 2 + 1
            kept = module.divided
            module.divided = lambda plan, kept=kept, stages=stages: dataclasses.replace(kept(plan), stages=stages)
        try:
            function, given, _ = chain(case, True)
            us, given = timed(function, given, checked=False)
            bench.note(f"{kind} {name}", us)
        except Exception as error:
            bench.note(f"{kind} {name}", f"{type(error).__name__}: {error}"[:300])
        Registers.receive, layer_mosaic.attend = receive, attend  # type: ignore[method-assign]
        registers.PAUSE, layer_plan.LAG, layer_stream.LAG = pause, lag, lag
        Registers.copy_rows, layer_threads.CHAINS = copy_rows, chains  # type: ignore[method-assign]
        if name == "half the ring":
            module.divided = kept
    jax.clear_caches()


if __name__ == "__main__":
    main()
