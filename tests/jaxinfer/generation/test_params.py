from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import ConfigError
from jaxinfer.generation.params import UNSET, GenerationDefaults, ResolvedParams, SamplingParams, derive_seed

BAD: dict[str, list[object]] = {
    "n": [0, -1, True, 1.0, "2", None],
    "max_tokens": [0, -3, True, 2.0, "8"],
    "min_tokens": [-1, False, 1.5, None],
    "temperature": [-0.1, math.nan, math.inf, True, "1", 10**400],
    "top_k": [-2, 1.0, True, "5"],
    "top_p": [0, -0.5, 1.01, math.nan, True, [1]],
    "min_p": [-0.1, 1.5, math.nan, False],
    "repetition_penalty": [0, -1, math.nan, math.inf, True],
    "presence_penalty": [-2.1, 3, math.nan, None, True],
    "frequency_penalty": [-2.1, 3, math.inf, None],
    "logit_bias": [
        {-1: 1.0},
        {True: 1.0},
        {"3": 1.0},
        {3: math.nan},
        {3: math.inf},
        {3: "x"},
        {3: 1e9},
        [3],
        {3: True},
    ],
    "stop": ["", [""], ["a", ""], 3, [b"a"], {"a"}],
    "stop_token_ids": [[-1], [1.0], [True], 5, ["a"], "ab"],
    "ignore_eos": [1, None, "yes"],
    "seed": [-1, 2**64, 1.0, True, "1"],
    "logprobs": [-1, 21, True, 1.0],
    "prompt_logprobs": [-1, 21, True, "5"],
    "include_stop_str_in_output": [0, None],
    "skip_special_tokens": [1, None],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_value_names_the_field(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        SamplingParams(**{name: value})


def test_every_field_is_checked() -> None:
    assert set(BAD) == {item.name for item in fields(SamplingParams)}


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=2), st.just(object()),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.floats()), max_size=3),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=2)), st.one_of(st.floats(), st.integers()), max_size=2),
)  # fmt: skip


@given(name=st.sampled_from(sorted(BAD)), value=ANYTHING)
def test_anything_is_taken_or_a_value_error(name: str, value: object) -> None:
    message = ""
    try:
        SamplingParams(**{name: value}).resolve({}, [2], 10**9)
    except ValueError as error:  # anything else fails the test
        message = str(error)
    assert message == "" or message.startswith(f"{name}: ")


def test_combinations() -> None:
    with pytest.raises(ValueError, match=r"^n: expected 1 with greedy"):
        SamplingParams(n=2, temperature=0)
    with pytest.raises(ValueError, match=r"^min_tokens: expected at most max_tokens=4, got 5"):
        SamplingParams(min_tokens=5, max_tokens=4)
    with pytest.raises(ValueError, match=r"^min_tokens: expected at most max_tokens=16 .*default"):
        SamplingParams(min_tokens=50).resolve({}, [], 10)
    with pytest.raises(ValueError, match=r"^n: expected 1 with greedy .*checkpoint's default"):
        SamplingParams(n=2).resolve({"do_sample": False}, [], 10)
    assert SamplingParams(min_tokens=50, max_tokens=None).resolve({}, [], 10).max_tokens is None


def test_values_are_normalised() -> None:
    params = SamplingParams(
        n=np.int64(2), temperature=1, top_k=-1, top_p=np.float32(0.5), stop="a", stop_token_ids=[4, 4, 3],
        logit_bias={np.int32(3): 2, 5: -math.inf},
    )  # fmt: skip
    assert type(params.n) is int
    assert type(params.temperature) is float
    assert (params.top_k, params.top_p) == (0, 0.5)
    assert params.stop == ("a",)
    assert params.stop_token_ids == (4, 3)
    assert params.logit_bias == {3: 2.0, 5: -math.inf}
    assert SamplingParams(stop=["a", "b", "a"]).stop == ("a", "b")


def test_later_changes_of_the_users_objects_do_not_reach_it() -> None:
    bias, stop = {1: 1.0}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[2] = 5.0
    stop.append("")
    assert (params.logit_bias, params.stop) == ({1: 1.0}, ("a",))


def test_frozen_keyword_only_comparable_copyable() -> None:
    params = SamplingParams(temperature=0.5, logit_bias={1: 2.0})
    with pytest.raises(AttributeError):
        params.temperature = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(params))
    assert again == copy.deepcopy(params) == params
    assert hash(again) == hash(params)
    assert again.max_tokens is UNSET


def test_repr_shows_what_was_given() -> None:
    assert repr(SamplingParams()) == "SamplingParams()"
    assert repr(SamplingParams(temperature=0, max_tokens=None)) == "SamplingParams(max_tokens=None, temperature=0.0)"


