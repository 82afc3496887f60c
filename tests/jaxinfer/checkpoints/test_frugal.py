"""What a conversion takes of memory, in a process of its own; and that orbax writes what it would have written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoints.frugal import FrugalHandler, Kept, handlers

ROOT = Path(__file__).resolve().parents[3]
MEBI = 1 << 20

# The demo first: its conversion imports all that there is to import, and starts all threads.
WATCHED = """
import sys, threading, time
from jaxinfer.checkpoints.convert import convert

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmRSS"))

def watch():
    while not ended:
        seen.append(resident())
        time.sleep(0.002)

model, out, demo = sys.argv[1:]
convert("demo", demo, progress=False)
seen, ended = [resident()], False
thread = threading.Thread(target=watch)
thread.start()
convert(model, out, progress=False)
ended = True
thread.join()
print(max(seen) - seen[0])
"""


def wide(folder: Path, layers: int, hidden: int, width: int) -> int:
    """Write a Llama of few wide layers; returns a layer's bytes."""
    folder.mkdir()
    config = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": width, "num_hidden_layers": layers,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 100, "max_position_embeddings": 64,
        "dtype": "bfloat16", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"self_attn." + name: (hidden, hidden) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    shapes |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden), "mlp.down_proj": (hidden, width)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    values = np.arange(max(np.prod(shape) for shape in shapes.values()), dtype=np.uint32).astype(np.uint16)
    tensors = {"model.embed_tokens": (100, hidden), "model.norm": (hidden,)}
    tensors |= {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}
    arrays = {
        f"{name}.weight": values[: np.prod(shape)].view(ml_dtypes.bfloat16).reshape(shape)
        for name, shape in tensors.items()
    }
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    return int(2 * sum(np.prod(shape) for shape in shapes.values()))


def test_a_conversion_takes_little_more_memory_than_one_layer(tmp_path):
    layer = wide(tmp_path / "model", layers=2, hidden=2048, width=32768)
    assert layer > 410 * MEBI  # one more copy of a layer, and what else there is (some 300 MiB), would not pass
    command = [sys.executable, "-c", WATCHED, *(str(tmp_path / name) for name in ("model", "store", "demo"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)

    assert layer < int(done.stdout) < layer + 600 * MEBI


def test_a_kept_array_is_not_copied():
    import copy

    values = np.arange(6).view(Kept)
    assert copy.deepcopy(values) is values
    assert [copy.deepcopy([values])[0]][0] is values


@pytest.mark.parametrize("chunk", [64, 1 << 20])
def test_what_is_written_is_read_by_orbax(tmp_path, chunk):
    rng = np.random.default_rng(0)
    arrays = {"a": rng.normal(size=(37, 11)), "b": np.arange(500, dtype=np.int32), "c": np.array(3.5)}
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=handlers()
    )
    arguments = {name: ocp.SaveArgs(chunk_byte_size=chunk) for name in arrays}
    with ocp.Checkpointer(handler) as checkpointer:
        for place in ("one", "other"):  # each save has an event loop of its own
            saved = {name: np.asarray(values).view(Kept) for name, values in arrays.items()}
            checkpointer.save(tmp_path / place, args=ocp.args.PyTreeSave(saved, save_args=arguments))
    with ocp.StandardCheckpointer() as reader:
        found = reader.restore(tmp_path / "other", arrays)
    for name, values in arrays.items():
        np.testing.assert_array_equal(found[name], values)


def test_orbax_still_writes_through_the_method_that_is_replaced():
    assert "_open_and_write" in vars(ocp.type_handlers.NumpyHandler)
    assert "_open_and_write" in vars(FrugalHandler)
