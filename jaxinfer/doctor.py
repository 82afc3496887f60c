"""What this machine offers, what will run where and why, and what is wrong with it."""

from __future__ import annotations

import glob
import html
import importlib.metadata
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from jaxinfer import hardware
from jaxinfer.checkpoints import resolve
from jaxinfer.errors import CheckpointError
from jaxinfer.hardware import Hardware
from jaxinfer.plan import plan
from jaxinfer.sizes import size
from pallas_kernels import Choice, Device, choices

Verdict = Literal["ok", "warning", "problem"]

PACKAGES = (
    "jaxinfer", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "tokenizers", "safetensors",
    "huggingface_hub", "numpy",
)  # fmt: skip
# Only some of these are there: what the CUDA extras bring.
GPU_PACKAGES = (
    "jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13", "nvidia-nccl-cu12", "nvidia-nccl-cu13",
)  # fmt: skip
VARIABLES = (
    "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR", "JAX_COMPILATION_CACHE_DIR", "NPROC",
)  # fmt: skip
DRIVER_FILE = Path("/proc/driver/nvidia/version")
GPU_FILES = "/proc/driver/nvidia/gpus/*"
# The least driver for the CUDA 13 wheels; the CUDA 12 ones take 525.
CUDA13_DRIVER = 580


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: ``devices``, ``versions``, ...
        what: the thing.
        value: what was found.
        verdict: whether that is as it should be.
        advice: what to do about it; empty where nothing is.
    """

    topic: str
    what: str
    value: str
    verdict: Verdict = "ok"
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What :func:`diagnose` found.

    Attributes:
        findings: in the order in which they are shown.
        implementations: which implementation serves which operation, and why; empty where JAX does not start.
        rates: measured bandwidth (bytes/s) and matmul (FLOP/s) of a device while all work, or None.
    """

    findings: tuple[Finding, ...]
    implementations: tuple[Choice[str], ...]
    rates: Mapping[str, Any] | None

    @property
    def healthy(self) -> bool:
        """Whether nothing is a problem; there may be warnings."""
        return all(finding.verdict != "problem" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON-able values."""
        return {
            "healthy": self.healthy,
            "findings": [asdict(finding) for finding in self.findings],
            "implementations": [choice.to_dict() for choice in self.implementations],
            "rates": None if self.rates is None else dict(self.rates),
        }

    def __str__(self) -> str:
        lines: list[str] = []
        width = max((len(finding.what) for finding in self.findings), default=0)
        for topic in dict.fromkeys(finding.topic for finding in self.findings):
            lines += ["", topic]
            for finding in self.findings:
                if finding.topic == topic:
                    lines.append(f"  {finding.what.ljust(width)}  {finding.value}".rstrip())
                    if finding.verdict != "ok":
                        lines.append(f"  {finding.verdict}: {finding.advice}")
        lines += ["", "what runs what", *(f"  {choice}" for choice in self.implementations)]
        return "\n".join(lines[1:])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{html.escape(f.topic)}</td><td>{html.escape(f.what)}</td><td>{html.escape(f.value)}</td>"
            f"<td>{html.escape(f.verdict if f.verdict == 'ok' else f'{f.verdict}: {f.advice}')}</td></tr>"
            for f in self.findings
        )
        served = "".join(f"<li>{html.escape(str(choice))}</li>" for choice in self.implementations)
        return f"<table>{rows}</table><ul>{served}</ul>"


def diagnose(model: str | Path | None = None, *, measure: bool = True) -> Diagnosis:
    """Look at versions, devices, driver, environment and the hub; nothing is sent anywhere.

    A machine on which JAX does not start is diagnosed too.

    Args:
        model: a model as :func:`jaxinfer.init_inference` takes it, of which only the headers are read: then
            ``implementations`` are those that would serve it on all devices here. None: those that serve most models.
        measure: also measure bandwidth and matrix product rate, which takes some seconds and 2 GB of a GPU.

    Raises:
        ConfigError, CheckpointError, sharding.MeshError: the model cannot be planned for.
    """
    findings = [*_system(), *_versions()]
    devices: list[jax.Device] = []
    try:
        devices = list(jax.local_devices())
    except Exception as error:  # where a plugin is missing, JAX fails an assertion of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300].removesuffix(":")
        findings.append(
            Finding(
                topic="devices", what="JAX", value=reason, verdict="problem",
                advice="JAX does not start; check JAX_PLATFORMS, the CUDA extra and the driver",
            )
        )  # fmt: skip
    findings += [*_devices(devices), *_driver(devices), *_environment(devices), *_hub()]
    rates: dict[str, Any] | None = None
    if devices and measure:
        from jaxinfer.bench import measure_limits

        limits = measure_limits(devices)
        rates = asdict(limits)
        findings += _rates(limits.bandwidth, limits.matmul, limits.dtype, hardware.of(devices[0]))
    served: tuple[Choice[str], ...] = ()
    if devices:
        served = choices(Device.of(devices[0])) if model is None else plan(model).implementations
    return Diagnosis(findings=tuple(findings), implementations=served, rates=rates)


def _system() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding(topic="system", what="platform", value=f"{platform.system()} {platform.machine()}, {cores} cores")
    yield Finding(topic="system", what="memory", value=size(memory))
    yield Finding(topic="system", what="python", value=platform.python_version())


def _versions() -> Iterator[Finding]:
    for name in PACKAGES:
        found = _version(name)
        if found is not None or name == "jaxinfer":
            yield Finding(topic="versions", what=name, value=found or "not installed (run from its sources)")
        else:
            yield Finding(topic="versions", what=name, value="missing", verdict="problem", advice=f"pip install {name}")
    for name in GPU_PACKAGES:
        if (found := _version(name)) is not None:
            yield Finding(topic="versions", what=name, value=found)
    jax_version, lib = _version("jax"), _version("jaxlib")
    for plugin in ("jax-cuda12-plugin", "jax-cuda13-plugin"):
        found = _version(plugin)
        if found is not None and found != lib:
            yield Finding(
                topic="versions", what="plugin", value=f"{plugin} {found} with jaxlib {lib}", verdict="problem",
                advice=f"JAX ignores a plugin of another version; install {plugin}=={jax_version}",
            )  # fmt: skip


def _devices(devices: Sequence[jax.Device]) -> Iterator[Finding]:
    if not devices:
        return
    first = devices[0]
    backend = getattr(first.client, "platform_version", "").splitlines()
    yield Finding(topic="devices", what="backend", value=f"{first.platform} ({', '.join(backend)})")
    for device in devices:
        stats = device.memory_stats() or {}
        memory = stats.get("bytes_limit") or hardware.of(device).memory
        text = device.device_kind
        if (capability := getattr(device, "compute_capability", None)) is not None:
            text += f", compute capability {capability}"
        text += f", {size(memory)} for JAX" if memory else ", memory unknown"
        if stats.get("bytes_in_use"):
            text += f", {size(stats['bytes_in_use'])} in use"
        yield Finding(topic="devices", what=f"{device.platform} {device.id}", value=text)


def _driver(devices: Sequence[jax.Device]) -> Iterator[Finding]:
    """The NVIDIA driver, and GPUs that JAX does not use."""
    version = driver_version()
    if version is None:
        return
    yield Finding(topic="devices", what="NVIDIA driver", value=version)
    present = len(glob.glob(GPU_FILES))
    if present and devices and all(device.platform == "cpu" for device in devices):
        extra = "cuda13" if int(version.split(".")[0]) >= CUDA13_DRIVER else "cuda12"
        chosen = os.environ.get("JAX_PLATFORMS")
        advice = f"JAX_PLATFORMS={chosen} keeps JAX off it" if chosen else f"pip install 'jaxinfer[{extra}]'"
        yield Finding(
            topic="devices", what="GPUs", value=f"{present} here, and JAX uses the CPU", verdict="warning",
            advice=advice,
        )  # fmt: skip


def _environment(devices: Sequence[jax.Device]) -> Iterator[Finding]:
    for name in VARIABLES:
        if name in os.environ:
            yield Finding(topic="environment", what=name, value=os.environ[name])
    path = os.environ.get("LD_LIBRARY_PATH", "")
    harmful = [part for part in path.split(":") if re.search(r"cuda|nvidia|cudnn|nccl", part, re.IGNORECASE)]
    if harmful and any(device.platform != "cpu" for device in devices):
        yield Finding(
            topic="environment", what="LD_LIBRARY_PATH", value=path, verdict="warning",
            advice=f"{':'.join(harmful)} comes before the CUDA libraries that pip installed; unset it if JAX fails",
        )  # fmt: skip
    else:
        yield Finding(topic="environment", what="LD_LIBRARY_PATH", value=path or "not set")
    cpus = sum(device.platform == "cpu" for device in devices)
    threads = _cpu_threads()
    # With as many threads as devices, 8 devices still hung in an all-reduce now and then; with twice as many, never.
    if cpus > 1 and threads < 2 * cpus:
        yield Finding(
            topic="environment", what="CPU threads", value=f"{threads} for {cpus} virtual devices", verdict="problem",
            advice=f"a collective can wait for ever; set NPROC={2 * cpus} before Python starts",
        )  # fmt: skip
    cache = jax.config.jax_compilation_cache_dir
    default = "JAX's own choice is off; the engine keeps them in ~/.cache/jaxinfer/compiled, on GPUs"
    yield Finding(topic="environment", what="compiled programs", value=str(cache or default))


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    yield Finding(topic="models", what="hub cache", value=f"{cache}, {models} models")
    offline = "offline: only what is cached (HF_HUB_OFFLINE is set)"
    yield Finding(topic="models", what="hub", value=offline if constants.HF_HUB_OFFLINE else "online; not asked now")
    try:
        folder = resolve("demo")
        bundled = (folder / "model.safetensors").is_file()
    except CheckpointError:
        bundled = False
    if bundled:
        yield Finding(topic="models", what="demo", value="bundled")
    else:
        yield Finding(
            topic="models", what="demo", value="missing", verdict="warning",
            advice="this installation has no bundled model; install jaxinfer again",
        )  # fmt: skip


def _rates(bandwidth: float, matmul: float, dtype: str, known: Hardware) -> Iterator[Finding]:
    def against(rate: float, usual: float | None) -> tuple[str, Verdict, str]:
        if usual is None:
            return "", "ok", ""
        share = rate / usual
        slow = "slower than such a device is: is something else running on it, or its clock lowered?"
        return f", {share:.0%} of what {known.kind} is known for", "warning" if share < 0.8 else "ok", slow

    text, verdict, advice = against(bandwidth, known.bandwidth)
    yield Finding(
        topic="measured", what="memory bandwidth", value=f"{size(bandwidth)}/s{text}", verdict=verdict,
        advice=advice if verdict != "ok" else "",
    )  # fmt: skip
    text, verdict, advice = against(matmul, known.matmul if dtype == "bfloat16" else None)
    yield Finding(
        topic="measured", what=f"{dtype} products", value=f"{matmul / 1e12:.4g} TFLOP/s{text}", verdict=verdict,
        advice=advice if verdict != "ok" else "",
    )  # fmt: skip


def driver_version(path: Path = DRIVER_FILE) -> str | None:
    """The NVIDIA driver's version as the kernel module tells it, such as ``580.95.05``; None where there is none."""
    try:
        text = path.read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found.group(1) if found else None


def _cpu_threads() -> int:
    """Threads of XLA's CPU pool: NPROC, else one for each core."""
    value = os.environ.get("NPROC", "")
    return int(value) if value.isdecimal() and int(value) > 0 else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
