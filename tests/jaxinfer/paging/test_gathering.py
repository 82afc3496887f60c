"""Prefill with gathered weights: when it is chosen, what is sent, and that it says what the resident engine says."""

from __future__ import annotations

import dataclasses
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.checkpoints.convert import convert
from jaxinfer.errors import CapacityError
from jaxinfer.hardware import Hardware
from jaxinfer.models.families import load_spec
from jaxinfer.paging import gathering, tiers
from jaxinfer.paging.gathering import COPIES, exchanged_bytes, rows
from jaxinfer.plan import make_plan
from tests.cases import case
from tests.engines import of, tiny
from tests.oracle import checkpoint, prompts, rms, shared_root

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
DEVICE = Hardware(kind="GPU", memory=1 << 40, bandwidth=4e12, matmul=8e14, link=5e10)
LENGTHS = (150, 140, 33, 60)
LONG = {"prefill_chunk": 256, "prefill_tokens": 1024, "max_batch": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture(scope="module")
def spec(root):
    return load_spec(checkpoint(case("llama-plain"), root))


def said(engine, asked):
    return [[output.token_ids for output in result.outputs] for result in engine.generate(asked, GREEDY)]


def layers_of(engine):
    """The compiled prefill layers and gathers, as text: of gathered weights, of sharded ones, and the gathers."""
    gathered, sharded, gathers = [], [], []
    for key, step in engine.executor._compiled.items():
        if key[0] == "gather":
            gathers.append(step.as_text())
        elif key[0] == "layer":
            _, batch = step.args_info[0][2:]
            if batch.tokens.shape[1] > 1:
                (gathered if batch.gathered else sharded).append(step.as_text())
            else:
                assert not batch.gathered
    return gathered, sharded, gathers


def gathered_batches(engine):
    """The batches of the compiled layers whose weights are gathered."""
    batches = [step.args_info[0][3] for key, step in engine.executor._compiled.items() if key[0] == "layer"]
    return [batch for batch in batches if batch.gathered]


def sent(text, collective):
    """Bytes of the results of a kind of collective in a compiled program, on one device."""
    found = re.findall(rf"= (.*?) {collective}\(", text)
    shapes = re.findall(r"(\w+)\[([\d,]*)\]", " ".join(found))
    sizes = {"f32": 4, "bf16": 2, "u32": 4, "u16": 2, "u8": 1}
    return sum(sizes[dtype] * math.prod(map(int, filter(None, shape.split(",")))) for dtype, shape in shapes)


def count(text, collective):
    return len(re.findall(rf"\s{collective}\(", text))


@pytest.mark.parametrize(
    ("name", "mesh"),
    # Rotary; learned positions and Conv1D; ALiBi; projected and post-norm; soft caps, windows and four norms; one norm
    # for both halves; norms of heads; one head for all devices.
    [
        *(
            (name, {"tensor": 2})
            for name in (
                "llama-plain", "gpt2-plain", "bloom-plain", "opt-projected-post-norm", "gemma2-plain",
                "falcon-grouped-one-norm", "qwen3-plain", "llama-multi-query",
            )
        ),
        ("gpt2-plain", {"tensor": 4}),
        ("llama-multi-query", {"tensor": 4}),
        ("gemma2-plain", {"data": 2, "tensor": 2}),
    ],
    ids=str,
)  # fmt: skip
def test_tokens_scores_and_logits_are_those_of_the_resident_engine(name, mesh, root):
    assert mesh["tensor"] in case(name).tensor
    asked = prompts(case(name), LENGTHS)
    with tiny(root, name) as resident:
        tokens, scores, logits = said(resident, asked), resident.score(asked), resident.logits(asked)
    with tiny(root, name, mesh=mesh, offload="host", **LONG) as paged:
        assert said(paged, asked) == tokens
        gathered, _, gathers = layers_of(paged)
        assert gathered
        assert gathers
        for got, expected in zip(paged.score(asked), scores, strict=True):
            # Sums in another order: resident engines on one device and on two differ by as much as 1.6e-5 here.
            np.testing.assert_allclose(got.logprobs[1:], expected.logprobs[1:], atol=5e-5)
        for got, expected in zip(paged.logits(asked), logits, strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"tensor": 4}], ids=str)
