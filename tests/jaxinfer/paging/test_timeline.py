"""Sums over events, also over those that overlap."""

from __future__ import annotations

import pytest

from jaxinfer.paging.timeline import LENGTH, Event, Timeline


def test_time_that_events_share_counts_once():
    timeline = Timeline()
    for start, end in ((0.0, 2.0), (1.0, 3.0), (5.0, 6.0)):
        timeline.add(Event("disk", 0, start, end, 100))
    assert timeline.busy["disk"] == pytest.approx(4.0)
    assert timeline.rate("disk") == pytest.approx(75.0)
    assert timeline.rate("link") is None


def test_waits_add_up_and_everything_can_be_forgotten():
    timeline = Timeline()
    timeline.wait("link", 0.5)
    timeline.wait("link", 0.25)
    timeline.add(Event("compute", 1, 0.0, 1.0))
    assert timeline.waited["link"] == 0.75
    timeline.clear()
    assert timeline.waited == {"disk": 0.0, "link": 0.0, "compute": 0.0, "kv_out": 0.0}
    assert timeline.busy["compute"] == 0.0
    assert not timeline.events


def test_only_the_latest_events_are_kept():
    timeline = Timeline()
    for i in range(LENGTH + 10):
        timeline.add(Event("link", i, float(i), i + 0.5, 1))
    assert len(timeline.events) == LENGTH
    assert timeline.nbytes["link"] == LENGTH + 10
    assert timeline.events[-1].layer == LENGTH + 9
