"""What paging did and waited for: events for a plot, and sums for a report."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal

Kind = Literal["disk", "link", "compute", "kv_out"]
KINDS: tuple[Kind, ...] = ("disk", "link", "compute", "kv_out")
LENGTH = 16384
"""Events that are kept: the latest."""


@dataclass(frozen=True)
class Event:
    """Something that took time, in seconds of ``time.perf_counter``.

    Attributes:
        kind: ``disk`` is a read into host memory, ``link`` a transfer to the devices, ``compute`` a layer, ``kv_out``
            keys and values on their way to host memory.
        layer: which.
        start, end: when.
        nbytes: bytes read, or moved to all devices together.
    """

    kind: Kind
    layer: int
    start: float
    end: float
    nbytes: int = 0


class Timeline:
    """Collects events, from any thread.

    Attributes:
        events: the latest ones.
        busy: seconds by kind; of events of one kind that overlap, the time counts once.
        nbytes: bytes by kind.
        waited: seconds that the loop stood still, by what it waited for.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forget everything so far."""
        with self._lock:
            self.events: deque[Event] = deque(maxlen=LENGTH)
            self.busy: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
            self.nbytes: dict[Kind, int] = dict.fromkeys(KINDS, 0)
            self.waited: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)
            self._until: dict[Kind, float] = dict.fromkeys(KINDS, 0.0)

    def add(self, event: Event) -> None:
        """Note something that is done."""
        with self._lock:
            self.events.append(event)
            self.nbytes[event.kind] += event.nbytes
            self.busy[event.kind] += max(0.0, event.end - max(event.start, self._until[event.kind]))
            self._until[event.kind] = max(self._until[event.kind], event.end)

    def wait(self, kind: Kind, seconds: float) -> None:
        """Note that the loop stood still."""
        with self._lock:
            self.waited[kind] += seconds

    def rate(self, kind: Kind) -> float | None:
        """Bytes per second while busy; None where nothing was moved."""
        with self._lock:
            return self.nbytes[kind] / self.busy[kind] if self.busy[kind] and self.nbytes[kind] else None
