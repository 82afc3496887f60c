"""Registers: the operations they become, and that the numpy in their place has them all."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import func

from pallas_kernels.registers import Reg, Registers
from tests.pallas_kernels.emulated import Emulated

PALLAS = {"scalar", "strided", "entries"}
"""What only hands arrays over from and to Pallas."""


def test_numpy_has_every_instruction_with_the_same_arguments():
    for name, method in inspect.getmembers(Registers, inspect.isfunction):
        if name.startswith("_") or name in PALLAS:
            continue
        wanted, found = (list(inspect.signature(m).parameters) for m in (method, getattr(Emulated, name)))
        assert found == wanted, name


def traced(do, kind="i32"):
    """The MLIR of a function of one argument."""
    from jax._src.interpreters import mlir

    with mlir.make_ir_context(), ir.Location.unknown():
        module = ir.Module.create()
        with ir.InsertionPoint(module.body):
            argument = ir.F32Type.get() if kind == "f32" else ir.IntegerType.get_signless(32)

            @func.FuncOp.from_py_func(argument)
            def main(value):
                return do(Reg(value)).value

        assert module.operation.verify()
        return str(module)


@pytest.mark.parametrize(
    ("do", "wanted"),
    [
        (lambda a: a // 3, "arith.divui"),
        (lambda a: a % 3, "arith.remui"),
        (lambda a: a >> 3, "arith.shrui"),
        (lambda a: a < 3, "arith.cmpi ult"),
        (lambda a: a & 0xFFFF0000, "arith.constant -65536 : i32"),
        (lambda a: 2 + a, "arith.addi"),
        (lambda a: 2 * a, "arith.muli"),
    ],
)
def test_integers_are_unsigned(do, wanted):
    assert wanted in traced(do)


@pytest.mark.parametrize(("do", "wanted"), [(lambda a: a * 2.0, "mulf"), (lambda a: a - 2.0, "subf")])
def test_floats_have_the_same_operators(do, wanted):
    assert f"arith.{wanted}" in traced(do, "f32")


@pytest.mark.parametrize("toggle", [False, True])
def test_the_table_of_a_merge_is_that_of_its_operations(toggle):
    o = object.__new__(Registers)  # without the numbers of the thread, which need a kernel
    text = traced(lambda a: o.merge(a, 0x00FF00FF, 0x43004300, toggle=toggle))
    table = next(int(word, 16) for word in text.replace(";", " ").replace(",", " ").split() if word.startswith("0x"))
    for a, b, c in np.ndindex(2, 2, 2):  # the bit of the table that PTX reads
        wanted = (a & b) ^ c if toggle else (a & b) | c
        assert table >> (4 * a + 2 * b + c) & 1 == wanted
