"""A checkpoint that is open: everything that its files say, checked before a device holds anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp

from jaxinfer.checkpoints import Checkpoint, Store, Target, check, is_store, load, resolve, restore
from jaxinfer.errors import ConfigError
from jaxinfer.generation.params import GenerationDefaults
from jaxinfer.models.config import read_config
from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.families import ignored, sources_of, spec_of
from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.models.relayout import Move, moves
from jaxinfer.models.sources import Sources
from jaxinfer.models.spec import Layout
from sharding import TensorLimits

DTYPES = ("float32", "bfloat16", "float16")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


class Pretrained:
    """A checkpoint's configuration, architecture and open weights, of which only the headers have been read.

    Use it as a context manager, or close it.

    Args:
        model: a folder as transformers writes it, a store, a Hugging Face hub id, or ``"demo"`` for the bundled model.

    Attributes:
        name: what the caller called it.
        folder: where it lies.
        config: transformers' configuration.
        spec: the architecture.
        checkpoint: the weights.

    Raises:
        ConfigError: the configuration is malformed, or asks for something that is not implemented.
        CheckpointError: files are missing, damaged or unsafe.
    """

    def __init__(self, model: str | Path) -> None:
        self.name = str(model)
        self.folder = resolve(model)
        self.checkpoint: Checkpoint | Store
        if is_store(self.folder):
            # First, since it holds the digests of the configuration and the tokenizer.
            self.checkpoint = Store(self.folder)
            self.config = read_config(self.folder)
            self.spec = spec_of(self.config)
        else:
            self.config = read_config(self.folder)
            self.spec = spec_of(self.config)
            self.checkpoint = Checkpoint(self.folder)

    @property
    def dtype(self) -> str:
        """The checkpoint's own dtype; ``float32`` where it does not say. A store's is what it was converted to.

        Raises:
            ConfigError: it is not one that the engine computes in.
        """
        if isinstance(self.checkpoint, Store) and self.checkpoint.manifest.dtype is not None:
            return self.checkpoint.manifest.dtype
        name = str(getattr(self.config, "dtype", None) or "float32").removeprefix("torch.")
        if name not in DTYPES:
            raise ConfigError(
                f"{self.config.model_type} config: dtype {name!r} is not implemented; give dtype=, one of {DTYPES}"
            )
        return name

    @property
    def limits(self) -> TensorLimits:
        """What the model allows the ``tensor`` axis to be."""
        return TensorLimits(heads=self.spec.heads, kv_heads=self.spec.kv_heads, intermediate=self.spec.intermediate)

    def parameters(self, dtype: str = "float32") -> dict[str, ParameterInfo]:
        """The model's parameters at the one-device layout, which is that of a store."""
        return parameters(abstract(self.spec, Layout.of(self.spec), jnp.dtype(dtype)))

    def check(self, layout: Layout) -> None:
        """Hold the weights against what a layout needs, before a device holds anything.

        Raises:
            CheckpointError: tensors are missing, unexpected, mis-shaped or mis-typed.
        """
        if isinstance(self.checkpoint, Store):
            self.checkpoint.check({path: info.shape for path, info in self.parameters().items()})
        else:
            self.sources(layout)

    def load(self, layout: Layout, targets: Mapping[str, Target], *, progress: bool) -> dict[str, jax.Array]:
        """Read the parameters of a layout onto their devices.

        Raises:
            CheckpointError: as :meth:`check`; also files that cannot be read, or are damaged.
        """
        if isinstance(self.checkpoint, Store):
            self.check(layout)
            moved = {path: self.moves(path, target, layout) for path, target in targets.items()}
            return restore(self.checkpoint, moved, targets, progress=progress)
        return load(self.checkpoint, self.sources(layout), targets, progress=progress)

    def moves(self, path: str, target: Target | ParameterInfo, layout: Layout) -> tuple[Move, ...]:
        """Say which regions of a store's tensor fill which of a parameter of a layout."""
        assert isinstance(self.checkpoint, Store)
        return moves(path, self.checkpoint.tensors[path].shape, self.spec, layout)

    def sources(self, layout: Layout) -> Sources:
        """Say which tensors of a folder of safetensors fill which parameters of a layout.

        Raises:
            CheckpointError: tensors are missing, unexpected, mis-shaped or mis-typed.
        """
        assert isinstance(self.checkpoint, Checkpoint)
        sources = sources_of(self.spec, layout, self.checkpoint.tensors)
        check(self.checkpoint, sources, lambda name: ignored(self.spec, name))
        return sources

    def generation(self) -> tuple[GenerationDefaults, tuple[int, ...]]:
        """What the checkpoint says of generation: defaults of sampling, and the tokens that end a sequence.

        Raises:
            ConfigError: ``generation_config.json`` is malformed.
        """
        values = _read_json(self.folder / "generation_config.json")
        eos = values.get("eos_token_id", getattr(self.config, "eos_token_id", None))
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise ConfigError(f"{self.folder}: eos_token_id: expected a token id or a list of them, got {eos!r}")
        return GenerationDefaults.read(values), tuple(ids)

    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None where the folder has none.

        Raises:
            ConfigError: its files are malformed.
        """
        if not any((self.folder / name).is_file() for name in TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False, local_files_only=True)
        except Exception as error:  # anything from KeyError to a Rust panic for a damaged file
            reason = " ".join(str(error).split())[:300]
            raise ConfigError(
                f"{self.folder}: the tokenizer cannot be read: {type(error).__name__}: {reason}"
            ) from error

    def close(self) -> None:
        """Close the files. Closing twice is harmless."""
        self.checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values
