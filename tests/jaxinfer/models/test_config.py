from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, GPT2Config, LlamaConfig, Qwen2Config

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import NEUTRAL, ConfigReader, read_config
from jaxinfer.models.families import load_spec
from tests.cases import CASES


def reader(config=None, **fields):
    config = config or LlamaConfig()
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    return ConfigReader(config)


@pytest.mark.parametrize("value", [0, -3, 1.0, True, "4", None, 2**31])
def test_integers(value):
    with pytest.raises(ConfigError, match="llama config: size must be a positive integer"):
        reader(size=value).integer("size")
    assert reader(size=3).integer("size") == 3
    assert reader().integer("size", 5) == 5


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan"), True, "1e-5", None])
def test_numbers(value):
    with pytest.raises(ConfigError, match="llama config: eps must be a positive number"):
        reader(eps=value).number("eps")
    assert reader(eps=2).number("eps") == 2.0


def test_what_may_be_unset():
    assert reader(window=None).optional_integer("window") is None
    assert reader(window=4).optional_integer("window") == 4
    assert reader(cap=None).optional_number("cap") is None
    assert reader(cap=30).optional_number("cap") == 30.0
    with pytest.raises(ConfigError, match="window"):
        reader(window=0).optional_integer("window")


def test_flags_choices_and_requirements():
    assert reader(bias=True).flag("bias") is True
    with pytest.raises(ConfigError, match="bias must be true or false, got 1"):
        reader(bias=1).flag("bias")
    assert reader(act="a").choice("act", {"a": 1, "b": 2}) == 1
    with pytest.raises(ConfigError, match="act must be one of a, b, got 'c'"):
        reader(act="c").choice("act", {"a": 1, "b": 2})
    reader(mode=None).require("mode", "x")
    with pytest.raises(ConfigError, match="mode='y' is not implemented, only 'x'"):
        reader(mode="y").require("mode", "x")


def test_division():
    assert reader(width=12, heads=3).divide("width", "heads") == 4
    with pytest.raises(ConfigError, match="width=12 is not a multiple of heads=5"):
        reader(width=12, heads=5).divide("width", "heads")


def test_windows_follow_the_layer_types():
    types = ["sliding_attention", "full_attention"]
    assert reader(layer_types=types, sliding_window=7).windows(2) == (7, None)
    assert reader(layer_types=None, sliding_window=7).windows(2) == (None, None)
    with pytest.raises(ConfigError, match="2 entries for 3 layers"):
        reader(layer_types=types, sliding_window=7).windows(3)
    with pytest.raises(ConfigError, match="sliding_window is unset"):
        reader(layer_types=types, sliding_window=None).windows(2)
    with pytest.raises(ConfigError, match="chunked"):
        reader(layer_types=["chunked", "full_attention"], sliding_window=7).windows(2)


def test_a_field_that_nobody_read_is_refused_unless_it_is_at_its_default():
    changed = ConfigReader(Qwen2Config(rms_norm_eps=0.5, tie_word_embeddings=True))
    changed.flag("tie_word_embeddings")
    with pytest.raises(ConfigError, match=r"not implemented: rms_norm_eps=0\.5$"):
        changed.finish()
    changed.number("rms_norm_eps")
    changed.finish()


def test_neutral_and_foreign_fields_are_let_through():
    config = GPT2Config(resid_pdrop=0.7, use_cache=False, eos_token_id=3, a_note="by someone", initializer_range=0.5)
    ConfigReader(config).finish()


def test_neutral_names_hold_nothing_that_every_reader_needs():
    assert not NEUTRAL & {"hidden_size", "tie_word_embeddings", "layer_types", "rope_parameters", "sliding_window"}


def write(folder, content):
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ({"model_type": "llama", "auto_map": {"AutoConfig": "x.Y"}}, "auto_map"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"model_type": "llama", "quantization_config": "int8"}, "quantization_config"),
        ('{"model_type": "llama", "rope_parameters": {"rope_theta": NaN}}', "rope_parameters.rope_theta"),
        ('{"model_type": "llama", "rms_norm_eps": Infinity}', "must be finite"),
        ({"model_type": "qwen2", "num_hidden_layers": 2_000_000_000}, "num_hidden_layers must be at most"),
        ({"model_type": "gpt_neo", "attention_types": [[["global"], 10**9]]}, "attention_types must be at most"),
        ({"model_type": "nonesuch"}, "nonesuch"),
        ({"hidden_size": 3}, "model_type"),
        ({"model_type": "llama", "hidden_size": "many"}, "hidden_size"),
        ({"model_type": "llama", "num_attention_heads": 0}, "transformers refuses it"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_in_one_line(content, named, tmp_path):
    with pytest.raises(ConfigError, match=named) as caught:
        read_config(write(tmp_path, content))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        read_config(tmp_path)


def test_fields_of_transformers_4_are_understood(tmp_path):
    old = {
        "model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16",
    }  # fmt: skip
    found = read_config(write(tmp_path, old)).rope_parameters
    assert (found["rope_type"], found["factor"], found["rope_theta"]) == ("linear", 2.0, 5000.0)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw):
    """The configuration of some case with one or two fields replaced by anything."""
    chosen = draw(st.sampled_from(CASES))
    options = AutoConfig.for_model(chosen.family, **chosen.options).to_dict()
    for name in draw(st.lists(st.sampled_from(sorted(options)), min_size=1, max_size=2)):
        options[name] = draw(st.sampled_from([0, -1, 1, 3, 1e9, 10**12, "", "x", [], {}, True, None]) | json_values)
    return options


@given(damaged())
def test_whatever_a_file_holds_the_error_is_ours(tmp_path_factory, values):
    folder = write(tmp_path_factory.mktemp("config"), values)
    with contextlib.suppress(ConfigError):
        load_spec(folder)
