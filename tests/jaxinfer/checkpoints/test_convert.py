"""Conversion: killed anywhere and gone on with, on a full disk, twice at once; and what it leaves."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import jaxinfer
from jaxinfer.checkpoints.convert import _Conversion, convert
from jaxinfer.checkpoints.manifest import PARTIAL, Manifest, Quantized
from jaxinfer.checkpoints.store import Store, verify
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.models.spec import Layout
from jaxinfer.pretrained import Pretrained
from jaxinfer.quantization import wire_dtype
from tests.oracle import checkpoint, shared_root
from tests.stores import converted, data_file, edit, source
from tests.wide import METHODS, wide

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return converted(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return source(tmp_path_factory)


def same(store, good):
    """Both hold the same tensors with the same digests, and the first's bytes have them."""
    first, second = Manifest.read(store), Manifest.read(good)
    assert first.tensors == second.tensors
    assert first.dtype == second.dtype
    copied = [name for name in second.files if "/" not in name]
    assert [first.files[name] for name in copied] == [second.files[name] for name in copied]
    assert verify(store).faults == ()


# What is run in a process of its own: a conversion that is killed at a certain point.
KILLED = """
import glob, os, signal, sys, threading
from jaxinfer.checkpoints.convert import convert
module = sys.modules["jaxinfer.checkpoints.convert"]
model, out, point = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def within_a_save():
    while not glob.glob(out + ".partial/store/weights/layers.1*tmp*"):
        pass
    die()

if point == "save":
    threading.Thread(target=within_a_save, daemon=True).start()
elif point == "note":  # the checkpoint of layer 1 is committed, its note is not
    whole = module.write_json
    module.write_json = lambda path, document: die() if path.name == "layers.1.json" else whole(path, document)
elif point == "commit":
    rename = os.rename
    os.rename = lambda old, new, **more: die() if str(new) == out else rename(old, new, **more)
elif point == "removal":  # all is done, but the folder of the unfinished store is still there
    rmtree = module.shutil.rmtree
    module.shutil.rmtree = lambda path, **more: die() if str(path) == out + ".partial" else rmtree(path, **more)
convert(model, out, progress=False)
"""


@pytest.mark.parametrize("point", ["save", "note", "commit", "removal"])
def test_a_killed_conversion_goes_on_where_it_was(folder, good, tmp_path, point):
    out = tmp_path / "store"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), str(out), point], cwd=ROOT, capture_output=True, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    partial = tmp_path / "store.partial"
    assert out.exists() == (point == "removal")
    if point != "removal":
        with pytest.raises(CheckpointError, match="a conversion that was not finished; run `jaxinfer convert` again"):
            jaxinfer.init_inference(partial)
    done = out if point == "removal" else partial / "store"
    before = {group: (done / "weights" / group).stat().st_ino for group in ("embed", "layers.0")}
    assert convert(folder, out, progress=False) == out
    assert {group: (out / "weights" / group).stat().st_ino for group in before} == before  # not written again
    assert sorted(path.name for path in (out / "weights").iterdir()) == ["embed", "head", "layers.0", "layers.1"]
    assert not partial.exists()
    same(out, good)


