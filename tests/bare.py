"""A model run bare: one device, no mesh, no cache, no engine, and weights read by safetensors' own reader."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from jaxinfer.models.attention import Batch
from jaxinfer.models.decoder import Decoder, abstract, parameters
from jaxinfer.models.families import ignored, load_spec, sources_of
from jaxinfer.models.sources import Sources
from jaxinfer.models.spec import Layout, ModelSpec


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint with one file."""
    return load_file(folder / "model.safetensors")


def fill(shapes: dict[str, tuple[int, ...]], sources: Sources, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Parameters as their sources say; every piece must have its shape, fit its region, and view without a copy."""
    assert shapes.keys() == sources.keys()
    filled = {}
    for path, pieces in sources.items():
        filled[path] = np.zeros(shapes[path], tensors[pieces[0].name].dtype)
        for piece in pieces:
            tensor = tensors[piece.name]
            assert tensor.shape == piece.shape, piece.name
            view = piece.view(tensor)
            assert np.shares_memory(view, tensor), f"{piece.name}: the view is a copy"
            region = filled[path][piece.region or ...]
            assert region.shape == view.shape, f"{piece.name}: {view.shape} into {region.shape} of {path}"
            region[...] = view
    return filled


def steady(folder: Path, prompts: Sequence[Sequence[int]], steps: int) -> list[Sequence[int]]:
    """Those prompts whose continuation by ``steps`` tokens stays on one side of LongRoPE's switch.

    transformers changes the frequencies of all positions at the switch. An engine whose cached keys are rotated cannot,
    so each sequence keeps one set, and only these prompts can be compared.
    """
    switch = load_spec(folder).long_from
    return [ids for ids in prompts if switch is None or len(ids) > switch or len(ids) + steps - 1 <= switch]


class BareModel:
    """The decoder of a checkpoint folder, laid out for ``tensor`` devices, called with lists of token ids."""

    def __init__(self, folder: Path, dtype: Any = jnp.float32, width: int = 104, tensor: int = 1) -> None:
        self.spec: ModelSpec = load_spec(folder)
        self.width = width
        layout = Layout.of(self.spec, tensor)
        tensors = read_tensors(folder)
        sources = sources_of(self.spec, layout, tensors)
        used = {piece.name for pieces in sources.values() for piece in pieces}
        self.unused = {name for name in tensors if name not in used and not ignored(self.spec, name)}
        decoder: Decoder = abstract(self.spec, layout, dtype)
        filled = fill({path: info.shape for path, info in parameters(decoder).items()}, sources, tensors)
        graph, state = nnx.split(decoder)
        flat = [
            (path, variable.replace(filled[".".join(map(str, path))])) for path, variable in nnx.to_flat_state(state)
        ]
        self.leaves = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), nnx.from_flat_state(flat))
        self.forward = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch)[0])

    def logits(self, prompts: Sequence[Sequence[int]], long: Sequence[bool] | None = None) -> list[np.ndarray]:
        """float32 [T, V] for each prompt, all in one batch padded on the right.

        ``long`` says which take the long frequencies of LongRoPE; None: those longer than transformers' limit.
        """
        tokens = np.zeros((len(prompts), self.width), np.int32)
        positions = np.full((len(prompts), self.width), -1, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
            positions[row, : len(prompt)] = np.arange(len(prompt))
        if long is None and self.spec.long_from is not None:
            long = [len(prompt) > self.spec.long_from for prompt in prompts]
        which = None if long is None else jnp.asarray(long)
        batch = Batch(tokens=jnp.asarray(tokens), positions=jnp.asarray(positions), long=which)
        logits = self.forward(self.leaves, batch)
        return [np.asarray(logits[row, : len(prompt)]) for row, prompt in enumerate(prompts)]

    def greedy(
        self, prompts: Sequence[Sequence[int]], count: int, long: Sequence[bool] | None = None
    ) -> list[list[int]]:
        """``count`` greedy tokens for each prompt, each from one full forward."""
        rows = [list(prompt) for prompt in prompts]
        for _ in range(count):
            for row, logits in zip(rows, self.logits(rows, long), strict=True):
                row.append(int(logits[-1].argmax()))
        return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
