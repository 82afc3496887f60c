"""What quantization costs: perplexity of the bundled model on text that it was not trained on, and errors of logits.

    python benchmarks/accuracy.py --out benchmarks/results/accuracy.json [--text TEXT]

(a) Perplexity of the demo model over windows of its whole context, each behind the token that opens a text. The text is
``benchmarks/held_out.txt``, the beginning of a held-out chapter of each novel; with ``--text``, all 51 of those that
``python -m jaxinfer.demo.fetch_text TEXT`` writes. (b) For every family a small random checkpoint: the root mean square
of the error of all logits against torch in float32, relative to that of the logits; bfloat16's own is beside it.
Random weights have no structure that would forgive rounding, so (b) is about faults, and (a) about what to expect.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for tests, which make the small checkpoints
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

HELD_OUT = Path(__file__).with_name("held_out.txt")
METHODS = (None, "int8", "fp8", "int4")
BATCH = 8


def chapters(folder: Path | None) -> list[str]:
    """The held-out chapters."""
    from jaxinfer.demo.fetch_text import CHAPTER
    from jaxinfer.demo.train import read_chapters

    if folder is None:
        return HELD_OUT.read_text(encoding="utf-8").strip().split(CHAPTER)
    return [chapter for held_out, chapter in read_chapters(folder) if held_out]


def windows(engine: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids in windows of the engine's context, of which the first opens a text and is not counted."""
    opening = engine.eos_token_ids[0]
    found = []
    for text in texts:
        ids = engine.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        width = engine.plan.max_model_len - 1
        found += [[opening, *ids[start : start + width]] for start in range(0, len(ids), width)]
    return found


def perplexity(texts: Sequence[str], quantize: str | None, dtype: str, **options: Any) -> dict[str, Any]:
    """The demo model's perplexity over texts.

    Args:
        texts: chapters.
        quantize, dtype, options: of ``init_inference``.
    """
    import jaxinfer

    settings: dict[str, Any] = {
        "mesh": {"tensor": 1}, "max_batch": BATCH, "prefill_chunk": 1024, "prefill_tokens": 4096, "progress": False,
    }  # fmt: skip
    with jaxinfer.init_inference("demo", dtype=dtype, quantize=quantize, **settings | options) as engine:
        start = time.perf_counter()
        scores = engine.score(windows(engine, texts))
        tokens = sum(len(score.token_ids) - 1 for score in scores)
        total = math.fsum(math.fsum(score.logprobs[1:]) for score in scores)
        return {
            "dtype": dtype, "quantize": quantize, **options, "tokens": tokens, "perplexity": math.exp(-total / tokens),
            "weight_bytes": engine.plan.weight_bytes, "seconds": time.perf_counter() - start,
        }  # fmt: skip


def families(root: Path) -> list[dict[str, Any]]:
    """Relative errors of the logits of every family's wide checkpoint."""
    import numpy as np

    from jaxinfer import init_inference
    from tests.oracle import checkpoint, prompts, rms, torch_logits, torch_model
    from tests.wide import WIDE

    rows = []
    for case in WIDE:
        folder, asked = checkpoint(case, root), prompts(case)
        truth = [torch_logits(torch_model(folder, case), prompt) for prompt in asked]
        size = rms(truth, [np.zeros_like(logits) for logits in truth])
        row: dict[str, Any] = {"family": case.family}
        for dtype, quantize in (("bfloat16", None), *(("float32", method) for method in METHODS[1:])):
            with init_inference(
                folder, {"tensor": 1}, dtype, quantize=quantize, max_batch=4, progress=False
            ) as engine:  # fmt: skip
                row[quantize or dtype] = rms(engine.logits(asked), truth) / size
        rows.append(row)
        print(row, flush=True)
    return rows


def table(document: dict[str, Any]) -> str:
    """The figures for people."""
    base = document["perplexity"][0]["perplexity"]
    lines = [f"{'weights':10} {'bytes':>12} {'perplexity':>11} {'against ' + document['dtype']:>18}"]
    for row in document["perplexity"]:
        change = f"{row['perplexity'] / base - 1:+.2%}"
        name = row["quantize"] or row["dtype"]
        lines.append(f"{name:10} {row['weight_bytes']:12,} {row['perplexity']:11.3f} {change:>18}")
    if document["families"]:
        names = list(document["families"][0])[1:]
        lines += ["", f"{'family':12}" + "".join(f"{name:>10}" for name in names)]
        lines += [
            f"{row['family']:12}" + "".join(f"{row[name]:10.4f}" for name in names) for row in document["families"]
        ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print and keep."""
    from machine import describe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--text", type=Path, help="what jaxinfer.demo.fetch_text wrote; default: the excerpt")
    parser.add_argument("--dtype", default="bfloat16", help="of activations, and of what is not quantized")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="more for init_inference")
    parser.add_argument("--no-families", action="store_true", help="perplexity only")
    args = parser.parse_args()
    options = dict(option.split("=", 1) for option in args.option)
    texts = chapters(args.text)
    document: dict[str, Any] = {
        "machine": describe(), "text": "all held-out chapters" if args.text else HELD_OUT.name, "dtype": args.dtype,
        "characters": sum(map(len, texts)), "perplexity": [], "families": [],
    }  # fmt: skip
    for method in METHODS:
        document["perplexity"].append(perplexity(texts, method, args.dtype, **options))
        print(document["perplexity"][-1], flush=True)
    if not args.no_families:
        with tempfile.TemporaryDirectory() as folder:
            document["families"] = families(Path(folder))
    print(table(document))
    if args.out is not None:
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
