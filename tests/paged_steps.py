"""Compile what the paged executor runs, layer by layer, for the GPU that tests/aot.py describes.

Compiling happens in a process of its own::

    python -m tests.paged_steps [CASE ...]
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests import aot

MARK = "compiled layer:"
CASES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantize": "int8", "kv_dtype": "int8"},
    "int4": {"quantize": "int4"},
    "cache in host memory": {"kv_offload": "host"},
    "int8 cache in host memory": {"kv_offload": "host", "quantize": "int8", "kv_dtype": "int8"},
}
TWO: dict[str, dict[str, Any]] = {
    "two devices": {"tensor": 2},
    "int4 on two devices": {"tensor": 2, "quantize": "int4"},
}
TOKENS = 64
COLLECTIVES = re.compile(r" (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


@dataclass(frozen=True)
class Compiled:
    """Of a layer's decode and prefill: kernels of ours, bytes in place, temporary bytes; and a cache's bytes.

    With two devices also prefill with gathered weights and the gathering itself: how often all four communicate; and of
    gathering the bytes of results, of what it takes besides, and of what the plan has for it.
    """

    decode: dict[str, int]
    aliased: tuple[int, int]
    temporary: tuple[int, int]
    layer: int
    cache: int
    sent: list[dict[str, int]]
    gathering: tuple[int, int, int] | None = None


def compile_layers(names: Sequence[str], timeout: float = 280) -> dict[str, Compiled]:
    """Compile the named cases in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.paged_steps", *names],
        cwd=aot.ROOT, env=aot.environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    lines = [json.loads(line.removeprefix(MARK)) for line in ran.stdout.splitlines() if line.startswith(MARK)]
    found = {name: Compiled(**values) for name, values in lines}
    if lost := [name for name in names if name not in found]:
        raise RuntimeError(f"{lost} were not compiled:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    return found


def build(name: str) -> Compiled:
    """Compile a layer of a case."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

    from jaxinfer import hardware
    from jaxinfer.executor import Executor
    from jaxinfer.models.attention import Batch
    from jaxinfer.models.positions import rotary
    from jaxinfer.models.spec import LayerSpec, ModelSpec, Norm
    from jaxinfer.paging.executor import PagedExecutor
    from jaxinfer.paging.tiers import layer_packings
    from jaxinfer.plan import make_plan
    from sharding import AXES

    layer = LayerSpec(scale=128**-0.5, rotary=rotary({"rope_theta": 1e4}, 128, 1024), window=None)
    spec = ModelSpec(
        family=name, vocab_size=512, hidden=1024, intermediate=2048, heads=8, kv_heads=8, head_dim=128,
        context_length=1024, layers=(layer,) * 3, norm=Norm(kind="rms", eps=1e-5, bias=False), gated_mlp=True,
    )  # fmt: skip
    options = dict((CASES | TWO)[name])
    devices = aot.described(options.pop("tensor", 1))
    mesh = Mesh(np.array(devices).reshape(1, 1, 1, -1), AXES, axis_types=(AxisType.Auto,) * 4)
    plan = make_plan(spec, dict(mesh.shape), "bfloat16", hardware.named("H200"), max_batch=4, offload="host", **options)
    packings = layer_packings(plan.parameters, spec.num_layers, plan.rules, plan.mesh)

    class Nowhere:
        """A pager of which only the layout is asked, or a cache of which only that it is there."""

        def __init__(self) -> None:
            self.packings = packings

        def close(self) -> None:
            pass

    class Unallocated(PagedExecutor):
        """Compiles for devices that are not here."""

        def _allocate(self) -> Any:
            blocks = plan.num_blocks
            if plan.tiers.kv_rows is not None:
                self.kv, blocks = Nowhere(), plan.tiers.kv_rows * plan.longest_blocks  # type: ignore[assignment]
            cache = tuple(
                jax.ShapeDtypeStruct((blocks, *shape[1:]), dtype, sharding=self._sharding(spec))
                for (shape, dtype), spec in zip(plan.cache_arrays, self._cache_specs, strict=True)
            )
            return [cache] * plan.spec.num_layers, jax.ShapeDtypeStruct((self.batch,), jnp.int32)

    def shaped(shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    placements = Executor.placements(plan, mesh)
    leaves = {path: shaped(info.shape, info.dtype, placements[path]) for path, info in plan.parameters.items()}
    executor = Unallocated(plan, mesh, leaves, Nowhere())  # type: ignore[arg-type]
    assert len(set(executor._kinds)) == 1
    segments = [shaped(one.shape, one.dtype, NamedSharding(mesh, one.spec)) for one in packings[0].segments]
    rows = executor._sharding(executor._rows)
    steps = []
    for tokens in (1, TOKENS):
        hidden = shaped((4, tokens, spec.hidden), jnp.bfloat16, rows)
        numbers = shaped((4, tokens), jnp.int32, rows)
        batch = Batch(numbers, numbers, shaped((4, 8), jnp.int32, rows))
        steps.append(executor._layer(0, ("layer", tokens), segments, executor.caches[0], hidden, batch, name))
    gathering = None
    if len(devices) > 1:
        gather = executor._gather_step(0, segments)
        whole = [shaped(one.shape, one.dtype, executor._sharding(PartitionSpec())) for one in gather.out_info]
        batch = dataclasses.replace(batch, gathered=True)
        hidden = shaped((4, TOKENS, spec.hidden), jnp.bfloat16, executor._sharding(executor._hidden_spec(True)))
        steps += [executor._layer(0, ("gathered",), whole, executor.caches[0], hidden, batch, name), gather]
        found = gather.memory_analysis()
        assert plan.tiers is not None
        gathering = found.output_size_in_bytes, found.temp_size_in_bytes, plan.tiers.gathering.nbytes
    calls = re.findall(r'custom_call_target="mosaic_gpu.*?op_name="[^"]*?(\w+)/\w+"', steps[0].as_text())
    memory = [step.memory_analysis() for step in steps]
    return Compiled(
        dict(Counter(calls)),
        (memory[0].alias_size_in_bytes, memory[1].alias_size_in_bytes),
        (memory[0].temp_size_in_bytes, memory[1].temp_size_in_bytes),
        packings[0].moved_bytes,
        sum(math.prod(array.shape) * array.dtype.itemsize for array in executor.caches[0]) // len(devices),
        [dict(Counter(COLLECTIVES.findall(step.as_text()))) for step in steps],
        gathering,
    )


if __name__ == "__main__":
    for case in sys.argv[1:] or CASES | TWO:
        print(MARK + json.dumps([case, asdict(build(case))]), flush=True)
