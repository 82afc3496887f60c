"""Sizes in bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.errors import ConfigError
from jaxinfer.sizes import parse_bytes, size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2 * 10**9), ("1.5 GiB", 3 << 29), ("300", 300), ("7 kb", 7000), ("1tb", 10**12), (12345, 12345),
        ("64MiB", 64 << 20), (None, None),
    ],
)  # fmt: skip
def test_sizes_are_read(text, expected):
    assert parse_bytes("memory", text) == expected


@pytest.mark.parametrize("value", ["", "GB", "2 XB", "-1GB", "1e400", "nan", 0, -5, True, 1.5, "2GB extra", []])
def test_what_is_no_size_is_refused_by_name(value):
    with pytest.raises(ConfigError, match="host_memory: expected bytes"):
        parse_bytes("host_memory", value)


@given(st.integers(1, 10**15))
def test_what_is_written_reads_back_within_its_digits(count):
    got = parse_bytes("memory", size(count))
    assert got is not None
    assert abs(got - count) <= max(0.006 * count, 1)


def test_units_are_decimal():
    assert [size(n) for n in (5, 1500, 2_340_000, 7e9, 3e12)] == ["5 B", "1.50 KB", "2.34 MB", "7.00 GB", "3.00 TB"]
