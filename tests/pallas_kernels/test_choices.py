"""What is chosen is what runs, and the table says so."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels
from pallas_kernels.choices import MAX_REDUCE_HEADS, attention_choice, choices


@pytest.mark.parametrize(
    ("platform", "tokens", "heads", "expected"),
    [
        ("gpu", 1, 1, "reduce"),
        ("gpu", 1, MAX_REDUCE_HEADS, "reduce"),
        ("gpu", 1, MAX_REDUCE_HEADS + 1, "dot"),
        ("gpu", 2, 1, "dot"),
        ("cpu", 1, 1, "dot"),
        ("cpu", 16, 8, "dot"),
    ],
)
def test_attention_is_chosen_by_platform_and_shape(platform, tokens, heads, expected):
    assert attention_choice(platform, query_tokens=tokens, heads_per_key=heads).implementation == expected


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (1, 4), (8, 1), (8, 4)])
def test_attention_runs_what_the_table_says(monkeypatch, platform, tokens, heads):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    arrays = [jnp.zeros((1, tokens, 2, heads, 8)), jnp.zeros((1, 2, 64, 8)), jnp.zeros((1, 2, 64, 8))]
    positions = jnp.arange(tokens)[None]

    def program(implementation: str | None) -> str:
        run = lambda *a: pallas_kernels.attention(*a, scale=1.0, implementation=implementation)  # noqa: E731
        return str(jax.make_jaxpr(run)(*arrays, positions))

    op = "decode attention" if tokens == 1 else "prefill attention"
    said = {choice.op: choice.implementation for choice in choices(platform, heads)}[op]
    assert program(None) == program(said)
    assert program("dot") != program("reduce")


def test_the_table_lists_every_case_where_there_is_no_model():
    assert [c.op for c in choices("gpu") if "decode" in c.op] == [
        "decode attention with up to 2 query heads a key",
        "decode attention with more",
    ]
    assert [c.op for c in choices("cpu") if "decode" in c.op] == ["decode attention"]


def test_a_choice_reads_as_a_sentence_and_is_json():
    choice = choices("gpu", 1)[1]
    assert str(choice).startswith("decode attention: reduce (XLA), because XLA fuses")
    assert json.loads(json.dumps(choice.to_dict()))["implementation"] == "reduce"
