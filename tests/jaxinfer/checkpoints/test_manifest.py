"""The manifest: what is written is read, and nothing else is believed."""

from __future__ import annotations

import json
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer.checkpoints.manifest import (
    DTYPES,
    MANIFEST,
    PARTIAL,
    Manifest,
    Quantized,
    StoredFile,
    StoredTensor,
    chunks,
    digest,
    group_of,
    read_json,
    write_json,
)
from jaxinfer.errors import CheckpointError, UnsafePathError, UnsupportedFormatError
from tests.stores import edit

TENSOR = StoredTensor("layers.0.mlp.up", DTYPES["bfloat16"], (5, 4), (2, 4), (1, 2, 0xFFFFFFFF))


@pytest.fixture
def store(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "data").write_bytes(b"12345")
    files = {"config.json": StoredFile(2, digest(np.frombuffer(b"{}", np.uint8))), "weights/data": StoredFile(5)}
    Manifest("bfloat16", {TENSOR.path: TENSOR}, files).write(tmp_path)
    return tmp_path


def test_what_is_written_is_read(store):
    manifest = Manifest.read(store)
    assert manifest.tensors == {TENSOR.path: TENSOR}
    assert manifest.dtype == "bfloat16"
    assert manifest.file_faults(store) == []
    assert TENSOR.group == "layers.0"
    assert TENSOR.nbytes == 40
    assert not (store / f"{MANIFEST}.tmp").exists()


def crc32c_by_bits(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


@given(st.binary(max_size=50))
def test_the_digest_is_crc32c(data):
    assert digest(np.frombuffer(data, np.uint8)) == crc32c_by_bits(data)
    assert crc32c_by_bits(b"123456789") == 0xE3069283 != zlib.crc32(b"123456789")  # the check value of the standard


def test_the_digest_is_that_of_c_order():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert digest(values.T) == crc32c_by_bits(values.T.tobytes()) != digest(values)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=3).map(
        lambda sides: tuple(zip(*((max(side), min(side)) for side in sides), strict=True)) or ((), ())
    )
)
def test_chunks_cover_every_element_once(sides):
    shape, chunk = sides
    written = np.zeros(shape, int)
    for box in chunks(shape, chunk):
        written[box] += 1
    assert (written == 1).all()


def test_groups():
    assert [group_of(path) for path in ("layers.12.mlp.up", "embed.tokens", "head.norm.scale")] == [
        "layers.12", "embed", "head"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "weights/../../x", "", "a\\b"])
def test_names_that_lead_out_of_the_folder_are_refused(store, name):
    edit(store, lambda d: d["files"].update({name: {"size": 5}}))
    with pytest.raises(UnsafePathError, match="inside the folder"):
        Manifest.read(store)


def test_links_out_of_the_folder_are_refused(store, tmp_path_factory):
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_bytes(b"12345")
    (store / "weights" / "data").unlink()
    (store / "weights" / "data").symlink_to(secret)
    with pytest.raises(UnsafePathError, match="out of the folder"):
        Manifest.read(store)


@pytest.mark.parametrize("version", [0, 2, "1", None, True])
def test_another_version_is_refused(store, version):
    edit(store, lambda d: d.update(version=version))
    with pytest.raises(UnsupportedFormatError, match=r"version: expected 1, got .*convert the model again"):
        Manifest.read(store)


def tensor(**changes):
    return lambda d: d["tensors"][TENSOR.path].update(changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format="other"), "format: expected 'jaxinfer-store', got 'other'"),
        (lambda d: d.pop("files"), "expected format, version, dtype, files, tensors"),
        (lambda d: d.update(files=[]), "files: expected"),
        (lambda d: d.update(tensors={}), "tensors: expected"),
        (lambda d: d.update(dtype="int8"), "dtype: expected null or one of"),
        (lambda d: d["files"].update({"config.json": {"size": -1}}), "file 'config.json'"),
        (lambda d: d["files"].update({"config.json": {"size": 2, "crc32c": 7}}), "crc32c: expected 8 digits"),
        (lambda d: d["tensors"].update({"../x": {}}), "expected a parameter's path"),
        (tensor(dtype="int64"), "layers.0.mlp.up.*dtype: expected one of"),
        (tensor(shape=[5, -4]), "shape: expected at most 8 positive sizes"),
        (tensor(shape=[5, 2**70]), "shape: expected at most 8 positive sizes"),
        (tensor(chunk=[0, 4]), "chunk: expected at most 8 positive sizes"),
        (tensor(chunk=[6, 4]), "chunk: expected one within the shape"),
        (tensor(chunk=[2]), "chunk: expected one within the shape"),
        (tensor(crc32c=["00000001"]), "crc32c: expected 3 numbers of 8 hexadecimal digits, got 1"),
        (tensor(crc32c=["x"] * 3), "crc32c: expected 3 numbers"),
        (tensor(more=1), "expected exactly dtype, shape, chunk and crc32c"),
    ],
)
def test_a_damaged_manifest_is_refused(store, change, message):
    edit(store, change)
    with pytest.raises(CheckpointError, match=message):
        Manifest.read(store)


def test_no_manifest_is_no_store(store):
    (store / MANIFEST).write_text("{")
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: expected JSON"):
        Manifest.read(store)
    (store / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="a conversion that was not finished"):
        Manifest.read(store)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json(store / PARTIAL)


def test_faults_of_files(store):
    (store / "config.json").write_bytes(b"[]")
    (store / "weights" / "data").write_bytes(b"1234")
    first, second = Manifest.read(store).file_faults(store)
    assert first.startswith("config.json (expected crc32c ")
    assert second == "weights/data (expected 5 bytes, got 4)"
    (store / "weights" / "data").unlink()
    assert Manifest.read(store).file_faults(store)[1] == "weights/data (No such file or directory)"


def test_json_is_replaced_as_a_whole(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("int8", "method: expected one of int8, int4, fp8, got"),
        (None, "method: expected one of int8, int4, fp8, got"),
        ({"method": "int3"}, "method: expected one of int8, int4, fp8, got"),
        ({"method": "int8", "groups": {}}, "quantization: expected {'method': 'int8'}, got"),
        ({"method": "int4", "groups": {"mlp.up": -1}}, "groups: expected weight -> inputs, got"),
        ({"method": "int4", "groups": {"mlp.up": 64}, "packing": "backwards"}, "quantization: expected .* low half"),
    ],
)
def test_a_quantization_that_is_not_ours_is_refused(store, entry, message):
    edit(store, lambda d: d.update(quantization=entry))
    with pytest.raises(CheckpointError, match=message):
        Manifest.read(store)


@pytest.mark.parametrize("quantized", [Quantized("fp8", {}), Quantized("int4", {"mlp.up": 128, "mlp.down": 64})])
def test_a_quantization_is_read_back(store, quantized):
    edit(store, lambda d: d.update(quantization=quantized.to_json()))
    assert Manifest.read(store).quantized == quantized
