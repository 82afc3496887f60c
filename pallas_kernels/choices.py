"""Which implementation serves which operation, and why: the one place that chooses, and a table for people."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

Implementation = Literal["dot", "reduce"]
"""Of attention: matrix products, or multiply and sum."""

MAX_REDUCE_HEADS = 2
"""Query heads per key head up to which ``reduce`` is chosen: each of them multiplies every key once more."""


@dataclass(frozen=True, kw_only=True)
class Choice[Name: str]:
    """What serves an operation.

    Attributes:
        op: the operation, such as ``decode attention``.
        implementation: what its ``implementation`` argument would be called; ``jnp`` where there is only one.
        compiler: who makes machine code of it.
        reason: why it is this one.
    """

    op: str
    implementation: Name
    compiler: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.implementation} ({self.compiler}), because {self.reason}"

    def to_dict(self) -> dict[str, str]:
        """The choice as JSON-able values."""
        return {
            "op": self.op, "implementation": self.implementation, "compiler": self.compiler, "reason": self.reason,
        }  # fmt: skip


def attention_choice(platform: str, *, query_tokens: int, heads_per_key: int) -> Choice[Implementation]:
    """Choose how attention over a cache is computed.

    Args:
        platform: ``jax.default_backend()``: ``cpu``, ``gpu``, ...
        query_tokens: new tokens of each sequence; 1 is decode.
        heads_per_key: query heads that share a key head.
    """
    decode = query_tokens == 1
    op = "decode attention" if decode else "prefill attention"
    if decode and platform == "gpu" and heads_per_key <= MAX_REDUCE_HEADS:
        reason = "XLA fuses multiply and sum with the gather of the blocks, where a product would write them out first"
        return Choice(op=op, implementation="reduce", compiler="XLA", reason=reason)
    if not decode:
        reason = "many query tokens share each key, which is what matrix products are for"
    elif platform != "gpu":
        reason = f"fusing with the gather of the blocks pays on a GPU only, and this is {platform}"
    else:
        reason = f"more than {MAX_REDUCE_HEADS} query heads share each key, and reduce would read it once for each"
    return Choice(op=op, implementation="dot", compiler="XLA", reason=reason)


def choices(platform: str, heads_per_key: int | None = None) -> tuple[Choice[str], ...]:
    """List what serves each operation on a platform.

    Args:
        platform: ``jax.default_backend()``.
        heads_per_key: query heads that share a key head in the model at hand; None lists every case.
    """
    few: Choice[str] = attention_choice(platform, query_tokens=1, heads_per_key=heads_per_key or 1)
    decode: tuple[Choice[str], ...] = (few,)
    if heads_per_key is None:
        many = attention_choice(platform, query_tokens=1, heads_per_key=MAX_REDUCE_HEADS + 1)
        if many.implementation != few.implementation:
            named = f"{few.op} with up to {MAX_REDUCE_HEADS} query heads a key"
            decode = (dataclasses.replace(few, op=named), dataclasses.replace(many, op=f"{many.op} with more"))
    rest = (
        ("cache write", "rows of donated blocks are written in place"),
        ("matrix products, norms, sampling", "there is no kernel of our own for them"),
    )
    return (
        attention_choice(platform, query_tokens=2, heads_per_key=heads_per_key or 1),
        *decode,
        *(Choice(op=op, implementation="jnp", compiler="XLA", reason=reason) for op, reason in rest),
    )