def test_a_full_disk_is_an_error_and_leaves_what_can_be_gone_on_with(folder, good, tmp_path):
    """The limit on the size of files stands for the disk's end; Python ignores its signal."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"store\.partial.*cannot be written"):
            convert(folder, tmp_path / "store", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "store").exists()
    same(convert(folder, tmp_path / "store", progress=False), good)


def test_free_space_is_checked_first(folder, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1 << 40, 0, 1 << 20))
    with pytest.raises(CheckpointError, match=r"expected \d+ bytes free on the disk, got 1048576"):
        convert(folder, tmp_path / "store", progress=False)
    assert not list((tmp_path / "store.partial").rglob("manifest.ocdbt"))


def test_nothing_is_overwritten(folder, good, tmp_path):
    with pytest.raises(CheckpointError, match="expected a place where nothing is yet, got a store"):
        convert(folder, good, progress=False)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="got something else"):
        convert(folder, tmp_path / "file", progress=False)
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match="expected an unfinished conversion or nothing, got other files"):
        convert(folder, tmp_path / "new", progress=False)
    assert (tmp_path / "new.partial" / "mine").read_text() == "mine"


def test_two_at_once_are_refused(folder, tmp_path):
    partial = tmp_path / "store.partial"
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(CheckpointError, match="another process converts to this place"):
            convert(folder, tmp_path / "store", progress=False)
    finally:
        os.close(handle)


def test_what_another_conversion_left_is_not_used(folder, good, tmp_path, monkeypatch):
    def stop(*_):
        raise OSError(5, "stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", stop)
        with pytest.raises(CheckpointError, match="cannot be written: stopped"):
            convert(folder, tmp_path / "store", "bfloat16", progress=False)
    assert json.loads((tmp_path / "store.partial" / PARTIAL).read_text())["dtype"] == "bfloat16"
    same(convert(folder, tmp_path / "store", progress=False), good)


def test_progress_is_shown_where_it_is_wanted(folder, good, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    with Store(good) as store:
        total = store.nbytes
    for progress, shown in ((True, True), (False, False), (None, False)):
        convert(folder, tmp_path / str(progress), progress=progress)
        found = capsys.readouterr()
        assert not found.out  # which belongs to the program's own output
        if shown:
            assert "converting:   0%" in found.err
            assert "converting: 100%" in found.err
            assert f"{total / 1e3:.0f}k/{total / 1e3:.0f}k" in found.err
        else:
            assert not found.err


def test_what_cannot_be_converted(folder, good, tmp_path):
    with pytest.raises(CheckpointError, match="expected a folder of safetensors, got a store"):
        convert(good, tmp_path / "store", progress=False)
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        convert(folder, tmp_path / "store", "int8", progress=False)


def test_a_store_takes_the_folder_s_place(folder, good):
    prompt = [5, 17, 4]
    options = {"mesh": {"tensor": 1}, "max_batch": 2, "kv_blocks": 4, "progress": False}
    with jaxinfer.init_inference(folder, **options) as one, jaxinfer.init_inference(good, **options) as other:
        np.testing.assert_array_equal(one.logits(prompt), other.logits(prompt))
        assert one.tokenizer.decode(prompt) == other.tokenizer.decode(prompt)
        assert one.defaults == other.defaults
    assert jaxinfer.plan(good, {"tensor": 1}).to_dict() == jaxinfer.plan(folder, {"tensor": 1}).to_dict()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dtype_is_rounded_to_nearest(folder, tmp_path, dtype):
    out = jaxinfer.convert(folder, tmp_path / "deep" / "store", dtype, progress=False)
    with Store(out) as store, Pretrained(out) as pretrained, Pretrained(folder) as original:
        assert {tensor.dtype.name for tensor in store.tensors.values()} == {dtype}
        assert pretrained.dtype == dtype
        tensor = store.tensors["embed.tokens"]
        got = np.empty(tensor.shape, tensor.dtype)
        store.read(tensor, 0, next(iter(tensor.boxes())), got)
        (name,) = (name for name in original.checkpoint.tensors if "embed_tokens" in name)
        np.testing.assert_array_equal(got, original.checkpoint.tensor(name).astype(getattr(ml_dtypes, dtype, dtype)))


@pytest.mark.parametrize("method", METHODS)
def test_a_quantized_store_says_how_and_is_verified(method, tmp_path_factory, tmp_path):
    folder = checkpoint(wide("llama"), shared_root(tmp_path_factory))
    out = convert(folder, tmp_path / "store", quantize=method, progress=False)
    groups = {"attention.out": 128, "attention.qkv": 128, "mlp.down": 128, "mlp.up": 128} if method == "int4" else {}
    with Store(out) as store:
        assert store.manifest.quantized == Quantized(method, groups)
        up, scale = store.tensors["layers.1.mlp.up"], store.tensors["layers.1.mlp.up_scale"]
        width = 128 if method == "int4" else 256  # two to a byte
        assert (up.shape, up.dtype) == ((2, 768, width), wire_dtype(method))
        assert (scale.shape, scale.dtype) == ((2, 2, 768) if method == "int4" else (2, 768), np.float32)
        assert store.tensors["embed.tokens"].dtype == np.float32
    assert not verify(out, progress=False).faults
    file = data_file(out, "layers.1")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "damaged: expected crc32c" in verify(out, progress=False).faults[0]


def test_an_unfinished_store_quantized_otherwise_is_not_gone_on_with(tmp_path_factory, tmp_path, monkeypatch):
    folder = checkpoint(wide("llama"), shared_root(tmp_path_factory))
    with monkeypatch.context() as patch:
        patch.setattr(_Conversion, "_commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            convert(folder, tmp_path / "store", quantize="int8", progress=False)
    with Store(convert(folder, tmp_path / "store", quantize="int4", progress=False)) as store:
        assert store.tensors["layers.0.mlp.up"].dtype == np.uint8


def test_weights_that_are_called_quantized_must_be(tmp_path_factory, tmp_path):
    folder = checkpoint(wide("llama"), shared_root(tmp_path_factory))
    out = convert(folder, tmp_path / "store", quantize="int8", progress=False)
    edit(out, lambda d: d["tensors"]["layers.0.mlp.up"].update(dtype="uint8"))
    with Pretrained(out) as pretrained, pytest.raises(CheckpointError, match=r"mlp\.up \(expected int8, got uint8\)"):
        pretrained.check(Layout.of(pretrained.spec))
