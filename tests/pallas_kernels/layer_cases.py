"""Decoder layers of several kinds: operands for the kernel's tests, and cases to compile."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.decoder_layers import LayerOperands, decoder_layers, plan_of
from pallas_kernels.qkv_gemm import slots_of
from pallas_kernels.skinny_gemm import InputNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    lengths: tuple[int, ...] = (150,)
    hidden: int = 256
    groups: int = 2
    per_group: int = 1
    dim: int = 64
    wide: int = 352
    gated: bool = True
    norm: str = "rms"
    biased: bool = False
    activation: str = "silu"
    rotary: bool = True
    window: int | None = None
    weight: str | None = None
    dtype: str = "bfloat16"
    width: int = 4


SMALL = {
    "plain": Case(),
    "four sequences, of different lengths": Case(lengths=(1, 64, 0, 200), per_group=2),
    "layer norms, biases, no rotation": Case(norm="layer", biased=True, gated=False, activation="relu", rotary=False),
    "exact gelu, window": Case(gated=False, activation="gelu", window=37, lengths=(100, 12)),
    "tanh gelu": Case(activation="gelu_tanh", groups=1, per_group=4),
    "int8": Case(weight="int8", hidden=288, lengths=(70, 9)),
    "fp8": Case(weight="fp8", wide=304),
    "int4, groups of 128": Case(weight="int4", wide=384),
    "int4, groups of 64": Case(weight="int4", hidden=192, wide=448, groups=1, per_group=3, lengths=(65, 5)),
    "int4, groups of 64 and of 128": Case(weight="int4", hidden=192, wide=512, lengths=(65, 5)),
    "float16": Case(dtype="float16", dim=128, per_group=2, biased=True),
    "seven query heads a key": Case(per_group=7, groups=1, dim=128, hidden=128, wide=128, lengths=(90,)),
    "heads of 256": Case(dim=256, groups=1, per_group=2, lengths=(130,)),
}
LLAMA = Case(hidden=4096, groups=32, dim=128, wide=11008, lengths=(512,), width=16)
LARGE = {
    "llama": LLAMA,
    "llama int8": dataclasses.replace(LLAMA, weight="int8"),
    "llama int4": dataclasses.replace(LLAMA, weight="int4"),
    "llama fp8": dataclasses.replace(LLAMA, weight="fp8"),
    "llama of four": dataclasses.replace(LLAMA, lengths=(512, 3, 100, 511)),
    "llama grouped": dataclasses.replace(LLAMA, groups=8, per_group=4, wide=14336),
    "qwen2": dataclasses.replace(LLAMA, hidden=3584, groups=4, per_group=7, wide=18944, norm="rms"),
    "opt": dataclasses.replace(
        LLAMA, wide=16384, gated=False, norm="layer", biased=True, activation="relu", rotary=False
    ),
    "gpt2-xl": Case(
        hidden=1600, groups=25, dim=64, wide=6400, gated=False, norm="layer", biased=True, activation="gelu_tanh",
        rotary=False, lengths=(136,), width=4,
    ),
}  # fmt: skip


def operands(case, seed=0, layers=2):
    """Everything :func:`decoder_layers` is given: arguments and the rotary angles."""
    rng = np.random.default_rng(seed)
    dtype = jnp.dtype(case.dtype)

    def random(*shape, size=1.0):
        if seed is None:
            return jnp.zeros(shape, dtype)
        return jnp.asarray(size * rng.standard_normal(shape, np.float32), dtype)

    heads, inner = case.per_group + 2, case.groups * case.per_group * case.dim
    lead = (2,) if case.gated else ()
    shapes = [
        (case.groups, heads, case.dim, case.hidden), (case.hidden, inner), (*lead, case.wide, case.hidden),
        (case.hidden, case.wide),
    ]  # fmt: skip

    def layer():
        weights, scales = [], []
        for which, shape in enumerate(shapes):
            weight, scale = make_weight(case, random(*shape, size=shape[-1] ** -0.5), which)
            weights.append(weight)
            scales.append(scale)
        biases = [random(*shape[:-1], size=0.1) if case.biased else None for shape in shapes]
        norms = tuple(
            InputNorm(
                kind=case.norm, eps=1e-5, scale=1 + random(case.hidden, size=0.1),
                bias=random(case.hidden, size=0.1) if case.norm == "layer" else None,
            )
            for _ in range(2)
        )  # fmt: skip
        return LayerOperands(
            weights=tuple(weights), scales=tuple(scales), biases=tuple(biases), norms=norms, activation=case.activation
        )

    batch = len(case.lengths)
    blocks = 1 + batch * case.width
    caches = [tuple(random(blocks, case.groups, 64, case.dim) for _ in range(2)) for _ in range(layers)]
    tables = jnp.asarray(1 + rng.permutation(batch * case.width).reshape(batch, case.width), jnp.int32)
    positions = jnp.asarray(case.lengths, jnp.int32) - 1
    angle = jnp.asarray(rng.uniform(0, 6, (batch, case.dim // 2)), jnp.float32)
    rotary = (jnp.cos(angle), jnp.sin(angle)) if case.rotary else None
    return (2 * random(batch, case.hidden), [layer() for _ in range(layers)], caches, tables, positions), rotary


def static(case):
    """The keywords that are not arrays."""
    return {"scale": case.dim**-0.5, "window": case.window}


def make_weight(case, weight, which):
    """A weight as the case wants it, and its scale."""
    if case.weight is None:
        return weight, None
    kept = weight.shape
    flat = weight if which != 0 else weight.reshape(-1, kept[-1])
    found, scale = quantize_like(flat, case.weight)
    if which == 0:
        scale = scale.reshape(*scale.shape[:-1], *kept[:-1]) if scale.ndim > 1 else scale.reshape(kept[:-1])
    return found.reshape(kept), scale


def quantize_like(weight, name):
    """Scales and entries of a weight [..., N, K]: int4's factors are [..., K / g, N]."""
    wide = weight.astype(jnp.float32)
    if name == "int4":
        group = 128 if weight.shape[-1] % 128 == 0 else 64
        parts = wide.reshape(*wide.shape[:-1], -1, group)
        scale = jnp.max(jnp.abs(parts), axis=-1) / 7
        found = jnp.round(parts / scale[..., None]).astype(jnp.int8).reshape(wide.shape).astype(jnp.int4)
        return found, jnp.moveaxis(scale, -1, -2)
    most, dtype = (127, jnp.int8) if name == "int8" else (448, jnp.float8_e4m3fn)
    scale = jnp.max(jnp.abs(wide), axis=-1) / most
    found = wide / scale[..., None]
    return (jnp.round(found) if name == "int8" else found).astype(dtype), scale


