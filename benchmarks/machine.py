"""What every benchmark records beside its figures: the machine, the software and the date."""

from __future__ import annotations

import datetime
import platform
import subprocess
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
