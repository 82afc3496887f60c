"""All layers of a decode step in one operation are those layers one after the other, and which models are served so."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels as ops
from jaxinfer import SamplingParams
from jaxinfer.models import whole
from jaxinfer.models.attention import Batch, Pieces
from jaxinfer.models.decoder import abstract
from jaxinfer.models.families import load_spec
from jaxinfer.models.positions import rotary
from jaxinfer.models.spec import Alibi, LayerSpec, Layout, Norm
from pallas_kernels.layers_choice import MAX_LAYER_TOKENS
from tests.cases import CASES, case
from tests.engines import tiny
from tests.modules import small_spec
from tests.oracle import checkpoint, prompts, shared_root, torch_greedy, torch_model
from tests.wide import wide

# Of the cases that are not served: what the reason must name.
UNSERVED = {
    "gpt2-layer-scaled": "scale of the scores",
    "gpt_neo-local": "window",
    "gpt_neo-wide": "window",
    "gptj-partial": "parallel",
    "gptj-whole-tied": "parallel",
    "gpt_neox-parallel": "parallel_two_norms",
    "gpt_neox-linear-rope": "parallel_two_norms",
    "opt-projected-post-norm": "post",
    "bloom-plain": "ALiBi",
    "bloom-post-norm-residual": "normed",
    "bloom-twelve-heads": "ALiBi",
    "qwen2-late-window": "window",
    "qwen2-typed-window": "window",
    "qwen3-plain": "norms of queries and keys",
    "qwen3-biased-tied-window": "norms of queries and keys",
    "gemma2-plain": "sandwich",
    "gemma2-uncapped-biased": "sandwich",
    "gemma3_text-plain": "sandwich",
    "gemma3_text-capped-untied": "sandwich",
    "phi3-partial-longrope-tied": "partial rotary embedding",
    "falcon-multi-query": "parallel",
    "falcon-alibi": "ALiBi",
    "falcon-alibi-twelve-heads": "parallel",
    "falcon-grouped-two-norms": "parallel_two_norms",
    "falcon-grouped-one-norm": "parallel",
}
SERVED = [each for each in CASES if each.name not in UNSERVED]
HOPPER = ops.Device("gpu", "9.0")
ROTARY = rotary({}, 64, 256)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture
def asked(monkeypatch):
    """Let the reference serve every decode step that the kernel would be asked for; how often it did."""
    calls = []

    def choice(on, *, rows, problem, tokens):
        served = "reference" if problem is None else "apart"
        return ops.Choice(op="whole layers", implementation=served, compiler="XLA", reason="a test says so")

    def counted(*given, **rest):
        calls.append(rest["implementation"])
        return run(*given, **rest)

    run = whole.decoder_layers
    monkeypatch.setattr(ops, "layers_choice", choice)
    monkeypatch.setattr(whole, "decoder_layers", counted)
    return calls


def random_model(spec, quantize=None, seed=0):
    """A decoder's graph, and its parameters in float32 but for quantized weights."""
    graph, state = nnx.split(abstract(spec, Layout.of(spec), jnp.dtype(jnp.float32), quantize))
    rng = np.random.default_rng(seed)

    def fill(path, like):
        values = rng.standard_normal(like.shape, np.float32)
        if "_scale" in jax.tree_util.keystr(path):  # of weights of about unit size
            return jnp.asarray(np.abs(values) + 1) * like.shape[-1] ** -0.5 / 50
        if like.dtype == jnp.float32:
            return jnp.asarray(values * (0.3 if len(like.shape) == 1 else like.shape[-1] ** -0.5))
        if like.dtype == jnp.float8_e4m3fn:
            return jnp.asarray(50 * values).astype(like.dtype)
        most = {jnp.dtype(jnp.int8): 127, jnp.dtype(jnp.int4): 7}[like.dtype]
        return jnp.asarray(rng.integers(-most, most + 1, like.shape), jnp.int8).astype(like.dtype)

    return graph, jax.tree_util.tree_map_with_path(fill, state)


def decode(spec, graph, state, dtype=jnp.float32, steps=3):
    """Logits of some decode steps of three rows, one of which is nobody's, and the caches after them."""
    rng = np.random.default_rng(1)
    shape = (10, spec.kv_heads, 64, spec.head_dim)
    caches = [tuple(jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(2)) for _ in spec.layers]
    tables = jnp.asarray(1 + rng.permutation(9).reshape(3, 3), jnp.int32)
    starts = np.array([62, -1, 7])
    long = None if spec.long_from is None else jnp.array([True, False, False])

    @jax.jit
    def step(state, caches, tokens, positions):
        return nnx.merge(graph, state)(Batch(tokens, positions, tables, long), caches)

    logits = []
    for number in range(steps):
        positions = jnp.asarray(np.where(starts < 0, -1, starts + number)[:, None], jnp.int32)
        tokens = jnp.asarray(rng.integers(0, spec.vocab_size, (3, 1)), jnp.int32)
        found, caches = step(state, caches, tokens, positions)
        logits.append(np.asarray(found)[starts >= 0, 0])
    return np.stack(logits), caches


