"""Drawing the next token of every row of a batch, on the device.

Rows never touch each other, and every option is an exact no-op on the rows that do not ask for it, so a row draws the
same tokens alone, in any slot, and beside any mates. Order of the steps, as in vLLM V1 (`v1/sample/sampler.py`):

    raw logits -> log-probabilities that are reported
    -> end tokens forbidden until min_tokens -> logit_bias -> repetition, frequency, presence penalty
    -> temperature 0: argmax; else / temperature -> min_p -> top_k -> top_p -> Gumbel-max

Ties: equal logits at the edge of top_k are all kept, as in transformers and vLLM. Those at the edge of top_p are all
kept too (transformers and vLLM keep some of them, by the order of their sort). Of equal best logits the lowest id wins.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.generation.params import MAX_LOGPROBS, ResolvedParams

Array = jax.Array | np.ndarray

PAD: Final = 2**31 - 1
"""Fills arrays of token ids; outside every vocabulary, so scatters drop it (-1 would be the last token)."""
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_LOGPROBS: Final = (1, 5, MAX_LOGPROBS)
_BIAS_WIDTHS: Final = (0, 16, 256, 4096, 65536, 1048576)
_END_WIDTHS: Final = (0, 4, 16, 256, 4096, 65536, 1048576)


@dataclass(frozen=True, kw_only=True)
class SamplerFeatures:
    """What any row of the batch needs; static, so that a batch pays only for that.

    The sort is what costs: 16 rows of 128,256 logits take 15 us greedy, 39 us random and 542 us with truncate on one
    H200 (11, 20 and 141 us for 32,000 logits).

    Attributes:
        random: some row has temperature > 0.
        truncate: some such row has top_k or top_p (which need sorted logits; min_p does not).
        penalties: some row has a repetition, presence or frequency penalty.
        bias: some row has logit_bias, or min_tokens with end tokens to forbid.
        logprobs: 0 for none, else 1, 5 or 20: how many of the most likely tokens are reported.
    """

    random: bool = False
    truncate: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: int = 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "repetition",
        "presence",
        "frequency",
        "seed",
        "min_tokens",
        "end_ids",
        "bias_ids",
        "bias_values",
    ],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class SamplingRows:
    """Sampling parameters of a batch as arrays; empty slots are neutral and greedy.

    Attributes:
        temperature: float32[B], 0 is greedy.
        top_k: int32[B], 0 is off.
        top_p, min_p: float32[B], 1 and 0 are off.
        repetition, presence, frequency: float32[B], 1, 0 and 0 are off.
        seed: uint32[B, 2], high and low half.
        min_tokens: int32[B].
        end_ids: int32[B, S], what min_tokens forbids, filled with PAD.
        bias_ids, bias_values: int32 and float32 [B, W], filled with PAD and 0.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition: Array
    presence: Array
    frequency: Array
    seed: Array
    min_tokens: Array
    end_ids: Array
    bias_ids: Array
    bias_values: Array


