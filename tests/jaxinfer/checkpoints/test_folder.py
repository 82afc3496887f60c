"""Folders: shards and their index, confinement, refused formats, and a checkpoint held against a model's needs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jaxinfer.checkpoints import folder as module
from jaxinfer.checkpoints.folder import Checkpoint, check, confined, weight_files
from jaxinfer.errors import CheckpointError, UnsafePathError, UnsupportedFormatError
from jaxinfer.models.sources import Piece

INDEX = "model.safetensors.index.json"


def shards(folder: Path, files: dict[str, dict[str, np.ndarray]], index: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, arrays in files.items():
        safetensors.numpy.save_file(arrays, folder / file)
    if index is None:
        index = {name: file for file, arrays in files.items() for name in arrays}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": index}))
    return folder


A = "model-00001-of-00002.safetensors"
B = "model-00002-of-00002.safetensors"
X, Y = np.arange(6.0, dtype=np.float32).reshape(2, 3), np.ones(4, np.float16)


def test_single_file(tmp_path: Path):
    safetensors.numpy.save_file({"x": X, "y": Y}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.path == tmp_path
        assert checkpoint.nbytes == X.nbytes + Y.nbytes
        assert checkpoint.tensors["x"].shape == (2, 3)
        np.testing.assert_array_equal(checkpoint.tensor("x"), X)
        out = np.empty((3, 2), np.float32)
        checkpoint.read("x", checkpoint.tensor("x").T, out)
        np.testing.assert_array_equal(out, X.T)
        with pytest.raises(CheckpointError, match="holds no tensor 'z'"):
            checkpoint.tensor("z")
    checkpoint.close()


def test_shards(tmp_path: Path):
    with Checkpoint(shards(tmp_path, {A: {"x": X}, B: {"y": Y}})) as checkpoint:
        assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {"x": A, "y": B}
        np.testing.assert_array_equal(checkpoint.tensor("x"), X)
        np.testing.assert_array_equal(checkpoint.tensor("y"), Y)


def test_a_single_file_goes_before_an_index(tmp_path: Path):
    shards(tmp_path, {A: {"x": X}})
    safetensors.numpy.save_file({"y": Y}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["y"]


def test_a_tensor_that_the_index_forgot_is_there_to_be_judged(tmp_path: Path):
    with (
        Checkpoint(shards(tmp_path, {A: {"x": X, "y": Y}}, {"x": A})) as checkpoint,
        pytest.raises(CheckpointError, match=f"1 tensors unexpected: 'y' in {A}"),
    ):
        check(checkpoint, {"p": (Piece("x", (2, 3)),)}, lambda name: False)


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "a/../../x.safetensors", "/etc/passwd", "", "..", "a\\..\\x", "a\0b", "a\nb"]
)
def test_names_that_lead_out(tmp_path: Path, name: str):
    with pytest.raises(UnsafePathError, match="expected the name of a file inside the folder") as error:
        Checkpoint(shards(tmp_path, {A: {"x": X}}, {"x": name}))
    assert repr(name) in str(error.value)


def test_links_out_of_a_folder_are_refused(tmp_path: Path):
    outside = shards(tmp_path / "outside", {A: {"x": X}})
    for kind in ("single", "shard", "index", "chain"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "single":
            (folder / "model.safetensors").symlink_to(outside / A)
        elif kind == "index":
            (folder / INDEX).symlink_to(outside / INDEX)
        else:
            shutil.copy(outside / INDEX, folder / INDEX)
            (folder / "first").symlink_to(outside)
            (folder / A).symlink_to(outside / A if kind == "shard" else Path("first") / A)
        with pytest.raises(UnsafePathError, match="out of the folder"):
            Checkpoint(folder)


def test_links_within_a_folder_and_to_a_folder_are_followed(tmp_path: Path):
    folder = shards(tmp_path / "real", {A: {"x": X}})
    (folder / A).rename(folder / "content")
    (folder / A).symlink_to("content")
    (tmp_path / "link").symlink_to(folder)
    with Checkpoint(tmp_path / "link") as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("x"), X)


def test_a_loop_of_links(tmp_path: Path):
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    with pytest.raises(CheckpointError):
        Checkpoint(tmp_path)


def hub_snapshot(cache: Path, name: str = "models--org--name") -> Path:
    """The layout of the hub's cache: a snapshot of links to blobs."""
    snapshot, blobs = cache / name / "snapshots" / "0123abcd", cache / name / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    safetensors.numpy.save_file({"x": X}, blobs / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    return snapshot


def test_the_hub_cache_links_to_its_own_blobs_only(tmp_path: Path):
    snapshot = hub_snapshot(tmp_path)
    with Checkpoint(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor("x"), X)
    other = hub_snapshot(tmp_path, "models--org--other")
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").symlink_to(tmp_path / "models--org--name" / "blobs" / "f00d")
    with pytest.raises(UnsafePathError, match="out of the folder"):
        Checkpoint(other)


def test_confined_gives_the_real_path(tmp_path: Path):
    assert confined(tmp_path, "config.json") == Path(os.path.realpath(tmp_path)) / "config.json"


INDEX_FAULTS: dict[str, tuple[str, str]] = {
    "not JSON": ("{", "expected JSON in UTF-8"),
    "duplicate names": (f'{{"weight_map": {{"x": "{A}", "x": "{A}"}}}}', "'x' occurs more than once"),
    "a list": ("[]", "weight_map: expected tensor name -> file name"),
    "no weight_map": ("{}", "weight_map: expected tensor name -> file name"),
    "an empty weight_map": ('{"weight_map": {}}', "weight_map: expected tensor name -> file name"),
    "no file name": ('{"weight_map": {"x": 3}}', r"expected file names, got something else for 'x' \(3\)"),
    "a missing file": ('{"weight_map": {"x": "model-9.safetensors"}}', "1 of 1 files missing: 'model-9.safetensors'"),
    "a pickle": ('{"weight_map": {"x": "pytorch_model.bin"}}', "got 'pytorch_model.bin' .it is a pickle"),
    "a name not in its file": (
        f'{{"weight_map": {{"z": "{A}"}}}}',
        f"1 tensors not in the file named for them: 'z' .{A}",
    ),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_index_faults(tmp_path: Path, fault: str):
    shards(tmp_path, {A: {"x": X}})
    content, message = INDEX_FAULTS[fault]
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(tmp_path)
    assert str(tmp_path / INDEX) in str(error.value)


def test_an_index_over_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards(tmp_path, {A: {"x": X}, B: {"y": Y}})
    with monkeypatch.context() as patch:
        patch.setattr(module, "MAX_INDEX_FILES", 1)
        with pytest.raises(CheckpointError, match="at most 1 files, got 2"):
            Checkpoint(tmp_path)
    monkeypatch.setattr(module, "MAX_INDEX_BYTES", 50)
    with pytest.raises(CheckpointError, match="at most 50 bytes"):
        Checkpoint(tmp_path)


def test_two_names_for_one_file(tmp_path: Path):
    shards(tmp_path, {A: {"x": X}}, {"x": A, "y": B})
    (tmp_path / B).symlink_to(A)
    with pytest.raises(CheckpointError, match="lead to the same file"):
        Checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path):
    with pytest.raises(CheckpointError, match=rf"1 tensors lie in more than one file: 'x' \({A}, {B}\)"):
        Checkpoint(shards(tmp_path, {A: {"x": X, "z": X}, B: {"x": X, "y": Y}}))


def test_ten_names_are_listed(tmp_path: Path):
    files = {f"model-{i}.safetensors": {f"x{i}": X} for i in range(13)}
    shards(tmp_path, files)
    for file in files:
        (tmp_path / file).unlink()
    with pytest.raises(CheckpointError, match=r"13 of 13 files missing: .*'model-6.safetensors' and 3 more$"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("pytorch_model.bin", "pickle"),
        ("model.pt", "pickle"),
        ("model.pth", "pickle"),
        ("model.ckpt", "pickle"),
        ("weights.pkl", "pickle"),
        ("weights.npz", "pickle"),
        ("flax_model.msgpack", "no header"),
        ("tf_model.h5", "HDF5"),
        ("model.Q4_K.GGUF", "GGUF"),
    ],
)
def test_refused_formats(tmp_path: Path, file: str, reason: str):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(UnsupportedFormatError, match=f"got only '{file}'; refused .*{reason}"):
        Checkpoint(tmp_path)


