"""The reader of one file, against the safetensors package and against every way a file can be wrong."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxinfer.checkpoints.safetensors import DTYPES, SafetensorsFile, parse_json, quoted
from jaxinfer.errors import CheckpointError, UnsupportedFormatError


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)
    return path


def entry(dtype: str = "F32", shape: Any = (1,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@given(
    arrays=st.dictionaries(
        st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20).filter(
            lambda name: name != "__metadata__"  # the package writes such a tensor beside the metadata: a name twice
        ),
        hnp.arrays(
            st.sampled_from(
                [np.float64, np.float32, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_]
            ),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
        ),
        max_size=6,
    )
)
def test_reads_what_the_safetensors_package_wrote(
    tmp_path_factory: pytest.TempPathFactory, arrays: dict[str, np.ndarray]
):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    with SafetensorsFile(path) as file:
        assert set(file.tensors) == set(arrays)
        assert file.metadata == {"format": "np"}
        for name, array in arrays.items():
            tensor = file.tensor(name)
            assert tensor.dtype == array.dtype
            assert tensor.shape == file.tensors[name].shape == array.shape
            assert tensor.tobytes() == array.tobytes()
            assert not tensor.flags.writeable


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "F8_E5M2"])
def test_reads_types_that_numpy_lacks(tmp_path: Path, kind: str):
    values = np.array([0.5, -1.5, 448.0], np.float32).astype(DTYPES[kind])
    write(tmp_path / "a", {"x": entry(kind, (3,), 0, values.nbytes)}, values.tobytes())
    with SafetensorsFile(tmp_path / "a") as file:
        assert file.tensor("x").dtype == DTYPES[kind]
        np.testing.assert_array_equal(file.tensor("x").astype(np.float32), values.astype(np.float32))


def test_reads_a_file_with_torch_bfloat16(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.randn(3, 5).bfloat16()
    save_file({"x": values}, tmp_path / "a")
    with SafetensorsFile(tmp_path / "a") as file:
        np.testing.assert_array_equal(file.tensor("x").astype(np.float32), values.float().numpy())


def test_an_empty_file_of_no_tensors_and_a_padded_header(tmp_path: Path):
    with SafetensorsFile(write(tmp_path / "a", b"{}   ")) as file:
        assert file.tensors == {}


FAULTS: dict[str, tuple[Any, bytes, int | None, str]] = {
    "header length over the file": ({"x": entry()}, b"1234", 4000, "truncated; the header has 4000 bytes"),
    "header length over the limit": (
        {"x": entry()},
        b"1234",
        2**40,
        "header of at most 100000000 bytes, got 1099511627776",
    ),
    "header length of 2**64 - 1": ({}, b"", 2**64 - 1, "header of at most 100000000"),
    "header not JSON": (b"{nothing}", b"", None, "expected JSON in UTF-8"),
    "header not an object": (b"[1, 2]", b"", None, "expected a JSON object"),
    "header of length 0": (b"", b"", None, "expected a JSON object"),
    "header not UTF-8": (b'{"\xff": 1}', b"", None, "expected JSON in UTF-8"),
    "header nested for ever": (b'{"x":' + b"[" * 200_000, b"", None, "nested too deeply"),
    "header with a 5000-digit number": (b'{"x":' + b"1" * 5000 + b"}", b"", None, "expected JSON in UTF-8"),
    "header with NaN": (b'{"x": NaN}', b"", None, "finite numbers, got NaN"),
    "header with a second document": (b"{}{}", b"", None, "expected JSON in UTF-8"),
    "duplicate names": (
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
        None,
        "'x' occurs more than once",
    ),
    "duplicate fields": (b'{"x":{"dtype":"F32","dtype":"F16"}}', b"", None, "'dtype' occurs more than once"),
    "overlap": (
        {"x": entry("F32", (2,), 0, 8), "y": entry("F32", (1,), 4, 8)},
        b"12345678",
        None,
        "'y' overlaps tensor 'x'",
    ),
    "the same bytes twice": ({"x": entry(), "y": entry()}, b"1234", None, "overlaps"),
    "hole": ({"x": entry(), "y": entry("F32", (1,), 8, 12)}, b"1" * 12, None, "'y' leaves a hole after tensor 'x'"),
    "hole at the start": ({"x": entry("F32", (1,), 4, 8)}, b"1" * 8, None, "'x' leaves a hole after the header"),
    "truncated": ({"x": entry()}, b"123", None, "truncated in tensor 'x'; expected"),
    "trailing": ({"x": entry()}, b"12345", None, "trailing bytes"),
    "unknown dtype": ({"x": entry("F4")}, b"1234", None, "expected a dtype of F64, .* got 'F4'"),
    "dtype of another type": ({"x": entry(["F32"])}, b"1234", None, "expected a dtype"),  # type: ignore[arg-type]
    "shape and bytes disagree": (
        {"x": entry("F32", (2,), 0, 4)},
        b"1234",
        None,
        r"takes 8 bytes, but data_offsets \[0, 4\] span 4",
    ),
    "negative size": ({"x": entry("F32", (-1,), 0, 4)}, b"1234", None, r"sizes below 2\*\*63, got \[-1\]"),
    "boolean size": ({"x": entry("F32", (True,), 0, 4)}, b"1234", None, r"got \[True\]"),
    "fractional size": ({"x": entry("F32", (1.0,), 0, 4)}, b"1234", None, r"got \[1.0\]"),
    "infinite size": (b'{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', b"1234", None, r"got \[inf\]"),
    "size over 63 bits": ({"x": entry("F32", (2**63,), 0, 4)}, b"1234", None, "sizes below"),
    "product over 63 bits": ({"x": entry("F32", (2**40, 2**40), 0, 4)}, b"1234", None, "non-finite"),
    "product over 63 bits beside a zero": ({"x": entry("F32", (2**40, 2**40, 0), 0, 0)}, b"", None, "non-finite"),
    "too many axes": ({"x": entry("F32", (1,) * 33, 0, 4)}, b"1234", None, "at most 32 sizes"),
    "negative offset": ({"x": entry("F32", (1,), -4, 0)}, b"1234", None, "data_offsets: expected two sizes"),
    "fractional offset": ({"x": entry("F32", (1,), 0.0, 4.0)}, b"1234", None, "data_offsets: expected two sizes"),
    "boolean offset": ({"x": entry("U8", (1,), False, True)}, b"1", None, "data_offsets: expected two sizes"),
    "offsets backwards": ({"x": entry("F32", (1,), 4, 0)}, b"1234", None, "span -4"),
    "offsets over 63 bits": ({"x": entry("F32", (1,), 2**64, 2**64 + 4)}, b"1234", None, "data_offsets"),
    "three offsets": ({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, b"1234", None, "data_offsets"),
    "missing field": ({"x": {"dtype": "F32", "shape": [1]}}, b"1234", None, "exactly dtype, shape and data_offsets"),
    "further field": ({"x": {**entry(), "scale": 2}}, b"1234", None, "exactly dtype, shape and data_offsets"),
    "entry not an object": ({"x": 3}, b"1234", None, "exactly dtype, shape and data_offsets, got 3"),
    "empty name": ({"": entry()}, b"1234", None, "printable"),
    "name with a lone surrogate": (
        b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b"1234",
        None,
        "printable",
    ),
    "name with a newline": ({"a\nb": entry()}, b"1234", None, "printable"),
    "metadata not an object": ({"__metadata__": [1]}, b"", None, "__metadata__: expected an object of strings"),
    "metadata not of strings": ({"__metadata__": {"a": 1}}, b"", None, "__metadata__: expected an object of strings"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults(tmp_path: Path, fault: str):
    header, data, length, message = FAULTS[fault]
    path = write(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=message) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@given(cut=st.integers(0, 2**16), flip=st.integers(0, 2**16), bit=st.integers(0, 7))
def test_a_damaged_file_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, bit: int
):
    folder = tmp_path_factory.mktemp("file")
    safetensors.numpy.save_file({"x": np.arange(6.0), "y": np.ones((2, 2), np.float16)}, folder / "a")
    whole = bytearray((folder / "a").read_bytes())
    damaged = bytearray(whole)
    damaged[flip % len(whole)] ^= 1 << bit
    for content in (whole[: cut % len(whole)], damaged):
        (folder / "b").write_bytes(content)
        try:
            SafetensorsFile(folder / "b").close()
        except CheckpointError:
            continue
        safetensors.numpy.load_file(folder / "b")  # what we accept, the package accepts


def test_every_shortened_file_is_refused(tmp_path: Path):
    safetensors.numpy.save_file({"x": np.arange(6.0)}, tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "b").write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            SafetensorsFile(tmp_path / "b")


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("the pickle was run",))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Bomb()))


IMPOSTORS = {
    "zip": (_zip, "zip archive, as torch.save writes"),
    **{f"pickle {p}": (lambda path, p=p: path.write_bytes(pickle.dumps(_Bomb(), p)), "a pickle") for p in range(2, 6)},
    "hdf5": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), "HDF5"),
    "gguf": (lambda path: path.write_bytes(b"GGUF" + bytes(64)), "GGUF"),
    "npy": (lambda path: np.save(open(path, "wb"), np.ones(3)), "numpy"),  # noqa: SIM115
    "lfs": (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n"), "Git LFS"),
}


@pytest.mark.parametrize("kind", IMPOSTORS)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_other_formats_under_this_name_are_refused(tmp_path: Path, kind: str):
    make, message = IMPOSTORS[kind]
    make(tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedFormatError, match=message):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path):
    header = json.dumps({"x": entry()}).encode().ljust(0x280)
    with SafetensorsFile(write(tmp_path / "a", header, b"1234")) as file:
        assert (tmp_path / "a").read_bytes()[:2] == b"\x80\x02"
        assert list(file.tensors) == ["x"]


def test_files_that_are_no_files(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        SafetensorsFile(tmp_path / "none")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        SafetensorsFile(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="expected a regular file"):
        SafetensorsFile(tmp_path / "fifo")


def test_unknown_tensor(tmp_path: Path):
    with (
        SafetensorsFile(write(tmp_path / "a", {})) as file,
        pytest.raises(CheckpointError, match="holds no tensor 'x'"),
    ):
        file.tensor("x")


@given(
    shape=hnp.array_shapes(min_dims=1, max_dims=4, max_side=6),
    data=st.data(),
    dtype=st.sampled_from([np.uint16, np.float32, ml_dtypes.bfloat16]),
)
def test_read_copies_any_view(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], data: st.DataObject, dtype: Any
):
    values = np.arange(np.prod(shape)).reshape(shape).astype(np.float32)
    path = tmp_path_factory.mktemp("file") / "a"
    safetensors.numpy.save_file({"x": values}, path)
    axes = data.draw(st.permutations(range(len(shape))))
    index = tuple(data.draw(st.slices(shape[axis])) for axis in axes)
    with SafetensorsFile(path) as file:
        out = np.zeros(values.transpose(axes)[index].shape, dtype)
        file.read(file.tensor("x").transpose(axes)[index], out)
    np.testing.assert_array_equal(out, values.transpose(axes)[index].astype(dtype))


def test_read_of_strides_far_wider_than_a_window(tmp_path: Path):
    values = np.random.default_rng(0).integers(0, 2**16, (3000, 6000), np.uint16)  # 36 MB, five windows
    safetensors.numpy.save_file({"x": values}, tmp_path / "a")
    with SafetensorsFile(tmp_path / "a") as file:
        for view in (np.s_[:, 100:300], np.s_[1::2], np.s_[:, ::-7]):
            out = np.empty(values[view].shape, np.uint16)
            file.read(file.tensor("x")[view], out)
            np.testing.assert_array_equal(out, values[view])
        out = np.empty((6000, 3000), np.uint16)
        file.read(file.tensor("x").T, out)
        np.testing.assert_array_equal(out, values.T)


def test_read_of_a_file_that_has_shrunk(tmp_path: Path):
    safetensors.numpy.save_file({"x": np.ones((64, 64))}, tmp_path / "a")
    with SafetensorsFile(tmp_path / "a") as file:
        tensor, out = file.tensor("x"), np.empty((64, 64))
        os.truncate(tmp_path / "a", file.size - 1)
        for view in (tensor, tensor.T):
            with pytest.raises(CheckpointError, match="changed its size"):
                file.read(view, out)


def test_read_refuses_what_is_no_view_of_the_file(tmp_path: Path):
    safetensors.numpy.save_file({"x": np.ones(4)}, tmp_path / "a")
    with SafetensorsFile(tmp_path / "a") as file, pytest.raises(ValueError, match="got a copy of shape"):
        file.read(file.tensor("x") + 0, np.empty(4))


def test_names_in_messages_are_escaped_and_short():
    assert quoted("a\x1b[31m\nb") == r"'a\x1b[31m\nb'"
    assert len(quoted("x" * 10**6)) < 250


def test_parse_json_of_plain_input():
    assert parse_json(b'{"a": [1, 2.5, null, true, {"b": "c"}]}', "here") == {"a": [1, 2.5, None, True, {"b": "c"}]}