@partial(jax.tree_util.register_dataclass, data_fields=["prompt_mask", "counts"], meta_fields=[])
@dataclass(frozen=True, kw_only=True)
class PenaltyState:
    """What penalties know of each row: prompt_mask bool[B, V] (tokens of the prompt), counts int32[B, V] (output)."""

    prompt_mask: Array
    counts: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token", "finite", "logprob", "rank", "top_ids", "top_logprobs"],
    meta_fields=[],
)
@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One drawn token per row.

    Attributes:
        token: int32[B]; 0 where nothing could be drawn.
        finite: bool[B]; False where a raw logit was NaN or infinite, or where every token was forbidden (or a penalty
            overflowed), so that the row must end with an error.
        logprob: float32[B], of the token, from the raw logits; NaN if features.logprobs is 0.
        rank: int32[B], 1 + how many tokens are more likely in the raw logits; 0 if features.logprobs is 0.
        top_ids, top_logprobs: int32 and float32 [B, L], the most likely tokens, best first; L = features.logprobs, or
            the vocabulary's size if that is smaller.
    """

    token: Array
    finite: Array
    logprob: Array
    rank: Array
    top_ids: Array
    top_logprobs: Array


def features_of(params: Sequence[ResolvedParams | None]) -> SamplerFeatures:
    """The features that a batch needs; None is an empty slot."""
    rows = [row for row in params if row is not None]
    drawn = [row for row in rows if not row.greedy]
    asked = [row.logprobs for row in rows if row.logprobs is not None]
    return SamplerFeatures(
        random=bool(drawn),
        truncate=any(row.top_k > 0 or row.top_p < 1 for row in drawn),
        penalties=any(
            row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0 for row in rows
        ),
        bias=any(row.logit_bias or (row.min_tokens > 0 and row.end_token_ids) for row in rows),
        logprobs=_bucket(max(asked), _LOGPROBS) if asked else 0,
    )


def pack(
    params: Sequence[ResolvedParams | None], bias_width: int | None = None, end_width: int | None = None
) -> SamplingRows:
    """The parameters of a batch as numpy arrays; None is an empty slot.

    Args:
        params: one per slot.
        bias_width, end_width: W and S of `SamplingRows`; None is the smallest of a few sizes that fits (0 if no row
            needs any), so that few shapes are ever compiled.

    Raises:
        ValueError: a row has more biases or end tokens than the given width.
    """
    size = len(params)
    biases = [row.logit_bias if row else () for row in params]
    ends = [sorted(row.end_token_ids) if row and row.min_tokens > 0 else [] for row in params]
    width, depth = max(map(len, biases), default=0), max(map(len, ends), default=0)
    bias_width = _bucket(width, _BIAS_WIDTHS) if bias_width is None else bias_width
    end_width = _bucket(depth, _END_WIDTHS) if end_width is None else end_width
    if width > bias_width or depth > end_width:
        raise ValueError(f"rows: {width} biases and {depth} end tokens do not fit in {bias_width} and {end_width}")
    bias_ids, bias_values = np.full((size, bias_width), PAD, np.int32), np.zeros((size, bias_width), np.float32)
    end_ids, seed = np.full((size, end_width), PAD, np.int32), np.zeros((size, 2), np.uint32)
    for index, row in enumerate(params):
        if row is None:
            continue
        for place, (token, value) in enumerate(biases[index]):
            bias_ids[index, place], bias_values[index, place] = token, value
        end_ids[index, : len(ends[index])] = ends[index]
        seed[index] = row.seed >> 32, row.seed & 0xFFFFFFFF

    def floats(name: str, neutral: float, low: float = -_HUGE) -> np.ndarray:
        # A float64 beyond float32 would become inf.
        values = np.array([neutral if row is None else getattr(row, name) for row in params], np.float64)
        return np.clip(values, low, _HUGE).astype(np.float32)

    def integers(name: str) -> np.ndarray:
        return np.array([0 if row is None else min(getattr(row, name), PAD) for row in params], np.int32)

    return SamplingRows(
        temperature=floats("temperature", 0),
        top_k=integers("top_k"),
        top_p=floats("top_p", 1),
        min_p=floats("min_p", 0),
        repetition=floats("repetition_penalty", 1, _TINY),  # logits are divided by it
        presence=floats("presence_penalty", 0),
        frequency=floats("frequency_penalty", 0),
        seed=seed,
        min_tokens=integers("min_tokens"),
        end_ids=end_ids,
        bias_ids=bias_ids,
        bias_values=bias_values,
    )


def empty_penalties(batch: int, vocab_size: int) -> PenaltyState:
    """The state of ``batch`` empty slots."""
    return PenaltyState(
        prompt_mask=jnp.zeros((batch, vocab_size), bool), counts=jnp.zeros((batch, vocab_size), jnp.int32)
    )


def fill_penalties(state: PenaltyState, slot: Array, prompt_ids: Array, output_ids: Array) -> PenaltyState:
    """Give a slot to a request.

    Args:
        state: of B slots.
        slot: int32[], which one.
        prompt_ids: int32[T], filled with PAD.
        output_ids: int32[U], filled with PAD: what a request that is recomputed had generated before.
    """
    vocab_size = state.counts.shape[1]
    mask = jnp.zeros(vocab_size, bool).at[prompt_ids].set(True, mode="drop")
    counts = jnp.zeros(vocab_size, jnp.int32).at[output_ids].add(1, mode="drop")
    return PenaltyState(
        prompt_mask=jnp.asarray(state.prompt_mask).at[slot].set(mask),
        counts=jnp.asarray(state.counts).at[slot].set(counts),
    )


def rank_logprobs(logits: jax.Array, token: Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of given tokens and of the most likely ones.

    Args:
        logits: float[N, V].
        token: int32[N].
        count: L, how many of the most likely ones (fewer if V is smaller).

    Returns:
        logprob float32[N], rank int32[N] (1 is the most likely; tokens equally likely share a rank), top_ids int32
        [N, L] and top_logprobs float32[N, L], best first.
    """
    logprobs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    logprob = jnp.take_along_axis(logprobs, token[:, None], axis=1)
    rank = 1 + jnp.sum(logprobs > logprob, axis=1, dtype=jnp.int32)
    top_logprobs, top_ids = jax.lax.top_k(logprobs, min(count, logits.shape[1]))
    return logprob[:, 0], rank, top_ids, top_logprobs


