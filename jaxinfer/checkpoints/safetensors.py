"""Reader of one safetensors file: everything is checked when it opens, and nothing is read until asked for.

A file is eight bytes of header length, a JSON header, and the bytes of the tensors
(https://github.com/huggingface/safetensors#format). The `safetensors` package itself accepts a name that occurs twice
(the last one wins) and its numpy reader knows no 8-bit floats, hence this one.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes
import numpy as np

from jaxinfer.errors import CheckpointError, UnsupportedFormatError

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_MAX_SIZE = 2**63 - 1

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Names of element types in a file -> numpy types (little-endian, as in the file)."""

# First bytes of other formats. Looked at only when the file is no safetensors file: a header of 640 bytes also begins
# with the two bytes of a protocol-2 pickle.
_MAGIC = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (it holds a pickle, which can run code)"),
    *((bytes((0x80, version)), "a pickle, which can run code") for version in range(2, 6)),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"GGUF", "a GGUF file"),
    (b"\x93NUMPY", "a numpy file, which can hold a pickle"),
    (b"version https://git-lfs", "a Git LFS pointer; the weights themselves were not downloaded"),
)

# A strided copy maps pages of the file as it goes and gives them back after each window, so that 16 threads hold at
# most 128 MiB of them. Without it a column shard keeps its whole tensor resident.
_WINDOW = 8 << 20


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its bytes are ``file[offset : offset + nbytes]``, in C order and little-endian."""

    name: str
    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def quoted(name: object) -> str:
    """A name from a file, fit for a one-line error message: escaped, and cut where it is absurdly long."""
    text = repr(name)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON from outside: a key that occurs twice, NaN, bad UTF-8 and endless nesting are CheckpointErrors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f"{where}: {quoted(twice)} occurs more than once; expected unique names")
        return table

    def constant(text: str) -> Any:
        raise CheckpointError(f"{where}: expected JSON with finite numbers, got {text}")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error).splitlines()[0][:200]
        raise CheckpointError(f"{where}: expected JSON in UTF-8, got something else ({reason})") from None


def is_size(value: object) -> bool:
    """Whether a JSON value is a size: an integer (no bool, no float) from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value <= _MAX_SIZE


