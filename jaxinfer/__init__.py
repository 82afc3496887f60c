"""jaxinfer: transformer inference in JAX on GPU meshes."""
