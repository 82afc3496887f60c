"""Compiled steps: what they alias, communicate and hold on each device."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest

from jaxinfer import SamplingParams, programs
from jaxinfer.engine import InferenceEngine
from jaxinfer.generation.sampling import features_of, pack
from jaxinfer.steps import DecodeInputs
from sharding import ShardingRules
from tests.cases import case
from tests.engines import LLAMA, tiny
from tests.oracle import prompts, shared_root

MESHES = [{"tensor": 2}, {"tensor": 4}, {"data": 2, "tensor": 2}]
PROMPTS = prompts(case(LLAMA), (3, 20))
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
COLLECTIVE = re.compile(
    r"= (\w+\[[\d,]*\])\S* (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(?:-start)?\("
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture(scope="module", params=[*MESHES, {"tensor": 1}], ids=str)
def engine(request, root):
    with tiny(root, mesh=request.param) as engine:
        engine.output = engine.generate(PROMPTS, GREEDY)
        yield engine


def steps(engine: InferenceEngine, kind: str) -> list[Any]:
    found = [step for key, step in engine.executor.compiled().items() if key.startswith(f"('{kind}'")]
    assert found
    return found


def bytes_by_device(arrays: Any) -> dict[Any, int]:
    found: dict[Any, int] = {}
    for array in jax.tree.leaves(arrays):
        for shard in array.addressable_shards:
            found[shard.device] = found.get(shard.device, 0) + shard.data.nbytes
    return found


def test_caches_are_donated_and_nothing_else_of_their_size_is_returned(engine):
    """Aliased bytes are those of the cache and of the last token of each slot, exactly."""
    kept = engine.plan.cache_bytes_per_device + 4 * engine.plan.slots
    for kind in ("prefill", "decode"):
        for step in steps(engine, kind):
            memory = step.memory_analysis()
            assert memory.alias_size_in_bytes == kept
            assert memory.output_size_in_bytes - kept < 1000  # the tokens that were drawn


def test_penalties_are_donated_too(engine):
    before = set(engine.executor.compiled())
    engine.generate(PROMPTS, SamplingParams(max_tokens=6, temperature=0, presence_penalty=0.5))
    plan = engine.plan
    kept = plan.cache_bytes_per_device + 4 * plan.slots + plan.slots * plan.spec.vocab_size * (1 + 4)
    for key in set(engine.executor.compiled()) - before:
        assert engine.executor.compiled()[key].memory_analysis().alias_size_in_bytes == kept


def test_decode_sums_twice_a_layer_and_gathers_only_logits(engine):
    plan = engine.plan
    tensor = plan.mesh["tensor"]
    for step in steps(engine, "decode"):
        found = COLLECTIVE.findall(step.as_text())
        sums = [shape for shape, op in found if op == "all-reduce"]
        gathers = [shape for shape, op in found if op == "all-gather"]
        assert len(sums) + len(gathers) == len(found), "another collective"
        if tensor == 1:
            assert not found
            continue
        # Two a layer and one for the embedding, each of one hidden state a slot; one gather of the head's logits.
        hidden = {f"f32[{plan.slots},1,{plan.spec.hidden}]", f"f32[{plan.slots},{plan.spec.hidden}]"}
        assert len(sums) <= 2 * plan.spec.num_layers + 1
        assert set(sums) <= hidden
        assert gathers == [f"f32[{plan.slots},{plan.layout.vocab_rows}]"]


def test_prefill_gathers_only_logits(engine):
    plan = engine.plan
    for step in steps(engine, "prefill"):
        gathers = [shape for shape, op in COLLECTIVE.findall(step.as_text()) if op == "all-gather"]
        assert len(gathers) == (plan.mesh["tensor"] > 1)
        assert all(shape.endswith(f",{plan.layout.vocab_rows}]") for shape in gathers)


def test_each_device_holds_its_part_of_each_parameter(engine):
    plan = engine.plan
    for (path, info), leaf in zip(plan.parameters.items(), engine.executor._leaves, strict=True):
        assert leaf.shape == info.shape
        assert leaf.dtype == info.dtype
        expected = tuple(
            size // plan.mesh["tensor"] if axis in ("vocab", "kv_heads", "mlp") else size
            for size, axis in zip(info.shape, info.axes, strict=True)
        )
        shards = leaf.addressable_shards
        assert {shard.data.shape for shard in shards} == {expected}, path
        assert {shard.device for shard in shards} == set(engine.mesh.devices.flat)
    assert set(bytes_by_device(engine.executor._leaves).values()) == {plan.weight_bytes_per_device}


def test_caches_are_divided_over_data_and_heads(engine):
    plan = engine.plan
    for array in jax.tree.leaves(engine.executor.caches):
        expected = (plan.num_blocks, plan.layout.kv_groups // plan.mesh["tensor"], 64, plan.spec.head_dim)
        assert {shard.data.shape for shard in array.addressable_shards} == {expected}
    assert set(bytes_by_device(engine.executor.caches).values()) == {plan.cache_bytes_per_device}


def test_a_step_for_empty_slots_changes_nothing(engine):
    executor, plan = engine.executor, engine.plan
    nobody = [None] * executor.batch
    zeros = np.zeros(executor.batch, np.int32)
    tables = np.zeros((executor.batch, 1), np.int32)
    before = [np.asarray(leaf) for leaf in jax.tree.leaves((executor.caches, executor.last))]
    nowhere = np.full(executor.batch, plan.slots, np.int32)
    inputs = DecodeInputs(slots=nowhere, positions=zeros, steps=zeros, step=zeros, tables=tables, rows=pack(nobody))
    drawn = executor.decode(inputs, features_of(nobody))
    assert drawn.tokens.shape == (plan.decode_chunk, executor.batch)
    for old, new in zip(before, jax.tree.leaves((executor.caches, executor.last)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_the_null_block_of_each_shard_is_never_written(engine):
    for array in jax.tree.leaves(engine.executor.caches):
        blocks = np.asarray(array).reshape(engine.plan.shards, engine.plan.num_blocks, -1)
        assert not blocks[:, 0].any()
        assert blocks[:, 1:].any()


def test_every_mesh_gives_the_same_tokens(engine, root):
    with tiny(root) as single:
        expected = single.generate(PROMPTS, GREEDY)
    assert [o.outputs[0].token_ids for o in engine.output] == [o.outputs[0].token_ids for o in expected]


def test_more_tensor_devices_than_key_heads(root):
    """One key/value head on four devices: each holds a copy of it, and its part of the queries."""
    with tiny(root, "llama-multi-query", mesh={"tensor": 4}) as engine, tiny(root, "llama-multi-query") as single:
        found, expected = engine.generate(PROMPTS, GREEDY), single.generate(PROMPTS, GREEDY)
        assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]
        groups = [np.asarray(engine.executor.caches[0][0])[:, group] for group in range(4)]
        assert all(np.array_equal(groups[0], group) for group in groups)
        memory = steps(engine, "decode")[0].memory_analysis()
        assert memory.alias_size_in_bytes == engine.plan.cache_bytes_per_device + 4 * engine.plan.slots


def test_a_vocabulary_that_is_not_divided_gives_the_same_tokens(root):
    with tiny(root, mesh={"tensor": 2}, rules=ShardingRules(vocab=None)) as engine, tiny(root) as single:
        found, expected = engine.generate(PROMPTS, GREEDY), single.generate(PROMPTS, GREEDY)
        assert [o.outputs[0].token_ids for o in found] == [o.outputs[0].token_ids for o in expected]


@pytest.mark.parametrize(("dtype", "precise"), [("float32", True), ("bfloat16", False)])
def test_float32_is_multiplied_as_float32(root, dtype, precise):
    with tiny(root, dtype=dtype) as engine:
        engine.generate(PROMPTS, GREEDY)
        text = steps(engine, "decode")[0].as_text()
        assert ("operand_precision={highest,highest}" in text) == precise
        kept = engine.plan.cache_bytes_per_device + 4 * engine.plan.slots
        assert steps(engine, "decode")[0].memory_analysis().alias_size_in_bytes == kept


def test_compilation_is_announced_once(root, monkeypatch):
    said: list[str] = []
    with tiny(root) as engine:
        executor = engine.executor
        show = executor._on_compile
        monkeypatch.setattr(executor, "_on_compile", lambda what: (said.append(what), show(what))[1])
        engine.generate(PROMPTS[0], GREEDY)
        engine.generate(PROMPTS[0], GREEDY)
    assert said == ["prefill of 1 x 16 tokens, context 64", "decode of 4 sequences, context 64"]


@pytest.mark.parametrize("mesh", [{"tensor": 1}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("name", ["qwen2-late-window", "gpt_neo-local", "gemma2-plain"])
def test_prompts_in_two_programs_are_what_they_are_in_one(root, monkeypatch, name, mesh):
    """Layers that differ, tied and learned embeddings; chunks, penalties and log-probabilities. Packed: test_runner."""
    given = prompts(case(name), (3, 20, 33, 70))
    params = [
        SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, **changes)
        for changes in ({}, {"prompt_logprobs": 2, "logprobs": 1}, {"repetition_penalty": 1.5}, {})
    ]
    found = []
    for least in (programs.PARTED_LAYERS, 4):
        monkeypatch.setattr(programs, "PARTED_LAYERS", least)
        with tiny(root, name, mesh=mesh) as engine:
            outputs = [*engine.generate(given, params), engine.generate(given[1], params[0])]
            found.append([(o.outputs[0].token_ids, o.prompt_logprobs, o.outputs[0].logprobs) for o in outputs])
            keys = engine.executor.compiled()
            assert any("prefill front" in key for key in keys) == (least == 4)
    for whole, parted in zip(*found, strict=True):
        assert whole[0] == parted[0]
        for before, after in zip(whole[1:], parted[1:], strict=True):
            assert_close(before, after)


def assert_close(found: Any, expected: Any) -> None:
    """Log-probabilities of the same tokens, and equal but for rounding."""
    for one, other in zip(found or [], expected or [], strict=True):
        assert (one or {}).keys() == (other or {}).keys()
        for token, entry in (one or {}).items():
            assert entry.logprob == pytest.approx(other[token].logprob, abs=1e-4)


def test_both_programs_of_a_prompt_are_given_their_caches(root, monkeypatch):
    monkeypatch.setattr(programs, "PARTED_LAYERS", 4)
    with tiny(root, "qwen2-late-window") as engine:
        engine.generate(PROMPTS[1], GREEDY)
        plan, given = engine.plan, jax.tree.leaves(engine.executor.caches)
        layer = plan.cache_bytes_per_device // 4
        aliased = [
            steps(engine, kind)[0].memory_analysis().alias_size_in_bytes for kind in ("prefill front", "prefill")
        ]
        assert aliased == [layer, 3 * layer + 4 * plan.slots]
        # The second fails: what both were given is gone, and the next prompt finds other caches.
        programs_of = engine.executor._prefill_programs
        expected = engine.generate(PROMPTS[1], GREEDY).outputs[0].token_ids

        def failing(*_: Any) -> Any:
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(engine.executor, "_prefill_programs", lambda *about: [programs_of(*about)[0], failing])
            with pytest.raises(RuntimeError, match="out of memory"):
                engine.generate(PROMPTS[1], GREEDY)
        assert all(leaf.is_deleted() for leaf in given[:2])
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(engine.executor.caches))
        assert engine.generate(PROMPTS[1], GREEDY).outputs[0].token_ids == expected
