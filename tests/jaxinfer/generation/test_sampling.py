from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from scipy import stats
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jaxinfer.generation.params import ResolvedParams, SamplingParams
from jaxinfer.generation.sampling import (
    PAD,
    PenaltyState,
    Sampled,
    SamplerFeatures,
    SamplingRows,
    allowed_logits,
    empty_penalties,
    features_of,
    fill_penalties,
    pack,
    rank_logprobs,
    sample,
)

V = 50
draw = jax.jit(sample, static_argnames="features")
allowed = jax.jit(allowed_logits, static_argnames="features")
ALL = SamplerFeatures(random=True, truncate=True, penalties=True, bias=True, logprobs=5)


def resolved(vocab_size: int = V, eos: Sequence[int] = (2,), **changes: Any) -> ResolvedParams:
    return SamplingParams(**changes).resolve({}, eos, vocab_size)


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def once(
    logits: np.ndarray,
    params: Sequence[ResolvedParams | None],
    step: int | Sequence[int] = 0,
    state: PenaltyState | None = None,
    features: SamplerFeatures | None = None,
) -> tuple[Sampled, PenaltyState | None]:
    features = features_of(params) if features is None else features
    steps = np.broadcast_to(np.asarray(step, np.int32), (len(params),))
    if features.penalties and state is None:
        state = empty_penalties(*logits.shape)
    return draw(logits, pack(params), state, steps, features)


def test_greedy_is_argmax() -> None:
    logits = noise(4, V)
    sampled, state = once(logits, [resolved(temperature=0)] * 4)
    np.testing.assert_array_equal(sampled.token, logits.argmax(1))
    assert np.all(sampled.finite)
    assert np.all(np.isnan(sampled.logprob))
    assert sampled.top_ids.shape == (4, 0)
    assert state is None
    assert sampled.token.dtype == np.int32


def test_greedy_compiles_to_no_sort_no_noise_no_exponential() -> None:
    features = features_of([resolved(temperature=0), None])
    assert features == SamplerFeatures()
    rows = pack([resolved(temperature=0)] * 2)
    text = draw.lower(noise(2, V), rows, None, np.zeros(2, np.int32), features).as_text()
    for operation in ("sort", "exponential", "threefry", "scatter", "top_k"):
        assert operation not in text


def test_min_p_needs_no_sort() -> None:
    features = features_of([resolved(min_p=0.1)])
    assert features == SamplerFeatures(random=True)


# Masks against transformers' classes

DISTINCT = st.lists(st.integers(-400, 400), min_size=8, max_size=8, unique=True).map(
    lambda values: np.array(values, np.float32)[None] / 40
)
TIED = st.lists(st.integers(-3, 3), min_size=8, max_size=8).map(lambda values: np.array(values, np.float32)[None])


def torch_chain(logits: np.ndarray, *warpers: Any) -> np.ndarray:
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(None, scores)
    return scores.numpy()


def ours(logits: np.ndarray, **changes: Any) -> np.ndarray:
    rows = pack([resolved(8, (), **changes)] * len(logits))
    return np.asarray(allowed(logits, rows, SamplerFeatures(random=True, truncate=True)))


def same_distribution(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(
        torch.softmax(torch.tensor(found), -1), torch.softmax(torch.tensor(expected), -1), rtol=1e-4, atol=1e-6
    )


@given(logits=st.one_of(DISTINCT, TIED), temperature=st.floats(0.05, 5), top_k=st.integers(1, 12))
def test_temperature_and_top_k(logits: np.ndarray, temperature: float, top_k: int) -> None:
    """Ties included: all tokens as likely as the k-th stay."""
    expected = torch_chain(logits, TemperatureLogitsWarper(temperature), TopKLogitsWarper(top_k))
    same_distribution(ours(logits, temperature=temperature, top_k=top_k), expected)


@given(logits=DISTINCT, min_p=st.one_of(st.just(0.0), st.floats(1e-30, 1.0)), temperature=st.floats(0.2, 3))
def test_min_p(logits: np.ndarray, min_p: float, temperature: float) -> None:
    scaled = logits.astype(np.float64) / temperature
    ratio = np.exp(scaled - scaled.max())
    if np.any(np.abs(ratio - min_p) < 1e-5 * ratio) and min_p < 1:
        return  # on the edge, where rounding decides
    expected = torch_chain(logits, TemperatureLogitsWarper(temperature), MinPLogitsWarper(min_p))
    same_distribution(ours(logits, temperature=temperature, min_p=min_p), expected)


@given(
    logits=DISTINCT,
    top_p=st.floats(0.01, 1.0),
    top_k=st.sampled_from([0, 1, 3, 6]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3]),
)
def test_min_p_then_top_k_then_top_p(logits: np.ndarray, top_p: float, top_k: int, min_p: float) -> None:
    warpers: list[Any] = [MinPLogitsWarper(min_p)] if min_p else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    left = torch_chain(logits, *warpers).astype(np.float64)
    reached = np.cumsum(np.sort(np.exp(left - left.max()))[0, ::-1])
    if top_p < 1 and np.any(np.abs(reached / reached[-1] - top_p) < 1e-5):
        return  # on the edge, where rounding decides
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = torch_chain(logits, *warpers) if warpers else logits
    same_distribution(ours(logits, temperature=1, top_p=top_p, top_k=top_k, min_p=min_p), expected)


