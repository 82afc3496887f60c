"""A KV cache in host memory against one on the devices: the same tokens, log-probabilities and logits."""

from __future__ import annotations

import gc
import itertools
import time
from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxinfer
from jaxinfer import CapacityError, SamplingParams
from jaxinfer.checkpoints.convert import convert
from jaxinfer.errors import CheckpointError
from jaxinfer.paging import tiers
from jaxinfer.paging.host_cache import Chunks, newest, window_tables
from pallas_kernels.attention import write_cache
from tests.cases import case
from tests.engines import changed, of, tiny
from tests.oracle import checkpoint, prompts, shared_root

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
FAMILIES = ["llama-plain", "gpt2-plain", "opt-projected-post-norm", "gemma2-plain", "falcon-grouped-one-norm"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of as few slots as there can be."""
    monkeypatch.setattr(tiers, "KV_WINDOW_BYTES", 1)


def hosted(root, name="llama-plain", **options):
    return tiny(root, name, **({"offload": "host", "kv_offload": "host"} | options))


def said(engine, asked, params=GREEDY):
    return [[output.token_ids for output in result.outputs] for result in engine.generate(asked, params)]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_scores_and_logits_are_those_of_the_resident_engine(name, root, small_groups):
    asked = prompts(case(name), (5, 70, 1, 33, 64, 63))
    with tiny(root, name) as resident:
        tokens, scores, logits = said(resident, asked), resident.score(asked), resident.logits(asked)
    with hosted(root, name) as engine:
        assert engine.plan.tiers.kv_rows == 1
        assert engine.executor.kv.groups == 4
        assert engine.executor.caches == []
        assert said(engine, asked) == tokens
        for got, expected in zip(engine.score(asked), scores, strict=True):
            np.testing.assert_allclose(got.logprobs[1:], expected.logprobs[1:], atol=1e-5)
        for got, expected in zip(engine.logits(asked), logits, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_sampling_penalties_and_log_probabilities_are_those_of_the_resident_engine(rows, root, monkeypatch):
    asked = prompts(case("llama-plain"), (1, 5, 19, 70))
    params = SamplingParams(
        max_tokens=6, temperature=0.8, top_p=0.9, seed=3, n=2, presence_penalty=0.3, logprobs=2, ignore_eos=True
    )
    one = jaxinfer.plan(checkpoint(case("llama-plain"), root), {"tensor": 1}, max_batch=4)
    row = one.longest_blocks * one.block_bytes_per_device // one.spec.num_layers
    monkeypatch.setattr(tiers, "KV_WINDOW_BYTES", rows * row)
    with tiny(root) as resident, hosted(root) as engine:
        assert engine.plan.tiers.kv_rows == rows
        for got, expected in zip(engine.generate(asked, params), resident.generate(asked, params), strict=True):
            assert [o.token_ids for o in got.outputs] == [o.token_ids for o in expected.outputs]
            for mine, other in zip(got.outputs, expected.outputs, strict=True):
                assert mine.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama-plain", {"data": 2, "tensor": 2}),
        ("gpt2-plain", {"data": 2}),
        ("llama-multi-query", {"tensor": 4}),
    ],
    ids=str,
)
def test_a_mesh_gives_the_same_tokens(name, mesh, root, small_groups):
    asked = prompts(case(name), (3, 20, 41, 7, 66))
    with tiny(root, name) as resident:
        expected = said(resident, asked)
    with hosted(root, name, mesh=mesh) as engine:
        assert engine.executor.kv.groups == 4 // mesh.get("data", 1)
        assert said(engine, asked) == expected
        assert said(engine, asked) == expected


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_caches_of_8_bits_travel_with_their_factors(kv_dtype, root, small_groups):
    asked = prompts(case("llama-plain"), (5, 70))
    with tiny(root, kv_dtype=kv_dtype) as resident, hosted(root, kv_dtype=kv_dtype) as engine:
        assert said(engine, asked) == said(resident, asked)
        for got, one in zip(engine.logits(asked), resident.logits(asked), strict=True):
            np.testing.assert_allclose(got, one, atol=1e-3, rtol=1e-3)
        assert len(engine.plan.cache_arrays) == 4


def test_prompts_longer_than_a_step_find_what_they_had(root, small_groups):
    """Chunks of 32 tokens of prompts up to 200, in micro-batches of 16, so that windows begin with blocks of before."""
    asked = prompts(case("llama-plain"), (200, 7, 131, 64))
    with tiny(root) as resident:
        expected, scores = said(resident, asked), resident.score(asked)
    with hosted(root, prefill_chunk=48) as engine:
        assert said(engine, asked) == expected
        for got, one in zip(engine.score(asked), scores, strict=True):
            np.testing.assert_allclose(got.logprobs[1:], one.logprobs[1:], atol=1e-5)


def test_micro_batches_of_prefill_share_a_window(root, small_groups, monkeypatch):
    name = "gemma2-plain"
    asked = prompts(case(name), (1, 7, 33, 70, 16, 100))
    with tiny(root, name, max_batch=8) as resident:
        expected = said(resident, asked)
    monkeypatch.setattr(tiers, "MICRO_TOKENS", 16)
    with hosted(root, name, max_batch=8, prefill_chunk=128, prefill_tokens=256) as engine:
        assert said(engine, asked) == expected


def test_many_more_prompts_than_slots_and_streams(root, small_groups, tmp_path):
    store = convert(checkpoint(case("llama-plain"), root), tmp_path / "store", progress=False)
    asked = prompts(case("llama-plain"), tuple(range(2, 40, 3)))
    with tiny(root) as resident:
        expected = said(resident, asked)
        text = "".join(resident.stream(asked[3], GREEDY))
    with of(store, offload="disk", kv_offload="host", max_batch=3) as engine:
        assert said(engine, asked) == expected
        assert "".join(engine.stream(asked[3], GREEDY)) == text
        stream = engine.stream(asked[4], GREEDY)
        next(stream)
        stream.close()  # its slot goes to another
        assert said(engine, asked) == expected


def test_transfers_are_issued_as_an_accelerator_s_are(root, small_groups, monkeypatch):
    """At once, in the caller's thread; blocks leave by way of page-locked memory."""
    asked = prompts(case("llama-plain"), (5, 40, 70))
    with tiny(root) as resident:
        expected = said(resident, asked)
    with hosted(root) as engine:
        monkeypatch.setattr(engine.executor.pager.link, "copies", False)
        assert said(engine, asked) == expected
        assert said(engine, asked) == expected


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("copies", [True, False])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_slots_change_hands_while_what_was_written_is_on_its_way(offload, copies, rows, root, tmp_path, monkeypatch):
    """Sequences that arrive and end at any time, with memory that is slow to write: a slot is given on at dispatch."""
    lengths = (5, 70, 1, 33, 130, 64, 2, 90, 20, 7)
    asked = prompts(case("llama-plain"), lengths)
    params = [SamplingParams(max_tokens=1 + 7 * i % 11, temperature=0, ignore_eos=True) for i in range(len(asked))]
    with tiny(root) as resident:
        expected = [said(resident, [one], own)[0] for one, own in zip(asked, params, strict=True)]
        row = resident.plan.longest_blocks * resident.plan.block_bytes_per_device // resident.spec.num_layers
    folder = checkpoint(case("llama-plain"), root)
    folder = convert(folder, tmp_path / "store", progress=False) if offload == "disk" else folder
    monkeypatch.setattr(tiers, "KV_WINDOW_BYTES", rows * row)
    with of(folder, offload=offload, kv_offload="host", max_batch=4, decode_chunk=2) as engine:
        kv, scheduler, handed_on = engine.executor.kv, engine._open().scheduler, []
        assert (kv.rows, kv.groups) == (rows, 4 // rows)
        monkeypatch.setattr(engine.executor.pager.link, "copies", copies)

        delays = itertools.cycle([0.004, 0, 0.002, 0])

        def slowly(function):
            def late(*given):
                time.sleep(next(delays))
                return function(*given)

            return late

        def prefilling(inputs, *rest):
            busy = {group for (_, group), jobs in kv._leaving.items() if not all(job.done() for job in jobs)}
            taken = Chunks.of(inputs.tables, inputs.positions, kv.blocks).slots
            handed_on.extend(slot for slot in taken.tolist() if slot >= 0 and slot // rows in busy)
            return prefill(inputs, *rest)

        prefill = engine.executor.prefill
        monkeypatch.setattr(engine.executor, "prefill", prefilling)
        for method in ("_write_rows", "_write_blocks"):
            monkeypatch.setattr(kv, method, slowly(getattr(kv, method)))
        for _ in range(2):
            with ThreadPoolExecutor(6) as callers:  # more than there are slots
                found = list(callers.map(lambda one, own: said(engine, [one], own)[0], asked, params))
            assert found == expected
        assert handed_on, "nothing was on its way when a slot changed hands: this tests nothing"
        assert scheduler.idle


@pytest.mark.parametrize("kv_offload", ["host", None])
def test_a_pass_that_fails_between_two_layers_harms_no_other_caller(kv_offload, root, monkeypatch):
    """One caller gets the error. What layers before it wrote, on the devices or in host memory, is computed again."""
    asked = prompts(case("llama-plain"), (5, 40, 70, 33, 20))
    with tiny(root) as resident:
        expected = [said(resident, [one])[0] for one in asked]
    with tiny(root, offload="host", **({"kv_offload": kv_offload} if kv_offload else {})) as engine:
        take, passes = engine.executor.pager.take, []

        def failing(layer):
            passes.append(layer)
            if passes.count(1) == 3 and layer == 1:
                raise CheckpointError("layer 1 is gone")
            return take(layer)

        def ask(one):
            try:
                return said(engine, [one])[0]
            except CheckpointError as error:
                return str(error)

        with monkeypatch.context() as patch, ThreadPoolExecutor(len(asked)) as callers:
            patch.setattr(engine.executor.pager, "take", failing)
            found = list(callers.map(ask, asked))
        assert found.count("layer 1 is gone") == 1
        for got, wanted in zip(found, expected, strict=True):
            assert got in (wanted, "layer 1 is gone")
        assert engine._open().scheduler.idle
        assert [said(engine, [one])[0] for one in asked] == expected


def test_what_a_sequence_leaves_is_written_before_what_the_next_in_its_slot_says(root, monkeypatch):
    asked = prompts(case("llama-plain"), (70, 130))
    params = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True, logprobs=0) for count in (2, 4)]
    with tiny(root, max_batch=1) as resident, hosted(root, max_batch=1, prefill_chunk=256) as engine:
        expected = resident.generate(asked, params)
        kv = engine.executor.kv
        write = kv._write_rows

        def late(*given):
            time.sleep(0.2)  # the next prompt has been computed by then
            write(*given)

        engine.generate(asked, params)  # compiles
        monkeypatch.setattr(kv, "_write_rows", late)
        for got, one in zip(engine.generate(asked, params), expected, strict=True):
            assert got.outputs[0].token_ids == one.outputs[0].token_ids
            assert got.outputs[0].cumulative_logprob == pytest.approx(one.outputs[0].cumulative_logprob, abs=1e-4)


def test_slots_that_hold_nan_harm_nobody_who_gets_them(root, tmp_path, monkeypatch):
    poison, asked = 50, prompts(case("llama-plain"), (5, 70, 20, 62))
    asked = [[token if token != poison else poison + 1 for token in prompt] for prompt in asked]
    params = SamplingParams(max_tokens=9, temperature=0, ignore_eos=True, logit_bias={poison: -1e4})
    with tiny(root) as resident:
        expected = said(resident, asked, params)
        row = resident.plan.longest_blocks * resident.plan.block_bytes_per_device // resident.spec.num_layers
    monkeypatch.setattr(tiers, "KV_WINDOW_BYTES", 2 * row)
    folder = changed(checkpoint(case("llama-plain"), root), tmp_path / "poisoned", poison=poison)
    with of(folder, offload="host", kv_offload="host") as engine:
        engine.generate([[poison] * 130] * 4, GREEDY)
        kept = [values for arrays in engine.executor.kv._layers[0].arrays.values() for values in arrays]
        assert all(np.isnan(values[2]).any() for values in kept), "this test tests nothing"
        assert said(engine, asked, params) == expected


def test_only_what_is_used_travels(root, small_groups):
    """Of a group with nothing to advance nothing, of the others the blocks up to the longest sequence's end."""
    name = "llama-plain"
    with hosted(root, name, decode_chunk=1) as engine:
        executor, plan = engine.executor, engine.plan
        engine.generate(prompts(case(name), (5,)), GREEDY)
        executor.kv.settle()
        block = plan.block_bytes_per_device
        moved = engine.offload_report()["link"]["bytes"] - executor.passes * plan.tiers.moved_bytes
        layer = max(plan.tiers.layer_bytes)
        assert 5 * block <= moved <= 5 * block + 2 * layer  # five decode steps of one sequence of one block
        out = engine.offload_report()["kv_out"]["bytes"]
        assert out == block + 5 * block // 64  # the prompt's block, then a token at a time
        engine.generate(prompts(case(name), (70, 60, 3)), GREEDY)
        assert "KV cache out" in jaxinfer.paging.report.line(executor)


def test_devices_hold_two_windows_and_no_more(root, small_groups, monkeypatch):
    name = "llama-plain"
    asked = prompts(case(name), (5, 40, 70, 100, 3, 64))
    gc.collect()
    before = sum(array.nbytes for array in jax.live_arrays())
    with hosted(root, name) as engine:
        executor, plan = engine.executor, engine.plan
        engine.generate(asked, GREEDY)
        tails = {shape[1:] for shape, _ in plan.cache_arrays}
        windows, everything = [], []

        def counted(function):
            def counting(*given):
                found = function(*given)
                live = jax.live_arrays()
                windows.append(sum(array.nbytes for array in live if array.shape[1:] in tails))
                everything.append(sum(array.nbytes for array in live))
                return found

            return counting

        for method in ("_placed", "_context"):
            monkeypatch.setattr(executor.kv, method, counted(getattr(executor.kv, method)))
        engine.generate(asked, GREEDY)
        assert len(windows) > 40
        assert 0 < max(windows) <= plan.cache_bytes_per_device
        temporary = max(step.memory_analysis().temp_size_in_bytes for step in executor.compiled().values())
        assert max(everything) - before + temporary <= plan.total_bytes_per_device
        assert engine.offload_report()["device"]["used_bytes"] <= plan.total_bytes_per_device
    assert sum(array.nbytes for array in jax.live_arrays()) <= before + 1000


def test_after_an_error_in_the_middle_of_a_pass_the_next_is_right(root, small_groups, tmp_path, monkeypatch):
    store = convert(checkpoint(case("llama-plain"), root), tmp_path / "store", progress=False)
    asked = prompts(case("llama-plain"), (5, 70, 20))
    with tiny(root) as resident:
        expected = said(resident, asked)
    with of(store, offload="disk", kv_offload="host") as engine:
        kv, calls = engine.executor.kv, []
        take = kv.take

        def failing(layer, index):
            calls.append((layer, index))
            if len(calls) == 9:
                raise CheckpointError("the disk is gone")
            return take(layer, index)

        monkeypatch.setattr(kv, "take", failing)
        with pytest.raises(CheckpointError, match="the disk is gone"):
            engine.generate(asked, GREEDY)
        assert not kv._held
        assert said(engine, asked) == expected


def test_what_cannot_be_written_back_is_said(root, small_groups, monkeypatch):
    asked = prompts(case("llama-plain"), (5, 70))
    with hosted(root) as engine:
        expected, kv = said(engine, asked), engine.executor.kv
        with monkeypatch.context() as broken:
            broken.setattr(kv, "_distinct", lambda leaf: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.generate(asked, GREEDY)
        assert said(engine, asked) == expected


def test_what_could_not_be_written_is_said_though_something_else_could_since(root, small_groups):
    with hosted(root) as engine:
        kv = engine.executor.kv
        failed, done = Future(), Future()
        failed.set_exception(ZeroDivisionError())
        done.set_result(None)
        for future in (done, failed, done):
            kv._leave(0, 1, future)
        assert kv._leaving[0, 1] == [failed, done]
        with pytest.raises(ZeroDivisionError):
            kv.settle()
        kv.settle()


def test_memory_that_cannot_be_had_is_an_error_and_nothing_is_kept(root, monkeypatch):
    from jaxinfer.paging import host_cache

    made = []

    class Scarce(host_cache.HostBuffer):
        def __init__(self, nbytes, device):
            if made:
                raise CapacityError("host memory: no more of it")
            super().__init__(nbytes, device)
            made.append(self)

    monkeypatch.setattr(host_cache, "HostBuffer", Scarce)
    with pytest.raises(CapacityError, match="no more of it"):
        hosted(root)
    assert made[0].array.size == 0


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.data())
def test_the_newest_rows_are_those_that_were_written(rows, width, groups, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    cache = tuple(jnp.asarray(rng.standard_normal((rows * width, groups, 64, 8), np.float32)) for _ in range(2))
    key, value = (jnp.asarray(rng.standard_normal((rows, 1, groups, 8), np.float32)) for _ in range(2))
    positions = jnp.asarray([[data.draw(st.integers(0, 64 * width - 1))] for _ in range(rows)], jnp.int32)
    tables = jnp.asarray(window_tables(rows, 1, width))
    written = write_cache(cache, key, value, tables, positions)
    for got, expected in zip(newest(written, tables, positions), (key, value), strict=True):
        np.testing.assert_array_equal(got, expected)
    # As host memory has it: blocks first, then rows.
    for row in range(rows):
        block, offset = divmod(int(positions[row, 0]), 64)
        whole = np.asarray(written[0]).reshape(width, rows, groups, 64, 8)
        np.testing.assert_array_equal(whole[block, row, :, offset], key[row, 0])


def test_rows_of_a_prefill_step_are_told_by_their_blocks():
    tables = np.array([[4, 5, 6], [0, 0, 0], [1, 2, 0]])  # slots 1, none, 0 of three blocks each
    positions = np.array([[64, 65, 66], [-1, -1, -1], [0, 1, -1]])
    found = Chunks.of(tables, positions, 3)
    assert found.slots.tolist() == [1, -1, 0]
    assert (found.starts.tolist(), found.stops.tolist()) == ([64, 0, 0], [67, 0, 2])
    assert found.width == 3
