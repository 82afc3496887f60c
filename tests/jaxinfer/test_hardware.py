from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxinfer.errors import ConfigError
from jaxinfer.hardware import KNOWN, named, of
from pallas_kernels import Device


def gpu(kind: str, capability: str | None = None, **stats: int) -> Any:
    return SimpleNamespace(
        platform="gpu", device_kind=kind, memory_stats=lambda: stats or None, compute_capability=capability
    )


def test_a_cpus_memory_is_shared_among_the_devices_it_plays():
    found = of(jax.devices("cpu")[0])
    assert found.kind == "cpu"
    assert found.memory is not None
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert found.memory * jax.local_device_count() == pytest.approx(total, rel=0.01)
    assert found.bandwidth is found.matmul is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_a_known_gpu_has_its_rates_and_the_memory_that_is_really_there(kind, name):
    found = of(gpu(kind, bytes_limit=12345))
    assert (found.kind, found.memory) == (kind, 12345)
    assert (found.bandwidth, found.matmul, found.measured) == (
        KNOWN[name].bandwidth, KNOWN[name].matmul, KNOWN[name].measured,
    )  # fmt: skip
    assert of(gpu(kind)).memory == KNOWN[name].memory


def test_an_unknown_gpu_has_no_rates():
    found = of(gpu("Future X1", bytes_limit=99))
    assert (found.kind, found.memory, found.bandwidth, found.matmul) == ("Future X1", 99, None, None)
    assert of(gpu("Future X1")).memory is None


def test_what_kernels_a_device_runs_is_what_it_says_or_else_what_is_known_of_it():
    assert of(jax.devices("cpu")[0]).device == Device("cpu")
    assert of(gpu("Future X1", "12.0")).device == Device("gpu", "12.0")
    assert of(gpu("Future X1")).device == Device("gpu")
    assert of(gpu("NVIDIA H200", "9.0")).device == of(gpu("NVIDIA H200")).device == Device("gpu", "9.0")
    assert [kind for kind in KNOWN if named(kind).device.hopper] == ["H200", "H100"]


def test_devices_are_found_by_name():
    assert named("h200") is KNOWN["H200"]
    assert all(named(kind).kind == kind for kind in KNOWN)
    with pytest.raises(ConfigError, match="device 'Z80' is not known; known are H200, H100"):
        named("Z80")
