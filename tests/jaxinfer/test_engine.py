"""The face: what callers give and get, on a tiny random model and against torch."""

from __future__ import annotations

import dataclasses
import gc
import math
import weakref
from typing import Any

import jax
import numpy as np
import pytest
import torch

from jaxinfer import SamplingParams, init_inference
from jaxinfer.engine import InferenceEngine
from jaxinfer.errors import ConfigError, JaxinferError, RequestError
from sharding import MeshError
from tests.cases import EOS, case
from tests.engines import LLAMA, changed, of, tiny
from tests.oracle import checkpoint, prompts, shared_root, torch_logits, torch_model

IDS = prompts(case(LLAMA), (3, 20, 9, 30))
LONG = prompts(case(LLAMA), (100,))[0]


def greedy(count: int, **changes: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": count, "temperature": 0, "ignore_eos": True} | changes))


def assert_idle(engine: InferenceEngine) -> None:
    scheduler = engine._open().scheduler
    assert scheduler.idle
    assert all(allocator.free == allocator.capacity for allocator in scheduler.allocators)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(root):
    return checkpoint(case(LLAMA), root)


@pytest.fixture(scope="module")
def engine(root):
    with tiny(root) as engine:
        yield engine


@pytest.fixture(scope="module")
def theirs(folder):
    return torch_model(folder, case(LLAMA))


def log_softmax(model: Any, ids: list[int]) -> np.ndarray:
    return torch.log_softmax(torch.tensor(torch_logits(model, ids)), -1).numpy()


# What may be a prompt, and what comes back.


def test_a_string_or_its_tokens_give_one_output_and_a_list_gives_a_list(engine):
    text = "the thing"
    ids = engine.tokenizer(text)["input_ids"]
    single, tokens, array = (engine.generate(prompt, greedy(6)) for prompt in (text, ids, np.asarray(ids)))
    assert single.prompt == text
    assert tokens.prompt is array.prompt is None
    assert single.prompt_token_ids == tokens.prompt_token_ids == array.prompt_token_ids == ids
    assert single.outputs == tokens.outputs == array.outputs
    assert single.outputs[0].text == engine.tokenizer.decode(single.outputs[0].token_ids)
    assert single.finished
    mixed = engine.generate([text, ids, tuple(ids)], greedy(6))
    assert [output.outputs for output in mixed] == [single.outputs] * 3
    assert [output.prompt for output in mixed] == [text, None, None]
    assert engine.generate([text], greedy(6))[0].outputs == single.outputs
    assert engine.generate([], greedy(6)) == []


def test_parameters_are_one_for_all_or_one_each(engine):
    lengths = [len(o.outputs[0].token_ids) for o in engine.generate(IDS[:3], [greedy(2), greedy(5), greedy(3)])]
    assert lengths == [2, 5, 3]
    lengths = [len(o.outputs[0].token_ids) for o in engine.generate(IDS[:3], greedy(4))]
    assert lengths == [4, 4, 4]


@pytest.mark.parametrize(
    ("params", "error"),
    [
        ([greedy(2)], "expected one, or one for each of 2 prompts, got 1"),
        ([greedy(2), {"max_tokens": 3}], r"sampling_params\[1\]: expected SamplingParams, got dict"),
        ([greedy(2), greedy(2, logit_bias={101: 1.0})], "logit_bias: expected token ids under 101, got 101"),
    ],
)
def test_wrong_parameters_are_value_errors(engine, params, error):
    with pytest.raises(ValueError, match=error):
        engine.generate(IDS[:2], params)
    assert_idle(engine)


BAD = [
    ([], "expected at least one token"),
    ("", "expected at least one token"),
    ([5, 101], "token 1 is 101, and the vocabulary has ids 0 to 100"),
    ([-1], "token 0 is -1"),
    ([5, 2.5], r"token 1 is not an integer: 2\.5"),
    ([5, True], "token 1 is not an integer: True"),
    ([5] * 300, "300 tokens, and the context length is 256"),
    ([5] * 256, "256 tokens leave no room for output in a context length of 256"),
    ([5] * 250, r"prompt of 250 tokens \+ max_tokens=7 is 257 tokens, and the context length is 256"),
    ("\ud800", "not encodable as UTF-8"),
    (3.5, "expected a string or token ids, got float"),
    (b"abc", "expected a string or token ids, got bytes"),
    (None, "expected a string or token ids, got NoneType"),
]


def test_bad_prompts_in_a_list_are_errors_of_their_own(engine):
    good = engine.generate(IDS[1], greedy(7)).outputs
    found = engine.generate([IDS[1], *(bad for bad, _ in BAD), IDS[1]], greedy(7))
    assert [found[0].outputs, found[-1].outputs] == [good, good]
    for output, (_, error) in zip(found[1:-1], BAD, strict=True):
        with pytest.raises(RequestError, match=error):
            raise RequestError(output.error)
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []
        assert output.outputs[0].text == ""
    assert_idle(engine)


@pytest.mark.parametrize(("bad", "error"), [(bad, error) for bad, error in BAD if bad != []])
def test_a_bad_prompt_alone_raises(engine, bad, error):
    with pytest.raises(RequestError, match=error if isinstance(bad, str | list) else "prompts: expected a string"):
        engine.generate(bad, greedy(7))
    assert_idle(engine)


@pytest.mark.parametrize("bad", [{"a": 1}, 7, {5, 6}, iter([5])], ids=lambda bad: type(bad).__name__)
def test_what_is_no_list_of_prompts_is_refused(engine, bad):
    for call in (engine.generate, engine.score, engine.logits):
        with pytest.raises(RequestError, match="prompts: expected a string, token ids, or a list of either, got"):
            call(bad)


# How an output ends.


def test_without_max_tokens_the_default_counts_and_none_is_the_whole_context(engine, root):
    default = engine.generate(IDS[0], SamplingParams(temperature=0, ignore_eos=True))
    assert len(default.outputs[0].token_ids) == 16
    with tiny(root, max_model_len=40) as short:
        full = short.generate(IDS[0], greedy(1, max_tokens=None))
        assert len(full.outputs[0].token_ids) == 37
        assert full.outputs[0].finish_reason == "length"
        assert full.outputs[0].token_ids[:16] == default.outputs[0].token_ids
        clipped = short.generate(IDS[3], SamplingParams(temperature=0, ignore_eos=True))
        assert len(clipped.outputs[0].token_ids) == 10  # the default is no wish, so it may be cut


def test_end_of_sequence_stop_tokens_and_min_tokens(engine):
    def run(**changes: Any) -> Any:
        return engine.generate(IDS[0], greedy(6, **{"ignore_eos": False, "logit_bias": {EOS: 1e4}} | changes)).outputs[
            0
        ]

    eos = run()
    assert (eos.token_ids, eos.text, eos.finish_reason, eos.stop_reason) == ([EOS], "", "stop", None)
    ignored = run(ignore_eos=True)
    assert (ignored.token_ids, ignored.finish_reason) == ([EOS] * 6, "length")
    late = run(min_tokens=3)
    assert EOS not in late.token_ids[:3]
    assert (late.token_ids[3:], late.finish_reason) == ([EOS], "stop")
    stop = run(ignore_eos=True, stop_token_ids=[EOS, 7])
    assert (stop.token_ids, stop.finish_reason, stop.stop_reason) == ([EOS], "stop", EOS)


def test_a_stop_token_ends_the_output_where_it_comes(engine):
    free = engine.generate(IDS[1], greedy(12)).outputs[0]
    for place in (0, 2, 3, 4, 7, 11):  # chunks are of 4, the first token comes with the prefill
        stop = free.token_ids[place]
        first = free.token_ids.index(stop)
        cut = engine.generate(IDS[1], greedy(12, stop_token_ids=[stop])).outputs[0]
        assert cut.token_ids == free.token_ids[: first + 1]
        assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
        assert cut.text == engine.tokenizer.decode(free.token_ids[:first])
        kept = engine.generate(IDS[1], greedy(12, stop_token_ids=[stop], include_stop_str_in_output=True)).outputs[0]
        assert kept.text == engine.tokenizer.decode(free.token_ids[: first + 1])


def test_stop_strings_are_cut_wherever_they_straddle_tokens_and_chunks(engine):
    free = engine.generate(IDS[1], greedy(24)).outputs[0]
    stops = [free.text[start : start + size] for size in (1, 2, 5, 9) for start in range(0, len(free.text) - size, 3)]
    found = engine.generate([IDS[1]] * len(stops), [greedy(24, stop=["\x00", stop]) for stop in stops])
    for output, stop in zip(found, stops, strict=True):
        end = free.text.index(stop)
        count = next(n for n in range(1, 25) if stop in engine.tokenizer.decode(free.token_ids[:n]))
        got = output.outputs[0]
        assert (got.text, got.finish_reason, got.stop_reason) == (free.text[:end], "stop", stop)
        assert got.token_ids == free.token_ids[:count]
    kept = engine.generate(IDS[1], greedy(24, stop=stops[5], include_stop_str_in_output=True)).outputs[0]
    assert kept.text == free.text[: free.text.index(stops[5]) + len(stops[5])]


def test_n_outputs_have_seeds_of_their_own(engine):
    params = SamplingParams(n=3, max_tokens=10, temperature=1, seed=5, ignore_eos=True, prompt_logprobs=1)
    found = engine.generate([IDS[0], IDS[1]], params)
    for output in found:
        assert [each.index for each in output.outputs] == [0, 1, 2]
        assert len({tuple(each.token_ids) for each in output.outputs}) == 3
        assert len(output.prompt_logprobs or []) == len(output.prompt_token_ids)
    alone = engine.generate(IDS[0], dataclasses.replace(params, n=1))
    assert alone.outputs[0].token_ids == found[0].outputs[0].token_ids


def test_requests_without_a_seed_differ_and_an_engine_repeats_itself(root):
    def run(seed: int) -> list[list[int]]:
        with tiny(root, seed=seed) as engine:
            found = engine.generate([IDS[0]] * 3, SamplingParams(temperature=1, max_tokens=10, ignore_eos=True))
            return [output.outputs[0].token_ids for output in found]

    first = run(1)
    assert len(set(map(tuple, first))) == 3
    assert run(1) == first
    assert not {tuple(each) for each in run(2)} & {tuple(each) for each in first}


# Log-probabilities, scores, logits.


def test_log_probabilities_are_torchs(engine, theirs):
    count = 5
    output = engine.generate(LONG, greedy(6, logprobs=count, prompt_logprobs=count, repetition_penalty=1.7))
    ids = output.prompt_token_ids + output.outputs[0].token_ids
    expected = log_softmax(theirs, ids)
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    assert output.prompt_logprobs[0] is None
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    assert len(entries) == len(ids) - 1
    for place, entry in enumerate(entries):
        assert entry is not None
        row, token = expected[place], ids[place + 1]
        assert next(iter(entry)) == token
        best = np.argsort(-row)[:count].tolist()
        assert set(entry) == {token, *best}
        for each, logprob in entry.items():
            assert logprob.logprob == pytest.approx(row[each], abs=5e-4)
            assert logprob.rank == 1 + (row > row[each]).sum()
            assert logprob.decoded_token == engine.tokenizer.decode([each])
    drawn = [entry[token].logprob for entry, token in zip(entries[len(LONG) - 1 :], ids[len(LONG) :], strict=True)]
    assert output.outputs[0].cumulative_logprob == pytest.approx(math.fsum(drawn), abs=1e-5)


def test_scores_are_torchs(engine, theirs):
    texts = ["the thing in the end", LONG, [7]]
    scores = engine.score(texts)
    for score in scores:
        expected = log_softmax(theirs, score.token_ids)
        assert score.logprobs[0] is None
        rows = np.arange(len(score.token_ids) - 1)
        np.testing.assert_allclose(score.logprobs[1:], expected[rows, score.token_ids[1:]], atol=5e-4)
    assert scores[0].text == texts[0]
    assert scores[1].text is None
    alone = engine.score(texts[0])
    assert alone.total == pytest.approx(scores[0].total, abs=1e-3)
    assert_idle(engine)


def test_logits_are_torchs_over_several_chunks(engine, theirs):
    found = engine.logits([LONG, IDS[0], [5] * 256])
    for ids, logits in zip((LONG, IDS[0], [5] * 256), found, strict=True):
        assert logits.shape == (len(ids), 101)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, torch_logits(theirs, ids), atol=2e-4, rtol=1e-3)
    np.testing.assert_allclose(engine.logits(IDS[0]), found[1], atol=1e-4)