def sample[State: (PenaltyState, None)](
    logits: jax.Array, rows: SamplingRows, state: State, step: Array, features: SamplerFeatures
) -> tuple[Sampled, State]:
    """Draw one token for every row.

    Args:
        logits: float[B, V], cut to the true vocabulary.
        rows: parameters of the B slots.
        state: what penalties need; may be None without features.penalties, and comes back as it is then.
        step: int32[B], how many tokens each row has generated. The noise of a row depends on its seed and on this.
        features: static; a superset of `features_of` the rows gives the same tokens.

    Returns:
        the drawn tokens, and the state with them counted.
    """
    raw = logits.astype(jnp.float32)
    processed = _forbid_and_bias(raw, rows, step) if features.bias else raw
    if features.penalties:
        if state is None:
            raise ValueError("state: expected a PenaltyState for a batch with penalties, got None")
        processed = _penalize(processed, rows, state)
    drawn_from = _noisy(processed, rows, step, features) if features.random else processed
    token, finite = _best(drawn_from, raw)
    if features.bias or features.penalties:
        finite &= jnp.isfinite(jnp.max(processed, axis=1))
    token = jnp.where(finite, token, 0)
    if features.penalties:
        row = jnp.arange(token.shape[0])
        state = PenaltyState(
            prompt_mask=state.prompt_mask, counts=jnp.asarray(state.counts).at[row, token].add(finite.astype(jnp.int32))
        )
    return _report(raw, token, finite, features.logprobs), state


