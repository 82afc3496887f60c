"""Models larger than the device: layers in host memory and on disk, each figure beside its limit of the same run.

    export XLA_PYTHON_CLIENT_MEM_FRACTION=.95
    python benchmarks/offload.py host largest --out benchmarks/results/offload_host_h200.json --seconds 110
    python benchmarks/offload.py kv --out benchmarks/results/offload_kv_h200.json --seconds 150
    python benchmarks/offload.py disk --folder /tmp --out benchmarks/results/offload_disk_h200.json --seconds 180

``host``: OPT-13B's shape, batch 64, prompts of 512 tokens; decode steps at bfloat16, int8 and int4, and prefill.
``two``: the same on one device and on two, see ``offload_two.py``.
``largest``: the same with as many sequences as fit. ``kv``: a device of 16 GB, with the KV cache on it, and in host
memory. ``disk``: a model of 40 GB that is made there, through a device of 1.6 GB, three times: through the page cache,
past it, and resident, for its tokens. Weights are random; in host memory every layer has the same ones, in a place of
its own. Limits: transfers of a layer's parameters alone, one after the other; products of large matrices; O_DIRECT
reads by one thread, four and eight. Each figure is printed and the file written as soon as it is there, and nothing is
begun for which the seconds that are left are too few. ``--rehearse`` runs tiny models on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import machine
import numpy as np
import offload_two
import shapes
from jax.sharding import Mesh
from offload_memory import Arena, same_layers

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.bench import measure_limits
from jaxinfer.checkpoints import convert as conversion
from jaxinfer.checkpoints.manifest import WEIGHTS
from jaxinfer.paging import host_cache, start, tiers
from jaxinfer.paging.link import Link
from jaxinfer.paging.memory import HostBuffer
from jaxinfer.paging.timeline import Timeline
from jaxinfer.pretrained import Pretrained
from sharding import TensorLimits, make_mesh

PROMPT, BATCH, STEPS = 512, 64, 8
HOST_MEMORY = 112 << 30  # of 128 GiB; a virtual machine may show less as free, and get more when it asks


class Bench:
    """Measures, and writes the file after each figure."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.rehearse = given, given.rehearse
        self.end = time.perf_counter() + given.seconds
        self.found: dict[str, Any] = {"machine": machine.describe(), "rehearsal": self.rehearse, "parts": given.parts}
        self.root = Path(tempfile.mkdtemp())
        self.mesh = make_mesh({"tensor": 1}, TensorLimits(heads=1, kv_heads=1, intermediate=1))
        self.arena = Arena((4 if self.rehearse else 2048) << 20)
        self.tokens: list[list[int]] | None = None  # of the resident engine
        self.prompt, self.batch, self.steps = (16, 4, 3) if self.rehearse else (PROMPT, BATCH, STEPS)

    def note(self, name: str, value: Any) -> None:
        """Keep a figure."""
        self.found[name] = value
        left = f"{self.end - time.perf_counter():.0f} s left"
        print(name, json.dumps(value), left, flush=True)
        if self.given.out is not None:
            self.given.out.write_text(json.dumps(self.found, indent=1))

    def late(self, what: str, seconds: float) -> bool:
        """Whether there is no time for more."""
        late = not self.rehearse and time.perf_counter() + seconds > self.end
        if late:
            self.note(f"{what}_left_out", f"would take {seconds:.0f} s")
        return late

    def limits(self) -> None:
        """The device's own rates."""
        if "limits" not in self.found:
            self.note("limits", dataclasses.asdict(measure_limits()))

    def link(self, packing: Any, mesh: Mesh | None = None) -> float:
        """Bytes per second to each device of a layer's transfers alone, a dozen in a row from two buffers."""
        mesh = mesh or self.mesh
        buffers = [HostBuffer(packing.nbytes * packing.parts, mesh.devices.flat[0]) for _ in range(2)]
        for buffer in buffers:
            buffer.array.fill(1)
        link, rates = Link(mesh, Timeline()), []
        for _ in range(3):
            begin = time.perf_counter()
            tickets = []
            for i in range(12):
                if len(tickets) > 1:
                    tickets[-2].landed.wait()
                    tickets[-2].drop()
                tickets.append(link.send(i, packing, np.split(buffers[i % 2].array, packing.parts)))
            tickets[-1].landed.wait()
            rates.append(12 * packing.moved_bytes / (time.perf_counter() - begin))
        link.close()
        del tickets
        for buffer in buffers:
            buffer.close()
        return max(rates)

    def prompts(self, engine: Any, count: int) -> list[list[int]]:
        """Random prompts."""
        rng = np.random.default_rng(0)
        return [rng.integers(3, engine.spec.vocab_size, self.prompt).tolist() for _ in range(count)]

    def run(self, engine: Any, asked: list[list[int]], tokens: int) -> float:
        """Seconds of generating, greedily, the host's work included."""
        begin = time.perf_counter()
        outputs = engine.generate(asked, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
        seconds = time.perf_counter() - begin
        failed = [output.error for output in outputs if output.error is not None]
        if failed:
            raise RuntimeError(f"{len(failed)} requests failed: {failed[0]}")
        self.said = [output.outputs[0].token_ids for output in outputs]
        return seconds

    def timed(self, engine: Any, count: int, steps: int, warm: bool = True) -> dict[str, Any]:
        """Seconds of a prefill of all prompts, and of a decode step after it; the host's work included.

        ``step_ms`` is the time between the ends of two passes, the median; ``wall_step_ms`` what more tokens take.
        """
        asked = self.prompts(engine, count)
        timeline = engine.executor.pager.timeline
        found: dict[str, Any] = {}
        if warm:
            found["first_s"] = self.run(engine, asked, 2)
            found["prefill_s"] = min(self.run(engine, asked, 1) for _ in range(2))
        timeline.clear()
        both = self.run(engine, asked, 1 + steps)
        last = len(engine.executor.pager.packings) - 1
        ends = [event.end for event in timeline.events if event.kind == "compute" and event.layer == last]
        # The first decode step compiles where nothing ran before.
        between = [later - before for before, later in itertools.pairwise(ends)][-(steps - 2) :]
        step = statistics.median(between)
        if warm:
            found["wall_step_ms"] = 1e3 * (both - found["prefill_s"]) / steps
        report = engine.offload_report()
        report.pop("timeline")
        return found | {
            "all_s": both, "slots": engine.plan.tiers.slots, "step_ms": 1e3 * step,
            "steps_ms": [1e3 * seconds for seconds in between], "tokens_per_s": count / step, "report": report,
        }  # fmt: skip

    def host(self) -> None:
        """Layers in host memory."""
        self.limits()
        for weights in self.given.weights:
            if not self.late(f"host_{weights}", 35 if weights == "bfloat16" else 25):
                with self.measured(f"host_{weights}", weights):
                    pass

    def two(self) -> None:
        """The same on one device, and on two of them with a link each."""
        offload_two.measure(self)

    @contextlib.contextmanager
    def measured(self, name: str, weights: str, mesh: Mesh | None = None) -> Iterator[Any]:
        """Link, decode and prefill of OPT-13B with its layers in host memory; then the engine, to measure more with."""
        begin = time.perf_counter()
        quantize = None if weights == "bfloat16" else weights
        with self.paged("opt-13b", mesh, quantize=quantize, max_batch=self.batch) as engine:
            loaded, plan = time.perf_counter() - begin, engine.plan
            rate = self.link(engine.executor.pager.packings[0], mesh)
            limit = 1e3 * plan.tiers.moved_bytes / rate
            # Of each device, while the others' are in use as well.
            self.note(f"{name}_link", {"load_s": loaded, "gb_s": rate / 1e9, "step_limit_ms": limit})
            found = self.timed(engine, self.batch, self.steps)
            flops = plan.prefill_flops(self.batch, self.prompt)  # of each device
            self.note(
                name,
                found
                | {
                    "devices": plan.devices, "load_s": loaded, "moved_bytes": plan.tiers.moved_bytes,
                    "micro_tokens": plan.micro_tokens, "gathering": dataclasses.asdict(plan.tiers.gathering),
                    "link_gb_s": rate / 1e9, "step_limit_ms": limit, "step_share": limit / found["step_ms"],
                    "prefill_limit_s": max(flops / self.found["limits"]["matmul"], limit / 1e3),
                },
            )  # fmt: skip
            yield engine

    def largest(self) -> None:
        """As many sequences as fit."""
        folder = shapes.folder("opt-13b", self.root, tiny=self.rehearse)
        longest = self.prompt + 64
        for quantize, kv_dtype in ((None, "auto"), (None, "int8"), ("int8", "int8")):
            name = f"largest_{quantize or 'bfloat16'}_kv_{kv_dtype}"
            if self.late(name, 35 if kv_dtype == "auto" else 45):
                continue
            count = 8 if self.rehearse else 1024
            for _ in range(2):  # the workspace grows with the slots
                plan = jaxinfer.plan(
                    folder, {"tensor": 1}, offload="host", max_batch=count, max_model_len=longest, quantize=quantize,
                    load_format="dummy", kv_dtype=kv_dtype, host_memory=HOST_MEMORY,
                )  # fmt: skip
                count = min(count, (plan.num_blocks - 1) // -(-longest // 64) // 8 * 8)
            begin = time.perf_counter()
            with self.paged("opt-13b", quantize=quantize, max_batch=count, kv_dtype=kv_dtype) as engine:
                loaded = time.perf_counter() - begin
                rate = self.link(engine.executor.pager.packings[0])
                found = self.timed(engine, count, 6, warm=False)
                limit = 1e3 * engine.plan.tiers.moved_bytes / rate
                self.note(name, found | {"sequences": count, "load_s": loaded, "step_limit_ms": limit})

    def kv(self) -> None:
        """A device of 16 GB: as many sequences as its cache holds, and all of them with the cache in host memory."""
        said: dict[tuple[str, str | None], list[list[int]]] = {}
        for kv_dtype in ("auto", "int8"):  # bfloat16 first: only there it should pay
            for kv_offload in (None, "host"):
                name = f"kv_{kv_dtype}_{kv_offload or 'device'}"
                if self.late(name, 25 if kv_offload is None else 45):  # memory for the cache is registered as well
                    continue
                cap: dict[str, Any] = {} if self.rehearse else {"device_memory": 16 << 30}
                options = {"max_batch": self.batch, "kv_dtype": kv_dtype, "kv_offload": kv_offload} | cap
                begin = time.perf_counter()
                with self.paged("opt-13b", **options) as engine:
                    loaded, plan = time.perf_counter() - begin, engine.plan
                    rate = self.link(engine.executor.pager.packings[0])
                    count = min(self.batch, (plan.num_blocks - 1) // plan.longest_blocks)
                    found = self.timed(engine, count, 6, warm=False)
                    # Of the sequences that are there, with the tokens that they have in the last steps.
                    kv = count * -(-(self.prompt + 6) // 64) * plan.block_bytes_per_device
                    moved = plan.tiers.moved_bytes + (kv if kv_offload else 0)
                    about = {"sequences": count, "load_s": loaded, "kv_bytes": kv, "rows": plan.tiers.kv_rows}
                    limit = 1e3 * moved / rate
                    about |= {"step_limit_ms": limit, "step_share": limit / found["step_ms"]}
                    said[kv_dtype, kv_offload] = self.said
                    if kv_offload and (kv_dtype, None) in said:
                        # Other products compute other numbers of rows: in bfloat16, near ties may fall otherwise.
                        pairs = list(zip(self.said, said[kv_dtype, None], strict=False))
                        about["same_first_token"] = sum(one[0] == other[0] for one, other in pairs) / len(pairs)
                        about["same_tokens"] = sum(one == other for one, other in pairs) / len(pairs)
                    self.note(name, found | about)

    def disk(self) -> None:
        """A store that is made here, 25 times as large as what may be used of the device."""
        parent = self.given.folder or self.root
        store = parent / "llama-115-layers"
        folder = shapes.folder("llama-115-layers", self.root, tiny=self.rehearse)
        self.note("disk_space", dict(zip(("total", "used", "free"), shutil.disk_usage(parent), strict=True)))
        begin = time.perf_counter()

        def said(done: int, of: int) -> None:
            left, needed = self.end - time.perf_counter(), (time.perf_counter() - begin) / done * (of - done)
            print(f"made {done} of {of} groups, {needed:.0f} s to go, {left:.0f} s left", flush=True)
            if needed > left and not self.rehearse:
                raise SystemExit("no time to make the store")

        make_store(folder, store, said)
        seconds = time.perf_counter() - begin
        size = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
        self.note("store", {"bytes": size, "made_in_s": seconds, "gb_s": size / 1e9 / seconds})
        files = sorted((store / WEIGHTS).rglob("d/*"), key=lambda path: -path.stat().st_size)[:16]

        def direct(when: str) -> float:
            rates = {count: direct_rate(files, count) / 1e9 for count in (1, 4, 8)}
            self.note(f"o_direct_gb_s_{when}", rates)
            return max(rates.values())

        best = direct("before")
        shape = {"max_batch": 4, "max_model_len": 128}  # four sequences, in blocks that fit beside two layers
        cap = size // 25
        asked = None
        for mode in ("page cache", "direct"):
            if mode == "direct" and asked is not None:
                self.resident(store, asked, shape, size)
                best = direct("before_first")
            each = size / 1e9 / (best if mode == "direct" else 3.0)
            if self.late(f"disk_{mode.replace(' ', '_')}", 15 + each * (1 if mode == "direct" else 2)):
                continue
            options: dict[str, Any] = {} if self.rehearse else {"device_memory": cap}
            free = start.available
            start.available = (lambda: 0) if mode == "direct" else (lambda: 1 << 50)
            try:
                engine = jaxinfer.init_inference(
                    store, {"tensor": 1}, progress=False, offload="disk", host_memory=HOST_MEMORY, **shape, **options,
                )  # fmt: skip
            finally:
                start.available = free
            with engine:
                asked = [ids[:64] for ids in self.prompts(engine, 4)]
                timeline = engine.executor.pager.timeline
                for which in ("first", "second"):  # the first verifies every byte
                    name = f"disk_{mode.replace(' ', '_')}_{which}"
                    if which == "second" and self.late(name, 12 + each):
                        continue
                    before, began = timeline.nbytes["disk"], time.perf_counter()
                    self.run(engine, asked, 1 if mode == "direct" else 2)
                    seconds, read = time.perf_counter() - began, timeline.nbytes["disk"] - before
                    report = engine.offload_report()
                    report.pop("timeline")
                    # The disk's rate moves: beside each pass stands what it gave before and after.
                    beside = [best] if mode != "direct" else [best, best := direct(f"after_{which}")]
                    self.note(
                        name,
                        {
                            "seconds": seconds, "read_bytes": read, "read_gb_s": read / 1e9 / seconds,
                            "share_of_o_direct": len(beside) * read / 1e9 / seconds / sum(beside),
                            "o_direct_gb_s_beside": beside, "model_over_cap": size / cap,
                            "planned_bytes": engine.plan.total_bytes_per_device, "cap_bytes": cap,
                            "slots": engine.plan.tiers.slots, "report": report, "tokens": self.said,
                            "agrees": self.tokens and self.said == [ids[: len(self.said[0])] for ids in self.tokens],
                        },
                    )  # fmt: skip

    def resident(self, store: Path, asked: list[list[int]], shape: dict[str, int], size: int) -> None:
        """The tokens of the engine that holds the whole store on the device."""
        if self.late("disk_resident", 10 + size / 3e9):
            return
        with jaxinfer.init_inference(store, {"tensor": 1}, progress=False, **shape) as engine:  # type: ignore[arg-type]
            self.run(engine, asked, 2)
            self.tokens, paged = self.said, self.found.get("disk_page_cache_second", {}).get("tokens", [])
            apart = []
            for ids, here, there in zip(asked, self.tokens, paged, strict=False):
                at = next((at for at, (one, other) in enumerate(zip(here, there, strict=False)) if one != other), None)
                if at is not None:  # by how much this engine prefers its own token
                    pair = engine.score([[*ids, *here[:at], said[at]] for said in (here, there)])
                    apart.append(
                        {"at": at, "tokens": [here[at], there[at]], "logprobs": [one.logprobs[-1] for one in pair]}
                    )
        self.note("disk_resident", {"tokens": self.tokens, "page_cache_agrees": paged == self.tokens, "apart": apart})

    @contextlib.contextmanager
    def paged(self, model: str, mesh: Mesh | None = None, **options: Any) -> Iterator[Any]:
        """A paged engine of a model with random weights, in memory that the next one gets again."""
        folder = shapes.folder(model, self.root, tiny=self.rehearse)
        own = start.HostBuffer
        self.arena.begin()
        start.HostBuffer, host_cache.HostBuffer = self.arena.buffer, self.arena.empty
        try:
            with same_layers(self.arena):
                engine = jaxinfer.init_inference(
                    folder, mesh or self.mesh, offload="host", load_format="dummy", progress=False,
                    max_model_len=self.prompt + 64, host_memory=HOST_MEMORY, **options,
                )  # fmt: skip
        finally:
            start.HostBuffer = host_cache.HostBuffer = own
        with engine:
            yield engine
        del engine
        gc.collect()


def make_store(folder: Path, place: Path, said: Callable[[int, int], None], threads: int = 4) -> None:
    """Write a store of random weights, without a checkpoint that it would be converted from; several groups at once."""
    if place.exists():
        return
    tile = (0.02 * np.random.default_rng(0).standard_normal(1 << 20, np.float32)).astype(conversion.DTYPES["bfloat16"])

    class Made(conversion._Conversion):
        """A conversion from nothing."""

        def _origin(self) -> dict[str, Any]:
            return {"version": 1, "made": True}

        def _stored(self, path: str) -> np.dtype:
            return conversion.DTYPES["bfloat16"]

        def _array(self, path: str, dtype: np.dtype) -> np.ndarray:
            shape = self.parameters[path].shape
            if path.endswith("norm.scale") or ".norms." in path:
                return np.ones(shape, dtype)
            # Layers that differ, or the tokens would not tell that one had stood in for another.
            return np.resize(np.roll(tile, zlib.crc32(path.encode())), shape)

        def write_all(self) -> None:
            """Write every group; :meth:`run` finds them there."""
            (self.store / WEIGHTS).mkdir(parents=True, exist_ok=True)
            self.notes.mkdir(exist_ok=True)
            self._check_space({})
            with ThreadPoolExecutor(threads) as pool:
                for done, _ in enumerate(pool.map(self._write, self.groups), 1):
                    if not done % 10:
                        said(done, len(self.groups))

    with Pretrained(folder, "dummy") as pretrained:
        made = Made(pretrained, None, {}, place, "bfloat16", None)  # type: ignore[arg-type]
        with made.opened() as finished:
            if not finished:
                made.write_all()
                made.run(False)
        shutil.rmtree(made.folder)


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
    parser.add_argument("parts", nargs="+", choices=("host", "two", "largest", "kv", "disk"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where the store is made, on the disk that is measured")
    parser.add_argument("--seconds", type=float, default=540.0, help="nothing is begun that would end later")
    parser.add_argument("--micro-tokens", type=int, help="most prompt tokens that a layer computes at a time")
    parser.add_argument("--slots", type=int, help="paged layers that the device holds at once")
    parser.add_argument("--weights", nargs="+", default=["bfloat16", "int8", "int4"], help="of `host` and `two`")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, on a CPU")
    bench = Bench(parser.parse_args())
    if bench.given.micro_tokens:
        tiers.MICRO_TOKENS = bench.given.micro_tokens
    if bench.given.slots:
        tiers.DEVICE_SLOTS = tiers.ROOMY_SLOTS = bench.given.slots
    for part in bench.given.parts:
        getattr(bench, part)()
