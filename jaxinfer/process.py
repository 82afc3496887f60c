"""What engines need of the process they run in: compiled programs that are kept, and an orderly end."""

from __future__ import annotations

import atexit
import weakref
from pathlib import Path
from typing import Protocol

import jax
from jax.sharding import Mesh


class Closing(Protocol):
    """Something that can be closed, twice without harm."""

    def close(self) -> None:
        """Close it."""


# A process that ends while the CPU works on a step is aborted ("terminate called without an active exception").
_open: weakref.WeakSet[Closing] = weakref.WeakSet()


def close_at_exit(thing: Closing) -> None:
    """Close it when the process ends, if it is there then."""
    _open.add(thing)


@atexit.register
def _close_all() -> None:
    for thing in list(_open):
        thing.close()


def keep_compiled(mesh: Mesh) -> None:
    """Keep compiled programs on disk between runs, unless the user has set JAX's cache up, or on a CPU.

    On a CPU a program is compiled for the very processor, and JAX warns when another reads it.
    """
    if jax.config.jax_compilation_cache_dir is None and mesh.devices.flat[0].platform != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxinfer" / "compiled"))
