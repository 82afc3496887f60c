"""The gated product of many rows with its activation in the same kernel, for prefill.

Shapes: ``M`` rows, ``K`` inputs, ``N`` outputs; a weight is ``[2, N, K]``, the gate and the values. XLA multiplies with
both, writes ``2 M N`` numbers and reads them again to write ``M N``; here they stay in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax

from pallas_kernels.choices import gated_problem
from pallas_kernels.skinny_gemm import SMEM_PER_SM, Activation, reference

ROWS = 64
"""Rows of a warpgroup: those of wgmma."""
WARPGROUPS = 2
"""Warpgroups that multiply."""
COLUMNS = 128
"""Columns of a tile of the result: half of the 256 of wgmma, the other half being the values."""


@dataclass(frozen=True, kw_only=True)
class GatedConfig:
    """How the kernel divides the work.

    Attributes:
        tile_k: inputs of a step, 32 or 64.
        stages: steps whose x and weight are in shared memory or on their way.
        cluster: blocks that share what they fetch of the weight, 1 or 2.
        group: tiles of rows, a cluster's each, that are worked on before the next ones; their x stays in the L2 cache
            while the weight passes by.
        lead: steps that the first warpgroup is ahead of the second, so that one multiplies while the other computes the
            activation; less than ``stages``.
        programs: clusters; they share the tiles.
    """

    tile_k: int = 64
    stages: int = 4
    cluster: int = 2
    group: int = 8
    lead: int = 0
    programs: int | None = None

    def shared_bytes(self) -> int:
        """Shared memory that the kernel takes, without barriers."""
        rows = WARPGROUPS * ROWS
        return 2 * (self.stages * (rows + 2 * COLUMNS) * self.tile_k + rows * COLUMNS)


CONFIG = GatedConfig()
"""What is used unless another is asked for."""


def gated_gemm(
    x: jax.Array,
    weight: jax.Array,
    *,
    activation: Activation | None = None,
    implementation: Literal["mosaic", "reference"] | None = None,
    config: GatedConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute ``act(x G^T) * (x V^T)``.

    Args:
        x: [M, K]. A number of rows that is not a multiple of 8 costs the kernel a copy of x.
        weight: [2, N, K], the gate G and the values V.
        activation: of the gate.
        implementation: ``mosaic`` is the Hopper kernel; ``reference``, or None, is ``jax.numpy``.
        config: how the kernel divides the work; None is :data:`CONFIG`.
        interpret: run the kernel on the CPU, slowly, as tests do.

    Returns:
        [M, N] in the dtype of ``x``; sums and what follows them are float32.

    Raises:
        ValueError: operands that do not fit each other, or that the named implementation cannot run.
    """
    if x.ndim != 2 or weight.ndim != 3 or weight.shape[0] != 2 or x.shape[1] != weight.shape[2]:
        raise ValueError(f"gated_gemm: x must be [M, K] and weight [2, N, K], got {x.shape} and {weight.shape}")
    if implementation is None or implementation == "reference":
        return reference(x, weight, activation=activation)
    if implementation != "mosaic":
        raise ValueError(f"gated_gemm: implementation {implementation!r} is none of 'mosaic', 'reference'")
    problem = gated_problem(x.dtype, weight.dtype, inputs=x.shape[1], outputs=weight.shape[1], activation=activation)
    if problem is None and x.shape[0] == 0:
        problem = "0 rows"
    if problem is not None:
        raise ValueError(f"gated_gemm: implementation 'mosaic' does not run {problem}")
    config = config or CONFIG
    _check_config(config)
    # Imported here, since it takes a second and only this implementation needs it.
    from pallas_kernels.gated_gemm_mosaic import run

    return run(x, weight, activation=activation, config=config, interpret=interpret)


def _check_config(config: GatedConfig) -> None:
    """Refuse a configuration that no kernel can be made of."""
    if config.tile_k not in (32, 64) or config.cluster not in (1, 2):
        raise ValueError(f"gated_gemm: tile_k must be 32 or 64, cluster 1 or 2, got {config}")
    if config.stages < 2 or config.group < 1 or not 0 <= config.lead < config.stages - 1:
        raise ValueError(
            f"gated_gemm: stages must be at least 2, group at least 1, lead less than stages - 1, got {config}"
        )
    if config.programs is not None and config.programs < 1:
        raise ValueError(f"gated_gemm: programs must be at least 1, got {config}")
    if (taken := config.shared_bytes()) > SMEM_PER_SM - 1024:
        raise ValueError(f"gated_gemm: takes {taken} bytes of shared memory, there are {SMEM_PER_SM - 1024}: {config}")
