"""Compile whole steps of the executor for the GPU that tests/aot.py describes, and say which kernels are in them.

Compiling happens in a process of its own, as in tests/aot.py::

    python -m tests.steps [CASE ...]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests import aot

MARK = "compiled step:"
_7B = {
    "norm": "rms", "gated_mlp": True, "hidden": 4096, "intermediate": 11008, "heads": 32, "kv_heads": 32,
    "head_dim": 128,
}  # fmt: skip
# changes of the spec, options of the plan, tokens of context
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "llama": ({"norm": "rms", "gated_mlp": True}, {}, 512),
    "llama, float16, long": ({"norm": "rms", "gated_mlp": True, "context": 8192}, {"dtype": "float16"}, 8192),
    "llama, heads of 128": ({"norm": "rms", "gated_mlp": True, "head_dim": 128}, {}, 512),
    "llama, heads of 128, int8 weights": (
        {"norm": "rms", "gated_mlp": True, "head_dim": 128}, {"quantize": "int8"}, 512,
    ),
    "llama, fp8 weights": ({"norm": "rms", "gated_mlp": True}, {"quantize": "fp8"}, 512),
    "heads of 128, prefill": ({"norm": "rms", "gated_mlp": True, "head_dim": 128}, {}, 512),
    "llama, float32": ({"norm": "rms", "gated_mlp": True}, {"dtype": "float32"}, 512),
    "llama, prefill": ({"norm": "rms", "gated_mlp": True}, {}, 512),
    "llama, prefill in two programs": ({"norm": "rms", "gated_mlp": True, "count": 16}, {}, 512),
    "llama, packed prefill": ({"norm": "rms", "gated_mlp": True}, {}, 512),
    "gemma, prefill": (
        {"norm": "rms", "gated_mlp": True, "residual": "sandwich", "softcap": 50.0, "window": 100}, {}, 512,
    ),
    "falcon, prefill": ({"residual": "parallel", "kv_heads": 1, "activation": "gelu", "alibi": True}, {}, 512),
    "gpt2, prefill": (
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu_tanh", "kv_heads": 8,
         "rotary": False}, {}, 512,
    ),
    "float32, prefill": ({"norm": "rms", "gated_mlp": True}, {"dtype": "float32"}, 512),
    "int8 cache, prefill": ({"norm": "rms", "gated_mlp": True}, {"kv_dtype": "int8"}, 512),
    "gpt2": (
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu_tanh", "kv_heads": 8,
         "rotary": False}, {}, 512,
    ),
    "gemma": ({"norm": "rms", "gated_mlp": True, "residual": "sandwich", "softcap": 50.0, "window": 100}, {}, 512),
    "falcon": ({"residual": "parallel", "kv_heads": 1, "activation": "gelu", "alibi": True, "rotary": False}, {}, 512),
    "odd heads": ({"head_dim": 72}, {}, 512),
    "llama, int8 weights and cache": (
        {"norm": "rms", "gated_mlp": True}, {"quantize": "int8", "kv_dtype": "int8"}, 512,
    ),
    "llama, int4 weights, fp8 cache": (
        {"norm": "rms", "gated_mlp": True}, {"quantize": "int4", "kv_dtype": "fp8"}, 512,
    ),
    "whole, llama": ({"norm": "rms", "gated_mlp": True}, {"max_batch": 1, "quantize": "int8"}, 512),
    "whole, llama, two rows, int4 weights": (
        {"norm": "rms", "gated_mlp": True}, {"max_batch": 2, "quantize": "int4"}, 512,
    ),
    "whole, gpt2": (
        {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu_tanh", "rotary": False},
        {"max_batch": 1, "dtype": "float16", "quantize": "int8"}, 512,
    ),
    "whole, 64 layers": ({"norm": "rms", "gated_mlp": True, "count": 64}, {"max_batch": 1, "quantize": "int8"}, 512),
    "whole, llama, bfloat16": ({"norm": "rms", "gated_mlp": True}, {"max_batch": 1}, 512),
    "whole, 7B": (_7B, {"max_batch": 1}, 512),
    "whole, 7B, int8 weights": (_7B, {"max_batch": 1, "quantize": "int8"}, 512),
    "whole, 7B, int4 weights": (_7B, {"max_batch": 1, "quantize": "int4"}, 512),
    "one row, gemma": (
        {"norm": "rms", "gated_mlp": True, "residual": "sandwich", "softcap": 50.0, "window": 100}, {"max_batch": 1},
        512,
    ),
    "one row, int8 cache": ({"norm": "rms", "gated_mlp": True}, {"max_batch": 1, "kv_dtype": "int8"}, 512),
}  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A compiled step: how often each kernel of ours is in its HLO, bytes of memory, caches and the least weight."""

    kernels: dict[str, int]
    aliased: int
    temporary: int
    caches: int
    weight: int


