"""The report against what is known of the run."""

from __future__ import annotations

import json

import jax
import pytest

from jaxinfer import SamplingParams
from jaxinfer.paging.report import line
from tests.engines import of, tiny
from tests.oracle import shared_root
from tests.stores import converted

GREEDY = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return converted(tmp_path_factory)


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_the_report_adds_up(store, offload):
    with of(store, offload=offload, decode_chunk=1, mesh={"tensor": 2}) as engine:
        engine.generate([5, 17, 4], GREEDY)
        jax.block_until_ready(engine.executor.caches)
        engine.executor.pager.link.close()  # all transfers are noted
        found = json.loads(json.dumps(engine.offload_report()))
        tiers = engine.plan.tiers
        assert found["passes"] == 5
        events = found["timeline"]
        for kind in ("link", "disk"):
            own = [event for event in events if event["kind"] == kind]
            assert sum(event["nbytes"] for event in own) == found[kind]["bytes"]
            assert all(event["end"] >= event["start"] for event in own)
        assert found["link"]["bytes"] == (5 * 2 + 1) * max(tiers.layer_bytes) * 2
        assert found["link"]["bytes_per_second"] == found["link"]["bytes"] / found["link"]["busy_seconds"]
        assert found["link"]["measured"] == 2 * engine.plan.hardware.link
        assert found["link"]["share"] > 0
        assert (found["disk"]["bytes"] > 0) == (offload == "disk")
        assert [e["layer"] for e in events if e["kind"] == "compute"][:4] == [0, 1, 0, 1]
        assert found["device"]["used_bytes"] <= found["device"]["planned_bytes"]
        text = line(engine.executor)
        assert "link" in text
        assert ("disk" in text.split("waited")[0]) == (offload == "disk")
        assert "waited disk" in text


def test_a_resident_engine_has_no_report(tmp_path_factory):
    with tiny(shared_root(tmp_path_factory)) as engine:
        assert engine.offload_report() is None
        assert line(engine.executor) == ""