def _best(logits: jax.Array, raw: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of each row [B, V] the id of the best logit, the lowest of equal ones, and whether all raw logits are finite.

    In one pass: on a GPU two passes would be four kernels of a few microseconds each.
    """

    def better(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        first = (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] < b[1]))
        return jnp.where(first, a[0], b[0]), jnp.where(first, a[1], b[1]), a[2] & b[2]

    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    start = jnp.float32(-jnp.inf), jnp.int32(PAD), jnp.bool_(True)
    _, token, finite = jax.lax.reduce((logits, ids, jnp.isfinite(raw)), start, better, (1,))
    return token, finite


def allowed_logits(logits: jax.Array, rows: SamplingRows, features: SamplerFeatures) -> jax.Array:
    """Logits [B, V] (float32, after penalties) to those that are drawn from: scaled by temperature, -inf where cut.

    Each row's best logit is 0, so that no temperature overflows; a softmax does not see the shift.
    """
    temperature = jnp.where(rows.temperature > 0, rows.temperature, 1.0)
    scaled = (logits - jnp.max(logits, axis=1, keepdims=True)) / temperature[:, None]
    # p >= min_p * p_best, as logits: no sum over the row, so nothing to round.
    edge = jnp.log(rows.min_p)
    if features.truncate:
        edge = _truncation_edge(scaled, edge, rows)
    return jnp.where(scaled >= edge[:, None], scaled, -jnp.inf)


def _forbid_and_bias(logits: jax.Array, rows: SamplingRows, step: Array) -> jax.Array:
    row = jnp.arange(logits.shape[0])[:, None]
    end_ids = jnp.where((step < rows.min_tokens)[:, None], rows.end_ids, PAD)
    logits = logits.at[row, end_ids].set(-jnp.inf, mode="drop")
    return logits.at[row, rows.bias_ids].add(rows.bias_values, mode="drop")


def _penalize(logits: jax.Array, rows: SamplingRows, state: PenaltyState) -> jax.Array:
    """Repetition as transformers' RepetitionPenaltyLogitsProcessor, frequency and presence as OpenAI defines them."""
    generated = state.counts > 0
    repetition = rows.repetition[:, None]
    repeated = jnp.where(logits < 0, logits * repetition, logits / repetition)
    logits = jnp.where(state.prompt_mask | generated, repeated, logits)
    logits = logits - rows.frequency[:, None] * state.counts
    return logits - jnp.where(generated, rows.presence[:, None], 0.0)


def _truncation_edge(scaled: jax.Array, edge: jax.Array, rows: SamplingRows) -> jax.Array:
    """The lowest logit [B] that min_p (whose edge is given), then top_k, then top_p leave."""
    ordered = jnp.sort(scaled, axis=1, descending=True)
    last = jnp.clip(jnp.where(rows.top_k > 0, rows.top_k, scaled.shape[1]), 1, scaled.shape[1]) - 1
    kth = jnp.take_along_axis(ordered, last[:, None], axis=1)[:, 0]
    edge = jnp.where(rows.top_k > 0, jnp.maximum(edge, kth), edge)
    mass = jnp.where(ordered >= edge[:, None], jnp.exp(ordered), 0.0)
    reached = jnp.cumsum(mass, axis=1)
    # A token stays if those before it do not reach top_p yet. The total is the last sum and not a sum of its own,
    # whose rounding could differ.
    kept = (reached - mass < rows.top_p[:, None] * reached[:, -1:]) & (mass > 0)
    # The best token (logit 0) stays even where top_p is 0 as a float32.
    nucleus = jnp.min(jnp.where(kept, ordered, 0.0), axis=1)
    return jnp.where(rows.top_p < 1, jnp.maximum(edge, nucleus), edge)


def _noisy(logits: jax.Array, rows: SamplingRows, step: Array, features: SamplerFeatures) -> jax.Array:
    """Logits whose argmax is a draw (Gumbel-max), or the logits themselves for greedy rows."""

    def noise(seed: jax.Array, at: jax.Array) -> jax.Array:
        # threefry whatever jax_default_prng_impl says: other generators give other bits under vmap.
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), at)
        # "high": the plain float32 uniform has 2^23 values, and ties among a large vocabulary would favour low ids.
        return jax.random.gumbel(key, (logits.shape[1],), jnp.float32, mode="high")

    noisy = allowed_logits(logits, rows, features) + jax.vmap(noise)(jnp.asarray(rows.seed), jnp.asarray(step))
    return jnp.where((rows.temperature > 0)[:, None], noisy, logits)


def _report(raw: jax.Array, token: jax.Array, finite: jax.Array, count: int) -> Sampled:
    if count:
        logprob, rank, top_ids, top_logprobs = rank_logprobs(raw, token, count)
    else:
        logprob, rank = jnp.full(token.shape, jnp.nan, jnp.float32), jnp.zeros(token.shape, jnp.int32)
        top_ids, top_logprobs = jnp.zeros((*token.shape, 0), jnp.int32), jnp.zeros((*token.shape, 0), jnp.float32)
    return Sampled(token=token, finite=finite, logprob=logprob, rank=rank, top_ids=top_ids, top_logprobs=top_logprobs)


def _bucket(needed: int, sizes: Sequence[int]) -> int:
    for size in sizes:
        if needed <= size:
            return size
    return 2 ** math.ceil(math.log2(needed))
