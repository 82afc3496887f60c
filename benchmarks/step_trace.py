"""Which kernels a step launches, how long each runs, and how long the device is idle between them."""

from __future__ import annotations

import re
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

TOP = 30
_STREAM = re.compile(r"stream", re.IGNORECASE)


def profile(run: Callable[[], Any], steps: int, *, top: int = TOP) -> dict[str, Any]:
    """Trace ``run``, which blocks until the device is done and advances by ``steps`` steps.

    Times are those under the profiler, which makes small kernels up to a few percent slower; hold them against each
    other, and the sum against the untraced time.

    Returns:
        Per step: ``span_us`` from the first kernel to the end of the last one, ``busy_us`` with at least one kernel,
        ``idle_us`` the rest, ``launches``; and of the ``top`` kernels their name, launches and microseconds.
    """
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        if not files:
            return {"error": "the profiler wrote no .xplane.pb"}
        events, where = _events(jax.profiler.ProfileData.from_file(str(files[-1])))
    return {"where": where, "steps": steps} | summary(events, steps, top)


def _events(data: Any) -> tuple[list[tuple[str, float, float]], str]:
    """(name, start, duration) in ns of what ran on a GPU's streams, or on the threads of XLA's CPU client."""
    planes = list(data.planes)
    gpus = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    for plane in gpus:
        streams = [line for line in plane.lines if _STREAM.search(line.name or "")]
        events = [(e.name, e.start_ns, e.duration_ns) for line in streams for e in line.events]
        if events:
            return events, f"{plane.name}, {len(streams)} streams"
    lines = [line for plane in planes for line in plane.lines if "XLA" in (line.name or "")]
    return [(e.name, e.start_ns, e.duration_ns) for line in lines for e in line.events], "host threads of XLA"


def summary(events: list[tuple[str, float, float]], steps: int, top: int = TOP) -> dict[str, Any]:
    """Sum events (name, start, duration in ns) up; see :func:`profile`."""
    if not events:
        return {"error": "the trace has no events of a device"}
    total: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    for name, _, duration in events:
        total[name][0] += 1
        total[name][1] += duration
    spans = sorted((start, start + duration) for _, start, duration in events)
    begin, end = spans[0]
    first, busy, gaps = begin, 0.0, []
    for start, stop in spans[1:]:
        if start > end:
            busy += end - begin
            gaps.append(start - end)
            begin, end = start, stop
        end = max(end, stop)
    busy += end - begin
    ranked = sorted(total.items(), key=lambda item: -item[1][1])[:top]
    return {
        "span_us": (end - first) / 1e3 / steps,
        "busy_us": busy / 1e3 / steps,
        "idle_us": (end - first - busy) / 1e3 / steps,
        "gaps": len(gaps) / steps,
        "longest_gaps_us": [gap / 1e3 for gap in sorted(gaps, reverse=True)[:5]],
        "launches": len(events) / steps,
        "kernels": [
            {"name": name[:160], "launches": count / steps, "us": nanoseconds / 1e3 / steps}
            for name, (count, nanoseconds) in ranked
        ],
    }
