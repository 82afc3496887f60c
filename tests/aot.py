"""Compile kernels for Hopper on a machine without a GPU, and read what ptxas says of registers and spills.

JAX's CUDA plugin compiles for a described GPU, ``tests/h200.txtpb``. It needs no CUDA library for that, only ptxas. The
plugin must be of the version of the installed jaxlib, and is kept out of the environment, where JAX would try it at
every start: ``make .cache/cuda`` installs both into that folder, without their dependencies (0.5 GB). The variable
``JAXINFER_CUDA_PLUGIN`` names another folder. Compiling happens in a process of its own, since ptxas writes to that
process's standard output::

    python -m tests.aot tests.pallas_kernels.skinny_gemm_cases
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = Path(__file__).with_name("h200.txtpb")
MARK = "aot case:"


@dataclass(frozen=True)
class Report:
    """What became of one case: the kernels' registers and spilled bytes, or the error."""

    name: str
    registers: tuple[int, ...] = ()
    spilled: int = 0
    serialized: bool = False
    error: str | None = None


def folder() -> Path:
    return Path(os.environ.get("JAXINFER_CUDA_PLUGIN", ROOT / ".cache" / "cuda"))


def _ptxas() -> Path | None:
    wheel = next(folder().glob("nvidia/**/bin/ptxas"), None)
    found = shutil.which("ptxas")
    return wheel or (Path(found) if found else None)


def missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    if not (folder() / "jax_plugins").is_dir():
        return f"no CUDA plugin in {folder()}: tests/aot.py says how to install it"
    if _ptxas() is None:
        return "no ptxas: tests/aot.py says how to install it"
    return None


def compile_cases(module: str, names: Sequence[str], timeout: float = 280) -> dict[str, Report]:
    """Compile the named cases of ``module``, which has ``CASES: dict[str, Callable[[], (function, arguments)]]``."""
    command = [sys.executable, "-m", "tests.aot", module, *names]
    ran = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )
    reports = dict(_read(part) for part in ran.stdout.split(MARK)[1:])
    lost = [name for name in names if name not in reports]
    if lost:
        raise RuntimeError(f"cases {lost} were not compiled:\n{ran.stdout[-2000:]}\n{ran.stderr[-4000:]}")
    return reports


def environment() -> dict[str, str]:
    """The variables of a process that compiles."""
    ptxas = _ptxas()
    assert ptxas is not None
    path = f"{ptxas.parent}{os.pathsep}{os.environ['PATH']}"
    chosen = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")}
    chosen |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "PATH": path,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder()))),
    }
    if not shutil.which("nvcc"):
        chosen["CUDA_HOME"] = str(ptxas.parents[1])
    return chosen


def _read(part: str) -> tuple[str, Report]:
    name, _, text = part.partition("\n")
    name = name.strip()
    error = re.search(r"^aot error: (.*)$", text, re.MULTILINE)
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text))
    return name, Report(
        name=name,
        registers=tuple(int(n) for n in re.findall(r"Used (\d+) registers", text)),
        spilled=spilled,
        serialized="serialized" in text,
        error=json.loads(error[1]) if error else None,
    )


def described(count: int = 1) -> list[Any]:
    """The described GPU, as many of one host: ``jax.Device`` s that are not here."""
    import jax
    from jax.experimental import topologies

    jax.devices()  # the plugin registers itself when JAX looks for platforms
    return topologies.get_topology_desc(
        platform="cuda", topology_name="NVIDIA H200", topology=f"1x1x{count}", target_config=TARGET.read_text()
    ).devices


def compiler() -> Callable[..., Any]:
    """Return a function that compiles ``function`` for the described GPU at arguments of given shapes and dtypes."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    sharding = NamedSharding(Mesh(np.array(described()), ("x",)), PartitionSpec())

    def compile_one(function: Callable[..., Any], arguments: Sequence[Any]) -> Any:
        placed = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), list(arguments))
        jitted = jax.jit(function, out_shardings=sharding)
        return jitted.trace(*placed).lower(lowering_platforms=("cuda",)).compile()

    return compile_one


def main(module: str, names: Sequence[str]) -> None:
    compile_one = compiler()
    cases = importlib.import_module(module).CASES
    for name in names or cases:
        print(f"\n{MARK} {name}", flush=True)
        try:
            compile_one(*cases[name]())
        except Exception as error:
            print(f"\naot error: {json.dumps(f'{type(error).__name__}: {error}'[:2000])}", flush=True)
            if "-v" in os.environ.get("AOT_FLAGS", ""):
                import traceback

                traceback.print_exc()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
