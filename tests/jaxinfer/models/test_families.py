"""Every family against transformers on torch: the same folder, float32, one device, no cache and no engine."""

from __future__ import annotations

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import read_config
from jaxinfer.models.families import FAMILIES, ignored, load_spec, sources_of, spec_of
from jaxinfer.models.spec import Layout
from tests.bare import BareModel, read_tensors
from tests.cases import CASES, case
from tests.oracle import (
    checkpoint,
    prompts,
    rms,
    shared_root,
    torch_batch_logits,
    torch_greedy,
    torch_logits,
    torch_model,
)

TOLERANCE = {"atol": 2e-4, "rtol": 1e-3}
STEPS = 32


def each(cases=CASES):
    return pytest.mark.parametrize("chosen", cases, ids=lambda chosen: chosen.name)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


def worst(values, reference):
    return max(float(np.abs(one - other).max()) for one, other in zip(values, reference, strict=True))


def test_every_family_has_at_least_two_cases():
    counted = {family: sum(each.family == family for each in CASES) for family in FAMILIES}
    assert min(counted.values()) >= 2, counted
    assert len({each.name for each in CASES}) == len(CASES)


@each()
def test_logits_and_greedy_tokens_are_those_of_transformers(chosen, root):
    folder = checkpoint(chosen, root)
    theirs, ours = torch_model(folder, chosen), BareModel(folder)
    assert not ours.unused, "tensors of the file that fill nothing"
    asked = prompts(chosen)
    for got, prompt in zip(ours.logits(asked), asked, strict=True):
        np.testing.assert_allclose(got, torch_logits(theirs, prompt), **TOLERANCE)
    reference = [torch_greedy(theirs, prompt, STEPS) for prompt in asked]
    assert min(each.margin for each in reference) > 2e-3, "a near tie: choose another seed for this case"
    assert ours.greedy(asked, STEPS) == [each.token_ids for each in reference]


@each()
def test_bfloat16_errs_little_more_than_transformers_does(chosen, root):
    """The truth is the float32 result of the same bfloat16 weights. transformers rounds every intermediate result to
    bfloat16, ours fewer of them, so its own error is the measure: a quarter more is room for luck. It is the
    root-mean-square over some ten thousand logits; none of them may be off by more than twice its worst.
    """
    folder, asked = checkpoint(chosen, root, torch.bfloat16), prompts(chosen)
    exact, rounded = torch_model(folder, chosen), torch_model(folder, chosen, torch.bfloat16)
    truth = [torch_logits(exact, prompt) for prompt in asked]
    theirs = [torch_logits(rounded, prompt) for prompt in asked]
    ours = BareModel(folder, jnp.bfloat16).logits(asked)
    assert rms(ours, truth) < 1.25 * rms(theirs, truth)
    assert worst(ours, truth) < 2 * worst(theirs, truth)


@each([chosen for chosen in CASES if chosen.name in ("bloom-twelve-heads", "falcon-alibi-twelve-heads")])
def test_alibi_at_positions_that_bfloat16_cannot_hold(chosen, root):
    folder = checkpoint(chosen, root)
    asked = prompts(chosen, lengths=(270, 300))
    theirs = torch_model(folder, chosen)
    for got, prompt in zip(BareModel(folder, width=304).logits(asked), asked, strict=True):
        np.testing.assert_allclose(got, torch_logits(theirs, prompt), **TOLERANCE)


# A row of LongRoPE in a padded batch of transformers takes the frequencies of the longest row; ours takes its own.
@each([chosen for chosen in CASES if "longrope" not in chosen.name][::5])
def test_the_reference_does_not_depend_on_its_batch(chosen, root):
    theirs, asked = torch_model(checkpoint(chosen, root), chosen), prompts(chosen)
    for got, prompt in zip(torch_batch_logits(theirs, asked), asked, strict=True):
        np.testing.assert_allclose(got, torch_logits(theirs, prompt), **TOLERANCE)


