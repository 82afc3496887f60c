"""What a step is given by the host, as one array since each one costs the host time, and what it gives back.

A chunk of decode steps of OPT-6.7B was handed out in 3.6 ms with its four arrays as numpy arrays, in 2.5 ms with them
on the device already (the host of one H200, one run), and a prompt waits that long for its first kernel. How much of it
one array saves has not been measured by itself: at batch 1 the whole generation took no less (``benchmarks/NOTES.md``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.generation.sampling import SamplingRows

Array = Any  # numpy on its way in, a tracer inside a step: jax.Array alone would be wrong at either end
ERROR_TOKEN = -1
"""Stands for a token where the logits were not finite."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """Tokens that a step drew, :data:`ERROR_TOKEN` where there is none; the rest where log-probabilities are asked.

    Shapes have a leading axis of steps in decode: ``tokens`` int32 [(K,) B], ``logprob`` float32, ``rank`` int32,
    ``top_ids`` and ``top_logprobs`` [(K,) B, L].
    """

    tokens: Array
    logprob: Array | None = None
    rank: Array | None = None
    top_ids: Array | None = None
    top_logprobs: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PromptReport:
    """Of each prompt token: ``logits`` [P, C, V], or the log-probability of the next (``logprob``, ``rank`` [P, C])."""

    logits: Array | None = None
    logprob: Array | None = None
    rank: Array | None = None
    top_ids: Array | None = None
    top_logprobs: Array | None = None


@dataclass(frozen=True)
class PromptWish:
    """What a prefill step reports of the prompt; static.

    Attributes:
        logits: the logits of every position.
        logprobs: alternatives beside each prompt token's log-probability; None for no log-probabilities.
    """

    logits: bool = False
    logprobs: int | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PrefillInputs:
    """What a prefill step is given, rows of all data shards one after the other.

    Attributes:
        tokens, positions: int32 [P, C]; a negative position marks padding.
        tables: int32 [P, W] block tables.
        last: int32 [P], the column whose logits are sampled from.
        slots: int32 [P], where the sampled token goes; the number of slots where there is none to go.
        step: int32 [P], output tokens before this one.
        rows: sampling parameters of the rows.
        long: bool [P], or None; see :class:`jaxinfer.models.attention.Batch`.
        targets: int32 [P, C], the token after each one, for the log-probabilities of the prompt; None without them.
        history: int32 [P, 2, H] prompt and output tokens so far, padded, where penalties need them; else None.
        pieces: None where each row is a chunk of one sequence. In a packed step, whose ``tokens`` and ``positions`` are
            [shards, T], int32 [P, L]: the token that stands at each place of the rows of attention, T where none does.
            ``tables`` then are those rows', and ``last``, a place among the T tokens, and all else the sequences'.
    """

    tokens: Array
    positions: Array
    tables: Array
    last: Array
    slots: Array
    step: Array
    rows: SamplingRows
    long: Array | None = None
    targets: Array | None = None
    history: Array | None = None
    pieces: Array | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeInputs:
    """What a decode step is given, sequences of all data shards one after the other.

    Attributes:
        slots: int32 [B], where each has its last token; the number of slots for a row that no sequence has.
        positions: int32 [B], place of the token that is fed first.
        steps: int32 [B], tokens to advance by; 0 where there is no sequence.
        step: int32 [B], output tokens before the first.
        tables: int32 [B, W] block tables.
        rows: sampling parameters.
        long: bool [B], or None.
    """

    slots: Array
    positions: Array
    steps: Array
    step: Array
    tables: Array
    rows: SamplingRows
    long: Array | None = None


@dataclass(frozen=True)
class InputLayout:
    """How inputs lie in one array, int32 [shards, words]: one after the other, each shard's rows in a row of it.

    Attributes:
        structure: of the inputs as a tree.
        leaves: shape of each within a shard, and its dtype, of 4 bytes or bool.
        shards: parts that the first axis of every input is divided into.
    """

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]
    shards: int

    @classmethod
    def of(cls, inputs: Any, shards: int) -> InputLayout:
        """The layout for inputs of these shapes; hashable, so what a compiled step is for."""
        leaves, structure = jax.tree.flatten(inputs)
        return cls(structure, tuple(((x.shape[0] // shards, *x.shape[1:]), x.dtype) for x in leaves), shards)

    def pack(self, inputs: Any) -> np.ndarray:
        """Lay inputs, numpy arrays, out."""
        words = [
            (x.astype(np.int32) if x.dtype.kind == "b" else x.view(np.int32)).reshape(self.shards, -1)
            for x in jax.tree.leaves(inputs)
        ]
        return np.concatenate(words, axis=1)

    def unpack(self, words: jax.Array) -> Any:
        """The inputs of one shard, inside a step, of its row [1, words]."""
        found, start = [], 0
        for shape, dtype in self.leaves:
            own = words[0, start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
            found.append(own != 0 if dtype.kind == "b" else jax.lax.bitcast_convert_type(own, dtype))
        return jax.tree.unflatten(self.structure, found)
