"""The torch peer of the table's rows; :mod:`table` starts this in a process of its own.

Llama rows: a decoder as gpt-fast writes it (one product for query, key and value and one for gate and up, a static
cache, each layer compiled by inductor with coordinate descent, the whole step one CUDA graph), timed on the device at a
fixed context that fills the cache, so that attention needs no mask. It does nothing on the host between steps. int8
weights are per channel and widened inside the fused product, int4 ones (groups of 128) go through torch's own kernel.
OPT and GPT-2 rows: transformers' ``generate``, as its users call it; eager, or with ``--compiled-peer`` a static cache,
for which transformers compiles the decode step.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

GROUP = 128
SAMPLES = 3


@dataclass
class Context:
    """What every row is given.

    Attributes:
        rehearse: tiny models, for a run on a CPU.
        root: where configurations are written.
        compiled: whether transformers compiles.
    """

    rehearse: bool
    root: Path
    compiled: bool = False

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cpu" if self.rehearse else "cuda"


class Linear(nn.Module):
    """A product with a random weight: bfloat16, int8 per channel, or int4 in groups."""

    def __init__(self, inputs: int, outputs: int, quantize: str | None, device: str) -> None:
        """Draw the weight."""
        super().__init__()
        self.quantize = quantize
        if quantize == "int8":
            self.register_buffer("weight", torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, device=device))
            self.register_buffer("scale", torch.full((outputs,), 2e-4, dtype=torch.bfloat16, device=device))
        elif quantize == "int4":
            packed = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.int32, device=device).to(torch.uint8)
            self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack(packed, 8))
            shape = (inputs // GROUP, outputs, 2)
            self.register_buffer("scale", torch.full(shape, 4e-3, dtype=torch.bfloat16, device=device))
        else:
            weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * 0.02
            self.register_buffer("weight", weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply [..., inputs] to [..., outputs]."""
        if self.quantize == "int8":
            return F.linear(x, self.weight.to(x.dtype)) * self.scale
        if self.quantize == "int4":
            rows = x.reshape(-1, x.shape[-1])
            return torch.ops.aten._weight_int4pack_mm(rows, self.weight, GROUP, self.scale).reshape(*x.shape[:-1], -1)
        return F.linear(x, self.weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions: [B, T, heads, D] with cos and sin [T, 1, D / 2]."""
    first, second = x.float().chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Layer(nn.Module):
    """One Llama layer over a static cache [B, kv_heads, S, D], or over its own tokens where they are the whole text."""

    def __init__(self, config: dict[str, Any], batch: int, cached: int, quantize: str | None, device: str) -> None:
        """Draw the weights and fill the cache with noise."""
        super().__init__()
        hidden, width = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.dim = hidden // self.heads
        self.qkv = Linear(hidden, (self.heads + 2 * self.kv_heads) * self.dim, quantize, device)
        self.out = Linear(hidden, hidden, quantize, device)
        self.gate_up = Linear(hidden, 2 * width, quantize, device)
        self.down = Linear(width, hidden, quantize, device)
        for name in ("n1", "n2"):
            self.register_buffer(name, torch.ones(hidden, dtype=torch.bfloat16, device=device))
        shape = (batch, self.kv_heads, cached, self.dim)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.randn(shape, dtype=torch.bfloat16, device=device))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """[B, T, H] to [B, T, H]; one token each is decode."""
        batch, tokens, _ = x.shape
        qkv = self.qkv(F.rms_norm(x, x.shape[-1:], self.n1, 1e-5)).view(batch, tokens, -1, self.dim)
        query, key, value = qkv.split([self.heads, self.kv_heads, self.kv_heads], 2)
        query, key = rotate(query, cos, sin).transpose(1, 2), rotate(key, cos, sin).transpose(1, 2)
        value = value.transpose(1, 2)
        self.keys.index_copy_(2, at, key)
        self.values.index_copy_(2, at, value)
        grouped = self.heads != self.kv_heads
        if tokens == 1:
            y = F.scaled_dot_product_attention(query, self.keys, self.values, enable_gqa=grouped)
        else:
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        x = x + self.out(y.transpose(1, 2).reshape(batch, tokens, -1))
        gate, up = self.gate_up(F.rms_norm(x, x.shape[-1:], self.n2, 1e-5)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Llama(nn.Module):
    """A Llama with random weights; a step turns a token of each sequence into the next."""

    def __init__(self, config: dict[str, Any], batch: int, cached: int, quantize: str | None, device: str) -> None:
        """Draw the weights; compile the layer, once for all of them."""
        super().__init__()
        self.config, self.device = config, device
        layers = [Layer(config, batch, cached, quantize, device) for _ in range(config["num_hidden_layers"])]
        for layer in layers:
            layer.compile(dynamic=False, fullgraph=True)
        self.layers = nn.ModuleList(layers)
        self.embed = torch.randn(config["vocab_size"], config["hidden_size"], device=device).to(torch.bfloat16) * 0.02
        self.head = Linear(config["hidden_size"], config["vocab_size"], None, device)
        self.norm = torch.ones(config["hidden_size"], dtype=torch.bfloat16, device=device)

    def places(self, start: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Cosines, sines and indices of positions."""
        dim = self.config["hidden_size"] // self.config["num_attention_heads"]
        at = torch.arange(start, start + tokens, device=self.device)
        angles = at[:, None, None] / 10000 ** (torch.arange(0, dim, 2, device=self.device) / dim)
        return angles.cos(), angles.sin(), at

    def forward(self, tokens: torch.Tensor, places: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The next token of each sequence."""
        x = self.embed[tokens]
        for layer in self.layers:
            x = layer(x, *places)
        return self.head(F.rms_norm(x[:, -1], x.shape[-1:], self.norm, 1e-5)).argmax(-1)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _time(run: Callable[[], Any], count: int, device: str) -> list[float]:
    """Milliseconds of a call, from samples of so many calls handed out at once."""
    samples = []
    for _ in range(SAMPLES):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(count):
            run()
        _synchronize(device)
        samples.append(1e3 * (time.perf_counter() - start) / count)
    return samples


def _clear(device: str) -> None:
    """Let go of the model before."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _llama(ctx: Context, name: str, batch: int, cached: int, quantize: str | None = None) -> Llama:
    import shapes
    import torch._inductor.config as inductor

    _clear(ctx.device)
    inductor.coordinate_descent_tuning = True
    torch.manual_seed(0)
    return Llama(shapes.config(name, tiny=ctx.rehearse), batch, cached, quantize, ctx.device).eval()


@torch.inference_mode()
def decode(
    ctx: Context, *, batch: int, name: str = "llama-7b", context: int = 512, quantize: str | None = None
) -> dict[str, Any]:
    """A decode step as a CUDA graph."""
    if ctx.rehearse:
        batch, context = min(batch, 2), 64
    model = _llama(ctx, name, batch, context, quantize)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=ctx.device)
    places = model.places(context - 1, 1)

    def step() -> None:
        tokens.copy_(model(tokens, places)[:, None])

    start = time.perf_counter()
    step()
    _synchronize(ctx.device)
    compile_s = time.perf_counter() - start
    run: Callable[[], Any] = step
    if ctx.device == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        run = graph.replay
    samples = _time(run, 2 if ctx.rehearse else 50, ctx.device)
    return {
        "value": statistics.median(samples), "unit": "ms a step", "samples_ms": samples, "compile_s": compile_s,
        "what": "torch, compiled layers, one CUDA graph a step, device time", "context": context,
    }  # fmt: skip


@torch.inference_mode()
def prefill(ctx: Context, *, batch: int = 8, tokens: int = 2040) -> dict[str, Any]:
    """Prefill of long prompts with SDPA's causal attention."""
    if ctx.rehearse:
        batch, tokens = 2, 48
    model = _llama(ctx, "llama-7b", batch, tokens)
    ids, places = torch.randint(3, 100, (batch, tokens), device=ctx.device), model.places(0, tokens)
    start = time.perf_counter()
    model(ids, places)
    _synchronize(ctx.device)
    compile_s = time.perf_counter() - start
    model(ids, places)
    samples = _time(lambda: model(ids, places), 2, ctx.device)
    ms = statistics.median(samples)
    weights = sum(part.weight.numel() for layer in model.layers for part in layer.modules() if isinstance(part, Linear))
    flops = 2 * batch * (tokens * weights + model.head.weight.numel())
    return {
        "value": flops / ms / 1e9, "unit": "TFLOP/s", "ms": ms, "samples_ms": samples, "compile_s": compile_s,
        "what": "torch, compiled layers, scaled_dot_product_attention",
    }  # fmt: skip


@torch.inference_mode()
def latency(ctx: Context, *, name: str, batch: int, prompt: int = 128, new: int = 8) -> dict[str, Any]:
    """Transformers' ``generate``, eager with its dynamic cache."""
    import shapes
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    _clear(ctx.device)
    config = AutoConfig.from_pretrained(shapes.folder(name, ctx.root, tiny=ctx.rehearse))
    with torch.device(ctx.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    wanted = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=1, eos_token_id=2,
        cache_implementation="static" if ctx.compiled else None,
    )  # fmt: skip
    ids = torch.randint(3, 100, (batch, prompt), device=ctx.device)

    def run() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=wanted)

    for _ in range(2 if ctx.compiled else 1):
        run()
    samples = [_time(run, 1, ctx.device)[0] for _ in range(2 if ctx.rehearse else 5)]
    return {
        "value": statistics.median(samples), "unit": "ms", "samples_ms": samples,
        "what": f"transformers, generate, {'static cache, compiled' if ctx.compiled else 'eager'}",
    }  # fmt: skip


