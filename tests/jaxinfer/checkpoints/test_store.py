"""A store: plain orbax reads it, and every fault is found before a damaged byte is given out."""

from __future__ import annotations

import json
import shutil

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxinfer.checkpoints.manifest import MANIFEST, PARTIAL
from jaxinfer.checkpoints.store import COMMIT, Store, is_store, verify
from jaxinfer.errors import CheckpointError, JaxinferError
from jaxinfer.pretrained import Pretrained
from tests.bare import fill, read_tensors
from tests.stores import converted, copied, data_file, edit, source


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return converted(tmp_path_factory)


@pytest.fixture
def store(good, tmp_path):
    return copied(good, tmp_path / "store")


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """Parameters by path, from the safetensors file with its own package."""
    folder = source(tmp_path_factory)
    with Pretrained(folder) as pretrained:
        from jaxinfer.models.spec import Layout

        sources = pretrained.sources(Layout.of(pretrained.spec))
        shapes = {path: info.shape for path, info in pretrained.parameters().items()}
    return fill(shapes, sources, read_tensors(folder))


def contents(folder):
    with Store(folder) as store:
        found = {}
        for path, tensor in store.tensors.items():
            found[path] = np.empty(tensor.shape, tensor.dtype)
            for index, box in enumerate(tensor.boxes()):
                out = np.empty(found[path][box].shape, tensor.dtype)
                store.read(tensor, index, box, out)
                found[path][box] = out
        return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, values in expected.items():
        np.testing.assert_array_equal(found[path], values, err_msg=path)


def test_a_store_holds_the_parameters(good, expected):
    assert_same(contents(good), expected)


def test_plain_orbax_reads_it(good, expected):
    found = {}
    for group in sorted(path for path in (good / "weights").iterdir()):
        found |= ocp.StandardCheckpointer().restore(group)
    assert_same(found, expected)


def test_the_layout_on_disk(good):
    """OCDBT and zarr3, no compression."""
    metadata = json.loads((good / "weights" / "layers.0" / "_METADATA").read_text())
    assert (metadata["use_ocdbt"], metadata["use_zarr3"]) == (True, True)
    with Store(good) as store:
        codecs = json.dumps(store._handle(store.tensors["layers.0.mlp.up"]).spec().to_json()["metadata"]["codecs"])
    assert '"bytes"' in codecs
    assert "zstd" not in codecs


def test_a_good_store_verifies(good):
    report = verify(good)
    assert report.faults == ()
    assert report.tensors == len(Store(good).tensors)
    assert report.to_dict()["good"] is True
    assert str(report).startswith(f"{good}: good (")


def test_what_is_a_store(good, tmp_path_factory, tmp_path):
    assert is_store(good)
    assert not is_store(source(tmp_path_factory))
    assert not is_store(tmp_path)
    (tmp_path / PARTIAL).write_text("{}")
    assert is_store(tmp_path)


def test_a_flipped_bit_is_found_and_named(store):
    file = data_file(store, "layers.1")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    (fault,) = verify(store).faults
    assert "weights/layers.1: tensor layers.1." in fault
    assert "damaged: expected crc32c " in fault
    with pytest.raises(CheckpointError, match=r"tensor layers\.1\..* damaged: expected crc32c [0-9a-f]{8}, got"):
        contents(store)


def test_any_flipped_bit_anywhere_is_found_or_does_not_matter(good, store, expected):
    rng = np.random.default_rng(0)
    files = sorted(path for path in good.rglob("*") if path.is_file())
    found = 0
    for file in files * 3:
        changed = store / file.relative_to(good)
        raw = file.read_bytes()
        content = bytearray(raw)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        changed.write_bytes(content)
        try:
            assert_same(contents(store), expected)
        except JaxinferError:
            found += 1
        changed.write_bytes(raw)
    assert found > len(files) // 2


