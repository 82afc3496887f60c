# %% [markdown]
# # Bigger than the GPU: layers that stream through the device
#
# A model need not fit. Its layers can live in host memory or on disk, and pass through two slots on the device: one
# layer computes while the next arrives. Tokens are the same. Here a CPU stands in for the GPU, with the bundled model:
# of its 8 MB of weights the device holds 4.5 at a time, however many layers there are.

# %%
import os

os.environ["JAX_PLATFORMS"] = "cpu"

import tempfile

import matplotlib.pyplot as plt
import numpy as np

import jaxinfer
from jaxinfer import SamplingParams

prompts = ["The captain of the ship", "My dear sister,", "In the beginning", "He opened the door and"]
params = SamplingParams(temperature=0, max_tokens=24)
shape = {"mesh": {"tensor": 1}, "dtype": "float32", "max_batch": 4, "max_model_len": 128, "progress": False}

with jaxinfer.init_inference("demo", **shape) as engine:
    resident = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
    print(f"{engine.plan.weight_bytes / 1e6:.1f} MB of weights, all on the device")

# %% [markdown]
# ## A store
# Layers on disk are read at every step, so they lie there as the model computes, with a digest for every chunk. Bytes
# are verified when they are read first: what is damaged is never computed with.

# %%
store = jaxinfer.convert("demo", tempfile.mkdtemp() + "/demo", "float32", progress=False)
print(jaxinfer.verify(store, progress=False).faults or "good")

# %% [markdown]
# ## The plan says where every layer will live
# `auto` keeps on the device what fits beside the cache, then fills host memory, and leaves the rest on disk. The plan
# for an H200 of which 26 MB may be used, and two sequences:

# %%
jaxinfer.plan(
    store, device="H200", offload="auto", device_memory="26MB", host_memory="10MB", max_batch=2, max_model_len=128
)

# %% [markdown]
# ## From disk, through 26 MB
# The cap holds everything on the device: embedding, two slots for layers, cache and workspace.

# %%
engine = jaxinfer.init_inference(store, offload="disk", device_memory="26MB", **shape)
paged = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
print("the same tokens:", paged == resident)
for tier in ("device", "host", "disk"):
    print(f"{tier}: layers {engine.plan.tiers.of(tier)}")
report = engine.offload_report()
print(f"planned {report['device']['planned_bytes'] / 1e6:.1f} MB, cap 26 MB")
assert paged == resident
assert report["device"]["used_bytes"] <= report["device"]["planned_bytes"] <= 26e6

# %% [markdown]
# ## What it did
# Every pass over the layers advances all sequences by a token, and moves every layer once. On a GPU the rates to look
# at are those of the link and the disk: the slower one, at its full speed, is all that a model of this size can have.

# %%
passes, moved = report["passes"], report["link"]["bytes"]
print(f"{passes} passes, {moved / 1e6:.0f} MB moved, {moved / passes / 1e6:.2f} MB a pass")
assert moved <= (passes + 1) * engine.plan.tiers.moved_bytes

# %% [markdown]
# The timeline shows two passes: layer by layer, reads run ahead, and each transfer starts before the layer before it
# has computed.


# %%
def draw(report, passes=2):
    """Draw the last passes of a report's timeline, a lane for each kind of event."""
    computed = [event for event in report["timeline"] if event["kind"] == "compute"]
    layers = engine.spec.num_layers
    start, end = computed[-passes * layers]["start"], computed[-1]["end"]
    figure, axes = plt.subplots(figsize=(10, 2.6))
    colors = plt.get_cmap("viridis")(np.linspace(0.1, 0.9, layers))
    for lane, kind in enumerate(("compute", "link", "disk")):
        for event in report["timeline"]:
            if event["kind"] == kind and event["end"] > start and event["start"] < end:
                left = 1e3 * (event["start"] - start)
                axes.barh(lane, 1e3 * (event["end"] - event["start"]), left=left, color=colors[event["layer"]], ec="w")
    axes.set_yticks(range(3), ["compute", "link", "disk"])
    axes.set_xlim(0, 1e3 * (end - start))
    axes.set_xlabel("ms; a color for each layer")
    axes.set_title("Layers on their way from disk, through host memory, to the device")
    figure.tight_layout()


draw(engine.offload_report())

# %%
engine.close()

# %% [markdown]
# ## Bytes are what counts
# A step is as long as the transfer of the layers. Weights of 8 or 4 bits travel as they are and are widened on the
# device, so that a pass moves a half or a quarter; and as many sequences as the cache holds share it.

# %%
sizes = {}
for quantize in (None, "int8", "int4"):
    plan = jaxinfer.plan("demo", {"tensor": 1}, offload="host", quantize=quantize, device="H200", host_memory="1GB")
    sizes[quantize or "bfloat16"] = plan.tiers.moved_bytes / 1e6
figure, axes = plt.subplots(figsize=(5, 2.4))
axes.barh(list(sizes), list(sizes.values()), color="tab:blue")
axes.set_xlabel("MB that a pass moves")
figure.tight_layout()

# %% [markdown]
# ## What cannot work is said before anything is loaded

# %%
for wrong in ({"offload": "disk"}, {"offload": "host", "device_memory": "2MB"}):
    try:
        jaxinfer.init_inference("demo", **wrong, **shape)
    except jaxinfer.JaxinferError as error:
        print(f"{wrong}: {error}\n")
