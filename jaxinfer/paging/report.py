"""What paging did, for people and programs: bytes, rates against what was measured at the start, and waiting."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxinfer.executor import Executor
from jaxinfer.paging.executor import PagedExecutor
from jaxinfer.paging.timeline import Kind


def report(executor: Executor) -> dict[str, Any] | None:
    """Say what paging did since the engine was made, or since :meth:`Timeline.clear`.

    Returns:
        None where nothing is paged. Otherwise: ``passes`` over all layers; for ``link`` and ``disk``: ``bytes`` moved,
        ``busy_seconds``, ``bytes_per_second`` while busy, ``measured`` at the start, in bytes per second, and ``share``
        of it; of ``kv_out``, keys and values that went to host memory, ``bytes`` and ``busy_seconds`` (those that come
        are part of ``link``); ``compute_seconds``; ``waited_seconds`` for each of ``link``, ``disk``, ``compute`` and
        ``kv_out``; ``device``: bytes of each device that the plan allows, and that are or were used at most;
        ``timeline``: events as dicts, see :class:`jaxinfer.paging.timeline.Event`.
    """
    if not isinstance(executor, PagedExecutor):
        return None
    plan, timeline = executor.plan, executor.pager.timeline

    def about(kind: Kind) -> dict[str, Any]:
        rate, limit = timeline.rate(kind), _measured(executor, kind)
        return {
            "bytes": timeline.nbytes[kind],
            "busy_seconds": timeline.busy[kind],
            "bytes_per_second": rate,
            "measured": limit,
            "share": None if rate is None or limit is None else rate / limit,
        }

    return {
        "passes": executor.passes,
        "link": about("link"),
        "disk": about("disk"),
        "kv_out": {"bytes": timeline.nbytes["kv_out"], "busy_seconds": timeline.busy["kv_out"]},
        "compute_seconds": timeline.busy["compute"],
        "waited_seconds": dict(timeline.waited),
        "device": {"planned_bytes": plan.total_bytes_per_device, "used_bytes": used_bytes(executor)},
        "timeline": [dataclasses.asdict(event) for event in list(timeline.events)],
    }


def used_bytes(executor: PagedExecutor) -> int:
    """Most bytes that were used on a device: the driver's peak or, of a CPU, what each of its devices holds now."""
    devices = list(executor.mesh.devices.flat)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else executor.device_bytes() // len(devices)


def line(executor: Executor) -> str:
    """The report in a few words, for a progress bar; empty where nothing is paged."""
    if not isinstance(executor, PagedExecutor):
        return ""
    timeline = executor.pager.timeline
    shown = []
    kinds: tuple[Kind, ...] = ("link", "disk")
    for kind in kinds:
        rate, limit = timeline.rate(kind), _measured(executor, kind)
        if rate is not None:
            shown.append(f"{kind} {rate / 1e9:.3g} GB/s" + ("" if limit is None else f" ({100 * rate / limit:.0f} %)"))
    if executor.kv is not None:
        shown.append(f"KV cache out {timeline.nbytes['kv_out'] / 1e9:.3g} GB")
    waited = ", ".join(
        f"{kind} {seconds:.2g} s" for kind, seconds in timeline.waited.items() if kind != "kv_out" or executor.kv
    )
    return "; ".join([*shown, f"waited {waited}"])


def _measured(executor: PagedExecutor, kind: Kind) -> float | None:
    """The rate at the start, of all devices together."""
    link = executor.plan.hardware.link
    return executor.tiers.disk if kind == "disk" else None if link is None else link * executor.plan.devices