def test_a_truncated_file_is_found_when_it_opens(store):
    file = data_file(store, "embed")
    size = file.stat().st_size
    with open(file, "r+b") as handle:
        handle.truncate(size // 2)
    with pytest.raises(CheckpointError, match=rf"weights/embed/.*expected {size} bytes, got {size // 2}"):
        Store(store)
    faults = verify(store).faults
    assert f"expected {size} bytes, got {size // 2}" in faults[0]
    assert any("tensor embed." in fault for fault in faults[1:])


def test_truncation_after_opening_is_an_error_that_names_the_tensor(store):
    with Store(store) as opened:
        with open(data_file(store, "head"), "r+b") as handle:
            handle.truncate(10)
        tensor = opened.tensors["head.tokens"]
        (box,) = tensor.boxes()
        with pytest.raises(CheckpointError, match=r"weights/head: tensor head\.tokens, chunk 0 of 1: expected"):
            opened.read(tensor, 0, box, np.empty(tensor.shape, tensor.dtype))


def test_chunks_that_go_after_opening_are_errors_and_not_zeros(store):
    """TensorStore's default is to fill what is not there with zeros."""
    with Store(store) as opened:
        tensor = opened.tensors["layers.0.mlp.up"]
        out = np.ones(tensor.shape, tensor.dtype)
        box = tuple(slice(0, size) for size in tensor.shape)
        opened.fetch(tensor, box, out)()
        assert np.any(out != 1)
        shutil.rmtree(store / "weights" / "layers.0")
        wait = opened.fetch(tensor, box, out)
        with pytest.raises(CheckpointError, match=r"layers\.0: tensor layers\.0\.mlp\.up: expected .* cannot be read"):
            wait()


def test_a_missing_file_is_found(store):
    file = data_file(store, "layers.0")
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"1 files missing or damaged: weights/layers.0/.*{file.name} \(No such"):
        Store(store)
    assert len(verify(store).faults) > 1


def test_missing_metadata_of_orbax_is_found(store):
    (store / "weights" / "layers.0" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match=r"missing or damaged: weights/layers.0/_METADATA \(No such"):
        Store(store)


def test_a_missing_layer_is_found(store):
    shutil.rmtree(store / "weights" / "layers.1")
    with pytest.raises(CheckpointError, match=r"weights/layers\.1/"):
        Store(store)


def test_a_missing_commit_is_found(store):
    (store / "weights" / "head" / COMMIT).unlink()
    with pytest.raises(CheckpointError, match=f"weights/head/{COMMIT}"):
        Store(store)
    edit(store, lambda d: d["files"].pop(f"weights/head/{COMMIT}"))
    with pytest.raises(CheckpointError, match=f"weights/head/{COMMIT}"):
        Store(store)
    (store / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="was not finished"):
        Pretrained(store)


def test_a_changed_configuration_is_found(store):
    config = store / "config.json"
    config.write_text(config.read_text().replace("silu", "relu"))
    with pytest.raises(CheckpointError, match=r"config\.json \(expected crc32c"):
        Pretrained(store)


def test_a_manifest_that_contradicts_the_files(store):
    edit(store, lambda d: d["tensors"]["head.norm.scale"].update(dtype="bfloat16"))
    with Store(store) as opened:
        tensor = opened.tensors["head.norm.scale"]
        with pytest.raises(CheckpointError, match=r"head\.norm\.scale.*expected bfloat16 .* got float32"):
            opened.read(tensor, 0, next(iter(tensor.boxes())), np.empty(tensor.shape, tensor.dtype))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("embed.tokens"), r"1 tensors missing: embed\.tokens \[101, 48\]"),
        (lambda t: t.update({"head.extra": t["head.norm.scale"]}), r"1 tensors unexpected: head\.extra"),
        (lambda t: t["head.norm.scale"].update(shape=[47], chunk=[47]), r"wrong shape: head.norm.scale \(expected"),
    ],
)
def test_a_store_that_lacks_what_the_model_needs(store, change, message):
    edit(store, lambda d: change(d["tensors"]))
    with Pretrained(store) as pretrained:
        from jaxinfer.models.spec import Layout

        with pytest.raises(CheckpointError, match=message):
            pretrained.check(Layout.of(pretrained.spec))