def test_neutral_defaults() -> None:
    resolved = SamplingParams().resolve({}, [2, 7], 10)
    assert resolved == ResolvedParams(
        n=1, max_tokens=16, min_tokens=0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0,
        presence_penalty=0.0, frequency_penalty=0.0, logit_bias=(), stop=(), stop_token_ids=frozenset(),
        eos_token_ids=frozenset({2, 7}), seed=0, logprobs=None, prompt_logprobs=None,
        include_stop_str_in_output=False, skip_special_tokens=True,
    )  # fmt: skip
    assert hash(resolved) == hash(SamplingParams().resolve({}, [7, 2], 10))


CONFIG = {
    "do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
    "max_new_tokens": 99,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CONFIG, (0.7, 20, 0.9, 0.05, 1.1, 99)),
        (CONFIG | {"do_sample": False}, (0.0, 0, 1.0, 0.0, 1.1, 99)),
        ({key: value for key, value in CONFIG.items() if key != "do_sample"}, (0.7, 20, 0.9, 0.05, 1.1, 99)),
        ({"do_sample": True}, (1.0, 0, 1.0, 0.0, 1.0, 16)),
        ({"temperature": None, "top_k": None, "max_length": 4096, "bos_token_id": 1}, (1.0, 0, 1.0, 0.0, 1.0, 16)),
        ({"temperature": 1e-7}, (0.0, 0, 1.0, 0.0, 1.0, 16)),
    ],
)
def test_defaults_of_the_checkpoint(config: dict[str, Any], expected: tuple[float, ...]) -> None:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens")
    resolved = SamplingParams().resolve(config, [], 10)
    assert tuple(getattr(resolved, name) for name in names) == expected
    given = dict(zip(names, (0.5, 3, 0.8, 0.2, 1.3, 5), strict=True))
    resolved = SamplingParams(**given).resolve(config, [], 10)  # type: ignore[arg-type]
    assert {name: getattr(resolved, name) for name in names} == given


def test_neutral_values_override_the_checkpoint() -> None:
    resolved = SamplingParams(temperature=0, top_k=0, top_p=1, min_p=0, repetition_penalty=1, max_tokens=None).resolve(
        CONFIG, [], 10
    )
    assert resolved.greedy
    assert (resolved.top_k, resolved.top_p, resolved.min_p, resolved.repetition_penalty) == (0, 1, 0, 1)
    assert resolved.max_tokens is None


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", -1), ("temperature", "1"), ("top_p", 1.5), ("top_k", 2.5), ("min_p", math.nan),
     ("repetition_penalty", 0), ("max_new_tokens", 0), ("do_sample", "yes")],
)  # fmt: skip
def test_bad_generation_config(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^generation_config: {key}: expected .*, got "):
        GenerationDefaults.read({key: value})


def test_options_that_are_not_supported_are_named() -> None:
    config = {"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0, "suppress_tokens": [], "top_p": 0.5}
    with pytest.warns(UserWarning, match=r"sets num_beams, no_repeat_ngram_size: not supported and ignored") as caught:
        defaults = GenerationDefaults.read(config)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert SamplingParams().resolve(defaults, [], 10).top_p == 0.5


def test_the_options_of_transformers_are_known() -> None:
    """Its defaults warn of nothing, and every option is either taken, warned about, or known to change no token."""
    from transformers import GenerationConfig

    from jaxinfer.generation.params import _IGNORED

    harmless = {
        "max_length", "early_stopping", "use_cache", "length_penalty", "output_scores", "return_dict_in_generate",
        "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "assistant_lookbehind", "target_lookbehind",
    }  # fmt: skip
    taken = {"do_sample", "temperature", "top_k", "top_p", "repetition_penalty"}
    defaults = GenerationConfig._get_default_generation_params()
    assert set(defaults) - harmless - taken <= set(_IGNORED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GenerationDefaults.read(defaults)
        GenerationDefaults.read(GenerationConfig().to_dict())


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    for params in (SamplingParams(logit_bias={10: 1.0}), SamplingParams(stop_token_ids=[3, 10])):
        with pytest.raises(ValueError, match=r"^(logit_bias|stop_token_ids): expected token ids under 10, got 10"):
            params.resolve({}, [], 10)
    resolved = SamplingParams(stop_token_ids=[3]).resolve({}, [2, 50256, -1], 10)
    assert resolved.eos_token_ids == {2}
    assert resolved.end_token_ids == {2, 3}
    assert SamplingParams(stop_token_ids=[3], ignore_eos=True).resolve({}, [2], 10).end_token_ids == {3}


def test_seeds() -> None:
    assert SamplingParams(seed=2**64 - 1).resolve({}, [], 10, seed=7).seed == 2**64 - 1
    assert SamplingParams().resolve({}, [], 10, seed=7).seed == 7
    first, second, third = SamplingParams(n=3, seed=5).resolve({}, [], 10).outputs()
    assert [item.n for item in (first, second, third)] == [1, 1, 1]
    assert first.seed == 5
    assert len({first.seed, second.seed, third.seed}) == 3
    # Written down: a change would change everybody's seeded outputs.
    assert derive_seed(5, 1) == second.seed == 15754209684419049175
