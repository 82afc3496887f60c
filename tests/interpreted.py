"""Interpreted kernels, in processes of their own: a simulated thread that fails leaves the others waiting for ever.

A process takes several seconds to start, so it runs a few cases of a test module, whose ``run_case(name)`` returns
text. A case that ends the process takes those behind it along; they run in another one then::

    python -m tests.interpreted tests.pallas_kernels.test_skinny_gemm_mosaic "short ring" ragged
"""

from __future__ import annotations

import functools
import importlib
import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = 7
MARK = "interpreted case: "


def result(module: str, names: Iterable[str], name: str) -> str:
    """What ``run_case(name)`` returns.

    Args:
        module: of the test.
        names: all its cases; those near this one are run with it.
        name: of the case.

    Raises:
        AssertionError: it failed, or took too long; with the end of what the process wrote.
    """
    every = tuple(names)
    start = every.index(name) // TOGETHER * TOGETHER
    found, said = _run(module, every[start : start + TOGETHER])
    if name not in found:
        found, said = _run(module, (name,))
    assert name in found, said[-4000:]
    return found[name]


@functools.cache
def _run(module: str, names: tuple[str, ...]) -> tuple[dict[str, str], str]:
    """What the cases returned, as far as the process came, and what it wrote beside."""
    command = [sys.executable, "-m", "tests.interpreted", module, *names]
    try:
        ran = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=60 + 20 * len(names), check=False
        )
        out, said, good = ran.stdout, ran.stderr, ran.returncode == 0
    except subprocess.TimeoutExpired as error:
        good = False
        parts = [part or b"" for part in (error.stdout, error.stderr)]
        out, said = (part.decode() if isinstance(part, bytes) else part for part in parts)
        said += f"\nnot done after {error.timeout:.0f} s"
    lines = [json.loads(line.removeprefix(MARK)) for line in out.splitlines() if line.startswith(MARK)]
    # Where the process ended badly the last case that returned may be the cause: it runs again, alone.
    return dict(lines if good else lines[:-1]), said


if __name__ == "__main__":
    run_case = importlib.import_module(sys.argv[1]).run_case
    for case in sys.argv[2:]:
        print(f"{MARK}{json.dumps([case, run_case(case)])}", flush=True)