def compiled(case, layers):
    """A function and its arguments' shapes, to compile."""
    arguments, rotary = jax.eval_shape(lambda: operands(case, None, layers))

    def function(arguments, rotary):
        return decoder_layers(*arguments, rotary=rotary, implementation="mosaic", **static(case))

    return function, (arguments, rotary)


def by_plan(arguments, rotary, case, **changes):
    """As `decoder_layers`, in one launch of a plan that is changed; also what a traced one notes."""
    from pallas_kernels import layer_mosaic  # it takes a second, and not all who are here need it

    x, layers, caches, tables, positions = arguments
    plan = dataclasses.replace(plan_of(x, layers, caches, tables, rotary=rotary, **static(case)), **changes)
    slots = slots_of(tables, positions[:, None], caches[0][0].shape[0])[:, 0]
    lengths = jnp.maximum(positions + 1, 0)
    return layer_mosaic.run(x, tuple(layers), tuple(caches), tables, slots, lengths, rotary, plan=plan)


def compiled_by_plan(case, layers, **changes):
    """A function of a plan that is changed and its arguments' shapes, to compile."""
    given = jax.eval_shape(lambda: operands(case, None, layers))
    return functools.partial(by_plan, case=case, **changes), given


# Of the small ones those that are not like a large one.
CASES = {
    name: functools.partial(compiled, case, 2)
    for name, case in (SMALL | LARGE).items()
    if name in LARGE
    or name in ("exact gelu, window", "tanh gelu", "int4, groups of 64 and of 128", "float16", "heads of 256")
}
for _name in ("llama", "llama int4"):
    CASES[f"{_name}, traced"] = functools.partial(compiled_by_plan, LARGE[_name], 2, traced=True)
CASES["32 layers of llama int8"] = functools.partial(compiled, LARGE["llama int8"], 32)
