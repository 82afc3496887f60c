"""The table of implementations, as doctor and the engine's repr show it."""

from __future__ import annotations

from pallas_kernels.choice_table import Shapes, choices
from pallas_kernels.choices import Device

CPU, AMPERE, HOPPER, BLACKWELL = Device("cpu"), Device("gpu", "8.0"), Device("gpu", "9.0"), Device("gpu", "10.0")


def test_the_table_says_why_a_quantized_cache_has_no_kernel_in_prefill():
    model = Shapes(dtype="bfloat16", heads_per_key=1, head_dim=128, kv_dtype="int8")
    said = {choice.op: choice for choice in choices(HOPPER, model)}
    assert said["decode attention"].implementation == "mosaic"
    prefill = said["prefill attention"]
    assert prefill.implementation == "dot"
    assert "the kernel does not run queries of bfloat16 with keys and values of int8" in prefill.reason


def test_the_table_lists_every_case_where_there_is_no_model():
    assert [c.op for c in choices(AMPERE) if "decode" in c.op] == [
        "decode attention with up to 2 query heads a key",
        "decode attention with more",
    ]
    assert [c.op for c in choices(CPU) if "decode" in c.op] == ["decode attention"]
    assert not [c for c in choices() if c.compiler != "XLA"], "this is a CPU"


def test_the_table_of_a_model_says_which_product_is_apart_and_why():
    products = (("attention.qkv", 4096, 12288, "int8"), ("mlp.up", 4096, 11007, "int8"))
    model = Shapes(dtype="bfloat16", heads_per_key=1, head_dim=128, products=products, norm="layer")
    said = {choice.op: choice for choice in choices(HOPPER, model)}
    assert said["products of up to 16 rows (attention.qkv)"].implementation == "mosaic"
    odd = said["products of up to 16 rows (mlp.up)"]
    assert odd.implementation == "dot"
    assert "does not run 11007 outputs, which 8 does not divide" in odd.reason
    assert said["products of more rows"].implementation == "dot"
    older = {choice.op: choice for choice in choices(AMPERE, model)}
    assert "the kernel is made for Hopper, and this is gpu of compute capability 8.0" in str(
        older["products of up to 16 rows"]
    )


def test_the_table_says_who_writes_the_cache():
    def said(on: Device, **about) -> str:
        model = Shapes(**{"dtype": "bfloat16", "heads_per_key": 1, "head_dim": 128} | about)
        (found,) = (choice for choice in choices(on, model) if choice.op.startswith("query"))
        return found

    assert said(HOPPER, rotary="halves").implementation == "mosaic"
    assert "norms of queries and keys" in said(HOPPER, head_norms=True).reason
    assert "keys and values of int8" in said(HOPPER, kv_dtype="int8").reason
    assert said(AMPERE).implementation == said(CPU).implementation == "apart"


def test_the_table_says_whether_whole_layers_are_one_kernel():
    def said(on: Device, **about) -> list[str]:
        product = ("attention.qkv", 128, 384, "int8")
        model = Shapes(**{"dtype": "bfloat16", "heads_per_key": 1, "head_dim": 128, "products": (product,)} | about)
        return [str(choice) for choice in choices(on, model) if choice.op.startswith("whole")]

    (served,) = said(HOPPER, whole=(None,))
    assert served.startswith("whole layers of up to 2 rows and 4096 tokens: mosaic (Mosaic GPU), because")
    (apart,) = said(HOPPER, whole=("a softcap of scores",))
    assert "apart (XLA), because the kernel does not run a softcap of scores" in apart
    assert "not described" in said(HOPPER)[0]
    assert ["this is cpu" in one for one in said(CPU, whole=(None,))] == [True]
    one, two = said(HOPPER, whole=(None, "two"))
    assert one.startswith("whole layers of up to 2 rows and 4096 tokens (1): mosaic")
    assert two.startswith("whole layers of up to 2 rows and 4096 tokens (2): apart")
    for on in (HOPPER, AMPERE, BLACKWELL, CPU):  # of no model
        served = "mosaic" if on == HOPPER else "apart"
        assert [choice.implementation for choice in choices(on) if choice.op.startswith("whole")] == [served]


def test_the_table_says_where_norms_are_computed():
    def norms(on: Device, kind: str) -> str:
        model = Shapes(dtype="bfloat16", heads_per_key=1, head_dim=128, norm=kind)
        return next(choice.implementation for choice in choices(on, model) if choice.op.startswith("norms"))

    assert norms(HOPPER, "rms") == "mosaic"
    assert norms(AMPERE, "rms") == norms(CPU, "layer") == "jnp"
