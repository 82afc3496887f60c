"""Models larger than the device: layers in host memory and on disk, each figure beside its limit of the same run.

    python benchmarks/offload.py host --out benchmarks/results/offload_host_h200.json       # about 4 minutes
    python benchmarks/offload.py largest --out benchmarks/results/offload_largest_h200.json # about 2 minutes
    python benchmarks/offload.py disk --folder /tmp/store --out benchmarks/results/offload_disk_h200.json # 8 minutes

``host``: OPT-13B's shape, batch 64, prompts of 512 tokens; decode steps at bfloat16, int8 and int4, and prefill.
``largest``: the same with as many sequences as fit. ``disk``: a model of 40 GB that is made there, through a device of
1.6 GB, twice: past the page cache, and through it. Weights are random; every layer has the same ones, in memory of its
own. Limits: transfers of a layer's parameters alone, one after the other; products of large matrices; O_DIRECT reads
by one thread and by eight. ``--rehearse`` runs tiny models on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np
import shapes

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.bench import measure_limits
from jaxinfer.checkpoints import convert as conversion
from jaxinfer.checkpoints.manifest import WEIGHTS
from jaxinfer.paging import start, tiers
from jaxinfer.paging.link import Link
from jaxinfer.paging.memory import HostBuffer
from jaxinfer.paging.timeline import Timeline
from jaxinfer.pretrained import Pretrained
from sharding import TensorLimits, make_mesh

PROMPT, BATCH, STEPS = 512, 64, 8
PIECE = 32 << 20


class Bench:
    """Measures, and writes the file after each figure."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.rehearse = given, given.rehearse
        self.end = time.perf_counter() + given.budget
        self.found: dict[str, Any] = {"machine": machine.describe(), "rehearsal": self.rehearse, "part": given.part}
        self.root = Path(tempfile.mkdtemp())
        self.mesh = make_mesh({"tensor": 1}, TensorLimits(heads=1, kv_heads=1, intermediate=1))
        self.prompt, self.batch, self.steps = (16, 4, 3) if self.rehearse else (PROMPT, BATCH, STEPS)

    def note(self, name: str, value: Any) -> None:
        """Keep a figure."""
        self.found[name] = value
        print(name, json.dumps(value), flush=True)
        if self.given.out is not None:
            self.given.out.write_text(json.dumps(self.found, indent=1))

    def late(self, what: str, seconds: float) -> bool:
        """Whether there is no time for more."""
        late = not self.rehearse and time.perf_counter() + seconds > self.end
        if late:
            self.note(f"{what}_left_out", "no time")
        return late

    def limits(self) -> None:
        """The device's own rates."""
        self.note("limits", dataclasses.asdict(measure_limits()))

    def link(self, packing: Any) -> float:
        """Bytes per second of a layer's transfers, four in a row from two buffers, with nothing beside them."""
        device = self.mesh.devices.flat[0]
        buffers = [HostBuffer(packing.nbytes, device) for _ in range(2)]
        for buffer in buffers:
            buffer.array.fill(1)
        link, rates = Link(self.mesh, Timeline()), []
        for _ in range(3):
            begin = time.perf_counter()
            tickets = []
            for i in range(4):
                if len(tickets) > 1:
                    tickets[-2].landed.wait()
                    tickets[-2].drop()
                tickets.append(link.send(i, packing, [buffers[i % 2].array]))
            tickets[-1].landed.wait()
            rates.append(4 * packing.moved_bytes / (time.perf_counter() - begin))
        link.close()
        del tickets
        for buffer in buffers:
            buffer.close()
        return max(rates)

    def prompts(self, engine: Any, count: int) -> list[list[int]]:
        """Random prompts."""
        rng = np.random.default_rng(0)
        return [rng.integers(3, engine.spec.vocab_size, self.prompt).tolist() for _ in range(count)]

    def timed(self, engine: Any, count: int, steps: int, warm: bool = True) -> dict[str, Any]:
        """Seconds of a prefill of all prompts, and of a decode step after it; the host's work included."""
        asked = self.prompts(engine, count)

        def run(tokens: int) -> float:
            begin = time.perf_counter()
            engine.generate(asked, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
            return time.perf_counter() - begin

        compiling = run(2) if warm else None
        prefill = min(run(1), run(1)) if warm else run(1)
        engine.executor.pager.timeline.clear()
        both = run(1 + steps)
        report = engine.offload_report()
        report.pop("timeline")
        step = (both - prefill) / steps
        return {
            "first_s": compiling, "prefill_s": prefill, "step_ms": 1e3 * step, "tokens_per_s": count / step,
            "report": report,
        }  # fmt: skip

    def host(self) -> None:
        """Layers in host memory."""
        self.limits()
        for quantize in (None, "int8", "int4"):
            if self.late(str(quantize), 60):
                continue
            begin = time.perf_counter()
            with same_layers(), self.engine("opt-13b", quantize=quantize, max_batch=self.batch) as engine:
                loaded = time.perf_counter() - begin
                rate = self.link(engine.executor.pager.packings[0])
                moved = engine.plan.tiers.moved_bytes
                found = self.timed(engine, self.batch, self.steps)
                limit = 1e3 * moved / rate
                flops = engine.plan.prefill_flops(self.batch, self.prompt)
                self.note(
                    f"host_{quantize or 'bfloat16'}",
                    found
                    | {
                        "load_s": loaded, "moved_bytes": moved, "micro_tokens": engine.plan.micro_tokens,
                        "link_gb_s": rate / 1e9, "step_limit_ms": limit, "step_share": limit / found["step_ms"],
                        "prefill_limit_s": max(flops / self.found["limits"]["matmul"], limit / 1e3),
                    },
                )  # fmt: skip
            gc.collect()

    def largest(self) -> None:
        """As many sequences as fit."""
        for kv_dtype in ("auto", "int8"):
            if self.late(kv_dtype, 90):
                continue
            longest = self.prompt + 64
            count = self.batch
            folder = shapes.folder("opt-13b", self.root, tiny=self.rehearse)
            while count < (8 if self.rehearse else 1024):
                plan = jaxinfer.plan(
                    folder, {"tensor": 1}, offload="host", max_batch=count + 8, max_model_len=longest,
                    load_format="dummy", kv_dtype=kv_dtype,
                )  # fmt: skip
                if plan.num_blocks - 1 < (count + 8) * -(-longest // 64):
                    break
                count += 8
            with same_layers(), self.engine("opt-13b", max_batch=count, kv_dtype=kv_dtype) as engine:
                rate = self.link(engine.executor.pager.packings[0])
                found = self.timed(engine, count, 4)
                limit = 1e3 * engine.plan.tiers.moved_bytes / rate
                self.note(f"largest_kv_{kv_dtype}", found | {"sequences": count, "step_limit_ms": limit})
            gc.collect()

    def disk(self) -> None:
        """A store that is made here, 25 times as large as what may be used of the device."""
        store = (self.given.folder or self.root) / "llama-100-layers"
        begin = time.perf_counter()
        make_store(shapes.folder("llama-100-layers", self.root, tiny=self.rehearse), store)
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        self.note("store", {"bytes": size, "made_in_s": time.perf_counter() - begin})
        files = sorted((store / WEIGHTS).rglob("d/*"), key=lambda path: -path.stat().st_size)[:16]
        rates = {count: direct_rate(files, count) / 1e9 for count in (1, 4, 8)}
        self.note("o_direct_gb_s", rates)
        cap = size // 25
        options = {"offload": "disk", "device_memory": cap, "max_batch": 16, "max_model_len": 256}
        for mode in ("direct", "page cache"):
            if self.late(mode, 3 * size / 1e9 / max(rates.values())):
                continue
            free = start.available
            if mode == "direct":
                start.available = lambda: 0  # as if the host's memory could not hold the layers
            try:
                engine = jaxinfer.init_inference(
                    store, {"tensor": 1}, progress=False, **options | ({"device_memory": None} if self.rehearse else {})
                )
            finally:
                start.available = free
            with engine:
                asked = self.prompts(engine, 4)
                asked = [ids[:64] for ids in asked]
                times = []
                for tokens in (1, 2):  # the first verifies every byte
                    begin = time.perf_counter()
                    said = engine.generate(asked, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
                    times.append(time.perf_counter() - begin)
                report = engine.offload_report()
                report.pop("timeline")
                step = times[1] / 2
                read = engine.plan.tiers.disk_bytes
                self.note(
                    f"disk_{mode.replace(' ', '_')}",
                    {
                        "first_pass_s": times[0], "pass_s": step, "read_gb_s": read / 1e9 / step,
                        "share_of_o_direct": read / 1e9 / step / max(rates.values()), "model_over_cap": size / cap,
                        "planned_bytes": engine.plan.total_bytes_per_device, "cap_bytes": cap, "report": report,
                        "tokens": [output.outputs[0].token_ids for output in said],
                    },
                )  # fmt: skip
            gc.collect()

    def engine(self, model: str, **options: Any) -> Any:
        """A paged engine of a model with random weights."""
        folder = shapes.folder(model, self.root, tiny=self.rehearse)
        options |= {"max_model_len": self.prompt + 64}
        return jaxinfer.init_inference(
            folder, {"tensor": 1}, offload="host", load_format="dummy", progress=False, **options
        )


@contextlib.contextmanager
def same_layers() -> Iterator[None]:
    """Draw one layer, and copy it for the others: the processor draws slowly."""
    fill, drawn = start._Filler.fill, {}

    def faster(self: Any, layer: int, packing: Any, parts: list[np.ndarray]) -> None:
        if packing not in drawn:
            fill(self, layer, packing, parts)
            drawn[packing] = parts
            return
        jobs = [
            (target[at : at + PIECE], source[at : at + PIECE])
            for target, source in zip(parts, drawn[packing], strict=True)
            for at in range(0, len(target), PIECE)
        ]
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda job: np.copyto(*job), jobs))

    start._Filler.fill = faster
    try:
        yield
    finally:
        start._Filler.fill = fill


def make_store(folder: Path, place: Path) -> None:
    """Write a store of random weights, without a checkpoint that it would be converted from."""
    if place.exists():
        return

    class Made(conversion._Conversion):
        """A conversion from nothing."""

        def _origin(self) -> dict[str, Any]:
            return {"version": 1, "made": True}

        def _stored(self, path: str) -> np.dtype:
            return conversion.DTYPES["bfloat16"]

        def _array(self, path: str, dtype: np.dtype) -> np.ndarray:
            shape = self.parameters[path].shape
            rng = np.random.default_rng(len(path))
            tile = (0.02 * rng.standard_normal(1 << 20, np.float32)).astype(dtype)
            whole = np.resize(tile, shape)
            return np.ones_like(whole) if path.endswith("norm.scale") or ".norms." in path else whole

    with Pretrained(folder, "dummy") as pretrained:
        made = Made(pretrained, None, {}, place, "bfloat16", None)  # type: ignore[arg-type]
        with made.opened() as finished:
            if not finished:
                made.run(False)
        conversion.shutil.rmtree(made.folder)


def direct_rate(files: list[Path], threads: int, most: int = 2 << 30) -> float:
    """Bytes per second of O_DIRECT reads by several threads."""
    done, lock = [0], threading.Lock()

    def read(part: int) -> None:
        buffer = HostBuffer(8 << 20, jax.devices("cpu")[0])
        count = 0
        for path in files[part::threads]:
            try:
                handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
            except OSError:
                handle = os.open(path, os.O_RDONLY)
            at = 0
            while count < most // threads and (got := os.preadv(handle, [buffer.array], at)) == len(buffer.array):
                at, count = at + got, count + got
            os.close(handle)
        with lock:
            done[0] += count

    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(threads)))
    return max(done[0], 1) / (time.perf_counter() - begin)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("host", "largest", "disk"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where the store is made, on the disk that is measured")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing new is begun")
    parser.add_argument("--micro-tokens", type=int, help="most prompt tokens that a layer computes at a time")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on a CPU")
    bench = Bench(parser.parse_args())
    if bench.given.micro_tokens:
        tiers.MICRO_TOKENS = bench.given.micro_tokens
    getattr(bench, bench.given.part)()