ROWS: dict[str, Callable[[Context], dict[str, Any]]] = {
    "decode1": lambda ctx: decode(ctx, batch=1),
    "decode16": lambda ctx: decode(ctx, batch=16),
    "decode64": lambda ctx: decode(ctx, batch=64),
    "int8": lambda ctx: decode(ctx, batch=1, quantize="int8"),
    "int4": lambda ctx: decode(ctx, batch=1, quantize="int4"),
    "long64": lambda ctx: decode(ctx, batch=64, name="llama-7b-gqa8", context=4096),
    "prefill": lambda ctx: prefill(ctx),
    "opt1": lambda ctx: latency(ctx, name="opt-6.7b", batch=1),
    "opt16": lambda ctx: latency(ctx, name="opt-6.7b", batch=16),
    "gpt2xl": lambda ctx: latency(ctx, name="gpt2-xl", batch=1),
}


def start(ctx: Context) -> dict[str, Any]:
    """Name the software and measure the same limits as torch reaches them."""
    import transformers

    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if ctx.device == "cuda":
        found["device"] = torch.cuda.get_device_name()
        source = torch.zeros(1 << 28, device="cuda")
        target = torch.empty_like(source)
        target.copy_(source)
        found["copy_bytes_per_second"] = 2 * source.nbytes / min(_time(lambda: target.copy_(source), 20, "cuda")) * 1e3
        side = 8192
        a = torch.randn(side, side, device="cuda").to(torch.bfloat16)
        a @ a
        found["matmul_flops"] = 2 * side**3 / min(_time(lambda: a @ a, 20, "cuda")) * 1e3
    return found
