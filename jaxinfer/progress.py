"""Progress bars: where they show, and the one for compilation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm


def shown(progress: bool | None) -> bool:
    """Whether to show progress: as told, else where somebody watches (a terminal or a notebook)."""
    if progress is not None:
        return progress
    return sys.stderr.isatty() or _in_a_kernel()


def _in_a_kernel() -> bool:
    """Whether this process is a notebook's. That ipykernel is imported does not say so: who looks for kernels does."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def bar(show: bool, **options: Any) -> tqdm:
    """Make a progress bar that is silent unless ``show``."""
    return tqdm(disable=not show, dynamic_ncols=True, **options)


@contextlib.contextmanager
def compiling(show: bool, what: str) -> Iterator[None]:
    """Show that a step is being compiled, and how long it has taken."""
    with bar(show, desc=f"compiling {what}", total=1, leave=False, bar_format="{desc} [{elapsed}]") as progress:
        yield
        progress.update()
