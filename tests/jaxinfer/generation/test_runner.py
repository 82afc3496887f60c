"""The generation loop on a tiny model: whatever runs beside a request, or before it, it is answered alike."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer import SamplingParams, programs
from jaxinfer.engine import InferenceEngine
from jaxinfer.errors import RequestError
from jaxinfer.generation import runner as runners
from jaxinfer.generation.requests import CompletionOutput, RequestOutput
from jaxinfer.generation.runner import NOT_FINITE, Counters, Runner
from jaxinfer.generation.scheduler import Packing
from jaxinfer.steps import InputLayout
from tests.cases import EOS, case
from tests.engines import LLAMA, changed, tiny
from tests.engines import of as engine_of
from tests.oracle import checkpoint, prompts, shared_root

POISON = 50
PROMPTS = prompts(case(LLAMA), (3, 20, 9, 30, 60, 1))
CLEAN = [[token if token != POISON else POISON + 1 for token in prompt] for prompt in PROMPTS]


def greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, **changes)


def sampled(seed: int, count: int = 12, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": count, "temperature": 1, "ignore_eos": True, "seed": seed} | changes))


CROWD = [
    sampled(1),
    sampled(2, repetition_penalty=1.5, presence_penalty=0.5, top_k=5, logprobs=2),
    greedy(12, logit_bias={10: 5.0, 11: -5.0}, frequency_penalty=1.0, logprobs=0),
    sampled(4, count=5),
    sampled(5, top_p=0.6, min_p=0.01, temperature=1.5, ignore_eos=False, min_tokens=5),
]


def tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    assert all(output.error is None for output in outputs)
    return [output.outputs[0].token_ids for output in outputs]


def runner(engine: InferenceEngine) -> Runner:
    return engine._open()


def fresh_counters(engine: InferenceEngine) -> Counters:
    runner(engine).counters = Counters()
    return runner(engine).counters


def assert_idle(engine: InferenceEngine) -> None:
    scheduler = runner(engine).scheduler
    assert scheduler.idle
    assert all(allocator.free == allocator.capacity for allocator in scheduler.allocators)
    assert not runner(engine)._pending


def assert_same(found: CompletionOutput, expected: CompletionOutput) -> None:
    """Bit for bit: also log-probabilities."""
    assert dataclasses.asdict(found) == dataclasses.asdict(expected)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture(scope="module")
def engine(root):
    with tiny(root) as engine:
        yield engine


SHORT = [prompt[:25] for prompt in CLEAN[: len(CROWD)]]


@pytest.fixture(scope="module")
def alone(engine):
    """What each request of the crowd gets when nobody else is there."""
    return [tokens([engine.generate(prompt, params)])[0] for prompt, params in zip(SHORT, CROWD, strict=True)]


@pytest.mark.parametrize("options", [{}, {"max_batch": 3, "mesh": {"data": 2}}], ids=str)
def test_a_request_gets_the_same_tokens_alone_and_in_any_crowd(options, alone, engine, root):
    other = tiny(root, **options) if options else engine
    order = (3, 2, 4, 0, 1)  # not the first slot, and not the slot it had alone
    found = other.generate([SHORT[i] for i in order], [CROWD[i] for i in order])
    assert tokens(found) == [alone[i] for i in order]
    assert_idle(other)


def test_finished_slots_are_refilled_and_results_come_in_order(engine):
    counters = fresh_counters(engine)
    lengths = [2, 30, 3, 7, 1, 12]
    found = engine.generate(PROMPTS, [greedy(length) for length in lengths])
    assert [len(each) for each in tokens(found)] == lengths
    assert [output.prompt_token_ids for output in found] == PROMPTS
    assert [output.outputs[0].finish_reason for output in found] == ["length"] * 6
    # 30 tokens are 8 steps of 4; the others ran in the slots beside them.
    assert counters.decode_steps <= 10
    assert counters.prefill_tokens == sum(map(len, PROMPTS))
    assert counters.preemptions == 0
    assert_idle(engine)


def test_long_prompts_are_computed_in_chunks(engine, root):
    counters = fresh_counters(engine)
    found = engine.generate(PROMPTS[4], greedy(8))
    assert counters.prefill_steps == 2  # 60 tokens, 32 at a time
    with tiny(root, prefill_chunk=64) as whole:
        expected = whole.generate(PROMPTS[4], greedy(8))
        assert runner(whole).counters.prefill_steps == 1
    assert tokens([found]) == tokens([expected])


def test_every_drawn_token_is_the_best_of_the_full_forward(engine):
    """Prefill in chunks and decode over blocks give what one forward over the whole text gives."""
    prompt = PROMPTS[4]
    output = tokens([engine.generate(prompt, greedy(70))])[0]
    logits = engine.logits([*prompt, *output])
    assert output == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


GREEDILY = (greedy(70), greedy(66, logprobs=0), greedy(70), greedy(64))
PENALIZED = tuple(sampled(i, 70, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=1) for i in range(4))


@pytest.mark.parametrize(
    ("mesh", "blocks", "params"),
    [({"tensor": 1}, 5, GREEDILY), ({"tensor": 1}, 3, PENALIZED), ({"data": 2}, 3, GREEDILY)],
    ids=["greedy", "sampled", "data"],
)
def test_when_blocks_run_out_the_youngest_is_computed_again_and_nothing_changes(mesh, blocks, params, engine, root):
    texts = [CLEAN[4][start : start + 50] for start in (0, 1, 2, 3)]
    params = [dataclasses.replace(each, prompt_logprobs=0) for each in params]
    expected = engine.generate(texts, params)
    with tiny(root, mesh=mesh, kv_blocks=blocks, prefill_chunk=128) as tight:
        counters = fresh_counters(tight)
        found = tight.generate(texts, params)
        assert counters.preemptions > 0
        assert counters.prefill_tokens > 4 * 50
        assert_idle(tight)
    for one, other in zip(found, expected, strict=True):
        assert one.outputs[0].finish_reason == "length"
        assert_alike(one, other)
        assert len(one.prompt_logprobs or []) == 50


def test_what_could_never_fit_is_refused_and_its_neighbours_are_served(root):
    with tiny(root, kv_blocks=2) as tight:
        short, long = tight.generate([CLEAN[0], CLEAN[4]], [greedy(4), greedy(100)])
        assert short.outputs[0].finish_reason == "length"
        assert long.error is not None
        assert "needs 3 KV blocks, and the cache has 2" in long.error
        assert long.outputs[0].finish_reason == "error"
        assert_idle(tight)
        with pytest.raises(RequestError, match="needs 3 KV blocks"):
            tight.generate(CLEAN[4], greedy(100))


@pytest.fixture(scope="module")
def poisoned(root, tmp_path_factory):
    folder = changed(checkpoint(case(LLAMA), root), tmp_path_factory.mktemp("nan") / "model", poison=POISON)
    with engine_of(folder, kv_blocks=8) as engine:
        yield engine


# A neighbour that drew the poisoned token would be poisoned by it, so nobody may.
UNPOISONED = [greedy(12, logprobs=2, logit_bias={POISON: -1e4}), sampled(4, 12, logprobs=1, logit_bias={POISON: -1e4})]


@pytest.mark.parametrize("place", [0, 39])
def test_logits_that_are_not_finite_end_their_request_and_the_neighbours_do_not_notice(place, poisoned, engine):
    bad, params = list(CLEAN[4][:40]), [UNPOISONED[0], UNPOISONED[0], UNPOISONED[1]]
    expected = engine.generate([CLEAN[1], bad, CLEAN[2]], params)
    bad[place] = POISON
    found = poisoned.generate([CLEAN[1], bad, CLEAN[2]], params)
    assert found[1].error == NOT_FINITE
    assert found[1].outputs[0].finish_reason == "error"
    assert found[1].outputs[0].token_ids == []
    for index in (0, 2):
        assert_same(found[index].outputs[0], expected[index].outputs[0])
    assert_idle(poisoned)


def test_they_may_come_in_the_middle_of_the_output(poisoned):
    found = poisoned.generate([CLEAN[0], CLEAN[1]], [greedy(9, logit_bias={POISON: 1e4}), greedy(9)])
    assert found[0].outputs[0].token_ids == [POISON]  # drawn, and then fed
    assert found[0].outputs[0].finish_reason == "error"
    assert found[0].error == NOT_FINITE
    assert found[1].outputs[0].finish_reason == "length"


@pytest.mark.parametrize("ended", ["by an error", "by itself"])
def test_blocks_that_hold_nan_harm_nobody_who_gets_them(ended, poisoned, engine):
    expected = engine.generate(CLEAN[:4], UNPOISONED[0])
    if ended == "by an error":
        used = poisoned.generate([[POISON] * 60] * 4, greedy(20))
    else:
        # The device, a step ahead, has fed the token that ends it: nobody sees an error, and the blocks hold NaN.
        ends = SamplingParams(max_tokens=20, temperature=0, logit_bias={POISON: 1e4}, stop_token_ids=[POISON])
        used = poisoned.generate([CLEAN[4]] * 4, ends)
    assert {output.outputs[0].finish_reason for output in used} == {"error" if ended == "by an error" else "stop"}
    assert np.isnan(np.asarray(poisoned.executor.caches[0][0])).any(), "this test tests nothing"
    found = poisoned.generate(CLEAN[:4], UNPOISONED[0])
    for one, other in zip(found, expected, strict=True):
        assert_same(one.outputs[0], other.outputs[0])


def test_penalties_of_a_failed_request_are_not_inherited(poisoned, engine):
    params = greedy(12, frequency_penalty=2.0, logit_bias={POISON: -1e4})
    poisoned.generate([[POISON, *prompt] for prompt in CLEAN[:4]], params)
    assert tokens(poisoned.generate(CLEAN[:4], params)) == tokens(engine.generate(CLEAN[:4], params))


def test_a_score_over_them_is_an_error_and_logits_are_as_they_are(poisoned):
    with pytest.raises(RequestError, match="not finite"):
        poisoned.score([5, POISON, 6, 7])
    assert np.isnan(poisoned.logits([5, 6, POISON, 7])[2:]).all()


def test_to_forbid_every_token_is_an_error(engine):
    nothing = greedy(3, logit_bias=dict.fromkeys(range(101), -np.inf))
    found = engine.generate([CLEAN[0], CLEAN[1]], [nothing, greedy(3)])
    assert [output.error for output in found] == [NOT_FINITE, None]


def test_an_interrupted_run_leaves_nothing_behind(engine, monkeypatch):
    expected = tokens([engine.generate(CLEAN[1], greedy(8))])
    decode, calls = engine.executor.decode, []

    def interrupted(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine.executor, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(CLEAN[:6], greedy(20))
    assert_idle(engine)
    assert tokens([engine.generate(CLEAN[1], greedy(8))]) == expected


class Broken(Exception):
    pass


def failing(call: int, function: Any, *, after: bool) -> Any:
    """A function that fails at one of its calls, before it does anything or after it has done it."""
    calls = itertools.count(1)

    def broken(*given: Any) -> Any:
        fails = next(calls) == call
        if fails and not after:
            raise Broken
        found = function(*given)
        if fails:
            raise Broken
        return found

    return broken


@pytest.mark.parametrize(
    ("place", "after", "call"),
    [
        ("prefill", False, 2), ("prefill", True, 1), ("decode", False, 1), ("decode", True, 3), ("results", False, 1),
        ("results", False, 4),
    ],
)  # fmt: skip
def test_a_step_that_fails_is_the_error_of_one_caller_and_harms_no_other(place, after, call, engine, monkeypatch):
    """Others are computed again, whether the step fails before it is handed out or after, or its results do."""
    asked: list[tuple[Any, ...]] = [(engine.generate, SHORT[1], CROWD[1]), (engine.logits, CLEAN[4])]
    asked += [(engine.generate, CLEAN[4], greedy(12, prompt_logprobs=1, logprobs=1)), (engine.score, CLEAN[4])]
    asked += [(engine.generate, SHORT[4], CROWD[4]), (engine.generate, CLEAN[1], greedy(1))]
    expected = [call(*given) for call, *given in asked]

    def caught(call: Any, *given: Any) -> Any:
        try:
            return call(*given)
        except Broken as error:
            return error

    with monkeypatch.context() as patch, ThreadPoolExecutor(len(asked)) as callers:
        where, name = (runner(engine), "_take_in") if place == "results" else (engine.executor, place)
        patch.setattr(where, name, failing(call, getattr(where, name), after=after))
        found = list(callers.map(lambda one: caught(*one), asked))
    broken = [index for index, one in enumerate(found) if isinstance(one, Broken)]
    assert len(broken) == 1
    for index in set(range(len(asked))) - set(broken):
        assert_alike(found[index], expected[index])
    assert_idle(engine)
    again = [call(*given) for call, *given in asked]
    for one, other in zip(again, expected, strict=True):
        assert_alike(one, other)


def test_caches_that_were_given_to_a_step_that_fails_are_allocated_anew(engine, monkeypatch):
    prompt, params = CLEAN[1], sampled(2, 9, repetition_penalty=1.5)
    expected = tokens([engine.generate(prompt, params)])
    given = jax.tree.leaves(engine.executor.caches)
    with monkeypatch.context() as patch:
        programs = engine.executor._prefill_programs
        patch.setattr(
            engine.executor,
            "_prefill_programs",
            lambda *about: [failing(1, program, after=True) for program in programs(*about)],
        )
        with pytest.raises(Broken):
            engine.generate(prompt, params)
    assert all(leaf.is_deleted() for leaf in given)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((engine.executor.caches, engine.executor.last)))
    assert_idle(engine)
    assert tokens([engine.generate(prompt, params)]) == expected


def assert_alike(found: Any, expected: Any) -> None:
    """Equal tokens, and log-probabilities and logits as close as two ways of computing them are."""
    if isinstance(found, np.ndarray):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    elif isinstance(found, RequestOutput):
        assert tokens([found]) == tokens([expected])
        assert_close(found.prompt_logprobs, expected.prompt_logprobs)
        assert_close(found.outputs[0].logprobs, expected.outputs[0].logprobs)
    else:
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def assert_close(found: Any, expected: Any) -> None:
    """Log-probabilities of a prompt or an output: of the same tokens, and nearly equal."""
    assert len(found or []) == len(expected or [])
    for one, other in zip(found or [], expected or [], strict=True):
        assert (one or {}).keys() == (other or {}).keys()
        for token, entry in (one or {}).items():
            assert entry.logprob == pytest.approx(other[token].logprob, abs=1e-4)


def test_the_device_is_always_a_step_ahead(engine, monkeypatch):
    """While results of a step are looked at, the next one has been handed out."""
    events: list[str] = []
    decode, take_in = engine.executor.decode, Runner._take_in
    monkeypatch.setattr(engine.executor, "decode", lambda *args: (events.append("out"), decode(*args))[1])
    monkeypatch.setattr(Runner, "_take_in", lambda self, p: (events.append("in"), take_in(self, p))[1])
    engine.generate(CLEAN[0], greedy(13))
    assert events == ["out", "in", "out", "in", "out", "in", "in"]  # the first one in is the prefill's


def test_nothing_more_is_compiled_for_another_prompt_of_like_size(engine):
    engine.generate(CLEAN[1], greedy(8))
    before = set(engine.executor.compiled())
    engine.generate(CLEAN[3], greedy(5))
    assert set(engine.executor.compiled()) == before


def test_end_tokens_end_only_their_own_request(engine):
    ends = SamplingParams(max_tokens=20, temperature=0, logit_bias={EOS: 1e4})
    found = engine.generate([CLEAN[0], CLEAN[1], CLEAN[0]], [ends, greedy(20), greedy(20, logit_bias={EOS: 1e4})])
    assert found[0].outputs[0].token_ids == [EOS]
    assert len(found[1].outputs[0].token_ids) == 20
    assert found[2].outputs[0].token_ids == [EOS] * 20


LONG = prompts(case(LLAMA), (100, 7, 60, 33, 1, 90, 128, 5))
PACKED = {"prefill_tokens": 512, "prefill_chunk": 128}


def recorded(engine: InferenceEngine, monkeypatch: Any) -> list[Any]:
    """The inputs of prefill steps from now on."""
    seen: list[Any] = []
    prefill = engine.executor.prefill
    monkeypatch.setattr(engine.executor, "prefill", lambda *args: (seen.append(args[0]), prefill(*args))[1])
    return seen


@pytest.mark.parametrize(
    ("piece", "mesh"), [(None, {"tensor": 1}), (16, {"data": 2, "tensor": 2})], ids=["rows", "pieces"]
)
def test_packed_prompts_get_what_they_get_alone(piece, mesh, root, monkeypatch):
    """In rows of attention as without a kernel, and in pieces as with one; with penalties, ends and preemptions."""
    monkeypatch.setattr(runners, "packing_of", lambda plan: Packing(piece))
    params = [greedy(6, logprobs=1), sampled(3, 6, repetition_penalty=1.4), greedy(1), sampled(5, 9)] * 2
    with tiny(root, mesh=mesh, max_batch=8, **PACKED) as crowd:
        expected = [crowd.generate(prompt, one) for prompt, one in zip(LONG, params, strict=True)]
        seen = recorded(crowd, monkeypatch)
        found = crowd.generate(LONG, params)
        packed = [inputs for inputs in seen if inputs.pieces is not None]
        assert packed, "this test tests nothing"
        for inputs in packed:
            assert (inputs.positions >= 0).sum() >= 0.5 * inputs.positions.size
        assert tokens(found) == tokens(expected)
        for one, other in zip(found, expected, strict=True):
            for mine, theirs in zip(one.outputs[0].logprobs or [], other.outputs[0].logprobs or [], strict=True):
                assert mine.keys() == theirs.keys()
                for token, entry in mine.items():
                    assert entry.logprob == pytest.approx(theirs[token].logprob, abs=1e-4)
        assert_idle(crowd)


@pytest.mark.parametrize("piece", [None, 16])
def test_packed_prompts_in_two_programs_get_what_they_get_alone(piece, root, monkeypatch):
    monkeypatch.setattr(runners, "packing_of", lambda plan: Packing(piece))
    monkeypatch.setattr(programs, "PARTED_LAYERS", 4)
    with tiny(root, "qwen2-late-window", mesh={"data": 2, "tensor": 2}, max_batch=8, **PACKED) as crowd:
        expected = [crowd.generate(prompt, greedy(5)) for prompt in LONG]
        seen = recorded(crowd, monkeypatch)
        found = crowd.generate(LONG, greedy(5))
        layouts = {InputLayout.of(inputs, 2) for inputs in seen if inputs.pieces is not None}
        assert layouts, "this test tests nothing"
        assert {key[1] for key in crowd.executor._compiled if key[0] == "prefill front"} >= layouts
    assert tokens(found) == tokens(expected)


def test_chunks_of_long_prompts_are_packed_too(root, monkeypatch):
    texts = [prompt * 2 for prompt in LONG[:4]]  # 200, 14, 120 and 66 tokens, 128 at a time
    monkeypatch.setattr(runners, "packing_of", lambda plan: Packing(64))
    with tiny(root, **PACKED) as crowd:
        expected = [crowd.generate(text, greedy(5)) for text in texts]
        seen = recorded(crowd, monkeypatch)
        found = crowd.generate(texts, greedy(5))
    assert any(inputs.pieces is not None for inputs in seen)
    assert tokens(found) == tokens(expected)


def test_what_a_prompt_reports_is_not_packed(root, monkeypatch):
    with tiny(root, max_batch=8, **PACKED) as crowd:
        expected = [crowd.score(prompt).logprobs for prompt in LONG]
        seen = recorded(crowd, monkeypatch)
        found = [output.logprobs for output in crowd.score(LONG)]
    assert all(inputs.pieces is None for inputs in seen)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine[1:] == pytest.approx(theirs[1:], abs=1e-4)


def test_decode_computes_the_sequences_that_are_there(root, monkeypatch):
    """32 slots: 8 rows while there are no more sequences, whatever slots they have."""
    with tiny(root, max_batch=32) as crowd:
        short, long = [prompt[:9] for prompt in CLEAN for _ in range(4)][:20], CLEAN[4][:9]
        params = [sampled(i, 3) for i in range(20)]
        expected = tokens([crowd.generate(long, sampled(7, 30, repetition_penalty=1.3))])[0]
        rows: list[int] = []
        decode = crowd.executor.decode
        monkeypatch.setattr(crowd.executor, "decode", lambda *args: (rows.append(len(args[0].slots)), decode(*args))[1])
        found = crowd.generate([*short, long], [*params, sampled(7, 30, repetition_penalty=1.3)])
        assert rows[0] == 32
        assert rows[-1] == 8
        assert tokens(found)[-1] == expected


def test_slots_are_free_when_the_last_step_of_a_sequence_has_been_handed_out(engine, monkeypatch):
    """Two sequences for each of four slots, each of a prompt and one decode step: no step waits for results."""
    events: list[str] = []
    executor, take_in = engine.executor, Runner._take_in
    for kind in ("prefill", "decode"):
        run = getattr(executor, kind)
        monkeypatch.setattr(executor, kind, lambda *args, kind=kind, run=run: (events.append(kind), run(*args))[1])
    monkeypatch.setattr(Runner, "_take_in", lambda self, p: (events.append("in"), take_in(self, p))[1])
    found = engine.generate([CLEAN[0][:3]] * 8, greedy(5))
    assert {output.outputs[0].finish_reason for output in found} == {"length"}
    assert events == ["prefill", "decode", "in", "prefill", "in", "decode", "in", "in"]
    assert_idle(engine)