def test_layers_have_no_all_reduce_and_send_what_is_counted(mesh, root):
    """The program's own collectives against the bytes by which the plan chooses."""
    asked, tensor = prompts(case("llama-plain"), LENGTHS), mesh["tensor"]
    with tiny(root, mesh=mesh, offload="host", **LONG) as paged:
        said(paged, asked)
        (layer,), _, (gather,) = layers_of(paged)
        plan = paged.plan
    with tiny(root, mesh=mesh, offload="host", **(LONG | {"prefill_tokens": 128})) as paged:
        assert paged.plan.tiers.gathering.tokens is None
        said(paged, asked)
        _, (*_, other), nothing = layers_of(paged)
        assert not nothing
    assert (count(layer, "all-reduce"), count(layer, "all-gather"), count(layer, "all-to-all")) == (0, 0, 2)
    assert (count(gather, "all-reduce"), count(gather, "all-to-all")) == (0, 0)
    assert count(gather, "all-gather") >= 1
    assert (count(other, "all-reduce"), count(other, "all-gather"), count(other, "all-to-all")) == (2, 0, 0)

    others, hidden = (tensor - 1) / tensor, plan.spec.hidden
    layer_bytes = max(plan.tiers.layer_bytes)
    tokens = sent(other, "all-reduce") // (2 * 4 * hidden)
    assert exchanged_bytes(plan, layer_bytes, tokens)[0] == pytest.approx(2 * sent(other, "all-reduce") * others)
    per_token = (2 * plan.spec.heads + 2 * plan.layout.kv_groups) * plan.spec.head_dim * 4
    tokens = sent(layer, "all-to-all") * tensor // per_token
    assert tokens >= plan.tiers.gathering.tokens
    moved = (sent(layer, "all-to-all") + sent(gather, "all-gather")) * others
    assert exchanged_bytes(plan, layer_bytes, tokens)[1] == pytest.approx(moved)


def test_a_pass_of_few_tokens_stays_sharded(root):
    asked = prompts(case("llama-plain"), (5, 20))
    with tiny(root) as resident:
        expected = said(resident, asked)
    with tiny(root, mesh={"tensor": 2}, offload="host", **LONG) as paged:
        assert paged.plan.tiers.gathering.tokens > 64
        assert said(paged, asked) == expected
        gathered, sharded, gathers = layers_of(paged)
        assert not gathered
        assert not gathers
        assert sharded


