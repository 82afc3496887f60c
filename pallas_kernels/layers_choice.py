"""Whether all layers of a decode step are one kernel, and why: :func:`pallas_kernels.choices` lists it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax

from pallas_kernels.choices import Choice, Device
from pallas_kernels.decoder_layers import Cache, LayerOperands, cores_problem, dtype_problem, plan_of

LayersImplementation = Literal["apart", "mosaic"]
"""Of the layers of a decode step: operation by operation, each with a choice of its own; or one Hopper kernel."""

MAX_LAYER_ROWS = 2
"""Rows up to which all layers are one kernel. In an engine on an H200, with a 7B Llama in bfloat16, a step of one row
took 3.47 ms (the kernels of its parts 3.80 on another day), of two rows 3.76. The kernel runs more, as far as shared
memory goes, but has not been timed with them."""

MAX_LAYER_TOKENS = 4096
"""Tokens that a row of the block tables has room for, up to which all layers are one kernel. It reads keys once for
every two query heads that share them, mostly from the L2 cache while they are so few; it was timed at 512."""


def layers_problem(
    x: jax.Array,
    layers: Sequence[LayerOperands],
    caches: Sequence[Cache],
    tables: jax.Array,
    *,
    rotary: tuple[jax.Array, jax.Array] | None,
    scale: float,
    window: int | None,
) -> str | None:
    """Name what the kernel cannot run of operands that fit each other, or None where it can run all.

    Args:
        x, layers, caches, tables, rotary, scale, window: as :func:`pallas_kernels.decoder_layers.decoder_layers` takes
            them; of arrays only shapes and dtypes are looked at, so ``jax.ShapeDtypeStruct`` will do.
    """
    problem = dtype_problem(x, layers, caches)
    return problem or plan_of(x, layers, caches, tables, rotary=rotary, scale=scale, window=window).problem()


def layers_choice(on: Device, *, rows: int, problem: str | None, tokens: int = 1) -> Choice[LayersImplementation]:
    """Choose how the layers of a decode step are computed.

    Args:
        on: what is compiled for.
        rows: sequences, one token each.
        problem: of the model or of the operands, such as :func:`layers_problem` names; None where there is none.
        tokens: that a row of the block tables has room for.
    """
    op = f"whole layers of up to {MAX_LAYER_ROWS} rows and {MAX_LAYER_TOKENS} tokens"
    if rows > MAX_LAYER_ROWS:
        why = f"beyond {MAX_LAYER_ROWS} rows the kernel has not been timed"
    elif tokens > MAX_LAYER_TOKENS:
        why = f"beyond {MAX_LAYER_TOKENS} tokens the kernel would read keys from memory more than once"
    elif not on.hopper:
        why = f"the kernel is made for Hopper, and this is {on}"
    elif (problem := cores_problem(on) or problem) is not None:
        why = f"the kernel does not run {problem}"
    elif rows == 0:
        why = "there are no rows"
    else:
        reason = "the blocks of one kernel stay for all layers, and weights arrive while they wait for each other"
        return Choice(op=op, implementation="mosaic", compiler="Mosaic GPU", reason=reason)
    reason = f"{why}; each operation of a layer is served by itself"
    return Choice(op=op, implementation="apart", compiler="XLA", reason=reason)