@pytest.mark.parametrize("call", ["score", "logits"])
def test_scores_and_logits_of_bad_texts_raise_and_name_them(engine, call):
    with pytest.raises(RequestError, match=r"^text 1: prompt: token 0 is 500"):
        getattr(engine, call)([[5], [500]])
    with pytest.raises(RequestError, match=r"^prompt: expected at least one token"):
        getattr(engine, call)("")
    assert_idle(engine)


# Streams.


@pytest.mark.parametrize("changes", [{}, {"stop": True}, {"temperature": 1, "seed": 3}], ids=str)
def test_pieces_of_a_stream_are_the_text(engine, changes):
    params = greedy(
        30,
        **changes | ({"stop": engine.generate(IDS[1], greedy(30)).outputs[0].text[11:15]} if "stop" in changes else {}),
    )
    expected = engine.generate(IDS[1], params).outputs[0].text
    pieces = list(engine.stream(IDS[1], params))
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    assert all(pieces)
    assert_idle(engine)


def test_closing_a_stream_early_frees_its_slot(engine):
    stream = engine.stream(IDS[0], greedy(200))
    next(stream)
    assert not engine._open().scheduler.idle
    stream.close()
    assert_idle(engine)


def test_other_calls_run_while_streams_are_open(engine):
    expected = engine.generate(IDS, greedy(30))
    streams = [engine.stream(prompt, greedy(30)) for prompt in IDS]
    texts = [next(stream) for stream in streams]
    beside = engine.generate(IDS, greedy(30))
    assert [output.outputs for output in beside] == [output.outputs for output in expected]
    for place, stream in enumerate(streams):
        texts[place] += "".join(stream)
    assert texts == [output.outputs[0].text for output in expected]
    assert_idle(engine)


