"""A checkpoint that is open: what its small files say."""

from __future__ import annotations

import json
import shutil

import pytest

from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.models.spec import Layout
from jaxinfer.pretrained import Pretrained
from tests.cases import EOS, case
from tests.oracle import checkpoint, shared_root

CASE = case("llama-plain")


@pytest.fixture
def folder(tmp_path, tmp_path_factory):
    return shutil.copytree(checkpoint(CASE, shared_root(tmp_path_factory)), tmp_path / "model")


def change(folder, name, **values):
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


def test_everything_is_read_and_closed(folder):
    with Pretrained(folder) as opened:
        assert (opened.name, opened.folder, opened.dtype) == (str(folder), folder, "float32")
        assert (opened.spec.family, opened.limits.heads, opened.limits.kv_heads) == ("llama", 4, 2)
        assert set(opened.sources(Layout.of(opened.spec, 2)))
        assert opened.generation()[1] == (EOS,)
        assert opened.tokenizer()("the")["input_ids"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [({"eos_token_id": [3, 4]}, (3, 4)), ({"eos_token_id": 7}, (7,)), ({"eos_token_id": None}, ())],
)
def test_tokens_that_end_a_sequence(folder, values, expected):
    change(folder, "generation_config.json", **values)
    with Pretrained(folder) as opened:
        assert opened.generation()[1] == expected


def test_defaults_of_sampling(folder):
    change(folder, "generation_config.json", do_sample=True, temperature=0.3, max_new_tokens=5)
    with Pretrained(folder) as opened:
        defaults = opened.generation()[0]
    assert (defaults.temperature, defaults.max_tokens) == (0.3, 5)


def test_without_generation_config_the_config_names_the_end(folder):
    (folder / "generation_config.json").unlink()
    with Pretrained(folder) as opened:
        assert opened.generation()[1] == (EOS,)


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, "\xff"])
def test_a_malformed_generation_config_is_named(folder, text):
    (folder / "generation_config.json").write_text(text, encoding="latin-1")
    with Pretrained(folder) as opened, pytest.raises(ConfigError, match=r"generation_config\.json"):
        opened.generation()


def test_no_tokenizer_is_none(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with Pretrained(folder) as opened:
        assert opened.tokenizer() is None


def test_a_damaged_tokenizer_is_an_error(folder):
    (folder / "tokenizer.json").write_text("{")
    with Pretrained(folder) as opened, pytest.raises(ConfigError, match="the tokenizer cannot be read"):
        opened.tokenizer()


def test_a_dtype_that_is_not_computed_in(folder):
    change(folder, "config.json", dtype="float64")
    with Pretrained(folder) as opened, pytest.raises(ConfigError, match="dtype 'float64' is not implemented"):
        _ = opened.dtype


def test_tensors_are_checked(folder):
    change(folder, "config.json", num_hidden_layers=3)
    with Pretrained(folder) as opened, pytest.raises(CheckpointError, match="tensors missing"):
        opened.sources(Layout.of(opened.spec))
