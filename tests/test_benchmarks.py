"""The scripts of ``benchmarks/``: what they count, and that the whole table runs, tiny, on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import decoder_layers  # noqa: E402
import recorder  # noqa: E402
import shapes  # noqa: E402
import step_trace  # noqa: E402
import table  # noqa: E402
import table_ours  # noqa: E402
import table_peer  # noqa: E402

from jaxinfer.bench import Limits  # noqa: E402
from pallas_kernels.layer_plan import MARKS  # noqa: E402

LIMITS = Limits(device="box", devices=1, dtype="bfloat16", bandwidth=4e12, matmul=8e14)


@pytest.fixture
def ctx(tmp_path):
    return table_ours.Context(True, tmp_path, limits=LIMITS)


def test_kernels_and_gaps_are_summed_up():
    # Two streams that overlap, a gap of 5 us, one kernel twice: 20 us from begin to end, 15 busy.
    events = [("a", 1000.0, 8000.0), ("b", 6000.0, 5000.0), ("a", 16000.0, 5000.0)]
    found = step_trace.summary(events, steps=2, top=1)
    assert (found["span_us"], found["busy_us"], found["idle_us"]) == (10.0, 7.5, 2.5)
    assert (found["gaps"], found["longest_gaps_us"], found["launches"]) == (0.5, [5.0], 1.5)
    assert found["kernels"] == [{"name": "a", "launches": 1.0, "us": 6.5}]
    assert "error" in step_trace.summary([], 1)


def test_times_noted_in_a_kernel_become_phases():
    """Clocks that differ from SM to SM and run over; a block that does not attend; one that is late at every mark."""
    layers, blocks, steps = 3, 4, np.arange(1, len(MARKS) + 1)
    us = np.cumsum(np.tile(steps, layers)).reshape(layers, -1, 1) + np.array([0, 0, 0, 0.5])
    cycles = 1500 * us + np.array([10, 7e6, 2**32 - 30_000, 5])  # 1.5 GHz
    noted = np.stack([cycles, 1000 * us + 2**32 - 100_000], -1).astype(np.uint64).astype(np.uint32)
    noted[:, MARKS.index("keys"), 1] = 0
    found = decoder_layers.phases(noted.view(np.int32))
    assert found["cycles per us"] == pytest.approx(1500)
    assert found["layer_us"] == pytest.approx(steps.sum())
    for name, step in zip(MARKS, steps, strict=True):
        expected = step + (step - 1) / blocks if name == "attended" else step  # who did not attend came from before
        assert found[name]["us"] == pytest.approx(expected)
        assert found[name]["spread_us"] == pytest.approx(0.5)


def test_bytes_and_operations_of_a_7b_llama():
    """Held against figures counted by hand: 4 h^2 + 3 h f weights a layer, and the head."""
    import requests_model

    plan = requests_model.engine(1, 2048, 16).plan
    layer = 4 * 4096**2 + 3 * 4096 * 11008
    head = 4096 * 32000
    norms = 65 * 4096
    assert table_ours.weight_bytes(plan) == 2 * (32 * layer + head + norms)
    assert table_ours.layer_flops(plan) == 2 * 32 * layer
    assert table_ours.head_flops(plan) == 2 * head


def test_the_limit_of_many_requests():
    import requests_model

    plan = requests_model.engine(1, 2048, 16).plan
    asked, wanted = np.array([10, 20]), np.array([3, 1])
    found = table_ours.request_limits(LIMITS, plan, asked, wanted, cached=1000.0)
    # The first sequence's tokens read 10, 11 and 12 cached ones, the second's 20.
    assert found["limit_kv_s"] == pytest.approx((10 + 11 + 12 + 20) * 1000 / 4e12)
    assert found["limit_weights_s"] == pytest.approx(3 * table_ours.weight_bytes(plan) / 4e12)
    flops = 30 * table_ours.layer_flops(plan) + 2 * table_ours.head_flops(plan)
    assert found["limit_prefill_s"] == pytest.approx(flops / 8e14)
    prompts, outputs = table_ours.lengths(512, tiny=False)
    assert (prompts.min() >= 32, prompts.max() <= 511, outputs.min() >= 32, outputs.max() <= 255) == (True,) * 4


def test_a_recorded_run_names_every_program_and_counts_every_token(ctx):
    asked, wanted = table_ours.lengths(12, tiny=True)
    with ctx.engine("llama-7b", max_batch=4, max_model_len=96, prefill_tokens=256, decode_chunk=4) as engine:
        prompts, params = ctx.prompts(engine, asked), [table_ours.greedy(int(n)) for n in wanted]
        noted, _ = recorder.rehearse(engine, prompts, params)
        assert engine.executor.compiled() == {}
        recorder.compile_all(engine, noted.programs(), threads=2)
        compiled = set(engine.executor._compiled)
        assert compiled == {step.key for step in noted.steps}
        outputs = engine.generate(prompts, params)
        assert set(engine.executor._compiled) == compiled
        assert [len(o.outputs[0].token_ids) for o in outputs] == wanted.tolist()
        counters = engine._open().counters
        kinds = {kind: [s for s in noted.steps if s.kind == kind] for kind in ("prefill", "decode")}
        assert (counters.prefill_steps, counters.decode_steps) == (len(kinds["prefill"]), len(kinds["decode"]))
        assert (counters.prefill_tokens, counters.decode_tokens) == tuple(
            sum(s.real for s in steps) for steps in kinds.values()
        )
    # Each decoded token reads the prompt, those before it, and itself.
    reads = sum(int(p) * (n - 1) + n * (n - 1) // 2 for p, n in zip(asked.tolist(), wanted.tolist(), strict=True))
    assert sum(step.context for step in noted.steps) == reads


def test_the_peer_computes_what_transformers_computes(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(torch._dynamo.config, "disable", True)
    config = shapes.config("llama-7b-gqa8", tiny=True)
    own = {k: v for k, v in config.items() if k not in ("dtype", "architectures", "model_type")}
    torch.manual_seed(0)
    reference = LlamaForCausalLM(LlamaConfig(**own)).to(torch.bfloat16).eval()
    state = reference.state_dict()
    model = table_peer.Llama(config, 2, 40, None, "cpu").eval()
    with torch.inference_mode():
        model.embed.copy_(state["model.embed_tokens.weight"])
        model.head.weight.copy_(state["lm_head.weight"])
        for index, layer in enumerate(model.layers):
            of = [state[f"model.layers.{index}.self_attn.{n}_proj.weight"] for n in "qkvo"]
            mlp = [state[f"model.layers.{index}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")]
            layer.qkv.weight.copy_(torch.cat(of[:3]))
            layer.out.weight.copy_(of[3])
            layer.gate_up.weight.copy_(torch.cat(mlp[:2]))
            layer.down.weight.copy_(mlp[2])
        for seed in range(3):
            ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(seed))
            expected = reference(ids).logits[:, -1].argmax(-1).tolist()
            assert model(ids, model.places(0, 40)).tolist() == expected
            model(ids[:, :39], model.places(0, 39))
            assert model(ids[:, 39:], model.places(39, 1)).tolist() == expected


def test_names_of_rows():
    assert table.chosen("decode,int8,decode1") == ["decode1", "decode16", "decode64", "int8"]
    with pytest.raises(SystemExit, match="no row decode2"):
        table.chosen("decode2")
    assert set(table.SECONDS["ours"]) - {"start"} == set(table_ours.ROWS)
    assert set(table.SECONDS["peer"]) - {"start"} == set(table_peer.ROWS)


def test_the_table_is_rehearsed_and_a_row_that_fails_leaves_the_rest(tmp_path):
    out = tmp_path / "table.json"
    command = [sys.executable, "benchmarks/table.py", "--rehearse", "--no-peer", "--profile", "--budget", "200"]
    command += ["--rows", "decode1,long64,requests", "--option", "no_such=1", "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=200)
    failed = json.loads(out.read_text())["rows"]
    assert all("init_inference has no no_such" in row["ours"]["error"] for row in failed.values())
    command = [part for part in command if part not in ("--option", "no_such=1")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=200)
    found = json.loads(out.read_text())
    assert set(found["rows"]) == {"decode1", "long64", "requests"}
    for row in found["rows"].values():
        assert row["ours"]["value"] > 0
        assert row["ours"]["share"] > 0
    assert found["rows"]["decode1"]["ours"]["trace"]["kernels"]
    assert found["ours"]["machine"]["device"] == "cpu"


def test_paging_over_two_devices_is_rehearsed(tmp_path):
    out = tmp_path / "two.json"
    command = [sys.executable, "benchmarks/offload.py", "two", "--rehearse", "--weights", "bfloat16", "--out", str(out)]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "NPROC": "16"}
    subprocess.run(command, cwd=ROOT, env=os.environ | flags, check=True, capture_output=True, timeout=200)
    found = json.loads(out.read_text())
    assert found["one_bfloat16"]["moved_bytes"] > 1.9 * found["two_bfloat16"]["moved_bytes"]
    assert found["ratio_bfloat16"]["same_first_token"] == found["ratio_bfloat16"]["same_tokens"] == 1
    assert found["ratio_batch_1"]["step"] > 0
    for tokens in (64, 16):
        ways = found[f"prefill_bfloat16_{tokens}_both_ways"]
        assert ways["faster"] in ("gathered", "sharded")
