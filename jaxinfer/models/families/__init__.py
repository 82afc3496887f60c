"""The model families: for each, the spec of a configuration and the table of tensor names. Nothing else."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from jaxinfer.errors import ConfigError
from jaxinfer.models.config import ConfigReader, read_config
from jaxinfer.models.sources import Piece, Sources
from jaxinfer.models.spec import Layout, ModelSpec

FAMILIES = (
    "bloom", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neo", "gpt_neox", "gptj", "llama", "mistral", "opt",
    "phi3", "qwen2", "qwen3",
)  # fmt: skip
"""transformers' ``model_type`` of every family; each is a module of this package."""


class Family(Protocol):
    """What a family's module provides."""

    PREFIX: str
    """What the causal model's tensor names have before those of its base model; base checkpoints lack it."""

    IGNORED: tuple[str, ...]
    """Regular expressions of tensors that files may carry and that hold nothing learned (masks, frequencies)."""

    @staticmethod
    def spec(config: ConfigReader) -> ModelSpec:
        """Turn a configuration into a spec."""

    @staticmethod
    def sources(spec: ModelSpec, layout: Layout) -> Sources:
        """Say which tensors fill which parameters."""


def family(model_type: str) -> Family:
    """Look up a family.

    Raises:
        ConfigError: the type is not implemented.
    """
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not implemented; implemented are {', '.join(FAMILIES)}")
    module: Any = importlib.import_module(f"{__name__}.{model_type}")
    return module


def spec_of(config: Any) -> ModelSpec:
    """Turn a transformers configuration into a :class:`ModelSpec`.

    Raises:
        ConfigError: the family, or an option that would change the result, is not implemented.
    """
    names = getattr(config, "architectures", None) or []
    wrong = [name for name in names if not re.search(r"ForCausalLM$|LMHeadModel$|Model$", name)]
    chosen = family(config.model_type)
    if wrong:
        raise ConfigError(f"{config.model_type} config: architectures {wrong} is not a causal language model")
    if getattr(config, "is_heterogeneous", False):
        raise ConfigError(f"{config.model_type} config: per_layer_config is not implemented")
    reader = ConfigReader(config)
    reader.require("is_encoder_decoder", False)
    reader.require("add_cross_attention", False)
    spec = chosen.spec(reader)
    reader.finish()
    return spec


def load_spec(folder: Path) -> ModelSpec:
    """Read the spec of a checkpoint folder; see :func:`read_config` and :func:`spec_of` for errors."""
    return spec_of(read_config(folder))


def sources_of(spec: ModelSpec, layout: Layout, names: Iterable[str]) -> Sources:
    """The sources of a spec's parameters, in the spelling that a file with these tensor names uses.

    A checkpoint of the base model has the causal model's names without their prefix.
    """
    chosen = family(spec.family)
    sources = chosen.sources(spec, layout)
    if chosen.PREFIX and not any(name.startswith(chosen.PREFIX) for name in names):
        sources = {
            path: tuple(Piece(p.name.removeprefix(chosen.PREFIX), p.shape, p.view, p.region) for p in pieces)
            for path, pieces in sources.items()
        }
    return sources


def ignored(spec: ModelSpec, name: str) -> bool:
    """Whether a file's tensor holds nothing that the model needs: a mask, frequencies, or a tied head stored twice."""
    patterns = family(spec.family).IGNORED
    if spec.tied_head:
        patterns = (*patterns, r"(lm_head|embed_out)\.weight")
    return any(re.fullmatch(pattern, name) for pattern in patterns)