@given(logits=TIED, top_p=st.floats(0.01, 0.99))
def test_top_p_keeps_all_ties_of_its_last_token(logits: np.ndarray, top_p: float) -> None:
    found = ours(logits, temperature=1, top_p=top_p)[0]
    theirs = torch_chain(logits, TopPLogitsWarper(top_p))[0]
    kept = ~np.isneginf(found)
    probability = np.exp(logits[0].astype(np.float64))
    probability /= probability.sum()
    edge = logits[0][kept].min()
    np.testing.assert_array_equal(kept, logits[0] >= edge)
    assert probability[kept].sum() >= top_p - 1e-5
    assert probability[logits[0] > edge].sum() < top_p + 1e-5
    assert set(np.flatnonzero(~np.isneginf(theirs))) <= set(np.flatnonzero(kept)) or np.isclose(
        probability[logits[0] > theirs[~np.isneginf(theirs)].min()].sum(), top_p, atol=1e-5
    )


@given(
    logits=DISTINCT,
    prompt=st.lists(st.integers(0, 7), max_size=6),
    output=st.lists(st.integers(0, 7), max_size=6),
    repetition=st.floats(0.2, 3),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties(
    logits: np.ndarray, prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> None:
    seen = torch.tensor([prompt + output], dtype=torch.int64)
    scores = RepetitionPenaltyLogitsProcessor(repetition)(seen, torch.tensor(logits))[0]
    for token in set(output):  # the definition in OpenAI's reference, which vLLM follows
        scores[token] -= frequency * output.count(token) + presence
    params = resolved(
        8, (), temperature=0, repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency
    )
    state = fill_penalties(empty_penalties(1, 8), np.int32(0), padded(prompt), padded(output))
    features = SamplerFeatures(penalties=True)
    sampled, after = draw(logits, pack([params]), state, np.zeros(1, np.int32), features)
    best = np.sort(scores.numpy())[-2:]
    assert best[1] - best[0] < 1e-5 or int(sampled.token[0]) == int(scores.argmax())
    np.testing.assert_array_equal(after.counts[0], np.bincount([*output, int(sampled.token[0])], minlength=8))
    np.testing.assert_array_equal(np.flatnonzero(after.prompt_mask[0]), sorted(set(prompt)))


def padded(ids: list[int], size: int = 8) -> np.ndarray:
    return np.array([*ids, *[PAD] * (size - len(ids))], np.int32)


def test_logit_bias_and_min_tokens() -> None:
    logits = np.zeros((1, V), np.float32)
    logits[0, [2, 3, 7]] = [9, 8, 7]  # 2 is end-of-sequence
    params = resolved(temperature=0, min_tokens=2, stop_token_ids=[3])
    for step, expected in [(0, 7), (1, 7), (2, 2)]:
        assert int(once(logits, [params], step)[0].token[0]) == expected
    biased = resolved(temperature=0, logit_bias={2: -math.inf, 49: 8.5})
    assert int(once(logits, [biased])[0].token[0]) == 49
    # Reported log-probabilities are those of the model.
    sampled, _ = once(logits, [replace(biased, logprobs=0)])
    expected = torch.log_softmax(torch.tensor(logits), -1)[0, 49]
    np.testing.assert_allclose(sampled.logprob[0], expected, rtol=1e-6)
    assert int(sampled.rank[0]) == 4


def test_logprobs_and_ranks_against_torch() -> None:
    logits = noise(6, V, seed=3)
    params = [resolved(seed=index, logprobs=3) for index in range(6)]
    sampled, _ = once(logits, params)
    assert sampled.top_ids.shape == (6, 5)  # three, rounded up
    expected = torch.log_softmax(torch.tensor(logits), -1)
    values, ids = expected.topk(5)
    np.testing.assert_array_equal(sampled.top_ids, ids)
    np.testing.assert_allclose(sampled.top_logprobs, values, rtol=1e-5)
    for row in range(6):
        token = int(sampled.token[row])
        np.testing.assert_allclose(sampled.logprob[row], expected[row, token], rtol=1e-5)
        assert int(sampled.rank[row]) == 1 + int((expected[row] > expected[row, token]).sum())


def test_rank_of_ties_and_a_vocabulary_smaller_than_the_bucket() -> None:
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0]])
    logprob, rank, top_ids, top_logprobs = rank_logprobs(logits, jnp.array([2]), 20)
    assert int(rank[0]) == 1
    np.testing.assert_array_equal(top_ids, [[1, 2, 0, 3]])
    np.testing.assert_allclose(logprob[0], top_logprobs[0, 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_a_bad_row_is_flagged_and_alone(bad: float, temperature: float) -> None:
    logits = noise(4, V)
    params = [resolved(temperature=temperature, seed=index, logprobs=1) for index in range(4)]
    clean, _ = once(logits, params)
    logits[2, 30] = bad
    sampled, _ = once(logits, params)
    np.testing.assert_array_equal(sampled.finite, [True, True, False, True])
    assert int(sampled.token[2]) == 0
    good = [0, 1, 3]
    for name in ("token", "logprob", "rank", "top_ids", "top_logprobs"):
        np.testing.assert_array_equal(getattr(sampled, name)[jnp.array(good)], getattr(clean, name)[jnp.array(good)])


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_row_where_every_token_is_forbidden_is_flagged(temperature: float) -> None:
    everything = resolved(8, (), temperature=temperature, logit_bias=dict.fromkeys(range(8), -math.inf))
    masked = resolved(8, range(8), temperature=temperature, min_tokens=1)
    overflow = resolved(8, (), temperature=temperature, repetition_penalty=1e-38)
    state = fill_penalties(empty_penalties(4, 8), np.int32(2), padded([0, 1, 2, 3]), padded([]))
    logits = 100 * np.abs(noise(4, 8))
    sampled, state = once(logits, [everything, masked, overflow, resolved(8, ())], state=state)
    np.testing.assert_array_equal(sampled.finite, [False, False, False, True])
    np.testing.assert_array_equal(sampled.token[:3], [0, 0, 0])
    np.testing.assert_array_equal(state.counts.sum(1), [0, 0, 0, 1])


def test_extreme_numbers() -> None:
    logits = np.array([[3e38, -3e38, 0.0, 1.0]] * 5, np.float32)
    params = [
        resolved(4, (), temperature=1e-4), resolved(4, (), temperature=1e300), resolved(4, (), top_p=1e-300),
        resolved(4, (), top_k=10**30), resolved(4, (), min_p=1e-300),
    ]  # fmt: skip
    sampled, _ = once(logits, params)
    assert np.all(sampled.finite)
    np.testing.assert_array_equal(np.delete(sampled.token, 1), [0] * 4)  # row 1 is uniform


# Distribution


def chi_square(tokens: np.ndarray, probability: np.ndarray) -> float:
    counts = np.bincount(tokens, minlength=len(probability))
    assert counts[probability == 0].sum() == 0
    expected = probability[probability > 0] * len(tokens)
    return float(stats.chisquare(counts[probability > 0], expected).pvalue)


@pytest.mark.parametrize("by", ["seed", "step"])
@pytest.mark.parametrize(
    "changes", [{}, {"temperature": 0.6, "top_k": 5}, {"temperature": 1.5, "top_p": 0.8}, {"min_p": 0.2}]
)
def test_distribution(by: str, changes: dict[str, float]) -> None:
    """Draws over seeds, and over the steps of one seed, follow the softmax of what is left."""
    count, size = 8192, 12
    logits = noise(1, size, scale=1.2, seed=5)
    params = resolved(size, (), **changes)
    features = features_of([params])
    steps = np.arange(count, dtype=np.int32) if by == "step" else np.zeros(count, np.int32)
    row = pack([params])
    rows = jax.tree.map(lambda leaf: np.repeat(leaf, count, axis=0), row)
    if by == "seed":
        rows = replace(rows, seed=np.stack([np.zeros(count), np.arange(count)], 1).astype(np.uint32))
    sampled, _ = draw(np.repeat(logits, count, axis=0), rows, None, steps, features)
    left = np.asarray(allowed(logits, row, features))[0].astype(np.float64)
    probability = np.exp(left) / np.exp(left).sum()
    # The seeds are fixed, so this either always passes or never does.
    assert chi_square(np.asarray(sampled.token), probability) > 1e-3


def test_rare_tokens_are_drawn() -> None:
    """A plain float32 uniform would never draw beyond e^-16.6 of the best token, and would draw many ties there."""
    size, count = 4096, 64
    logits = np.zeros((count, size), np.float32)
    params = [resolved(size, (), seed=index) for index in range(count)]
    tokens = np.asarray(once(logits, params)[0].token)
    assert len(set(tokens)) > 0.95 * count
    assert stats.kstest(tokens / size, "uniform").pvalue > 1e-3


def test_seeds_are_64_bits_wide() -> None:
    logits = np.zeros((1, 4096), np.float32)
    seeds = [0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1]
    assert len({int(once(logits, [resolved(4096, (), seed=seed)])[0].token[0]) for seed in seeds}) == len(seeds)
    assert pack([resolved(seed=2**63 + 5)]).seed.tolist() == [[2**31, 5]]


def test_draws_are_written_down() -> None:
    """A change of these changes what every user's seed means."""
    tokens = [
        int(once(np.zeros((1, 4096), np.float32), [resolved(4096, (), seed=7)], step)[0].token[0]) for step in range(4)
    ]
    assert tokens == [1415, 2322, 1918, 49]


# Independence

CROWD: list[dict[str, Any]] = [
    {"temperature": 0}, {}, {"temperature": 0.7, "top_k": 7}, {"top_p": 0.6},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.02},
    {"repetition_penalty": 1.3, "temperature": 0.9}, {"frequency_penalty": 0.7, "presence_penalty": -0.4},
    {"logit_bias": {3: 4.0, 9: -math.inf}, "top_p": 0.95}, {"min_tokens": 3, "temperature": 1.7},
    {"min_p": 0.1, "logprobs": 4}, {"temperature": 0, "repetition_penalty": 1.2, "logprobs": 20},
]  # fmt: skip


def generate(params: Sequence[ResolvedParams | None], logits: np.ndarray, features: SamplerFeatures) -> np.ndarray:
    """Tokens [steps, B] by a scan over steps, whose logits [steps, B, V] do not depend on the tokens."""
    rows = pack(params)

    def advance(state: PenaltyState, now: tuple[jax.Array, jax.Array]) -> tuple[PenaltyState, Sampled]:
        sampled, state = sample(now[0], rows, state, jnp.full(len(params), now[1], jnp.int32), features)
        return state, sampled

    state = empty_penalties(*logits.shape[1:])
    _, sampled = jax.jit(partial(jax.lax.scan, advance))(state, (logits, jnp.arange(len(logits))))
    assert np.all(sampled.finite)
    return np.asarray(sampled.token)


def test_a_row_draws_the_same_alone_and_in_any_crowd() -> None:
    check_independence(24, 1000)


@pytest.mark.gpu
@pytest.mark.parametrize(("steps", "vocab"), [(24, 1000), (6, 32_000), (4, 128_256)])
def test_a_row_draws_the_same_alone_and_in_any_crowd_on_a_gpu(steps: int, vocab: int) -> None:
    check_independence(steps, vocab)


def check_independence(steps: int, vocab: int) -> None:
    params = [resolved(vocab, seed=100 + index, **changes) for index, changes in enumerate(CROWD)]
    logits = noise(steps, len(params), vocab, seed=9, scale=2.0)
    alone = [generate([row], logits[:, [index]], features_of([row]))[:, 0] for index, row in enumerate(params)]
    crowd = generate(params, logits, features_of(params))
    np.testing.assert_array_equal(crowd, np.stack(alone, 1))
    order = np.random.default_rng(0).permutation(16)  # other slots, another B, empty slots between
    slots: list[ResolvedParams | None] = [params[item] if item < len(params) else None for item in order]
    spread = np.stack([logits[:, item % len(params)] for item in order], 1)
    moved = generate(slots, spread, replace(features_of(params), logprobs=20))
    for slot, item in enumerate(order):
        if item < len(params):
            np.testing.assert_array_equal(moved[:, slot], alone[item])


@settings(max_examples=25)
@given(data=st.data())
def test_features_beyond_the_needed_change_nothing(data: st.DataObject) -> None:
    changes = data.draw(st.sampled_from(CROWD))
    params = resolved(V, seed=data.draw(st.integers(0, 2**64 - 1)), **changes)
    logits = noise(1, V, seed=data.draw(st.integers(0, 999)))
    step = data.draw(st.integers(0, 5))
    found, _ = once(logits, [params], step)
    assert int(once(logits, [params], step, features=ALL)[0].token[0]) == int(found.token[0])


def test_within_shard_map_and_scan() -> None:
    """Rows over a data axis draw what they draw on one device."""
    params = [resolved(V, seed=index, **CROWD[index]) for index in range(8)]
    logits, features = noise(5, 8, V, seed=2), features_of(params)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def body(logits: jax.Array, rows: SamplingRows, state: PenaltyState) -> tuple[jax.Array, PenaltyState]:
        def advance(state: PenaltyState, now: tuple[jax.Array, jax.Array]) -> tuple[PenaltyState, jax.Array]:
            steps = jnp.full(rows.temperature.shape, now[1], jnp.int32)
            sampled, state = sample(now[0], rows, state, steps, features)
            return state, sampled.token

        state, tokens = jax.lax.scan(advance, state, (logits, jnp.arange(5)))
        return tokens, state

    whole = jax.jit(
        jax.shard_map(
            body, mesh=mesh, in_specs=(P(None, "data"), P("data"), P("data")), out_specs=(P(None, "data"), P("data"))
        )
    )
    tokens, state = whole(logits, pack(params), empty_penalties(8, V))
    np.testing.assert_array_equal(tokens, generate(params, logits, features))
    np.testing.assert_array_equal(np.asarray(state.counts).sum(1), [5] * 8)


def test_other_random_implementations_change_nothing() -> None:
    logits, params = noise(3, V), [resolved(seed=index) for index in range(3)]
    expected = once(logits, params)[0].token
    with jax.default_prng_impl("rbg"):
        found = jax.jit(lambda: sample(jnp.asarray(logits), pack(params), None, np.zeros(3, np.int32), ALL_RANDOM))()[0]
    np.testing.assert_array_equal(found.token, expected)


ALL_RANDOM = SamplerFeatures(random=True)

# Packing


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"temperature": 0}, {}),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, {}),
        ({}, {"random": True}),
        ({"top_k": 5}, {"random": True, "truncate": True}),
        ({"top_p": 0.5}, {"random": True, "truncate": True}),
        ({"temperature": 0, "presence_penalty": 1}, {"penalties": True}),
        ({"temperature": 0, "repetition_penalty": 1.1}, {"penalties": True}),
        ({"temperature": 0, "logit_bias": {1: 1}}, {"bias": True}),
        ({"temperature": 0, "logit_bias": {}}, {}),
        ({"temperature": 0, "min_tokens": 1}, {"bias": True}),
        ({"temperature": 0, "min_tokens": 1, "ignore_eos": True}, {}),
        ({"temperature": 0, "logprobs": 0}, {"logprobs": 1}),
        ({"temperature": 0, "logprobs": 2}, {"logprobs": 5}),
        ({"temperature": 0, "logprobs": 20}, {"logprobs": 20}),
    ],
)
def test_features(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    params = resolved(**changes)
    assert features_of([None, params, resolved(temperature=0)]) == SamplerFeatures(**expected)


def test_pack_has_few_shapes() -> None:
    wide = resolved(logit_bias={token: 1.0 for token in range(17)}, min_tokens=1, stop_token_ids=[5, 6, 7, 8])
    rows = pack([wide, None, resolved()])
    assert rows.bias_ids.shape == rows.bias_values.shape == (3, 256)
    assert rows.end_ids.shape == (3, 16)
    assert rows.end_ids[0].tolist() == [2, 5, 6, 7, 8] + [PAD] * 11
    assert pack([None]).bias_ids.shape == pack([None]).end_ids.shape == (1, 0)
    assert pack([resolved()], bias_width=16, end_width=4).end_ids.shape == (1, 4)
    with pytest.raises(ValueError, match="do not fit"):
        pack([wide], bias_width=16)
    assert len(jax.tree.leaves(rows)) == 12
    assert all(leaf.dtype in (np.float32, np.int32, np.uint32) for leaf in jax.tree.leaves(rows))


def test_penalties_need_their_state() -> None:
    with pytest.raises(ValueError, match=r"^state: expected a PenaltyState"):
        sample(jnp.zeros((1, V)), pack([None]), None, np.zeros(1, np.int32), SamplerFeatures(penalties=True))


def test_fill_penalties_touches_one_slot() -> None:
    state = fill_penalties(empty_penalties(3, 8), np.int32(1), padded([1, 1, 5]), padded([2, 2, 7]))
    state = jax.jit(fill_penalties)(state, np.int32(2), padded([0]), padded([]))
    np.testing.assert_array_equal(state.counts, [[0] * 8, [0, 0, 2, 0, 0, 0, 0, 1], [0] * 8])
    assert np.flatnonzero(state.prompt_mask[1]).tolist() == [1, 5]
    again = fill_penalties(state, np.int32(1), padded([3]), padded([]))
    assert np.flatnonzero(again.prompt_mask[1]).tolist() == [3]
    assert int(again.counts.sum()) == 0
