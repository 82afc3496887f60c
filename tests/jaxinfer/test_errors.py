from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxinfer
from jaxinfer import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_is_jaxinfers_and_public(kind):
    assert issubclass(kind, errors.JaxinferError)
    assert getattr(jaxinfer, kind.__name__) is kind
    # Whoever catches ValueError for bad input catches these.
    assert issubclass(kind, ValueError) or kind is errors.JaxinferError


@given(names=st.lists(st.text("abc", min_size=1), max_size=15), limit=st.integers(1, 12))
def test_long_lists_are_cut(names, limit):
    text = errors.listed(names, limit)
    shown, _, rest = text.partition(" and ")
    assert shown.split(", ") == names[:limit] or not names
    assert rest == ("" if len(names) <= limit else f"{len(names) - limit} more")
