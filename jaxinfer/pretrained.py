"""A checkpoint that is open: everything that its files say, checked before a device holds anything."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.checkpoints import (
    Checkpoint,
    Store,
    Target,
    check,
    dummy,
    is_store,
    load,
    load_quantized,
    packed,
    resolve,
    restore,
    unpacked,
)
from jaxinfer.errors import ConfigError
from jaxinfer.generation.params import GenerationDefaults
from jaxinfer.models.config import read_config
from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.families import ignored, sources_of, spec_of
from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.models.relayout import Move, moves, scale_moves
from jaxinfer.models.sources import Sources
from jaxinfer.models.spec import Layout
from jaxinfer.quantization import check_method, wire_dtype, wire_shape
from sharding import TensorLimits

DTYPES = ("float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "dummy")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


class Pretrained:
    """A checkpoint's configuration, architecture and open weights, of which only the headers have been read.

    Use it as a context manager, or close it.

    Args:
        model: a folder as transformers writes it, a store, a Hugging Face hub id, or ``"demo"`` for the bundled model.
        load_format: ``auto``, or ``dummy`` for random parameters in place of the weights, which need not be there.

    Attributes:
        name: what the caller called it.
        folder: where it lies.
        config: transformers' configuration.
        spec: the architecture.
        checkpoint: the weights; None for ``dummy``.

    Raises:
        ConfigError: the configuration is malformed, or asks for something that is not implemented; or ``load_format``
            is unknown.
        CheckpointError: files are missing, damaged or unsafe.
    """

    def __init__(self, model: str | Path, load_format: str = "auto") -> None:
        if load_format not in LOAD_FORMATS:
            raise ConfigError(f"load_format: expected one of {', '.join(LOAD_FORMATS)}, got {load_format!r}")
        self.name = str(model)
        self.folder = resolve(model, weights=load_format != "dummy")
        self.checkpoint: Checkpoint | Store | None = None
        if load_format == "dummy":
            self.config = read_config(self.folder)
            self.spec = spec_of(self.config)
        elif is_store(self.folder):
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

    @property
    def quantize(self) -> str | None:
        """How the weights lie in a store: one of :data:`jaxinfer.quantization.DTYPES`, or None."""
        quantized = self.checkpoint.manifest.quantized if isinstance(self.checkpoint, Store) else None
        return None if quantized is None else quantized.method

    def quantized(self, asked: str | None) -> str | None:
        """How the weights will be: as asked, or as a store has them.

        Raises:
            ConfigError: it is no way to quantize, or not that of the store.
        """
        check_method(asked)
        if isinstance(self.checkpoint, Store) and asked not in (None, self.quantize):
            raise ConfigError(
                f"quantize: expected None or what the store {self.folder} holds, {self.quantize or 'no quantization'}, "
                f"got {asked!r}; convert the checkpoint again with quantize={asked!r}"
            )
        return asked or self.quantize

    def parameters(self, dtype: str = "float32", quantize: str | None = None) -> dict[str, ParameterInfo]:
        """The model's parameters at the one-device layout, which is that of a store."""
        return parameters(abstract(self.spec, Layout.of(self.spec), jnp.dtype(dtype), quantize))

    def check(self, layout: Layout) -> None:
        """Hold the weights against what a layout needs, before a device holds anything.

        Raises:
            CheckpointError: tensors are missing, unexpected, mis-shaped or mis-typed.
        """
        if self.checkpoint is None:
            return
        if not isinstance(self.checkpoint, Store):
            self.sources(layout)
            return
        listed = self.parameters(quantize=self.quantize)
        how = {path: info.quantization for path, info in listed.items()}
        shapes = {
            path: info.shape if (q := how[path]) is None else wire_shape(info.shape, q.method)
            for path, info in listed.items()
        }
        dtypes = {path: wire_dtype(q.method) for path, q in how.items() if q is not None}
        dtypes |= {path: np.dtype(np.float32) for path, info in listed.items() if info.factors}
        self.checkpoint.check(shapes, dtypes)

    def load(
        self, layout: Layout, targets: Mapping[str, Target], *, progress: bool, seed: int = 0
    ) -> dict[str, jax.Array]:
        """Read the parameters of a layout onto their devices; ``dummy`` draws them there, from ``seed``.

        Raises:
            CheckpointError: as :meth:`check`; also files that cannot be read, or are damaged, and weights that are not
                finite where they are to be quantized.
        """
        if self.checkpoint is None:
            return dummy(targets, seed)
        if isinstance(self.checkpoint, Store):
            self.check(layout)
            moved = {path: self.moves(path, target, layout) for path, target in targets.items()}
            wired = {path: packed(target) for path, target in targets.items()}
            found = restore(self.checkpoint, moved, wired, progress=progress)
            return {path: unpacked(found.pop(path), target) for path, target in targets.items()}
        sources = self.sources(layout)
        quantized = {path for path, target in targets.items() if target.quantization is not None}
        quantized |= {f"{path}_scale" for path in quantized}
        plain = {path: target for path, target in targets.items() if path not in quantized}
        found = load(self.checkpoint, sources, plain, progress=progress)
        if quantized:
            chosen = {path: target for path, target in targets.items() if path in quantized}
            found |= load_quantized(self.checkpoint, sources, chosen, progress=progress)
        return {path: found[path] for path in targets}

    def moves(self, path: str, target: Target | ParameterInfo, layout: Layout) -> tuple[Move, ...]:
        """Say which regions of a store's tensor fill which of a parameter of a layout."""
        assert isinstance(self.checkpoint, Store)
        shape = self.checkpoint.tensors[path].shape
        if self.quantize == "int4" and path.endswith("_scale"):
            return scale_moves(path, shape, target.shape, self.spec, layout)
        return moves(path, shape, self.spec, layout)

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
        if self.checkpoint is not None:
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
