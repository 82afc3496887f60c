"""What the doctor sees on machines that are well, and on machines that are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

import jaxinfer
from jaxinfer import doctor
from jaxinfer.doctor import Diagnosis, Finding, diagnose, driver_version
from jaxinfer.hardware import Hardware


def find(findings, what):
    return next((finding for finding in findings if finding.what == what), None)


def test_this_machine_is_well():
    found = diagnose(measure=False)
    assert found.healthy
    assert found.rates is None
    assert find(found.findings, "jax").value == jax.__version__
    assert [finding.what for finding in found.findings if finding.what.startswith("cpu ")] == [
        f"cpu {i}" for i in range(8)
    ]
    assert find(found.findings, "demo").value == "bundled"
    assert "offline" in find(found.findings, "hub").value
    assert [choice.op for choice in found.implementations][:2] == ["prefill attention", "decode attention"]


def test_a_models_own_shapes_decide_what_serves_it(monkeypatch):
    monkeypatch.setattr(doctor, "plan", lambda model: jaxinfer.plan(model, device="H200", dtype="bfloat16"))
    said = {choice.op: choice for choice in diagnose("demo", measure=False).implementations}
    assert said["products of up to 16 rows"].implementation == "mosaic"
    assert said["decode attention"].implementation == "reduce"
    for op in ("prefill attention", "decode attention"):
        assert "the kernel does not run head_dim 32" in said[op].reason
    with pytest.raises(jaxinfer.CheckpointError):
        diagnose("no-such-folder-or-model", measure=False)


def test_a_diagnosis_is_json_text_and_html():
    bad = Finding(topic="devices", what="<GPU>", value="gone", verdict="problem", advice="look for it")
    found = Diagnosis(findings=(bad,), implementations=diagnose(measure=False).implementations, rates=None)
    assert json.loads(json.dumps(found.to_dict()))["healthy"] is False
    assert "problem: look for it" in str(found)
    assert "decode attention: dot (XLA), because" in str(found)
    assert "&lt;GPU&gt;" in found._repr_html_()


def test_measured_rates_are_reported():
    found = diagnose(measure=True)
    assert found.rates["bandwidth"] > 1e8
    assert "GB/s" in find(found.findings, "memory bandwidth").value
    json.dumps(found.to_dict())


def test_slow_devices_are_warned_of():
    known = Hardware(kind="H200", memory=None, bandwidth=4.26e12, matmul=8.2e14)
    fast = list(doctor._rates(4.2e12, 8e14, "bfloat16", known))
    assert [finding.verdict for finding in fast] == ["ok", "ok"]
    assert "99% of what H200 is known for" in fast[0].value
    slow = list(doctor._rates(2e12, 8e14, "bfloat16", known))
    assert (slow[0].verdict, slow[1].verdict) == ("warning", "ok")


@pytest.mark.parametrize(("threads", "verdict"), [("8", "problem"), ("15", "problem"), ("16", None), ("32", None)])
def test_too_few_threads_for_virtual_devices(monkeypatch, threads, verdict):
    monkeypatch.setenv("NPROC", threads)
    found = find(doctor._environment(jax.local_devices()), "CPU threads")
    assert (found and found.verdict) == verdict
    if verdict:
        assert "NPROC=16" in found.advice


def test_one_device_needs_no_more_threads(monkeypatch):
    monkeypatch.setenv("NPROC", "1")
    assert find(doctor._environment(jax.local_devices()[:1]), "CPU threads") is None


@pytest.mark.parametrize(
    ("platform", "path", "verdict"),
    [
        ("gpu", "/usr/local/cuda/lib64:/opt/lib", "warning"),
        ("cpu", "/usr/local/cuda/lib64", "ok"),
        ("gpu", "/opt/lib", "ok"),
        ("gpu", "", "ok"),
    ],
)
def test_cuda_libraries_in_the_way(monkeypatch, platform, path, verdict):
    monkeypatch.setenv("LD_LIBRARY_PATH", path)
    found = find(doctor._environment([SimpleNamespace(platform=platform)]), "LD_LIBRARY_PATH")
    assert found.verdict == verdict
    if verdict == "warning":
        assert found.advice.startswith("/usr/local/cuda/lib64 comes before")


@pytest.mark.parametrize(
    ("driver", "platforms", "advice"),
    [
        ("580.95.05", None, "jaxinfer[cuda13]"),
        ("535.1", None, "jaxinfer[cuda12]"),
        ("580.1", "cpu", "JAX_PLATFORMS=cpu"),
    ],
)
def test_a_gpu_that_jax_does_not_use(monkeypatch, driver, platforms, advice):
    monkeypatch.setattr(doctor, "driver_version", lambda: driver)
    monkeypatch.setattr(doctor.glob, "glob", lambda _: ["0", "1"])
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    if platforms:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    found = find(doctor._driver([SimpleNamespace(platform="cpu")]), "GPUs")
    assert found.verdict == "warning"
    assert advice in found.advice
    assert find(doctor._driver([SimpleNamespace(platform="gpu")]), "GPUs") is None


def test_the_drivers_version_is_read_from_the_kernel(tmp_path):
    file = tmp_path / "version"
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\nGCC version: 12.2.0"
    )
    assert driver_version(file) == "580.95.05"
    assert driver_version(tmp_path / "none") is None


def test_a_plugin_of_another_version_is_a_problem(monkeypatch):
    versions = {"jax": "0.11.2", "jaxlib": "0.11.2", "jax-cuda13-plugin": "0.10.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = list(doctor._versions())
    assert find(found, "plugin").verdict == "problem"
    assert find(found, "flax").verdict == "problem"  # missing
    versions |= {"jax-cuda13-plugin": "0.11.2"}
    assert find(doctor._versions(), "plugin") is None


def test_a_machine_on_which_jax_does_not_start_is_diagnosed_too():
    ended = subprocess.run(
        [sys.executable, "-m", "jaxinfer", "doctor", "--json"],
        capture_output=True, text=True, timeout=100, check=False, env=os.environ | {"JAX_PLATFORMS": "cuda"},
    )  # fmt: skip
    assert ended.returncode == 2, ended.stderr
    found = json.loads(ended.stdout)
    assert not found["healthy"]
    assert any(finding["what"] == "JAX" and finding["verdict"] == "problem" for finding in found["findings"])
