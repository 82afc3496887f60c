"""The surroundings of every test, set before jax, transformers or torch is imported.

Tests run on eight virtual CPU devices. ``JAXINFER_TEST_PLATFORM=gpu pytest -m gpu`` runs the GPU tests on the GPU.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

PLATFORM = os.environ.get("JAXINFER_TEST_PLATFORM", "cpu")
CACHE = Path(__file__).resolve().parents[1] / ".cache"
DEVICES = "--xla_force_host_platform_device_count=8"
# Programs are tiny here and many: most of the time goes into compiling them, a third less with these.
FRUGAL = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could set its platform and devices")

# XLA sizes its CPU thread pool by this. With fewer threads than virtual devices a collective can wait for ever.
os.environ.setdefault("NPROC", "16")
if PLATFORM == "gpu":
    os.environ["JAX_PLATFORMS"] = "cuda,cpu"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch, the reference, is on the same GPU
else:
    os.environ["JAX_PLATFORMS"] = "cpu"
    if DEVICES not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{FRUGAL} {os.environ.get('XLA_FLAGS', '')} {DEVICES}".strip()

# The same programs are compiled again and again, by other tests, other workers and the next run.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(CACHE / "hypothesis")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # each worker's torch would otherwise start a thread for every core


def pytest_configure() -> None:
    from hypothesis import settings

    # No deadline: an example that compiles takes far longer than the next. CI tries the same examples every time.
    settings.register_profile("jaxinfer", deadline=None, derandomize="CI" in os.environ, print_blob=True)
    settings.load_profile("jaxinfer")
    if PLATFORM not in ("cpu", "gpu"):
        raise pytest.UsageError(f"JAXINFER_TEST_PLATFORM: expected cpu or gpu, got {PLATFORM!r}")
    if PLATFORM == "gpu":
        import jax

        try:
            jax.devices("gpu")
        except RuntimeError as error:
            raise pytest.UsageError(f"JAXINFER_TEST_PLATFORM=gpu, but JAX finds no GPU: {error}") from error


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            if PLATFORM != "gpu":
                item.add_marker(pytest.mark.skip(reason="needs a GPU: JAXINFER_TEST_PLATFORM=gpu pytest -m gpu"))
        elif PLATFORM == "gpu":
            item.add_marker(pytest.mark.skip(reason="runs on virtual CPU devices: unset JAXINFER_TEST_PLATFORM"))
