"""How steps become programs: the parts of a prefill step, and what XLA is told when it compiles them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pallas_kernels import Device

MANY_TOKENS = 128
"""Tokens of a prefill step from which :func:`compiler_options` knows better than XLA's defaults."""

PARTED_LAYERS = 16
"""Layers of a model from which a prefill step is several programs, see :func:`prefill_parts`."""


@dataclass(frozen=True)
class Part:
    """Layers that have a program of their own in prefill.

    Attributes:
        layers: which.
        places: where the parameters that the program reads are among all of them.
        total: parameters of the whole model.
    """

    layers: range
    places: tuple[int, ...]
    total: int

    @property
    def own(self) -> slice:
        """Where these layers are among all."""
        return slice(self.layers.start, self.layers.stop)

    def of[Leaf](self, leaves: Sequence[Leaf]) -> list[Leaf]:
        """What the program reads of all parameters, or what belongs to these."""
        return [leaves[place] for place in self.places]

    def among[Leaf](self, leaves: Sequence[Leaf]) -> list[Leaf | None]:
        """As many as the whole model has, None where the program reads nothing."""
        found: list[Leaf | None] = [None] * self.total
        for place, leaf in zip(self.places, leaves, strict=True):
            found[place] = leaf
        return found


def prefill_parts(paths: Sequence[str], layers: int) -> list[Part]:
    """Divide a model into the programs of a prefill step: a quarter of the layers, and the rest.

    A GPU begins with a program when the host has looked at all of its arrays and brought its CUDA graph up to date: 1.3
    of the 6.2 ms that a prompt of 128 tokens took an OPT-6.7B on an H200. So some layers come before the others, whose
    turn it is on the host while the device computes. Prompt and 7 steps took 31.8 ms instead of 32.1 in one run,
    30.9 instead of 32.7 in another; of GPT-2 XL the prompt alone 4.1 instead of 4.3, with 7 steps 14.8 instead of 14.5,
    which is within what samples differ by (``benchmarks/NOTES.md``).

    Args:
        paths: of the model's parameters, ``layers.3.mlp.up``.
        layers: how many there are.
    """
    first = layers // 4 if layers >= PARTED_LAYERS else 0
    parts = []
    for own in filter(None, (range(first), range(first, layers))):
        read = {f"layers.{index}" for index in own}
        # The head may share the embedding's table.
        read |= {"embed", "head"} if own.stop == layers else {"embed"} if own.start == 0 else set()
        kinds = (".".join(path.split(".")[: 2 if path.startswith("layers.") else 1]) for path in paths)
        parts.append(Part(own, tuple(i for i, kind in enumerate(kinds) if kind in read), len(paths)))
    return parts


def compiler_options(on: Device, rows: int) -> dict[str, str]:
    """Options of XLA for a prefill step of so many tokens.

    Without its Triton products XLA leaves bias and residual to cuBLASLt, which adds them within the product. On an H200
    8 x 2040 tokens of a 7B Llama took 11.07 ms a layer instead of 11.34 (``benchmarks/prefill_variants.py``), and whole
    prompts of 128, 512 and 4 x 512 tokens 7.4, 13.6 and 44.9 ms instead of 7.8, 13.7 and 45.6; of OPT-6.7B, 128 and
    16 x 128 tokens 7.3 and 43.9 ms instead of 8.0 and 44.5. Fewer tokens have not been timed.
    """
    return {"xla_gpu_enable_triton_gemm": "False"} if on.hopper and rows >= MANY_TOKENS else {}
