"""Prompts on their way in: every wrong one is refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.errors import RequestError
from jaxinfer.generation.live import LiveRequest, encode, is_prompt, output_limit
from jaxinfer.generation.params import GenerationDefaults, SamplingParams


class Words:
    """A tokenizer of single letters: a is 0."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def check(prompt, tokenizer=None):
    return encode(prompt, tokenizer, vocab_size=10, longest=5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("text", True), ("", True), ([1, 2], True), (np.array([1, 2]), True), ((3,), True), ([np.int32(1)], True),
        ([], False), (["text"], False), ([[1, 2]], False), (None, False),
    ],
)  # fmt: skip
def test_one_prompt_or_several(value, expected):
    assert is_prompt(value) is expected


def test_prompts_become_plain_ids():
    assert check("abc", Words()) == [0, 1, 2]
    ids = check(np.array([1, 9], np.int32))
    assert ids == [1, 9]
    assert all(type(token) is int for token in ids)


@pytest.mark.parametrize(
    ("prompt", "tokenizer", "message"),
    [
        ("abc", None, "no tokenizer"),
        ("", Words(), "at least one token"),
        ([], None, "at least one token"),
        ("\ud800", Words(), "not encodable as UTF-8"),
        (b"abc", Words(), "got bytes"),
        (7, None, "got int"),
        (None, None, "got NoneType"),
        ([1, True], None, "token 1 is not an integer: True"),
        ([1.0], None, "token 0 is not an integer"),
        ([1, 10], None, "token 1 is 10, and the vocabulary has ids 0 to 9"),
        ([1, -(2**70)], None, f"token 1 is -{2**70}, and the vocabulary has ids 0 to 9"),
        ([2**64, 1], None, f"token 0 is {2**64}, and the vocabulary has ids 0 to 9"),
        ([-1], None, "token 0 is -1"),
        ([1] * 6, None, "6 tokens, and the context length is 5"),
    ],
)
def test_wrong_prompts_are_refused(prompt, tokenizer, message):
    with pytest.raises(RequestError, match=message):
        check(prompt, tokenizer)


def limit(prompt, longest, default=16, **fields):
    params = SamplingParams(**fields)
    return output_limit(prompt, params, params.resolve(GenerationDefaults(max_tokens=default), (), 10), longest)


def test_output_is_what_was_asked_for_or_what_fits():
    assert limit(3, 10, max_tokens=7) == 7
    assert limit(3, 10, max_tokens=None) == 7
    assert limit(3, 10) == 7  # the default of 16 is a wish
    assert limit(3, 100) == 16


def test_output_that_does_not_fit_is_refused():
    with pytest.raises(
        RequestError, match=r"prompt of 3 tokens \+ max_tokens=8 is 11 tokens, and the context length is 10"
    ):
        limit(3, 10, max_tokens=8)
    with pytest.raises(RequestError, match="leave no room for output"):
        limit(10, 10)


def test_a_refused_request_has_an_output_that_says_error():
    request = LiveRequest("4", "text")
    request.error = "no"
    output = request.output()
    assert (output.request_id, output.prompt, output.error) == ("4", "text", "no")
    assert output.outputs[0].finish_reason == "error"
    assert request.failure() == "no"