def test_folders_without_weights(tmp_path: Path):
    with pytest.raises(CheckpointError, match="got nothing"):
        Checkpoint(tmp_path / "none")
    with pytest.raises(CheckpointError, match="got an empty folder"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"got 'config\.json'"):
        Checkpoint(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_text("")
    with pytest.raises(CheckpointError, match=r"got only 'adapter_model\.safetensors'"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="expected a checkpoint folder, got a file"):
        Checkpoint(tmp_path / "config.json")
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(CheckpointError, match="which does not exist"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="expected a regular file"):
        Checkpoint(tmp_path)


def test_a_bad_shard_closes_the_good_ones(tmp_path: Path):
    shards(tmp_path, {A: {"x": X}, B: {"y": Y}})
    os.truncate(tmp_path / B, 20)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match="truncated"):
        Checkpoint(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_weight_files_of_a_sharded_folder(tmp_path: Path):
    files, index = weight_files(shards(tmp_path, {A: {"x": X}, B: {"y": Y}}))
    assert list(files) == [A, B]
    assert index == {"x": A, "y": B}


def test_check(tmp_path: Path):
    tensors = {
        "good": X,
        "half": Y.astype(ml_dtypes.bfloat16),
        "shaped": X,
        "typed": np.ones(3, np.int32),
        "scaled": np.ones(3, ml_dtypes.float8_e4m3fn),
        "extra": Y,
        "rotary.inv_freq": Y,
    }
    shards(tmp_path, {A: {name: values for name, values in tensors.items() if name not in ("half", "scaled")}})
    write_small(tmp_path / B, {name: tensors[name] for name in ("half", "scaled")})
    index = dict.fromkeys(tensors, A) | {"half": B, "scaled": B}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))

    def ignored(name: str) -> bool:
        return name.endswith("inv_freq")

    with Checkpoint(tmp_path) as checkpoint:
        good = {"a": (Piece("good", (2, 3)),), "b": (Piece("half", (4,)),)}
        check(checkpoint, good, lambda name: name not in ("good", "half"))
        with pytest.raises(CheckpointError) as error:
            check(
                checkpoint,
                good
                | {
                    "c": (Piece("shaped", (3, 2)), Piece("gone", (7,))),
                    "d": (Piece("typed", (3,)),),
                    "e": (Piece("scaled", (3,)),),
                },
                ignored,
            )
    assert str(error.value) == (
        f"{tmp_path}: 1 tensors missing: 'gone' [7]; "
        f"1 tensors unexpected: 'extra' in {A}; "
        f"1 tensors of the wrong shape: 'shaped' in {A} (expected [3, 2], got [2, 3]); "
        f"1 tensors of the wrong dtype, expected bfloat16, float16, float32 or float64: 'typed' in {A} (got int32); "
        "1 tensors of an 8-bit floating dtype, which means nothing without its scales, and those are not implemented: "
        f"'scaled' in {B} (got float8_e4m3fn)"
    )


def write_small(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Types that the safetensors package's numpy writer may lack."""
    names = {"bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    header, data = {}, b""
    for name, array in arrays.items():
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


def test_a_tensor_name_never_becomes_a_file_name(tmp_path: Path):
    names = ["../../escape", "/etc/passwd", A]
    with Checkpoint(shards(tmp_path / "folder", {A: {name: X + i for i, name in enumerate(names)}})) as checkpoint:
        for i, name in enumerate(names):
            np.testing.assert_array_equal(checkpoint.tensor(name), X + i)
    assert sorted(os.listdir(tmp_path)) == ["folder"]
