"""What a plan shows, in each of its forms."""

from __future__ import annotations

import json

import pytest

import jaxinfer
from jaxinfer import plan_table
from tests.cases import case
from tests.oracle import checkpoint, shared_root


@pytest.fixture(scope="module", params=[None, "host"])
def plan(request, tmp_path_factory):
    folder = checkpoint(case("llama-plain"), shared_root(tmp_path_factory))
    return jaxinfer.plan(folder, device="H200", offload=request.param)


def test_every_row_is_in_the_text_and_the_html(plan):
    lines, shown = plan_table.text(plan).splitlines(), plan_table.html(plan)
    rows = plan_table.rows(plan)
    assert len({len(row) for row in rows}) == 1
    for what, each, total in rows:
        (line,) = (line for line in lines if line.startswith(f"{what}  "))
        assert each in line
        assert total in line
        assert f"<td>{what}</td>" in shown
    for choice in plan.implementations:
        assert str(choice) in lines


def test_the_document_is_json_and_agrees_with_the_rows(plan):
    document = json.loads(json.dumps(plan_table.to_dict(plan)))
    assert document["per_device"]["total_bytes"] == plan.total_bytes_per_device
    assert (document["paging"] is None) == (plan.tiers is None)
    assert document["tiers"]["host"] == (0 if plan.tiers is None else plan.tiers.host_bytes)
    assert document["bounds"]["step_ms"]["batch_1"] == plan.step_milliseconds(1, document["bounds"]["context"])
