# %% [markdown]
# # Quickstart: from a checkpoint to text
#
# This notebook uses the small model that comes with jaxinfer, so it runs anywhere, offline. With a checkpoint of your
# own, put its folder or its Hugging Face hub id in place of `"demo"`.

# %%
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # remove this line to use your GPU

import jaxinfer
from jaxinfer import SamplingParams

# %% [markdown]
# ## Plan
# Before anything is loaded, a plan says where every byte would live, and how fast a decode step can be at best. It
# reads the configuration and the headers of the weights, nothing more. It can plan for a machine that is not here.

# %%
jaxinfer.plan("demo")

# %%
jaxinfer.plan("demo", mesh={"tensor": 2}, device="H200")

# %% [markdown]
# ## Load
# The engine compiles each step when it is first needed; later calls of the same shape start at once. Progress bars are
# off here because this notebook is kept as it ran; leave `progress` out to see them.

# %%
engine = jaxinfer.init_inference("demo", progress=False)
engine

# %% [markdown]
# ## Generate
# A string gives one output, a list gives a list. `temperature=0` is greedy; what is left out comes from the
# checkpoint's `generation_config.json`. Names and meanings of the parameters are vLLM's.

# %%
output = engine.generate("It was a fine morning, and", SamplingParams(temperature=0, max_tokens=40))
print(output.outputs[0].text)

# %%
prompts = ["The captain of the ship", "My dear sister,", "In the beginning", "He opened the door and"]
engine.generate(prompts, SamplingParams(temperature=0.8, top_p=0.95, max_tokens=32, seed=1))

# %% [markdown]
# With a seed, a request's tokens do not depend on what else runs beside it:

# %%
params = SamplingParams(temperature=1.0, max_tokens=24, seed=7)
alone = engine.generate(prompts[1], params).outputs[0].token_ids
crowd = engine.generate(prompts, params)[1].outputs[0].token_ids
assert alone == crowd
print(alone)

# %% [markdown]
# A prompt that cannot be served says why, and its neighbours are unharmed:

# %%
outputs = engine.generate([[1, 2, 3], [10**6], "All is well,"], SamplingParams(temperature=0, max_tokens=8))
[(output.outputs[0].finish_reason, output.error) for output in outputs]

# %% [markdown]
# ## Stream
# Text comes in whole characters, as soon as a chunk of tokens is there. Stop strings are cut, also where they straddle
# tokens.

# %%
for piece in engine.stream("Once upon a time", SamplingParams(temperature=0.7, seed=3, max_tokens=60, stop=["\n\n"])):
    print(piece, end="", flush=True)

# %% [markdown]
# ## Score
# The log-probability of every token of a text, given those before it: what evaluations are made of.

# %%
scores = engine.score(["The sun rose over the sea.", "Sea the over rose sun the."])
for score in scores:
    print(f"{score.text!r}: perplexity {score.perplexity:.1f}")

# %%
import matplotlib.pyplot as plt

score = scores[0]
pieces = [engine.tokenizer.decode([token]) for token in score.token_ids]
known = [(piece, value) for piece, value in zip(pieces, score.logprobs, strict=True) if value is not None]
plt.figure(figsize=(7, 2.5))
plt.bar(range(len(known)), [value for _, value in known])
plt.xticks(range(len(known)), [repr(piece)[1:-1] for piece, _ in known])
plt.ylabel("log-probability")
plt.title(score.text)
plt.tight_layout()
plt.show()

# %% [markdown]
# The alternatives that the model saw at each step:

# %%
output = engine.generate("The captain", SamplingParams(temperature=0, max_tokens=4, logprobs=3))
for entry in output.outputs[0].logprobs:
    print({logprob.decoded_token: round(logprob.logprob, 2) for logprob in entry.values()})

# %%
engine.close()