def compared(spec, asked, monkeypatch, quantize=None):
    graph, state = random_model(spec, quantize)
    got, written = decode(spec, graph, state)
    assert asked == ["reference"], "one call, and traced once"
    monkeypatch.undo()
    expected, kept = decode(spec, graph, state)
    assert asked == ["reference"]
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=1e-5)
    for one, other in zip(jax.tree.leaves(written), jax.tree.leaves(kept), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("chosen", SERVED, ids=lambda chosen: chosen.name)
def test_logits_and_caches_are_those_of_the_layers_one_after_the_other(chosen, root, asked, monkeypatch):
    compared(load_spec(checkpoint(chosen, root)), asked, monkeypatch)


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_so_they_are_with_quantized_weights(family, quantize, root, asked, monkeypatch):
    compared(load_spec(checkpoint(wide(family), root)), asked, monkeypatch, quantize)


@pytest.mark.parametrize("name", ["llama-biased-tied", "mistral-window", "gpt2-plain", "phi3-longrope"])
def test_an_engine_says_what_torch_says(name, root, asked):
    chosen = case(name)
    folder = checkpoint(chosen, root)
    model, greedy = torch_model(folder, chosen), SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    with tiny(root, name, max_batch=2) as engine:
        given = [prompts(chosen)[at] for at in (1, 2)]
        said = [output.outputs[0].token_ids for output in engine.generate(given, greedy)]
    assert asked
    assert set(asked) == {"reference"}
    assert said == [torch_greedy(model, prompt, 8).token_ids for prompt in given]


@pytest.mark.parametrize("chosen", CASES, ids=lambda chosen: chosen.name)
def test_what_is_not_served_is_named(chosen, root):
    problem = whole.spec_problem(load_spec(checkpoint(chosen, root)))
    wanted = UNSERVED.get(chosen.name)
    assert problem is None if wanted is None else problem is not None and wanted in problem


SPECS = {
    "softcap": ({"softcap": 4.0}, "a softcap of scores"),
    "alibi": ({"alibi": Alibi(slopes=(0.5,) * 4)}, "ALiBi"),
    "norms": ({"qk_norm": Norm(kind="rms", eps=1e-5)}, "norms of queries and keys"),
    "rotary": ({"layers": (LayerSpec(scale=1.0, rotary=rotary({}, 8, 64)), LayerSpec(scale=1.0))}, "differ in their"),
    "neighbours": (
        {"layers": (LayerSpec(scale=1.0, rotary=rotary({}, 8, 64, interleaved=True)),)}, "interleaved rotary embedding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECS)
def test_each_part_alone_is_named(name):
    changes, wanted = SPECS[name]
    assert wanted in whole.spec_problem(small_spec(**changes))


def traced(spec, on=HOPPER, rows=1, tokens=1, dtype=jnp.bfloat16, kv_dtype=None, quantize="int8", **batch):
    """What is chosen for a step, in abstract arrays."""
    graph, state = nnx.split(abstract(spec, Layout.of(spec), jnp.dtype(dtype), quantize))
    found = []

    def body(state, x, caches):
        model = nnx.merge(graph, state)
        ids = jnp.zeros((rows, tokens), jnp.int32)
        given = Batch(ids, ids, **{"tables": jnp.zeros((rows, 4), jnp.int32)} | batch)
        found.append(whole.implementation(model.problem, model.layers, x, given, caches))

    blocks = jax.ShapeDtypeStruct((9, spec.kv_heads, 64, spec.head_dim), kv_dtype or dtype)
    caches = [(blocks, blocks) if kv_dtype is None else (blocks,) * 4] * spec.num_layers
    with ops.compiling_for(on):
        jax.eval_shape(body, state, jax.ShapeDtypeStruct((rows, tokens, spec.hidden), dtype), caches)
    return found[0]


def able(**changes):
    """A spec that the kernel runs."""
    sizes = {"hidden": 256, "intermediate": 512, "heads": 4, "kv_heads": 2, "head_dim": 64}
    return small_spec(**{**sizes, "layers": (LayerSpec(scale=0.1, rotary=ROTARY),) * 2, **changes})


def test_the_kernel_is_chosen_for_few_rows_of_decode_on_hopper_and_nowhere_else():
    spec = able()
    assert [traced(spec, rows=rows) for rows in range(1, ops.MAX_LAYER_ROWS + 1)] == ["mosaic"] * ops.MAX_LAYER_ROWS
    assert traced(spec, rows=ops.MAX_LAYER_ROWS + 1) == "apart"
    wide = jnp.zeros((1, MAX_LAYER_TOKENS // 64 + 1), jnp.int32)
    assert [traced(spec, tables=tables) for tables in (wide, wide[:, 1:])] == ["apart", "mosaic"]
    assert traced(spec, tokens=2) == traced(spec, tables=None) == traced(spec, gathered=True) == "apart"
    ids = jnp.zeros((1, 1), jnp.int32)
    assert traced(spec, pieces=Pieces(ids, ids, ids[0], ids)) == "apart"
    for on in (ops.Device("cpu"), ops.Device("gpu", "8.0"), ops.Device("gpu", "10.0")):
        assert traced(spec, on=on) == "apart"


def test_what_the_kernel_cannot_run_stays_apart():
    assert traced(able(), dtype=jnp.float16) == "mosaic"
    assert [traced(able(), quantize=quantize) for quantize in (None, "int4", "fp8")] == ["mosaic"] * 3
    assert traced(able(), dtype=jnp.float32) == "apart"
    assert traced(able(), kv_dtype=jnp.int8) == "apart"
    assert traced(able(residual="sandwich")) == "apart"
    assert traced(able(head_dim=32, layers=(LayerSpec(scale=1.0),))) == "apart"
    assert traced(able(head_dim=512, layers=(LayerSpec(scale=1.0),))) == "apart"


def test_layers_divided_among_devices_stay_apart(monkeypatch):
    monkeypatch.setattr(whole, "axis_size", lambda axis: {"tensor": 2}[axis])
    assert traced(able()) == "apart"
