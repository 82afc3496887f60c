"""The kernel of decoder layers, compiled for Hopper without one: what ptxas says of it."""

from __future__ import annotations

import pytest

from pallas_kernels.layer_mosaic import parameters_of
from pallas_kernels.layer_plan import PARAMETERS
from tests import aot
from tests.pallas_kernels import layer_cases
from tests.pallas_kernels.test_layer_plan import plan


@pytest.mark.skipif(aot.missing() is not None, reason=str(aot.missing()))
def test_it_compiles_without_spills():
    reports = aot.compile_cases("tests.pallas_kernels.layer_cases", list(layer_cases.CASES))
    assert {name: report.error for name, report in reports.items() if report.error} == {}
    assert {name: report.spilled for name, report in reports.items() if report.spilled} == {}
    assert all(report.registers for report in reports.values())


@pytest.mark.parametrize("name", layer_cases.SMALL)
def test_parameters_have_the_names_of_the_plan(name):
    case = layer_cases.SMALL[name]
    (_, [layer], _, _, _), _ = layer_cases.operands(case, layers=1)
    found = plan(case)
    assert [*parameters_of(layer, found), "keys", "values"] == sorted(
        found.parameters, key=[*parameters_of(layer, found), "keys", "values"].index
    )
    assert len(found.parameters) < PARAMETERS
