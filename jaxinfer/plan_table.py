"""A plan for people and programs: rows of a table, text, HTML, and JSON."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

from jaxinfer.paging import tiers as paging
from jaxinfer.sizes import size
from pallas_kernels import BLOCK_SIZE

if TYPE_CHECKING:
    from jaxinfer.plan import Plan

BOUND_CONTEXT = 512
"""Tokens of the sequences whose bounds a plan shows."""


def rows(plan: Plan) -> list[tuple[str, str, str]]:
    """The plan as (what, on each device, in all) rows."""
    memory = plan.hardware.memory
    devices, shards = plan.devices, plan.shards
    cache = plan.cache_bytes_per_device
    tokens = (plan.num_blocks - 1) * BLOCK_SIZE
    table = [
        ("model", plan.spec.family, f"{plan.parameter_count:,} parameters"),
        ("dtype", plan.weights, ""),
        (
            "mesh",
            " ".join(f"{a}={n}" for a, n in plan.mesh.items() if n > 1) or "one device",
            f"{devices} x {plan.hardware.kind}",
        ),
        ("weights (device)", size(plan.weight_bytes_per_device), size(plan.weight_bytes_per_device * devices)),
        (f"KV cache (device), {tokens:,} tokens a shard, {plan.cache_dtype}", size(cache), size(cache * devices)),
        ("workspace (device), at most", size(plan.workspace_bytes_per_device), ""),
        *paging.rows(plan),
        ("memory", "unknown" if memory is None else size(memory), ""),
        ("fits", {True: "yes", False: "no", None: "unknown"}[plan.fits], ""),
        ("slots", str(plan.slots), f"{plan.slots * shards} sequences at once"),
        ("longest sequence", f"{plan.max_model_len:,} tokens", ""),
    ]
    context = min(BOUND_CONTEXT, plan.max_model_len)
    bounds = [(f"prefill, at least (1 x {context} tokens)", plan.prefill_milliseconds(1, context), "")]
    for batch in dict.fromkeys((1, plan.slots)):
        bound = plan.step_milliseconds(batch, context)
        rate = "" if bound is None else f"{1e3 * batch * shards / bound:,.0f} tokens/s at most"
        bounds.append((f"decode step, at least (batch {batch} a shard, context {context})", bound, rate))
    table += [(what, "rates unknown" if ms is None else f"{ms:.3g} ms", rate) for what, ms, rate in bounds]
    return table


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as JSON-able values, sizes in bytes and times in ms."""
    context = min(BOUND_CONTEXT, plan.max_model_len)
    return {
        "family": plan.spec.family,
        "dtype": plan.dtype,
        "quantize": plan.quantize,
        "kv_dtype": plan.cache_dtype,
        "mesh": dict(plan.mesh),
        "device": plan.hardware.kind,
        "device_memory": plan.hardware.memory,
        "parameters": plan.parameter_count,
        "weight_bytes": plan.weight_bytes,
        "per_device": {
            "weight_bytes": plan.weight_bytes_per_device,
            "cache_bytes": plan.cache_bytes_per_device,
            "workspace_bytes": plan.workspace_bytes_per_device,
            "total_bytes": plan.total_bytes_per_device,
        },
        "tiers": {"device": plan.total_bytes_per_device * plan.devices} | paging.elsewhere(plan),
        "paging": paging.to_dict(plan),
        "fits": plan.fits,
        "slots": plan.slots,
        "kv_blocks": plan.num_blocks,
        "max_model_len": plan.max_model_len,
        "bounds": {
            "context": context,
            "prefill_ms": plan.prefill_milliseconds(1, context),
            "step_ms": {
                "batch_1": plan.step_milliseconds(1, context),
                "all_slots": plan.step_milliseconds(plan.slots, context),
            },
            "measured": plan.hardware.measured,
        },
        "implementations": [choice.to_dict() for choice in plan.implementations],
    }


def text(plan: Plan) -> str:
    """The plan as lines of text."""
    shown = [("", "each device", "in all"), *rows(plan)]
    widths = [max(len(row[i]) for row in shown) for i in range(3)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in shown]
    return "\n".join([*lines, "", *map(str, plan.implementations)])


def html(plan: Plan) -> str:
    """The plan as an HTML table."""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows(plan))
    served = "".join(f"<li>{escape(str(choice))}</li>" for choice in plan.implementations)
    return f"<table><tr><th></th><th>each device</th><th>in all</th></tr>{body}</table><ul>{served}</ul>"
