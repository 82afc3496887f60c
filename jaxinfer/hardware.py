"""What a device can hold and how fast it reads: the constants that a plan is computed from."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass

import jax

from jaxinfer.errors import ConfigError
from pallas_kernels import Device


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One device.

    Attributes:
        kind: what it is called.
        memory: bytes that a program can use, or None where unknown.
        bandwidth: bytes per second of a large copy, read and written bytes counted together; None where unknown.
        matmul: bfloat16 multiply-adds of a large product, in FLOP per second; None where unknown.
        link: bytes per second from registered host memory to the device; None where unknown.
        measured: whether the rates were measured (else they are a share of the data sheet's).
        platform: ``cpu``, ``gpu``, ...
        capability: compute capability of an NVIDIA GPU, such as ``9.0``, which decides what kernels it runs; None where
            unknown.
        cores: SMs of a GPU that is here; None where unknown.
    """

    kind: str
    memory: int | None
    bandwidth: float | None
    matmul: float | None
    link: float | None = None
    measured: bool = False
    platform: str = "gpu"
    capability: str | None = None
    cores: int | None = None

    @property
    def device(self) -> Device:
        """What code for it is made for."""
        return Device(self.platform, self.capability, self.cores)


# The H200 as benchmarks/decode_7b.py measured it: 88 % of the data sheet's bandwidth, 70 % of its dense bfloat16 rate.
# The others were not measured: 85 and 75 % of their data sheets, an assumption; PCIe 5 as an H200 reaches it, or half
# of that for PCIe 4.
KNOWN: dict[str, Hardware] = {
    "H200": Hardware(
        kind="H200",
        memory=143_771 << 20,
        bandwidth=4.22e12,
        matmul=6.9e14,
        link=5.3e10,
        measured=True,
        capability="9.0",
    ),
    "H100": Hardware(kind="H100", memory=81_559 << 20, bandwidth=2.85e12, matmul=7.4e14, link=5.3e10, capability="9.0"),
    "A100-80GB": Hardware(
        kind="A100-80GB", memory=81_920 << 20, bandwidth=1.73e12, matmul=2.3e14, link=2.5e10, capability="8.0"
    ),
    "A100-40GB": Hardware(
        kind="A100-40GB", memory=40_960 << 20, bandwidth=1.32e12, matmul=2.3e14, link=2.5e10, capability="8.0"
    ),
    "L40S": Hardware(kind="L40S", memory=46_068 << 20, bandwidth=0.73e12, matmul=2.7e14, link=2.5e10, capability="8.9"),
    "RTX 4090": Hardware(
        kind="RTX 4090", memory=24_564 << 20, bandwidth=0.86e12, matmul=1.2e14, link=2.5e10, capability="8.9"
    ),
}


def named(name: str) -> Hardware:
    """Look up a device by name, such as ``H200``.

    Raises:
        ConfigError: it is not in :data:`KNOWN`.
    """
    for kind, hardware in KNOWN.items():
        if kind.lower() == name.lower():
            return hardware
    raise ConfigError(f"device {name!r} is not known; known are {', '.join(KNOWN)}")


def of(device: jax.Device) -> Hardware:
    """Describe a device that is here; a CPU's memory is shared among the devices that it plays."""
    if device.platform == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        share = total // max(jax.local_device_count(), 1)
        return Hardware(kind="cpu", memory=share, bandwidth=None, matmul=None, platform="cpu")
    name = device.device_kind
    # All words: A100-SXM4-40GB is A100-40GB, and not the one of 80 GB.
    known = next(
        (entry for kind, entry in KNOWN.items() if all(w in name.lower() for w in kind.lower().split("-"))), None
    )
    stats = device.memory_stats() or {}
    memory = stats.get("bytes_limit") or (known.memory if known else None)
    seen = Device.of(device)
    found = known or Hardware(kind=name, memory=None, bandwidth=None, matmul=None)
    return dataclasses.replace(
        found, kind=name, memory=memory, platform=seen.platform, capability=seen.capability or found.capability,
        cores=seen.cores,
    )  # fmt: skip
