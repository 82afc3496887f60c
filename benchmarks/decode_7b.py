"""Loading and decode of a 7B Llama with random weights, beside transformers on the same files and the device's limits.

    python benchmarks/decode_7b.py --out benchmarks/results/decode_7b_h200.json

Writes a checkpoint (32 layers, hidden 4096, MLP 11008, 32 heads, vocabulary 32000, bfloat16, 13.5 GB) to ``--folder``,
then measures in processes of their own, one after the other on the same GPU: jaxinfer; transformers with a static cache
and ``torch.compile``. A decode step is timed at a mean context of 512 tokens, over 128 steps, host work included.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PROMPT, STEPS = 448, 128  # contexts of 449 to 576 tokens, 512 on average
BATCHES = (1, 16)


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
    import numpy as np

    import jaxinfer

    found: dict[str, Any] = {"machine": machine.describe(), "limits": machine.limits()}
    nbytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    loads = []
    for batch in BATCHES:
        start = time.perf_counter()
        engine = jaxinfer.init_inference(folder, max_batch=batch, max_model_len=1024)
        jax.block_until_ready(engine.executor.parameters)
        loads.append(time.perf_counter() - start)
        rng = np.random.default_rng(0)
        prompts = [rng.integers(3, 32000, PROMPT).tolist() for _ in range(batch)]

        def run(tokens: int, engine: Any = engine, prompts: Any = prompts) -> float:
            params = jaxinfer.SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            begin = time.perf_counter()
            engine.generate(prompts, params)
            return time.perf_counter() - begin

        began = time.perf_counter()
        run(STEPS + 1)
        warm = time.perf_counter() - began
        long, short = [run(STEPS + 1) for _ in range(5)], [run(1) for _ in range(5)]
        step = (statistics.median(long) - statistics.median(short)) / STEPS
        device = _device_step(engine)
        bound = engine.plan.step_bytes_per_device + batch * 512 * engine.plan.block_bytes_per_device / 64
        found[f"batch_{batch}"] = {
            "step_ms": 1e3 * step,
            "device_step_ms": 1e3 * device,
            "host_share": max(0.0, 1 - device / step),
            "limit_ms": 1e3 * bound / (found["limits"]["copy_tb_s"] * 1e12),
            "prefill_ms": 1e3 * statistics.median(short),
            "first_call_s": warm,
            "long_s": long,
            "short_s": short,
        }
        engine.close()
        del engine, run
    found["load_s"] = loads
    found["load_gb_s"] = [nbytes / seconds / 1e9 for seconds in loads]
    return found


def _device_step(engine: Any) -> float:
    """Seconds of a decode step with nothing for the host to do: chunks handed out one after the other."""
    import jax
    import numpy as np

    from jaxinfer.executor import DecodeInputs
    from jaxinfer.generation.sampling import SamplerFeatures, pack

    executor, plan = engine.executor, engine.plan
    size = executor.batch
    tables = 1 + np.arange(size * 9, dtype=np.int32).reshape(size, 9)
    inputs = DecodeInputs(
        positions=np.full(size, 512 - plan.decode_chunk // 2, np.int32),
        steps=np.full(size, plan.decode_chunk, np.int32),
        step=np.zeros(size, np.int32),
        tables=np.pad(tables, ((0, 0), (0, 1))),
        rows=pack([None] * size),
    )
    features = SamplerFeatures()
    jax.block_until_ready(executor.decode(inputs, features).tokens)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(8):
            drawn = executor.decode(inputs, features)
        jax.block_until_ready(drawn.tokens)
        times.append((time.perf_counter() - start) / (8 * plan.decode_chunk))
    return statistics.median(times)


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
    parser.add_argument("--part", choices=("make", "ours", "peer"))
    args = parser.parse_args()
    if args.part == "make":
        args.folder.mkdir(parents=True, exist_ok=True)
        return make(args.folder, args.layers)
    if args.part:
        found = {"ours": ours, "peer": peer}[args.part](args.folder)
        return print(json.dumps(found))
    results: dict[str, Any] = {"command": " ".join(sys.argv), "prompt": PROMPT, "steps": STEPS, "layers": args.layers}
    for part in ("make", "ours", "peer"):
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
                f"batch {batch}: jaxinfer {mine['step_ms']:.2f} ms (device {mine['device_step_ms']:.2f}, limit "
                f"{mine['limit_ms']:.2f}), transformers {theirs['step_ms']:.2f} ms"
            )
        print(f"load: {results['ours']['load_gb_s']} GB/s")


if __name__ == "__main__":
    main()
