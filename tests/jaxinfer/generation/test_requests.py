from __future__ import annotations

import json
import math

import pytest

from jaxinfer.generation.requests import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    RequestOutputs,
    ScoreOutput,
    logprob_dict,
)

EVIL = "<script>alert('x')</script>&\"\n"


def request(**changes: object) -> RequestOutput:
    output = CompletionOutput(
        text=EVIL, token_ids=[5, 6], finish_reason="stop", stop_reason="\n",
        logprobs=[{5: Logprob(-0.5, 1, "a"), 9: Logprob(-math.inf, 7, "b")}, {6: Logprob(math.nan, 0)}],
        cumulative_logprob=-math.inf,
    )  # fmt: skip
    values: dict[str, object] = {
        "request_id": "3", "prompt": EVIL, "prompt_token_ids": [1, 2], "outputs": [output],
        "prompt_logprobs": [None, {2: Logprob(-1.5, 2, "<b>")}],
        "metrics": RequestMetrics(time_to_first_token=0.25, total=math.inf),
    }  # fmt: skip
    return RequestOutput(**(values | changes))  # type: ignore[arg-type]


def test_json_is_strict_and_complete() -> None:
    found = json.loads(json.dumps(request().to_dict(), allow_nan=False))
    assert found["prompt"] == EVIL
    assert found["prompt_logprobs"] == [None, [{"token_id": 2, "logprob": -1.5, "rank": 2, "decoded_token": "<b>"}]]
    assert found["metrics"] == {
        "queued": None, "time_to_first_token": 0.25, "time_per_output_token": None, "total": None,
    }  # fmt: skip
    (output,) = found["outputs"]
    assert output["cumulative_logprob"] is None
    assert output["logprobs"][0][1] == {"token_id": 9, "logprob": None, "rank": 7, "decoded_token": "b"}
    assert (output["finish_reason"], output["stop_reason"], output["token_ids"]) == ("stop", "\n", [5, 6])
    assert json.loads(json.dumps(RequestOutputs([request()]).to_dict(), allow_nan=False)) == [found]


def test_html_is_escaped_and_bounded() -> None:
    table = RequestOutputs([request(), request(error=EVIL, outputs=[])] * 50)._repr_html_()
    assert "<script>" not in table
    assert "&lt;script&gt;alert(&#x27;x&#x27;)" in table
    assert "and 80 more" in table
    assert request()._repr_html_().count("<tr>") == 2
    assert "3 tokens" in request(prompt=None, prompt_token_ids=[1, 2, 3])._repr_html_()
    score = ScoreOutput(text=EVIL, token_ids=[1], logprobs=[None])
    assert "<script>" not in score._repr_html_()


def test_repr_is_one_short_line() -> None:
    long = request(prompt="x" * 1000, error="y" * 1000)
    assert "\n" not in repr(long)
    assert len(repr(long)) < 400
    assert repr(CompletionOutput(text="hi", token_ids=[1], finish_reason="length")) == (
        "CompletionOutput('hi', 1 tokens, length)"
    )
    assert len(repr(ScoreOutput(text="x" * 1000, token_ids=[1], logprobs=[None]))) < 150


def test_finished() -> None:
    assert request().finished
    assert not request(outputs=[CompletionOutput()]).finished


def test_score() -> None:
    score = ScoreOutput(text="abc", token_ids=[1, 2, 3], logprobs=[None, -1.0, -3.0])
    assert score.total == -4.0
    assert score.perplexity == pytest.approx(math.exp(2))
    assert score.to_dict() == {
        "text": "abc", "token_ids": [1, 2, 3], "logprobs": [None, -1.0, -3.0], "total": -4.0,
        "perplexity": score.perplexity,
    }  # fmt: skip
    assert math.isnan(ScoreOutput(text="", token_ids=[], logprobs=[]).perplexity)
    assert ScoreOutput(text="", token_ids=[1], logprobs=[None]).to_dict()["perplexity"] is None
    impossible = ScoreOutput(text="", token_ids=[1, 2], logprobs=[-1.0, -math.inf])
    assert (impossible.total, impossible.perplexity) == (-math.inf, math.inf)
    assert ScoreOutput(text="", token_ids=[1], logprobs=[-1e9]).perplexity == math.inf


def test_logprob_dict() -> None:
    def decode(token: int) -> str:
        return f"t{token}"

    found = logprob_dict(7, -2.0, 4, [3, 5, 7], [-0.5, -1.0, -2.0], 2, decode)
    assert list(found.items()) == [
        (7, Logprob(-2.0, 4, "t7")), (3, Logprob(-0.5, 1, "t3")), (5, Logprob(-1.0, 2, "t5")),
    ]  # fmt: skip
    assert list(logprob_dict(3, -0.5, 1, [3, 5], [-0.5, -1.0], 2, decode)) == [3, 5]
    assert list(logprob_dict(7, -2.0, 4, [3], [-0.5], 0, decode)) == [7]
