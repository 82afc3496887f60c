"""Modules of a model built with random weights, bare or as the body of a ``shard_map`` over the tensor axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxinfer.models.spec import LayerSpec, ModelSpec, Norm
from sharding import ShardingRules, TensorLimits, make_mesh


def small_spec(**changes: Any) -> ModelSpec:
    """A spec of two layers, four heads of 8 and hidden 16; ``changes`` replace its fields."""
    base = ModelSpec(
        family="llama",
        vocab_size=37,
        hidden=16,
        intermediate=24,
        heads=4,
        kv_heads=4,
        head_dim=8,
        context_length=256,
        layers=(LayerSpec(scale=0.3),) * 2,
        norm=Norm(kind="layer", eps=1e-5, bias=True),
    )
    return base.replace(**changes)


class Built:
    """A module with random weights; ``weights`` has them by dotted path, as numpy arrays."""

    def __init__(self, make: Callable[[], nnx.Module], seed: int = 0, dtype: Any = jnp.float32) -> None:
        self.graph, state = nnx.split(nnx.eval_shape(make))
        rng = np.random.default_rng(seed)
        self.weights: dict[str, np.ndarray] = {}
        self.axes: dict[str, tuple[str | None, ...]] = {}
        flat = []
        for path, variable in nnx.to_flat_state(state):
            shape = variable.get_value().shape
            name = ".".join(map(str, path))
            self.axes[name] = variable.axes
            self.weights[name] = (rng.standard_normal(shape) / np.sqrt(min(shape))).astype(np.float32)
            flat.append((path, variable.replace(jnp.asarray(self.weights[name], dtype))))
        self.state = nnx.from_flat_state(flat)

    def __call__(self, call: Callable[[Any], Any]) -> Any:
        """``call(module)`` on one device."""
        return jax.jit(lambda state: call(nnx.merge(self.graph, state)))(self.state)

    def split(self, call: Callable[[Any], Any], tensor: int) -> Any:
        """``call(module)`` with every weight split over ``tensor`` devices as the rules say; results are whole."""
        rules, leaves = ShardingRules(), jax.tree.leaves(self.state)
        structure = jax.tree.structure(self.state)
        limits = TensorLimits(heads=tensor, kv_heads=tensor, intermediate=tensor)

        def body(leaves: list[jax.Array]) -> Any:
            return call(nnx.merge(self.graph, jax.tree.unflatten(structure, leaves)))

        specs = [rules.spec(axes) for axes in self.axes.values()]
        mesh = make_mesh({"tensor": tensor}, limits)
        return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=(specs,), out_specs=P(), check_vma=False))(leaves)


def normal(*shape: int, seed: int = 1) -> jax.Array:
    """float32 standard normal numbers."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