@each(
    [
        chosen
        for chosen in CASES
        if 4 in chosen.tensor and chosen.name.endswith(("-plain", "-multi-query", "grouped-two-norms"))
    ]
)
def test_a_layout_for_four_devices_holds_the_same_model(chosen, root):
    folder, asked = checkpoint(chosen, root), prompts(chosen)
    for one, four in zip(BareModel(folder).logits(asked), BareModel(folder, tensor=4).logits(asked), strict=True):
        np.testing.assert_allclose(four, one, atol=1e-4, rtol=1e-4)


@each([next(each for each in CASES if each.family == family) for family in FAMILIES])
def test_names_without_the_prefix_and_leftovers_are_understood(chosen, root):
    folder = checkpoint(chosen, root)
    spec, tensors = load_spec(folder), read_tensors(folder)
    layout = Layout.of(spec)
    prefix = re.escape({"gpt_neox": "gpt_neox."}.get(chosen.family, "")) or r"(transformer|model)\."
    short = [re.sub(f"^{prefix}", "", name) for name in tensors]
    assert short != list(tensors)
    named = {piece.name for pieces in sources_of(spec, layout, short).values() for piece in pieces}
    assert named == set(short)
    assert not any(ignored(spec, name) for name in [*tensors, *short])


@pytest.mark.parametrize(
    ("name", "leftovers"),
    [
        ("gpt2-plain", ["h.0.attn.bias", "transformer.h.11.attn.masked_bias", "lm_head.weight"]),
        ("gpt_neo-local", ["transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"]),
        ("gptj-partial", ["transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"]),
        ("gpt_neox-parallel", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("llama-plain", ["model.layers.0.self_attn.rotary_emb.inv_freq"]),
        ("falcon-alibi", ["lm_head.weight"]),
        ("bloom-plain", ["lm_head.weight"]),
    ],
)
def test_leftovers_of_older_files_are_ignored(name, leftovers, root):
    spec = load_spec(checkpoint(case(name), root))
    assert [ignored(spec, leftover) for leftover in leftovers] == [True] * len(leftovers)


def test_an_untied_head_is_not_a_leftover(root):
    assert not ignored(load_spec(checkpoint(case("llama-plain"), root)), "lm_head.weight")


def refused(family, **options):
    with pytest.raises(ConfigError) as caught:
        spec_of(AutoConfig.for_model(family, **options))
    return str(caught.value)


@pytest.mark.parametrize(
    ("family", "options", "named"),
    [
        ("gpt2", {"n_embd": 30, "n_head": 4}, "n_embd=30"),
        ("gpt2", {"activation_function": "mish"}, "activation_function"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention"),
        ("gpt2", {"n_layer": 0}, "n_layer"),
        ("gpt2", {"layer_norm_epsilon": 0.0}, "layer_norm_epsilon"),
        ("gptj", {"rotary_dim": 7}, "even"),
        ("llama", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 4}, "multiple"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma2", {"sliding_window": None}, "sliding_window"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen2", {"layer_types": ["chunked_attention"] * 32}, "chunked_attention"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "sliding_window"),
        ("falcon", {"new_decoder_architecture": True, "parallel_attn": False}, "parallel_attn"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn"),
        ("falcon", {"multi_query": False, "num_kv_heads": 1}, "num_kv_heads"),
        ("bert", {}, "model_type 'bert'"),
        ("mixtral", {}, "model_type 'mixtral'"),
    ],
)  # fmt: skip
def test_what_is_not_implemented_is_refused_by_name(family, options, named):
    assert named in refused(family, **options)


def test_an_option_of_a_later_transformers_is_refused(root, tmp_path):
    folder = checkpoint(case("qwen3-plain"), root)
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"] = {"1": {"num_key_value_heads": 1}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="per_layer_config"):
        spec_of(read_config(tmp_path))


def test_a_classifier_is_refused(root, tmp_path):
    config = json.loads((checkpoint(case("llama-plain"), root) / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification"):
        load_spec(tmp_path)
