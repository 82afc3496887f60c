"""Random parameters: what is drawn, where it lies, and an engine that runs on it without any weights."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.checkpoints.dummy import DEVIATION, dummy
from jaxinfer.checkpoints.loader import Target
from jaxinfer.errors import CheckpointError, ConfigError
from tests.cases import case
from tests.engines import of
from tests.oracle import checkpoint, shared_root


def target(shape, dtype, sharding=None):
    return Target(shape, jnp.dtype(dtype), sharding or SingleDeviceSharding(jax.devices()[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_normal_and_norms_are_one(dtype):
    drawn = dummy(
        {"a.out": target((64, 512), dtype), "a.out_bias": target((512,), dtype), "n.scale": target((9,), dtype)}
    )
    assert {str(array.dtype) for array in drawn.values()} == {dtype}
    values = np.asarray(drawn["a.out"], np.float64)
    assert values.std() == pytest.approx(DEVIATION, rel=0.02)
    assert abs(values.mean()) < DEVIATION / 50
    assert (abs(values) < DEVIATION).mean() == pytest.approx(0.6827, abs=0.01)  # as of a normal distribution
    assert np.asarray(drawn["a.out_bias"], np.float64).std() == pytest.approx(DEVIATION, rel=0.2)
    assert (np.asarray(drawn["n.scale"], np.float64) == 1).all()


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("int8", -127, 127), ("int4", -7, 7), ("float8_e4m3fn", -448, 448)]
)
def test_quantized_weights_take_the_whole_range_and_factors_undo_it(dtype, least, most):
    drawn = dummy({"l.up": target((256, 1024), dtype), "l.up_scale": target((256,), "float32")})
    weight, scale = np.asarray(drawn["l.up"].astype(jnp.float32)), np.asarray(drawn["l.up_scale"])
    assert drawn["l.up"].dtype == jnp.dtype(dtype)
    assert np.isfinite(weight).all()
    assert weight.min() >= least
    assert weight.max() <= most
    if dtype != "float8_e4m3fn":
        assert set(np.unique(weight)) == set(range(least, most + 1))
    product = weight * scale[:, None]
    # Factors are uniform between half and one and a half: their mean square is 1 + 1/12.
    assert product.std() == pytest.approx(DEVIATION * (13 / 12) ** 0.5, rel=0.05)
    assert len(np.unique(scale)) > 200


def test_paths_and_seeds_give_other_values_and_meshes_the_same():
    mesh = Mesh(np.array(jax.devices()[:4]), ("tensor",))
    split = NamedSharding(mesh, PartitionSpec("tensor"))
    one = dummy({"a": target((8, 16), "float32"), "b": target((8, 16), "float32")}, 3)
    many = dummy({"a": target((8, 16), "float32", split)}, 3)
    assert many["a"].sharding == split
    np.testing.assert_array_equal(one["a"], many["a"])
    assert not (np.asarray(one["a"]) == np.asarray(one["b"])).any()
    assert not (np.asarray(one["a"]) == np.asarray(dummy({"a": target((8, 16), "float32")}, 4)["a"])).any()


@pytest.fixture
def folder(tmp_path, tmp_path_factory):
    """A checkpoint without its weights."""
    source = checkpoint(case("llama-plain"), shared_root(tmp_path_factory))
    return shutil.copytree(source, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors*"))


@pytest.mark.parametrize("mesh", [{"tensor": 1}, {"data": 2, "tensor": 2}], ids=str)
def test_an_engine_without_weights_generates(folder, mesh):
    prompts, params = [[5, 6, 7], [8] * 40], SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors"):
        of(folder)
    tokens = []
    for seed in (1, 1, 2):
        with of(folder, mesh=mesh, load_format="dummy", seed=seed) as engine:
            outputs = engine.generate(prompts, params)
        assert [output.error for output in outputs] == [None, None]
        tokens.append([output.outputs[0].token_ids for output in outputs])
        assert [len(ids) for ids in tokens[-1]] == [9, 9]
    assert tokens[0] == tokens[1] != tokens[2]


def test_a_plan_needs_no_weights_either(folder):
    found = jaxinfer.plan(folder, device="H200", load_format="dummy")
    assert found.fits
    with pytest.raises(ConfigError, match="load_format: expected one of auto, dummy, got 'random'"):
        jaxinfer.plan(folder, load_format="random")


@pytest.mark.parametrize(("method", "dtype"), [("int8", "int8"), ("int4", "int4"), ("fp8", "float8_e4m3fn")])
def test_quantized_weights_are_drawn_for_an_engine(tmp_path, method, dtype):
    values = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(values))
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with of(tmp_path, load_format="dummy", quantize=method) as engine:
        drawn = engine.executor.parameters
        assert str(drawn["layers.1.mlp.down"].dtype) == dtype
        assert drawn["layers.1.mlp.down_scale"].dtype == jnp.float32
        logits = engine.logits([5, 6, 7])
        assert engine.generate([[5, 6, 7]], params)[0].outputs[0].finish_reason == "length"
    assert np.isfinite(logits).all()
    assert logits.std() > 0.01