def test_a_stream_is_refused_before_it_begins(engine):
    for bad, error in (([5, 500], "token 1 is 500"), (["a", "b"], "stream takes one prompt"), ([5] * 256, "no room")):
        with pytest.raises(RequestError, match=error):
            engine.stream(bad, greedy(5))
    with pytest.raises(ValueError, match="n: stream gives one output, got n=2"):
        engine.stream("a", SamplingParams(n=2, temperature=1))


# Chat.


def test_chat_continues_the_template(engine):
    messages = [{"role": "user", "content": "the end"}]
    assert engine.chat_ids(messages) == engine.tokenizer("user: the end\n", add_special_tokens=False)["input_ids"]
    answer = engine.chat(messages, greedy(8))
    assert answer.outputs == engine.generate(engine.chat_ids(messages), greedy(8)).outputs
    with pytest.raises(RequestError, match="messages: expected a list"):
        engine.chat("hello")


# Loading, defaults, closing.


def test_defaults_come_from_the_generation_config(folder, tmp_path, engine):
    config = {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 1.5, "eos_token_id": [EOS, 40]}
    expected = engine.generate(IDS[1], greedy(5, repetition_penalty=1.5))
    with of(changed(folder, tmp_path / "model", generation=config)) as other:
        assert other.eos_token_ids == (EOS, 40)
        found = other.generate(IDS[1], SamplingParams(ignore_eos=True))
        assert found.outputs == expected.outputs
        ended = other.generate(IDS[1], SamplingParams(max_tokens=3, logit_bias={40: 1e4}))
        assert (ended.outputs[0].token_ids, ended.outputs[0].stop_reason) == ([40], None)
        np.testing.assert_allclose(other.score(LONG).total, engine.score(LONG).total, rtol=1e-5)


