"""Loading and decode of a 7B Llama with random weights, beside transformers on the same files and the device's limits.

    python benchmarks/decode_7b.py --out benchmarks/results/decode_7b_h200.json

Writes a checkpoint (32 layers, hidden 4096, MLP 11008, 32 heads, vocabulary 32000, bfloat16, 13.5 GB) to ``--folder``,
then measures in processes of their own, one after the other on the same GPU: jaxinfer; transformers with a static cache
and ``torch.compile``. A decode step is timed at a mean context of 512 tokens, over 128 steps, host work included.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROMPT, STEPS = 448, 128  # contexts of 449 to 576 tokens, 512 on average
BATCHES = (1, 16)
_BUFFER = bytearray(64 << 20)


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint, as transformers names it."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    hidden, width, heads, vocab = 4096, 11008, 32, 32000
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocab, max_position_embeddings=4096, rms_norm_eps=1e-5, dtype="bfloat16",
        architectures=["LlamaForCausalLM"], bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, device="cuda") * 0.02).to(torch.bfloat16).cpu()

    index: dict[str, str] = {}

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, name))

    ends = {"model.embed_tokens.weight": normal(vocab, hidden), "lm_head.weight": normal(vocab, hidden)}
    write("ends.safetensors", ends | {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    for start in range(0, layers, 8):
        tensors = {}
        for i in range(start, min(start + 8, layers)):
            at = f"model.layers.{i}."
            tensors |= {f"{at}self_attn.{n}_proj.weight": normal(hidden, hidden) for n in "qkvo"}
            tensors |= {f"{at}mlp.{n}_proj.weight": normal(width, hidden) for n in ("gate", "up")}
            tensors[f"{at}mlp.down_proj.weight"] = normal(hidden, width)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{at}{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        write(f"layers-{start}.safetensors", tensors)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def ours(folder: Path) -> dict[str, Any]:
    """Measure jaxinfer."""
    import jax
    import machine

    import jaxinfer
    from jaxinfer.bench import bench, measure_limits

    found: dict[str, Any] = {"machine": machine.describe()}
    limits = measure_limits()
    found["limits"] = dataclasses.asdict(limits)
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found["read_gb_s"] = nbytes / _read(folder) / 1e9
    # transformers reads the configuration, and imports torch for it where torch is installed: seconds, and not loading.
    found["start_s"] = _seconds(lambda: jaxinfer.plan(folder, max_model_len=1024))
    found["load_gb_s"] = []
    for batch in BATCHES:
        start = time.perf_counter()
        with jaxinfer.init_inference(folder, max_batch=batch, max_model_len=1024) as engine:
            jax.block_until_ready(engine.executor.parameters)
            found["load_gb_s"].append(nbytes / (time.perf_counter() - start) / 1e9)
            result = bench(
                engine, batches=(batch,), prompt_tokens=PROMPT, decode_tokens=STEPS, limits=limits, repeats=5
            )
        found[f"batch_{batch}"] = {**dataclasses.asdict(result.decode[0])}
        found[f"prefill_{batch}"] = {**dataclasses.asdict(result.prefill[0])}
    return found


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _read(folder: Path) -> float:
    """Seconds to read all files once, one thread, into the page cache if they are not there."""
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(_BUFFER):
                pass
    return time.perf_counter() - start


def load(folder: Path) -> dict[str, Any]:
    """Measure loading alone: the first and two more in one process, after one plain read of the files."""
    import jax
    import machine

    import jaxinfer

    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found: dict[str, Any] = {"machine": machine.describe(), "bytes": nbytes, "read_gb_s": []}
    for _ in range(2):
        found["read_gb_s"].append(nbytes / _read(folder) / 1e9)
    found["start_s"] = _seconds(lambda: jaxinfer.plan(folder, max_model_len=1024))
    found["load_gb_s"] = []
    for _ in range(3):
        start = time.perf_counter()
        with jaxinfer.init_inference(folder, max_batch=1, max_model_len=1024) as engine:
            jax.block_until_ready(engine.executor.parameters)
            found["load_gb_s"].append(nbytes / (time.perf_counter() - start) / 1e9)
    return found


def peer(folder: Path) -> dict[str, Any]:
    """Measure transformers' own fast path: ``generate`` with a static cache, which compiles the decode step."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GenerationConfig

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()
    torch.cuda.synchronize()
    found: dict[str, Any] = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "load_s": time.perf_counter() - start,
    }
    for batch in BATCHES:
        ids = torch.randint(3, 32000, (batch, PROMPT), device="cuda")

        def run(tokens: int, ids: Any = ids) -> float:
            # The same cache length for both counts, so that one compiled step serves them.
            config = GenerationConfig(
                cache_implementation="static", max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
                pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
            torch.cuda.synchronize()
            begin = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            torch.cuda.synchronize()
            return time.perf_counter() - begin

        began = time.perf_counter()
        run(STEPS + 1)
        warm = time.perf_counter() - began
        run(STEPS + 1)
        long = [run(STEPS + 1) for _ in range(4)]
        short = [run(2) for _ in range(4)]
        step = (statistics.median(long) - statistics.median(short)) / (STEPS - 1)
        found[f"batch_{batch}"] = {"step_ms": 1e3 * step, "first_call_s": warm, "long_s": long, "short_s": short}
    return found


def main() -> None:
    """Run everything and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/llama-7b-random"))
    parser.add_argument("--out", type=Path, default=Path("decode_7b.json"))
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--part", choices=("make", "load", "ours", "peer"))
    args = parser.parse_args()
    if args.part == "make":
        args.folder.mkdir(parents=True, exist_ok=True)
        return make(args.folder, args.layers)
    if args.part:
        found = {"load": load, "ours": ours, "peer": peer}[args.part](args.folder)
        return print(json.dumps(found))
    results: dict[str, Any] = {"command": " ".join(sys.argv), "prompt": PROMPT, "steps": STEPS, "layers": args.layers}
    for part in ("make", "load", "ours", "peer"):
        command = [sys.executable, __file__, "--part", part, "--folder", str(args.folder), "--layers", str(args.layers)]
        start = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        print(f"{part}: {time.perf_counter() - start:.1f} s, exit {done.returncode}", flush=True)
        if done.returncode:
            results[part] = {"exit": done.returncode}
        elif part != "make":
            results[part] = json.loads(done.stdout.strip().splitlines()[-1])
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    with contextlib.suppress(KeyError):
        for batch in BATCHES:
            mine, theirs = results["ours"][f"batch_{batch}"], results["peer"][f"batch_{batch}"]
            print(
                f"batch {batch}: jaxinfer {mine['ms']:.2f} ms (device {mine['device_ms']:.2f}, host "
                f"{mine['host_share']:.1%}, limit {mine['bound_ms']:.2f}), transformers {theirs['step_ms']:.2f} ms"
            )
        print(f"load: {results['load']['load_gb_s']} GB/s; plain read {results['load']['read_gb_s']} GB/s")


if __name__ == "__main__":
    main()
