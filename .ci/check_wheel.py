"""Build the wheel, install it away from the repository, and write a few words with the model that it bundles."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NEEDED = [
    *(f"{package}/py.typed" for package in ("jaxinfer", "pallas_kernels", "sharding")),
    *(f"jaxinfer/demo/{name}" for name in ("config.json", "generation_config.json", "model.safetensors")),
    "jaxinfer/demo/tokenizer.json",
]


def main() -> None:
    """Exit with a message at the first thing that is wrong."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # setuptools would put what an earlier build left there into this wheel.
    shutil.rmtree(ROOT / "build", ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", scratch, str(ROOT)], check=True)
        [wheel] = Path(scratch).glob("*.whl")
        names = set(zipfile.ZipFile(wheel).namelist())
        if missing := [name for name in NEEDED if name not in names]:
            sys.exit(f"{wheel.name} lacks {', '.join(missing)}")
        packages = {name.split("/")[0] for name in names if ".dist-info/" not in name}
        if packages != {"jaxinfer", "pallas_kernels", "sharding"}:
            sys.exit(f"{wheel.name} holds {', '.join(sorted(packages))}")

        site = Path(scratch) / "site"
        subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
        # The dependencies come from this environment, our own packages from the wheel.
        environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}

        def run(*arguments: str) -> str:
            command = [sys.executable, *arguments]
            return subprocess.run(
                command, cwd=scratch, env=environment, stdout=subprocess.PIPE, text=True, check=True
            ).stdout.strip()

        where = run("-c", "import jaxinfer; print(jaxinfer.__file__)")
        if not where.startswith(str(site)):
            sys.exit(f"jaxinfer was imported from {where}, not from the wheel")
        text = run("-m", "jaxinfer", "generate", "--model", "demo", "It was a fine morning, and")
        if not text:
            sys.exit("the bundled model wrote nothing")
        size = wheel.stat().st_size / 1e6
        print(f"{wheel.name}: {size:.1f} MB; installed, its bundled model writes: {text!r}")


if __name__ == "__main__":
    main()