def test_a_checkpoint_without_a_tokenizer_takes_ids(folder, tmp_path, engine):
    target = changed(folder, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).unlink()
    with of(target) as bare:
        assert bare.tokenizer is None
        output = bare.generate(IDS[0], greedy(5))
        assert output.outputs[0].token_ids == engine.generate(IDS[0], greedy(5)).outputs[0].token_ids
        assert output.outputs[0].text == ""
        found = bare.generate(["text", IDS[0]], [greedy(5), greedy(5, stop="x")])
        assert "no tokenizer; give prompts as token ids" in (found[0].error or "")
        assert "stop strings need a tokenizer" in (found[1].error or "")
        with pytest.raises(RequestError, match="no text to stream"):
            bare.stream(IDS[0])
        with pytest.raises(ConfigError, match="no chat template"):
            bare.chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("mesh", [{"tensor": 1}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize(("kv_dtype", "allowed"), [("int8", 0.03), ("fp8", 0.2)])
def test_a_cache_of_8_bits_is_nearly_that_of_the_dtype(root, engine, kv_dtype, allowed, mesh):
    """Logits by prefill, of a random model, which is touchy; and decode says what prefill over such a cache says."""
    prompts = [list(range(1, 91)), [5, 7, 9]]
    exact = engine.logits(prompts)
    with tiny(root, mesh=mesh, kv_dtype=kv_dtype) as rough:
        found = rough.logits(prompts)
        for ours, theirs in zip(found, exact, strict=True):
            error = np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))
            assert 0 < error < allowed
        for output in rough.generate(prompts, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)):
            said = output.outputs[0].token_ids
            again = rough.logits(output.prompt_token_ids + said[:-1])[len(output.prompt_token_ids) - 1 :]
            gaps = again.max(axis=-1) - again[np.arange(len(said)), said]
            assert gaps.max() < 1e-4


