"""The manifest of a store: what tensors it holds, how they are cut into chunks, and the digest of every byte.

A store is a folder::

    jaxinfer_store.json     this manifest, written last
    config.json, ...        the checkpoint's configuration and tokenizer, as they were
    weights/embed           one orbax checkpoint a group (OCDBT and zarr3, uncompressed, chunks of at most 8 MiB):
    weights/layers.0        a leaf is a parameter by its dotted path, laid out for one device
    weights/head

A digest belongs to a chunk, not to a tensor, so that a device's shard is verified without reading the rest. Orbax has
none: it returns flipped bits silently. Groups are committed one by one, so that a conversion can go on after a kill.

Of a quantized store the manifest says how (:class:`Quantized`): beside each quantized weight lie its factors, of the
same path with ``_scale``. Values of int4 are uint8 here, two to a byte along the last axis, the even one in the low
half: zarr3 would take a byte for each.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import crc32c
import ml_dtypes
import numpy as np

from jaxinfer.checkpoints.boxes import Box
from jaxinfer.checkpoints.folder import confined
from jaxinfer.checkpoints.safetensors import is_size, parse_json, quoted
from jaxinfer.errors import CheckpointError, UnsupportedFormatError
from jaxinfer.quantization import DTYPES as METHODS
from jaxinfer.quantization import wire_dtype

MANIFEST = "jaxinfer_store.json"
PARTIAL = "jaxinfer_partial.json"
"""In a conversion that is not finished, instead of the manifest."""
WEIGHTS = "weights"
FORMAT, VERSION = "jaxinfer-store", 1
MAX_MANIFEST_BYTES = 256 << 20  # a tensor takes some 150 bytes, and a chunk of 8 MiB eleven: a model of 2 TB has 5 MB
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
STORED = DTYPES | {str(dtype): dtype for dtype in map(wire_dtype, METHODS)}
PACKING = "two to a byte along the last axis, the even one in the low half"


@dataclass(frozen=True)
class StoredTensor:
    """A parameter in a store.

    Attributes:
        path: its dotted path.
        dtype, shape: as stored.
        chunk: the shape of a chunk; those at the end may be smaller.
        digests: crc32c of every chunk's bytes (C order, little-endian), the last axis of the grid running fastest.
    """

    path: str
    dtype: np.dtype
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    digests: tuple[int, ...]

    @property
    def group(self) -> str:
        """The orbax checkpoint that holds it."""
        return group_of(self.path)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def boxes(self) -> Iterator[Box]:
        """The chunks, in the order of their digests."""
        return chunks(self.shape, self.chunk)

    def to_json(self) -> dict[str, Any]:
        """The tensor as the manifest has it."""
        return {
            "dtype": self.dtype.name, "shape": self.shape, "chunk": self.chunk,
            "crc32c": [f"{digest:08x}" for digest in self.digests],
        }  # fmt: skip

    @classmethod
    def from_json(cls, path: str, entry: Any, where: str) -> StoredTensor:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: it is something else.
        """
        where = f"{where}: tensor {quoted(path)}"
        if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", path):
            raise CheckpointError(f"{where}: expected a parameter's path")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "chunk", "crc32c"}:
            raise CheckpointError(f"{where}: expected exactly dtype, shape, chunk and crc32c, got {quoted(entry)}")
        dtype, shape, chunk, digests = (entry[key] for key in ("dtype", "shape", "chunk", "crc32c"))
        if not isinstance(dtype, str) or dtype not in STORED:
            raise CheckpointError(f"{where}: dtype: expected one of {', '.join(STORED)}, got {quoted(dtype)}")
        for name, sizes in (("shape", shape), ("chunk", chunk)):
            if not isinstance(sizes, list) or len(sizes) > 8 or not all(is_size(size) and size for size in sizes):
                raise CheckpointError(f"{where}: {name}: expected at most 8 positive sizes, got {quoted(sizes)}")
        if len(shape) != len(chunk) or any(part > size for part, size in zip(chunk, shape, strict=True)):
            raise CheckpointError(f"{where}: chunk: expected one within the shape {shape}, got {chunk}")
        count = math.prod(-(-size // part) for size, part in zip(shape, chunk, strict=True))
        good = isinstance(digests, list) and all(
            isinstance(text, str) and re.fullmatch("[0-9a-f]{8}", text) for text in digests
        )
        if not good or len(digests) != count:
            got = len(digests) if good else quoted(digests)
            raise CheckpointError(f"{where}: crc32c: expected {count} numbers of 8 hexadecimal digits, got {got}")
        return cls(path, STORED[dtype], tuple(shape), tuple(chunk), tuple(int(text, 16) for text in digests))


@dataclass(frozen=True)
class StoredFile:
    """A file of a store: its size and, of those that were copied from the checkpoint, the crc32c."""

    size: int
    crc32c: int | None = None


@dataclass(frozen=True)
class Quantized:
    """How the weights of a store are quantized.

    Attributes:
        method: ``int8``, ``int4`` or ``fp8``.
        groups: of int4, the inputs of a group for each kind of weight (``mlp.down``); otherwise empty.
    """

    method: str
    groups: Mapping[str, int]

    def to_json(self) -> dict[str, Any]:
        """The quantization as the manifest has it."""
        packed = {"groups": dict(self.groups), "packing": PACKING} if self.method == "int4" else {}
        return {"method": self.method} | packed

    @classmethod
    def from_json(cls, entry: Any, where: str) -> Quantized:
        """Read what :meth:`to_json` wrote.

        Raises:
            CheckpointError: it is something else.
        """
        method = entry.get("method") if isinstance(entry, dict) else None
        if not isinstance(method, str) or method not in METHODS:
            raise CheckpointError(
                f"{where}: quantization: method: expected one of {', '.join(METHODS)}, got {quoted(entry)}"
            )
        groups = entry.get("groups", {})
        if not isinstance(groups, dict) or not all(map(is_size, groups.values())):
            raise CheckpointError(f"{where}: quantization: groups: expected weight -> inputs, got {quoted(groups)}")
        found = cls(method, groups)
        if entry != found.to_json():
            raise CheckpointError(f"{where}: quantization: expected {found.to_json()}, got {quoted(entry)}")
        return found


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        dtype: what the conversion was asked to store, or None: each tensor as the checkpoint had it.
        tensors: parameter path -> tensor.
        files: name of every other file of the store -> its size and digest.
        quantized: how weights are quantized, or None.
    """

    dtype: str | None
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]
    quantized: Quantized | None = None

    def write(self, folder: Path) -> None:
        """Write it to a folder, all or nothing."""
        document = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype,
            **({} if self.quantized is None else {"quantization": self.quantized.to_json()}),
            "files": {
                name: {"size": file.size} | ({} if file.crc32c is None else {"crc32c": f"{file.crc32c:08x}"})
                for name, file in sorted(self.files.items())
            },
            "tensors": {path: tensor.to_json() for path, tensor in self.tensors.items()},
        }
        write_json(folder / MANIFEST, document)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of a store, without a look at what it speaks of.

        Raises:
            CheckpointError: there is none, or it is damaged.
            UnsafePathError: it names a file outside the folder.
            UnsupportedFormatError: it is of another version.
        """
        where = folder / MANIFEST
        if (folder / PARTIAL).exists() or not where.exists():
            raise CheckpointError(
                f"{folder}: expected {MANIFEST}, which commits a store, got a conversion that was not finished; "
                "run `jaxinfer convert` again, and it goes on from there"
            )
        document = read_json(where)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise CheckpointError(f"{where}: format: expected {FORMAT!r}, got {quoted(_field(document, 'format'))}")
        if document.get("version") is True or document.get("version") != VERSION:
            raise UnsupportedFormatError(
                f"{where}: version: expected {VERSION}, got {quoted(document.get('version'))}; convert the model again"
            )
        if set(document) - {"quantization"} != {"format", "version", "dtype", "files", "tensors"}:
            raise CheckpointError(f"{where}: expected format, version, dtype, files, tensors; got {sorted(document)}")
        dtype, files, tensors = document["dtype"], document["files"], document["tensors"]
        if dtype is not None and (not isinstance(dtype, str) or dtype not in DTYPES):
            raise CheckpointError(f"{where}: dtype: expected null or one of {', '.join(DTYPES)}, got {quoted(dtype)}")
        if not isinstance(tensors, dict) or not tensors:
            raise CheckpointError(f"{where}: tensors: expected parameter path -> tensor, got {quoted(tensors)}")
        if not isinstance(files, dict) or not files:
            raise CheckpointError(f"{where}: files: expected file name -> size, got {quoted(files)}")
        for name in files:
            confined(folder, name)
        quantized = document.get("quantization")
        return cls(
            dtype,
            {path: StoredTensor.from_json(path, entry, str(where)) for path, entry in tensors.items()},
            {name: _file(name, entry, str(where)) for name, entry in files.items()},
            None if "quantization" not in document else Quantized.from_json(quantized, str(where)),
        )

    def file_faults(self, folder: Path) -> list[str]:
        """What is wrong with the files of a folder: missing, of another size, or changed."""
        faults = []
        for name, file in self.files.items():
            try:
                path = confined(folder, name)
                got = path.stat().st_size
                if got != file.size:
                    faults.append(f"{name} (expected {file.size} bytes, got {got})")
                elif file.crc32c is not None and (digest := crc32c.crc32c(path.read_bytes())) != file.crc32c:
                    faults.append(f"{name} (expected crc32c {file.crc32c:08x}, got {digest:08x})")
            except OSError as error:
                faults.append(f"{name} ({error.strerror})")
        return faults


def group_of(path: str) -> str:
    """The group of a parameter: its layer, ``embed`` or ``head``."""
    first, *rest = path.split(".")
    return f"{first}.{rest[0]}" if first == "layers" else first


def chunks(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[Box]:
    """Cut a shape into chunks, the last axis running fastest."""
    sides = [
        [slice(start, min(start + part, size)) for start in range(0, size, part)]
        for size, part in zip(shape, chunk, strict=True)
    ]
    return itertools.product(*sides)


def digest(values: np.ndarray) -> int:
    """The crc32c of an array's bytes in C order."""
    return crc32c.crc32c(memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8)))


def read_json(path: Path) -> Any:
    """Read a JSON file of a store.

    Raises:
        CheckpointError: it cannot be read, or is no JSON.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{path}: expected at most {MAX_MANIFEST_BYTES} bytes, got more")
    return parse_json(data, str(path))


def write_json(path: Path, document: Any) -> None:
    """Write a JSON file so that after a crash it is there as a whole, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _field(document: Any, name: str) -> Any:
    return document.get(name) if isinstance(document, dict) else document


def _file(name: str, entry: Any, where: str) -> StoredFile:
    if not isinstance(entry, dict) or not set(entry) <= {"size", "crc32c"} or not is_size(entry.get("size")):
        raise CheckpointError(f"{where}: file {quoted(name)}: expected size and perhaps crc32c, got {quoted(entry)}")
    text = entry.get("crc32c", "0")
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{1,8}", text):
        raise CheckpointError(f"{where}: file {quoted(name)}: crc32c: expected 8 digits, got {quoted(text)}")
    return StoredFile(entry["size"], int(text, 16) if "crc32c" in entry else None)
