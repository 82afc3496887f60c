"""jaxinfer: transformer inference in JAX on GPU meshes.

``init_inference`` loads a Hugging Face checkpoint; the :class:`InferenceEngine` it returns generates, streams, chats
and scores. ``plan`` says beforehand where every byte would live. ``convert`` makes a store of a checkpoint, ``verify``
says whether it is still whole.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.checkpoints.convert import convert as convert
    from jaxinfer.checkpoints.store import Verified as Verified
    from jaxinfer.checkpoints.store import verify as verify
    from jaxinfer.engine import InferenceEngine as InferenceEngine
    from jaxinfer.engine import init_inference as init_inference
    from jaxinfer.errors import CapacityError as CapacityError
    from jaxinfer.errors import CheckpointError as CheckpointError
    from jaxinfer.errors import ConfigError as ConfigError
    from jaxinfer.errors import JaxinferError as JaxinferError
    from jaxinfer.errors import ReadTimeoutError as ReadTimeoutError
    from jaxinfer.errors import RequestError as RequestError
    from jaxinfer.errors import UnsafePathError as UnsafePathError
    from jaxinfer.errors import UnsupportedFormatError as UnsupportedFormatError
    from jaxinfer.generation.params import SamplingParams as SamplingParams
    from jaxinfer.generation.requests import CompletionOutput as CompletionOutput
    from jaxinfer.generation.requests import Logprob as Logprob
    from jaxinfer.generation.requests import RequestOutput as RequestOutput
    from jaxinfer.generation.requests import RequestOutputs as RequestOutputs
    from jaxinfer.generation.requests import ScoreOutput as ScoreOutput
    from jaxinfer.plan import Plan as Plan
    from jaxinfer.plan import plan as plan
    from sharding import MeshError as MeshError

# The same table once more, because names are imported when they are first used: JAX takes a second or two, and
# `jaxinfer --help` need not wait for it.
_HOMES = {
    "jaxinfer.checkpoints.convert": ("convert",),
    "jaxinfer.checkpoints.store": ("Verified", "verify"),
    "jaxinfer.engine": ("InferenceEngine", "init_inference"),
    "jaxinfer.errors": (
        "CapacityError", "CheckpointError", "ConfigError", "JaxinferError", "ReadTimeoutError", "RequestError",
        "UnsafePathError", "UnsupportedFormatError",
    ),
    "jaxinfer.generation.params": ("SamplingParams",),
    "jaxinfer.generation.requests": ("CompletionOutput", "Logprob", "RequestOutput", "RequestOutputs", "ScoreOutput"),
    "jaxinfer.plan": ("Plan", "plan"),
    "sharding": ("MeshError",),
}  # fmt: skip
__all__ = [name for names in _HOMES.values() for name in names]


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """This package, on which ``plan`` is always the function, though there is a module ``jaxinfer.plan`` too."""

    def __setattr__(self, name: str, value: Any) -> None:
        # What Python does once it has imported a submodule.
        if not (name == "plan" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