def test_a_closed_engine_says_so_and_its_memory_is_free(root):
    engine = tiny(root)
    stream = engine.stream(IDS[0], greedy(50))
    next(stream)
    arrays = jax.tree.leaves((engine.executor._leaves, engine.executor.caches))
    executor = weakref.ref(engine.executor)
    engine.close()
    engine.close()
    assert all(array.is_deleted() for array in arrays)
    with pytest.raises(JaxinferError, match="engine is closed"):
        next(stream)
    del stream
    gc.collect()
    assert executor() is None or not executor()._compiled
    for call in (lambda: engine.generate(IDS[0]), lambda: engine.score(IDS[0]), lambda: next(engine.stream(IDS[0]))):
        with pytest.raises(JaxinferError, match="engine is closed"):
            call()


def test_what_is_wrong_is_found_before_anything_is_loaded(folder, monkeypatch):
    monkeypatch.setattr("jaxinfer.pretrained.Pretrained.load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(MeshError):
        init_inference(folder, mesh={"tensor": 3})
    with pytest.raises(ConfigError, match="max_batch"):
        init_inference(folder, max_batch=0)
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        init_inference(folder, dtype="int8")


def test_an_engine_shows_itself(engine):
    assert "llama" in repr(engine)
    page = engine._repr_html_()
    assert "<table>" in page
    engine.name, name = "<script>", engine.name
    assert "<script>" not in engine._repr_html_()
    engine.name = name
