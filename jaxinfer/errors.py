"""Errors that jaxinfer raises for bad input; each names the thing, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterable


class JaxinferError(Exception):
    """Base of every error that jaxinfer raises on purpose."""


class ConfigError(JaxinferError, ValueError):
    """A model configuration that is malformed, or asks for something that is not implemented."""


class CheckpointError(JaxinferError, ValueError):
    """A checkpoint that is missing, damaged, or does not hold the tensors its configuration asks for."""


class ReadTimeoutError(CheckpointError):
    """A read from disk that did not end in time. It may still be under way: nothing can end it but the disk."""


class UnsafePathError(CheckpointError):
    """A file name inside a checkpoint that would lead out of the checkpoint's folder."""


class UnsupportedFormatError(CheckpointError):
    """Weights in a format that jaxinfer refuses to read, such as pickle."""


class RequestError(JaxinferError, ValueError):
    """One prompt that cannot be served; other prompts of the same call are unaffected."""


class CapacityError(JaxinferError, ValueError):
    """A model, cache or request that does not fit the memory it was given."""


def listed(names: Iterable[object], limit: int = 10) -> str:
    """Join names for an error message: at most ``limit`` of them, then how many more there are."""
    texts = [str(name) for name in names]
    shown = ", ".join(texts[:limit])
    return shown if len(texts) <= limit else f"{shown} and {len(texts) - limit} more"
