"""What host memory and the link give, and whether transfers hide behind compute: run first on a new machine (40 s).

    python benchmarks/paging_probe.py --out benchmarks/results/paging_probe_h200.json

Each figure is written as soon as it is there. ``--rehearse`` runs everything small, on a CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import machine
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.paging.link import Link
from jaxinfer.paging.memory import HostBuffer
from jaxinfer.paging.packing import Packing
from jaxinfer.paging.timeline import Timeline
from sharding import ShardingRules, TensorLimits, make_mesh

MEBI = 1 << 20


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The median of several runs, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Probe:
    """Measures, and writes the file after each figure."""

    def __init__(self, out: Path | None, rehearse: bool, budget: float) -> None:
        self.out, self.rehearse, self.end = out, rehearse, time.perf_counter() + budget
        self.found: dict[str, Any] = {"machine": machine.describe(), "rehearsal": rehearse}
        self.device = jax.local_devices()[0]
        self.mesh: Mesh = make_mesh({"tensor": 1}, TensorLimits(heads=1, kv_heads=1, intermediate=1))

    def note(self, name: str, value: Any) -> None:
        """Keep a figure."""
        self.found[name] = value
        print(name, json.dumps(value), flush=True)
        if self.out is not None:
            self.out.write_text(json.dumps(self.found, indent=1))

    def left(self) -> bool:
        """Whether there is time for more."""
        return time.perf_counter() < self.end

    def register(self, nbytes: int) -> HostBuffer:
        """Touched, registered memory."""
        start = time.perf_counter()
        buffer = HostBuffer(nbytes, self.device)
        registered = time.perf_counter() - start
        start = time.perf_counter()
        buffer.array.fill(1)
        self.note(f"register_{nbytes // MEBI}_mib_s", {"register": registered, "touch": time.perf_counter() - start})
        return buffer

    def sizes(self, buffer: HostBuffer) -> None:
        """One array at a time, waited for; and eight of them in a row, as a layer's parameters travel."""
        rates = {}
        for size in (1, 8, 64, 160, 320, 640, 1024):
            nbytes = size * MEBI
            if nbytes > buffer.array.nbytes:
                break
            view = buffer.array[:nbytes]
            alone = nbytes / seconds(lambda view=view: jax.device_put(view, self.device))
            parts = np.split(view, 8)
            row = nbytes / seconds(lambda parts=parts: jax.device_put(parts, self.device))
            rates[f"{size}_mib"] = {"alone_gb_s": alone / 1e9, "eight_in_a_row_gb_s": row / 1e9}
        self.note("registered_to_device", rates)

    def plain(self, size: int) -> None:
        """Memory that is not registered."""
        values = np.ones(size * MEBI, np.uint8)
        rate = values.nbytes / seconds(lambda: jax.device_put(values, self.device), 2)
        self.note("plain_numpy_gb_s", rate / 1e9)

    def overlap(self, buffer: HostBuffer) -> None:
        """Layers of one array each through two slots, with compute of half, one and two times a transfer's length."""
        nbytes = min(buffer.array.nbytes // 2, 640 * MEBI if not self.rehearse else 4 * MEBI)
        side = 4096 if not self.rehearse else 256
        info = ParameterInfo((nbytes // 2 // 1024, 1024), jnp.dtype(jnp.bfloat16), (None, None))
        packing = Packing.of({"weight": info}, ShardingRules(), dict(self.mesh.shape))
        parts = [[buffer.array[i * packing.nbytes : (i + 1) * packing.nbytes]] for i in range(2)]
        x = jnp.ones((side, side), jnp.bfloat16)

        def body(x: jax.Array, weight: jax.Array, count: int) -> jax.Array:
            x = x + weight[0, 0]
            return jax.lax.fori_loop(0, count, lambda _, x: (x @ x) * jnp.bfloat16(1e-4), x)

        step = jax.jit(body, static_argnums=2)
        weight = jax.device_put(packing.arrays(parts[0][0])[0], self.device)
        link = Link(self.mesh, Timeline())
        transfer = nbytes / 1e9
        once = seconds(lambda: link.send(0, packing, parts[0]).arrays())
        transfer = once
        product = seconds(lambda: step(x, weight, 10)) / 10
        rows = []
        for share in (0.5, 1.0, 2.0):
            count = max(1, round(share * transfer / product))
            compute = seconds(lambda count=count: step(x, weight, count), 3)
            for ahead in (True, False):
                layers = 12
                start = time.perf_counter()
                ticket, y, done = link.send(0, packing, parts[0]), x, []
                for i in range(layers):
                    if len(done) > 1:
                        jax.block_until_ready(done[-1 if ahead else -2])
                    following = link.send(i + 1, packing, parts[(i + 1) % 2]) if ahead else None
                    y = step(y, ticket.arrays()[0], count)
                    done.append(y)
                    ticket = following or link.send(i + 1, packing, parts[(i + 1) % 2])
                jax.block_until_ready(y)
                rows.append(
                    {
                        "compute_ms": 1e3 * compute, "transfer_ms": 1e3 * transfer, "put_first": ahead,
                        "layer_ms": 1e3 * (time.perf_counter() - start) / layers,
                    }
                )  # fmt: skip
        link.close()
        self.note("overlap", rows)

    def outwards(self) -> None:
        """Bytes of a window on their way out, eight after another: by way of page-locked memory, and of numpy's."""
        size = 4 * MEBI if self.rehearse else 42 * MEBI
        make = jax.jit(lambda i: jnp.full(size // 2, i, jnp.bfloat16))
        there = jax.sharding.SingleDeviceSharding(self.device, memory_kind="pinned_host")

        def pinned() -> None:
            for i in range(8):
                np.asarray(jax.device_put(make(i), there))[::4096].sum()

        def plain() -> None:
            for i in range(8):
                array = make(i)
                array.copy_to_host_async()
                np.asarray(array)[::4096].sum()

        rates = {name: 8 * size / seconds(run, 3) / 1e9 for name, run in (("pinned", pinned), ("plain", plain))}
        self.note("window_out_gb_s", rates)

    def four_bits(self) -> None:
        """Values of 4 bits that travel two to a byte are the same on the device."""
        values = np.random.default_rng(0).integers(-8, 8, (64, 128)).astype(ml_dtypes.int4)
        info = ParameterInfo(values.shape, jnp.dtype(jnp.int4), (None, None))
        packing = Packing.of({"weight": info}, ShardingRules(), dict(self.mesh.shape))
        from jaxinfer.paging.packing import two_to_a_byte

        buffer = np.zeros(packing.nbytes, np.uint8)
        two_to_a_byte(values, packing.views(buffer)["weight"])
        arrays = [jax.device_put(array, self.device) for array in packing.arrays(buffer)]
        got = jax.jit(lambda segments: packing.unpack(segments)[0].astype(jnp.int8))(arrays)
        self.note("four_bits_agree", bool(np.array_equal(np.asarray(got), values.astype(np.int8))))

    def host_time(self) -> None:
        """Microseconds of the host for handing over a layer, and for calling a compiled function with its arrays."""
        infos = {
            name: ParameterInfo(shape, jnp.dtype(jnp.bfloat16), (None,) * len(shape))
            for name, shape in {
                "qkv": (1024, 1024), "out": (1024, 1024), "up": (1024, 1024), "down": (1024, 1024),
                **{f"small{i}": (1024,) for i in range(8)},
            }.items()
        }  # fmt: skip
        packing = Packing.of(infos, ShardingRules(), dict(self.mesh.shape))
        buffer = HostBuffer(packing.nbytes, self.device)
        buffer.array.fill(0)
        link = Link(self.mesh, Timeline())
        arrays = link.send(0, packing, [buffer.array]).arrays()
        x = jnp.ones((64, 1024), jnp.bfloat16)

        def body(segments: list[jax.Array], x: jax.Array) -> jax.Array:
            leaves = packing.unpack(segments)
            return x @ leaves[0] + leaves[4]

        step = jax.jit(body).lower(arrays, x).compile()
        step(arrays, x).block_until_ready()
        puts, calls = [], []
        for _ in range(50):
            start = time.perf_counter()
            ticket = link.send(0, packing, [buffer.array])
            puts.append(time.perf_counter() - start)
            ticket.landed.wait()
            start = time.perf_counter()
            y = step(arrays, x)
            calls.append(time.perf_counter() - start)
            y.block_until_ready()
        link.close()
        self.note("host_us", {"send": 1e6 * statistics.median(puts), "call": 1e6 * statistics.median(calls)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--budget", type=float, default=40.0, help="seconds after which nothing new is begun")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, for a CPU")
    given = parser.parse_args()
    probe = Probe(given.out, given.rehearse, given.budget)
    memory = probe.register((16 if given.rehearse else 1300) * MEBI)
    for measure in (
        lambda: probe.sizes(memory), probe.outwards, probe.host_time, lambda: probe.overlap(memory), probe.four_bits,
    ):  # fmt: skip
        if probe.left():
            measure()
    if probe.left():
        probe.plain(4 if given.rehearse else 256)