class SafetensorsFile:
    """A safetensors file, checked as a whole and mapped read-only.

    Raises:
        CheckpointError: the file is missing, truncated, has trailing bytes, or a header that is malformed, too long,
            names a tensor twice, or does not describe the data byte for byte without overlap or hole.
        UnsupportedFormatError: it is a file of another format under this name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            # Without O_NONBLOCK a FIFO would block here for ever.
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be opened ({error.strerror})") from None
        try:
            self.size = self._regular_size()
            self.metadata: dict[str, str] = {}
            self.tensors: dict[str, TensorInfo] = self._read_header()
            self._map = mmap.mmap(self._fd, self.size, access=mmap.ACCESS_READ)
        except BaseException:
            os.close(self._fd)
            raise
        self._bytes = np.frombuffer(self._map, np.uint8)
        self._base: int = self._bytes.__array_interface__["data"][0]

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file; valid until the file is closed."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: holds no tensor {quoted(name)}")
        return np.ndarray(info.shape, info.dtype, self._bytes, info.offset)

    def read(self, source: np.ndarray, out: np.ndarray) -> None:
        """Copy ``source``, a view of a tensor of this file, to ``out``, of the same shape; casts where dtypes differ.

        A contiguous range is read by `preadv`, any other through the map. From page cache both run at 9 GB/s a thread;
        but `preadv` reads a cold disk in large requests, and a file cut short meanwhile is an error, not a SIGBUS.

        Raises:
            CheckpointError: the file has changed its size since it was opened, or cannot be read.
            ValueError: ``source`` is not a view of this file.
        """
        if source.size == 0:
            return
        start, _ = self._range(source)
        if os.fstat(self._fd).st_size != self.size:
            raise CheckpointError(f"{self.path}: changed its size while it was read; expected {self.size} bytes")
        if source.dtype == out.dtype and source.flags.c_contiguous and out.flags.c_contiguous:
            self._pread(start, memoryview(out.reshape(-1).view(np.uint8)))
            return
        for part, target in _windows(source, out):
            _copy(part, target)
            first, last = self._range(part)
            first -= first % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, first, last - first)

    def close(self) -> None:
        """Close the file; the mapping goes with the last view of it. Closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            del self._bytes, self._map

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _regular_size(self) -> int:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path}: expected a regular file")
        return status.st_size

    def _pread(self, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], start + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read ({error.strerror})") from None
            if count == 0:
                raise CheckpointError(f"{self.path}: expected {len(buffer)} bytes at {start}, got {done}")
            done += count

    def _range(self, view: np.ndarray) -> tuple[int, int]:
        """First and one-past-last byte of the file under a view of it."""
        low, high = np.lib.array_utils.byte_bounds(view)
        start, stop = low - self._base, high - self._base
        if start < 0 or stop > self.size:
            raise ValueError(f"{self.path}: expected a view of the mapped file, got a copy of shape {view.shape}")
        return start, stop

    def _read_header(self) -> dict[str, TensorInfo]:
        if self.size < 8:
            raise CheckpointError(f"{self.path}: truncated; expected at least 8 bytes, got {self.size}")
        head = memoryview(bytearray(min(32, self.size)))
        self._pread(0, head)
        (length,) = struct.unpack_from("<Q", head)
        if length > self.size - 8 or bytes(head[8:9]) != b"{":
            for magic, what in _MAGIC:
                if bytes(head).startswith(magic):
                    raise UnsupportedFormatError(f"{self.path}: expected a safetensors file, got {what}")
        if length > MAX_HEADER_BYTES:
            raise CheckpointError(f"{self.path}: expected a header of at most {MAX_HEADER_BYTES} bytes, got {length}")
        if length > self.size - 8:
            raise CheckpointError(
                f"{self.path}: truncated; the header has {length} bytes, the file {self.size - 8} after its length"
            )
        if bytes(head[8:9]) != b"{":
            raise CheckpointError(f"{self.path}: expected a JSON object as header, got {bytes(head[8:16])!r}")
        raw = bytearray(length)
        self._pread(8, memoryview(raw))
        header = parse_json(bytes(raw), f"{self.path}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise CheckpointError(f"{self.path}: __metadata__: expected an object of strings")
        self.metadata = metadata
        tensors = {name: self._tensor_info(name, entry, 8 + length) for name, entry in header.items()}
        self._check_layout(tensors, 8 + length)
        return tensors

    def _tensor_info(self, name: str, entry: Any, data: int) -> TensorInfo:
        where = f"{self.path}: tensor {quoted(name)}"
        if not name.isprintable() or not name:
            raise CheckpointError(f"{where}: expected a name of printable characters")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            got = sorted(entry) if isinstance(entry, dict) else entry
            raise CheckpointError(f"{where}: expected exactly dtype, shape and data_offsets, got {quoted(got)}")
        kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        dtype = DTYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None:
            raise CheckpointError(f"{where}: expected a dtype of {', '.join(DTYPES)}; got {quoted(kind)}")
        if not isinstance(shape, list) or not all(is_size(size) for size in shape) or len(shape) > 32:
            raise CheckpointError(f"{where}: shape: expected at most 32 sizes below 2**63, got {quoted(shape)}")
        # numpy refuses shapes whose sizes overflow even when another size is 0, so zeros do not count here.
        if math.prod(size for size in shape if size) * dtype.itemsize > _MAX_SIZE:
            raise CheckpointError(f"{where}: shape {quoted(shape)} is non-finite: over 2**63 - 1 bytes")
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_size(offset) for offset in offsets):
            raise CheckpointError(f"{where}: data_offsets: expected two sizes below 2**63, got {quoted(offsets)}")
        begin, end = offsets
        nbytes = math.prod(shape) * dtype.itemsize
        if end - begin != nbytes:
            raise CheckpointError(
                f"{where}: {kind} {quoted(shape)} takes {nbytes} bytes, but data_offsets {offsets} span {end - begin}"
            )
        return TensorInfo(name, self.path, dtype, tuple(shape), data + begin, nbytes)

    def _check_layout(self, tensors: dict[str, TensorInfo], data: int) -> None:
        end, previous = data, "the header"
        for info in sorted(tensors.values(), key=lambda info: (info.offset, info.nbytes)):
            if info.offset != end:
                fault = "overlaps" if info.offset < end else "leaves a hole after"
                raise CheckpointError(
                    f"{self.path}: tensor {quoted(info.name)} {fault} {previous}: "
                    f"expected it at byte {end}, got {info.offset}"
                )
            end, previous = info.offset + info.nbytes, f"tensor {quoted(info.name)}"
        if end > self.size:
            raise CheckpointError(f"{self.path}: truncated in {previous}; expected {end} bytes, got {self.size}")
        if end < self.size:
            raise CheckpointError(f"{self.path}: trailing bytes; expected {end} bytes, got {self.size}")


def _windows(source: np.ndarray, out: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Halve a strided copy along its widest-reaching axis until each part spans at most one window of the file."""
    reach = [(size - 1) * abs(stride) for size, stride in zip(source.shape, source.strides, strict=True)]
    if sum(reach) < _WINDOW:
        yield source, out
        return
    axis = reach.index(max(reach))
    middle = source.shape[axis] // 2
    for half in (slice(None, middle), slice(middle, None)):
        index = (slice(None),) * axis + (half,)
        yield from _windows(source[index], out[index])


def _copy(source: np.ndarray, out: np.ndarray) -> None:
    """Copy with a cast where dtypes differ; a transposed matrix goes in tiles of 512 x 64.

    A thread transposes 16-bit elements at 1.2 GB/s in such tiles and at 0.3 without (the rows of the source are pages
    apart).
    """
    if source.dtype != out.dtype:
        # float64 beyond float32's range becomes inf, as in every other reader
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(out, source, casting="unsafe")
    elif source.ndim == 2 and abs(source.strides[0]) < abs(source.strides[1]):
        for row in range(0, source.shape[0], 512):
            for column in range(0, source.shape[1], 64):
                tile = np.s_[row : row + 512, column : column + 64]
                np.copyto(out[tile], source[tile])
    else:
        np.copyto(out, source)
