"""The surroundings of every test, set before jax is imported.

Tests run on eight virtual CPU devices. ``JAXINFER_TEST_PLATFORM=gpu pytest -m gpu`` runs the GPU tests on the GPU.
"""

import os

os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
