"""What every benchmark records beside its figures: the machine, and the limits it reaches in the same run."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any


def describe() -> dict[str, Any]:
    """The machine, the software and the date."""
    import flax
    import jax
    import jaxlib

    device = jax.local_devices()[0]
    found = {
        "date": datetime.date.today().isoformat(),
        "device": device.device_kind,
        "devices": jax.local_device_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "flax": flax.__version__,
    }
    if device.platform == "gpu":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
        found["driver"] = driver.strip()
    return found


def seconds(run: Callable[[], Any], repeats: int = 5) -> list[float]:
    """Times of ``run``, which must wait for its own results, after one call that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def limits() -> dict[str, float]:
    """Copy bandwidth (TB/s, bytes read and written) and rate of an 8192^3 bfloat16 product (TFLOP/s), here and now."""
    import jax
    import jax.numpy as jnp

    source = jnp.ones(1 << 30, jnp.float32)
    copy = jax.jit(lambda x: x + 1.0)
    moved = 2 * source.nbytes
    bandwidth = moved / statistics.median(seconds(lambda: jax.block_until_ready(copy(source))))
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    chain = jax.jit(lambda a, b: jax.lax.fori_loop(0, 20, lambda _, x: (x @ b) * jnp.bfloat16(0.011), a))
    rate = 20 * 2 * 8192**3 / statistics.median(seconds(lambda: jax.block_until_ready(chain(a, b))))
    return {"copy_tb_s": bandwidth / 1e12, "matmul_tflop_s": rate / 1e12}