@pytest.mark.parametrize("more", [{}, {"kv_offload": "host"}, {"kv_dtype": "int8"}], ids=str)
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_micro_batches_share_what_was_gathered(offload, more, root, tmp_path, monkeypatch):
    """Groups of rows, and pieces of rows: the weights of each layer are gathered once a pass for all of them."""
    name = "gemma2-plain"
    asked = prompts(case(name), LENGTHS)
    with tiny(root, name, **{k: v for k, v in more.items() if k == "kv_dtype"}) as resident:
        expected = said(resident, asked)
    monkeypatch.setattr(tiers, "MICRO_TOKENS", 32)
    store = convert(checkpoint(case(name), root), tmp_path / "store", progress=False)
    with of(store, mesh={"tensor": 2}, offload=offload, **LONG, **more) as paged:
        executor, calls = paged.executor, []
        gather, split, splits = executor._gather, executor._split, []
        monkeypatch.setattr(executor, "_gather", lambda layer, own: (calls.append(layer), gather(layer, own))[1])
        monkeypatch.setattr(executor, "_split", lambda *given: (splits.append(split(*given)), splits[-1])[1])
        assert said(paged, asked) == expected
        assert max(groups for groups, _ in splits) > 1
        assert max(columns for _, columns in splits) > 1
        # Each device computes as many of a piece's tokens as it would of a sharded pass.
        pieces = [math.prod(batch.tokens.shape) for batch in gathered_batches(paged)]
        assert 32 < max(pieces) <= 2 * 32
        count = paged.plan.spec.num_layers
        assert calls == [*range(count)] * (len(calls) // count)
        assert 0 < len(calls) // count <= len(splits)


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_quantized_weights_are_gathered_as_they_travel(method, monkeypatch):
    monkeypatch.setattr(tiers, "MICRO_TOKENS", 64)  # pieces enough to widen for
    asked = [list(range(3, 60)), list(range(9, 120)), [5, 17, 4] * 40]
    options = {"dtype": "float32", "max_model_len": 256, "quantize": method}
    with of("demo", mesh={"tensor": 2}, **options) as resident:
        expected, logits = said(resident, asked), resident.logits(asked)
    with of("demo", mesh={"tensor": 2}, offload="host", **options, **(LONG | {"prefill_tokens": 2048})) as paged:
        paged.executor.tiers = with_gathering(paged.executor.tiers, 64)
        assert said(paged, asked) == expected
        assert paged.plan.tiers.gathering.widened
        gathered, _, _ = layers_of(paged)
        assert gathered
        for got, one in zip(paged.logits(asked), logits, strict=True):
            np.testing.assert_allclose(got, one, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_quantized_weights_are_gathered_only_where_they_are_widened_no_oftener(spec, method):
    """Of OPT-13B's layers: whole pieces of 4096 tokens for each device, however few bytes weights are."""
    big = dataclasses.replace(spec, hidden=5120, heads=40, kv_heads=40, head_dim=128, intermediate=14336)

    def planned(tensor, quantize):
        return make_plan(
            big, {"tensor": tensor}, "bfloat16", DEVICE, max_batch=64, offload="host", quantize=quantize,
            prefill_tokens=32768, kv_blocks=1024,
        )  # fmt: skip

    for tensor in (2, 4):
        found, plain = planned(tensor, method), planned(tensor, None)
        chosen, pieces = found.tiers.gathering, 4096 * tensor
        sharded, gathered = exchanged_bytes(found, max(found.tiers.layer_bytes), pieces)
        assert chosen.tokens == pieces if gathered < sharded else chosen.tokens > pieces
        assert f"; a whole layer is widened for {pieces:,} tokens at a time, a part of one for 4,096" in chosen.why
        assert f"gathered from {chosen.tokens:,} tokens" in rows(found)[0][1]
        assert "widened" not in plain.tiers.gathering.why

        def ways(count, tokens, blocks, found=found, plain=plain):
            return [gathering.gathers(plan, plan.tiers, count, tokens, blocks) for plan in (found, plain)]

        assert ways(64, 512, 8) == [True, True]
        assert ways(8, 4096, 64) == [True, True]
        assert not ways(56, 512, 8)[0]  # 7 pieces of a part, and more than half or a quarter of that
        assert ways(64, 512, 256) == [False, True]  # memory for long contexts: as many pieces either way
        assert ways(8, 512, 8) == [False, False]


def with_gathering(own, tokens):
    return dataclasses.replace(own, gathering=dataclasses.replace(own.gathering, tokens=tokens))


def test_bfloat16_logits_are_those_of_the_resident_engine_but_for_rounding(root, tmp_path):
    asked = prompts(case("llama-plain"), LENGTHS)
    store = convert(checkpoint(case("llama-plain"), root), tmp_path / "store", "bfloat16", progress=False)
    with of(store) as resident, of(store, dtype="float32") as exact:
        truth, expected = exact.logits(asked), resident.logits(asked)
    with of(store, mesh={"tensor": 2}, offload="host", **LONG) as paged:
        got = paged.logits(asked)
        assert layers_of(paged)[0]
    assert rms(got, truth) <= 1.25 * rms(expected, truth)


def test_devices_hold_no_more_than_the_plan_says(root):
    asked = prompts(case("llama-plain"), LENGTHS)
    with tiny(root, mesh={"tensor": 2}, offload="host", **LONG) as paged:
        said(paged, asked)
        plan, tiers_ = paged.plan, paged.plan.tiers
        slots = min(tiers_.slots, plan.spec.num_layers) * max(tiers_.layer_bytes)
        assert tiers_.device_bytes == slots + tiers_.gathering.nbytes
        (gather,) = [step for key, step in paged.executor._compiled.items() if key[0] == "gather"]
        memory = gather.memory_analysis()
        assert memory.output_size_in_bytes + memory.temp_size_in_bytes <= tiers_.gathering.nbytes
        temporary = max(step.memory_analysis().temp_size_in_bytes for step in paged.executor.compiled().values())
        assert paged.executor.device_bytes() // 2 + tiers_.gathering.nbytes + temporary <= plan.total_bytes_per_device


@pytest.mark.parametrize("method", [None, "int8", "int4"])
@pytest.mark.parametrize("tensor", [2, 4])
def test_gathering_takes_no_more_memory_than_is_counted(method, tensor):
    """Of parameters that travel alone and of small ones."""
    options = {"dtype": "float32", "max_model_len": 256, "quantize": method, "prefill_tokens": 4096 * tensor}
    with of("demo", mesh={"tensor": tensor}, offload="host", **options) as paged:
        executor = paged.executor
        segments = executor.pager.take(0)
        whole = executor._gather(0, segments)
        (gather,) = [step for key, step in executor._compiled.items() if key[0] == "gather"]
        memory, nbytes = gather.memory_analysis(), executor.tiers.gathering.nbytes
        held = sum(leaf.addressable_shards[0].data.on_device_size_in_bytes() for leaf in whole)
        assert held == pytest.approx(max(paged.plan.tiers.buffer_bytes), rel=0.1)
        assert nbytes // 2 < memory.output_size_in_bytes + memory.temp_size_in_bytes <= nbytes


@given(st.integers(1, 10**7), st.sampled_from([2, 4]), st.sampled_from(["float32", "bfloat16"]))
def test_the_chosen_way_sends_less(spec, tokens, tensor, dtype):
    plan = make_plan(
        spec, {"tensor": tensor}, dtype, DEVICE, max_batch=4, offload="host", kv_blocks=8, prefill_tokens=tokens
    )
    found = plan.tiers.gathering
    mean = sum(plan.tiers.layer_bytes) / spec.num_layers
    sharded, gathered = exchanged_bytes(plan, mean, tokens)
    assert (found.tokens is not None) == (gathered <= sharded)
    if found.tokens is not None:
        sharded, gathered = exchanged_bytes(plan, mean, found.tokens - 1)
        assert sharded < gathered
        assert found.nbytes == COPIES * max(plan.tiers.buffer_bytes)


def test_by_hand():
    """13 billion parameters on two devices: weights of 629 MB, and 20 KB less for each token."""
    layer = 12 * 5120 * 5120 * 2
    plan = jaxinfer.plan("demo", mesh={"tensor": 2}, device="H200", dtype="bfloat16")
    plan = dataclasses.replace(
        plan, spec=dataclasses.replace(plan.spec, hidden=5120, heads=40, kv_heads=40, head_dim=128),
        layout=dataclasses.replace(plan.layout, kv_groups=40),
    )  # fmt: skip
    sharded, gathered = exchanged_bytes(plan, layer / 2, 30720)
    assert sharded == 2 * 30720 * 5120 * jnp.dtype("bfloat16").itemsize == gathered


def test_what_is_not_gathered_says_why(spec, monkeypatch):
    def planned(mesh, **options):
        return make_plan(spec, mesh, "float32", DEVICE, max_batch=4, offload="host", **options)

    alone = planned({"tensor": 1})
    assert alone.tiers.gathering.tokens is None
    assert "one device" in alone.tiers.gathering.why
    assert rows(alone) == []
    few = planned({"tensor": 2}, prefill_tokens=64)
    assert re.search("it would pay from [0-9]+ tokens a pass, which takes 64 at most", few.tiers.gathering.why)
    assert few.tiers.gathering.nbytes == 0
    assert rows(few) == [("weights in prefill", "sharded", few.tiers.gathering.why)]
    whole = planned({"tensor": 2}, prefill_tokens=1024, kv_blocks=2)
    assert whole.tiers.gathering.tokens is not None
    assert f"gathered from {whole.tiers.gathering.tokens} tokens" in str(whole)
    assert whole.to_dict()["paging"]["gathering"]["tokens"] == whole.tiers.gathering.tokens
    monkeypatch.setattr(gathering, "SHARE", 1 << 40)
    refused = planned({"tensor": 2}, prefill_tokens=1024, kv_blocks=2, device_memory=1 << 30).tiers.gathering
    assert refused.tokens is None
    assert "for a whole layer are more than 1/1099511627776 of the 1.07 GB" in refused.why


def test_weights_are_gathered_only_where_there_is_room(spec, monkeypatch):
    """No plan that fits without is refused for it. (In so little memory a layer is more than its usual share.)"""
    monkeypatch.setattr(gathering, "SHARE", 1)

    def planned(cap):
        return make_plan(
            spec, {"tensor": 2}, "float32", DEVICE, max_batch=4, offload="host", prefill_tokens=1024, kv_blocks=2,
            device_memory=cap,
        )  # fmt: skip

    def fits(cap):
        try:
            return planned(cap).total_bytes_per_device <= cap
        except CapacityError:
            return False

    least, enough = 1, 1 << 30
    while least < enough:
        middle = (least + enough) // 2
        least, enough = (least, middle) if fits(middle) else (middle + 1, enough)
    assert fits(least)
    before, room = least, 1 << 30
    while before + 1 < room:
        middle = (before + room) // 2
        before, room = (before, middle) if planned(middle).tiers.gathering.tokens is not None else (middle, room)
    needed = planned(1 << 30).tiers.gathering.nbytes
    assert room >= least + needed  # larger pieces need more beside
    for cap in (least, room - 1):
        found = planned(cap).tiers.gathering
        assert (found.tokens, found.nbytes) == (None, 0)
        assert "no room for" in found.why
    assert planned(room).total_bytes_per_device <= room
