# %% [markdown]
# # Sharding: one model over a mesh of devices
#
# A mesh gives devices names along axes: `tensor` splits every layer over devices, `data` runs copies side by side on
# different sequences. Eight virtual devices of one CPU stand in for GPUs here; nothing else changes on real ones.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["NPROC"] = "16"  # threads for JAX's virtual devices; with fewer they can wait for each other for ever

import jax

import jaxinfer
from jaxinfer import SamplingParams

jax.devices()

# %% [markdown]
# ## Tokens are the same on any mesh

# %%
prompts = ["The captain of the ship", "My dear sister,", "In the beginning", "He opened the door and"]
params = SamplingParams(temperature=0, max_tokens=24)

with jaxinfer.init_inference("demo", mesh={"tensor": 1}, dtype="float32", progress=False) as engine:
    single = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]

engine = jaxinfer.init_inference("demo", mesh={"data": 2, "tensor": 4}, dtype="float32", progress=False)
outputs = engine.generate(prompts, params)
assert [output.outputs[0].token_ids for output in outputs] == single
outputs

# %% [markdown]
# ## Where the bytes are
# No device ever holds a whole weight. The plan counts what each one holds:

# %%
engine.plan

# %% [markdown]
# The fused query-key-value weight of the first layer is split over key/value heads along `tensor`, and repeated along
# `data`. Shown here as a matrix, one row for each of its outputs:

# %%
weights = engine.executor.parameters
qkv = weights["layers.0.attention.qkv"]
print(qkv.shape, qkv.sharding.spec)
jax.debug.visualize_array_sharding(qkv.reshape(-1, qkv.shape[-1]))

# %% [markdown]
# The MLP's first weight is split over its width, the second over the same axis, so that one all-reduce joins both:

# %%
for name in ("layers.0.mlp.up", "layers.0.mlp.down"):
    print(name, weights[name].shape, weights[name].sharding.spec)
    print("  on each device:", weights[name].addressable_shards[0].data.shape)

# %%
jax.debug.visualize_array_sharding(weights["layers.0.mlp.down"])

# %% [markdown]
# KV blocks belong to a `data` shard and hold that device's heads only:

# %%
keys, values = engine.executor.caches[0]
print(keys.shape, keys.sharding.spec, "each device:", keys.addressable_shards[0].data.shape)

# %% [markdown]
# ## What the devices say to each other
# In a decode step each layer has two all-reduces, one after attention and one after the MLP; embedding and head have
# one more exchange each. Weights never travel.

# %%
decode = next(step for name, step in engine.executor.compiled().items() if "decode" in name)
lines = [line for line in decode.as_text().splitlines() if " all-reduce(" in line or " all-gather(" in line]
print(len(lines), "collectives for", engine.spec.num_layers, "layers")

# %% [markdown]
# ## A mesh that cannot work is refused before anything is compiled

# %%
try:
    jaxinfer.init_inference("demo", mesh={"tensor": 3})
except jaxinfer.MeshError as error:
    print(error)

# %%
engine.close()
