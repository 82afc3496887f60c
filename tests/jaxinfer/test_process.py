"""What engines need of their process; its end is tried in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxinfer import process

ROOT = Path(__file__).resolve().parents[2]


def test_what_is_open_at_the_end_is_closed():
    program = """
from jaxinfer import process
class Thing:
    def close(self): print("closed")
kept, dropped = Thing(), Thing()
process.close_at_exit(kept)
process.close_at_exit(dropped)
del dropped
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "closed\n"


@pytest.mark.parametrize(
    ("platform", "before", "kept"), [("cpu", None, False), ("gpu", None, True), ("gpu", "/mine", False)]
)
def test_compiled_programs_are_kept_unless_the_user_says_where_or_on_a_cpu(platform, before, kept, monkeypatch):
    set_to = {}
    monkeypatch.setattr(jax, "config", SimpleNamespace(jax_compilation_cache_dir=before, update=set_to.__setitem__))
    device = SimpleNamespace(platform=platform)
    process.keep_compiled(SimpleNamespace(devices=SimpleNamespace(flat=[device])))
    assert ("jax_compilation_cache_dir" in set_to) == kept
