"""How a model is laid out over devices: the mesh, the rules of placement, and the collectives between its parts."""

from sharding.collectives import all_gather, all_to_all, axis_index, axis_size, own_part, psum
from sharding.linear import linear_psum
from sharding.mesh import AXES, MeshError, TensorLimits, describe, make_mesh, mesh_sizes
from sharding.rules import ShardingRules

__all__ = [
    "AXES",
    "MeshError",
    "ShardingRules",
    "TensorLimits",
    "all_gather",
    "all_to_all",
    "axis_index",
    "axis_size",
    "describe",
    "linear_psum",
    "make_mesh",
    "mesh_sizes",
    "own_part",
    "psum",
]
