"""What paging did, for people and programs: bytes, rates against what was measured at the start, and waiting."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxinfer.paging.executor import PagedExecutor
from jaxinfer.paging.timeline import Kind


def report(executor: PagedExecutor) -> dict[str, Any]:
    """Say what paging did since the engine was made, or since :meth:`Timeline.clear`.

    Returns:
        ``passes`` over all layers; for ``link`` and ``disk``: ``bytes`` moved, ``busy_seconds``, ``bytes_per_second``
        while busy, ``measured`` at the start, in bytes per second, and ``share`` of it; ``waited_seconds`` for each of
        ``link``, ``disk`` and ``compute``; ``device``: bytes of each device that the plan allows, and that are or were
        used at most; ``timeline``: events as dicts, see :class:`jaxinfer.paging.timeline.Event`.
    """
    pager, plan = executor.pager, executor.plan
    timeline, tiers = pager.timeline, executor.tiers
    measured = {"link": None if plan.hardware.link is None else plan.hardware.link * plan.devices, "disk": tiers.disk}

    def about(kind: Kind) -> dict[str, Any]:
        rate, limit = timeline.rate(kind), measured[kind]
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


def line(executor: PagedExecutor) -> str:
    """The report in a few words, for a progress bar."""
    timeline = executor.pager.timeline
    found = report(executor) | {}
    shown = []
    for kind in ("link", "disk"):
        rate, share = found[kind]["bytes_per_second"], found[kind]["share"]
        if rate is not None:
            of = "" if share is None else f" ({100 * share:.0f} %)"
            shown.append(f"{kind} {rate / 1e9:.3g} GB/s{of}")
    waited = timeline.waited
    shown.append("waited " + ", ".join(f"{kind} {waited[kind]:.2g} s" for kind in ("link", "disk", "compute")))
    return "; ".join(shown)