def compile_steps(names: Sequence[str], timeout: float = 280) -> dict[str, Step]:
    """Compile the named cases in a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "tests.steps", *names],
        cwd=aot.ROOT, env=aot.environment(), capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    lines = [json.loads(line.removeprefix(MARK)) for line in ran.stdout.splitlines() if line.startswith(MARK)]
    found = {name: Step(**step) for name, step in lines}
    if lost := [name for name in names if name not in found]:
        raise RuntimeError(f"{lost} were not compiled:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    return found


def build(name: str) -> Any:
    """The compiled programs of a case's step, and the bytes of its caches and of the smallest weight of a layer."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from jaxinfer import hardware
    from jaxinfer.executor import Executor
    from jaxinfer.generation.sampling import SamplerFeatures, pack
    from jaxinfer.models.positions import alibi_slopes, rotary
    from jaxinfer.models.spec import Alibi, LayerSpec, ModelSpec, Norm
    from jaxinfer.plan import make_plan
    from jaxinfer.steps import DecodeInputs, PrefillInputs, PromptWish
    from sharding import AXES

    changes, options, context = CASES[name]
    changes = dict(changes)
    kind, longest, dim = changes.pop("norm", "layer"), changes.pop("context", 1024), changes.get("head_dim", 64)
    turned = rotary({"rope_theta": 1e4}, dim, longest) if changes.pop("rotary", True) else None
    layer = LayerSpec(scale=dim**-0.5, rotary=turned, window=changes.pop("window", None))
    if changes.pop("alibi", False):
        changes["alibi"] = Alibi(slopes=alibi_slopes(8))
    fields = {
        "family": name, "vocab_size": 512, "hidden": 256, "intermediate": 768, "heads": 8, "kv_heads": 2,
        "head_dim": 64, "context_length": longest, "layers": (layer,) * changes.pop("count", 2),
        "norm": Norm(kind=kind, eps=1e-5, bias=kind == "layer"),
    }  # fmt: skip
    spec = ModelSpec(**fields | changes)
    mesh = Mesh(np.array(aot.described()).reshape(1, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 4)
    plan = make_plan(
        spec, dict(mesh.shape), hardware=hardware.named("H200"),
        **{"dtype": "bfloat16", "max_batch": 4, "decode_chunk": 8} | options,
    )  # fmt: skip

    class Unallocated(Executor):
        """Compiles its steps for devices that are not here."""

        def _allocate(self) -> Any:
            cache = tuple(
                jax.ShapeDtypeStruct(shape, dtype, sharding=self._sharding(spec))
                for (shape, dtype), spec in zip(plan.cache_arrays, self._cache_specs, strict=True)
            )
            last = jax.ShapeDtypeStruct((self.batch,), jnp.int32, sharding=self._sharding(self._rows))
            return [cache] * plan.spec.num_layers, last

    placements = Executor.placements(plan, mesh)
    leaves = {
        path: jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=placements[path])
        for path, info in plan.parameters.items()
    }
    executor = Unallocated(plan, mesh, leaves)
    rows, width = pack([None] * executor.batch), context // 64
    zeros = np.zeros(executor.batch, np.int32)
    tables = np.zeros((executor.batch, width), np.int32)
    if "packed" in name:
        tokens, pieces = np.zeros((1, 256), np.int32), np.zeros((executor.batch, 128), np.int32)
        inputs: Any = PrefillInputs(tokens, tokens, tables, zeros, zeros, zeros, rows, pieces=pieces)
    elif "prefill" in name:
        tokens = np.zeros((executor.batch, 256), np.int32)
        inputs = PrefillInputs(tokens, tokens, tables, zeros, zeros, zeros, rows)
    else:
        inputs = DecodeInputs(np.arange(executor.batch, dtype=np.int32), zeros, zeros, zeros, tables, rows)
    if isinstance(inputs, PrefillInputs):
        layout = executor._layout(inputs)
        programs = executor._prefill_programs(inputs, layout, SamplerFeatures(), PromptWish(), None)
    else:
        programs = [executor._decode_program(inputs, SamplerFeatures(), None)]
    weights = (f"layers.0.{name}" for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down"))
    weight = min(plan.parameters[path].nbytes for path in weights)
    return programs, plan.cache_bytes_per_device, weight


def main(names: Sequence[str]) -> None:
    for name in names or CASES:
        programs, *sizes = build(name)
        text, memory = "".join(step.as_text() for step in programs), [step.memory_analysis() for step in programs]
        # The last but one part of an operation's path is the name that its kernel was given.
        calls = re.findall(r'custom_call_target="mosaic_gpu.*?op_name="[^"]*?(\w+)/\w+"', text)
        aliased, temporary = sum(m.alias_size_in_bytes for m in memory), max(m.temp_size_in_bytes for m in memory)
        report = Step(dict(Counter(calls)), aliased, temporary, *sizes)
        print(MARK + json.dumps([name, asdict(report)]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
