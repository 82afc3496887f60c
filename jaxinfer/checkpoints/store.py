"""A store: a checkpoint converted to orbax, of which any part can be read at the disk's speed and is verified as it is.

TensorStore reads what orbax wrote: handles are opened once, and bytes go straight into the reader's buffers.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorstore

from jaxinfer import progress as bars
from jaxinfer.checkpoints.boxes import Box, nbytes_of, shape_of
from jaxinfer.checkpoints.folder import INDEX_FILE, SINGLE_FILE
from jaxinfer.checkpoints.manifest import MANIFEST, PARTIAL, WEIGHTS, Manifest, StoredTensor, digest
from jaxinfer.errors import CheckpointError, ReadTimeoutError, listed

# What OCDBT needs to find chunks. Chunks themselves are not cached, each is read once.
_INDEX_CACHE_BYTES = 16 << 20
MAX_THREADS = 16
SLOWEST = 1e6
"""Bytes per second of a slow disk that is alive: long reads may take longer, since none shows before its end."""
_LOOK_SECONDS = 0.5
COMMIT = "commit_success.txt"
"""What orbax writes last into a checkpoint; it restores without, so that we look."""


def is_store(folder: Path) -> bool:
    """Whether a folder is a store, be it an unfinished or damaged one, rather than a folder of safetensors."""
    if any(os.path.lexists(folder / name) for name in (MANIFEST, PARTIAL)):
        return True
    return (folder / WEIGHTS).is_dir() and not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


class Store:
    """A store that is open: every file is there with its size, every tensor has the shape that the manifest says.

    Reading takes place in chunks, and each is held against its digest before anybody sees it. Use it as a context
    manager, or close it.

    Args:
        path: the folder.
        strict: refuse a store whose files are missing or damaged; otherwise :meth:`faults` says what they lack.
        direct: read past the page cache (O_DIRECT), which must be possible there.
        seconds: how long a read may take, and besides a second for each of its megabytes (:data:`SLOWEST`); None: for
            ever. A read that was given up may still write to its array, which it keeps alive until it ends.

    Attributes:
        path: the folder.
        manifest: what it holds.

    Raises:
        CheckpointError: it is damaged, or its conversion was not finished.
        UnsafePathError: the manifest names a file outside the folder.
        UnsupportedFormatError: it is of another version.
    """

    def __init__(
        self, path: str | Path, *, strict: bool = True, direct: bool = False, seconds: float | None = None
    ) -> None:
        self.path, self.seconds = Path(path), seconds
        self.manifest = Manifest.read(self.path)
        faults = self.faults() if strict else []
        if faults:
            raise CheckpointError(f"{self.path}: {len(faults)} files missing or damaged: {listed(faults)}")
        self._context = _context(direct)
        self._handles: dict[str, Any] = {}
        self._opening: dict[str, Any] = {}
        self._stopped = threading.Event()
        self._lock = threading.Lock()

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Parameter path -> tensor."""
        return self.manifest.tensors

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def faults(self) -> list[str]:
        """What is wrong with the files: missing, of another size, changed, or never committed."""
        groups = dict.fromkeys(tensor.group for tensor in self.tensors.values())
        commits = [f"{WEIGHTS}/{group}/{COMMIT}" for group in groups]
        found = self.manifest.file_faults(self.path)
        return found + [f"{name} (not in {MANIFEST})" for name in commits if name not in self.manifest.files]

    def check(self, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, np.dtype] | None = None) -> None:
        """Hold the store against what a model needs at the one-device layout, before a device holds anything.

        Args:
            shapes: parameter path -> shape as stored.
            dtypes: those that tensors must have, where a cast would change what they mean: quantized weights and their
                factors.

        Raises:
            CheckpointError: tensors are missing, unexpected, or of another shape or dtype than the model needs.
        """
        missing = [f"{path} {list(shape)}" for path, shape in shapes.items() if path not in self.tensors]
        unexpected = [path for path in self.tensors if path not in shapes]
        wrong = [
            f"{path} (expected {list(shapes[path])}, got {list(tensor.shape)})"
            for path, tensor in self.tensors.items()
            if path in shapes and tensor.shape != tuple(shapes[path])
        ]
        kinds = [
            f"{path} (expected {dtypes[path]}, got {tensor.dtype})"
            for path, tensor in self.tensors.items()
            if dtypes and path in dtypes and tensor.dtype != dtypes[path]
        ]
        faults = {
            "missing": missing, "unexpected": unexpected, "of the wrong shape": wrong, "of the wrong dtype": kinds,
        }.items()  # fmt: skip
        found = [f"{len(names)} tensors {fault}: {listed(names)}" for fault, names in faults if names]
        if found:
            raise CheckpointError(f"{self.path / MANIFEST}: {'; '.join(found)}")

    def read(self, tensor: StoredTensor, index: int, box: Box, out: np.ndarray) -> None:
        """Read a chunk and verify it. Every byte of a load goes through this method, in any number of threads.

        Args:
            tensor: one of the store's.
            index: the chunk's number.
            box: the chunk; see :meth:`StoredTensor.boxes`.
            out: a contiguous array of its shape and dtype.

        Raises:
            CheckpointError: the chunk cannot be read, or has another digest. ``out`` must not be used then.
            ReadTimeoutError: it did not come in time. ``out`` may be written to at any later time.
        """
        self._filled(tensor, f", chunk {index} of {len(tensor.digests)}", box, out)()
        got = digest(out)
        if got != tensor.digests[index]:
            where = self._where(tensor, f", chunk {index} of {len(tensor.digests)}")
            raise CheckpointError(f"{where}: damaged: expected crc32c {tensor.digests[index]:08x}, got {got:08x}")

    def fetch(self, tensor: StoredTensor, box: Box, out: np.ndarray) -> Callable[..., None]:
        """Start reading a region whose chunks have been verified before; without another look at their digests.

        Args:
            tensor: one of the store's.
            box: the region.
            out: an array of its shape and dtype.

        Returns:
            A function that waits until ``out`` is filled, and raises :class:`CheckpointError` where it cannot be, or
            :class:`ReadTimeoutError` where that takes too long; it may be called again then. With a number of seconds
            it waits no longer than that.
        """
        return self._filled(tensor, "", box, out)

    def _filled(self, tensor: StoredTensor, which: str, box: Box, out: np.ndarray) -> Callable[..., None]:
        """Start a read; what is returned waits for it."""
        failed: Exception | None = None
        future: Any = None
        begun = time.monotonic()
        try:
            future = tensorstore.array(out).write(self._handle(tensor)[box])
        except (ValueError, OSError, RuntimeError) as error:
            failed = error

        def wait(seconds: float | None = None) -> None:
            nonlocal failed
            limit = None if self.seconds is None else self.seconds + out.nbytes / SLOWEST
            limit = limit if seconds is None else seconds
            try:
                if failed is not None:
                    error, failed = failed, OSError("it was not begun")  # if asked again, it is not late
                    raise error
                self._result(future, limit)
            except TimeoutError:
                waited = f"which did not come in {time.monotonic() - begun:.3g} seconds"
                raise ReadTimeoutError(f"{self._where(tensor, which)}: expected {out.nbytes} bytes, {waited}") from None
            except (ValueError, OSError, RuntimeError) as error:
                raise CheckpointError(
                    f"{self._where(tensor, which)}: expected {out.nbytes} bytes, cannot be read: {_reason(error)}"
                ) from None

        return wait

    def _result(self, future: Any, seconds: float | None) -> Any:
        """What a future brings, unless that takes too long or the store is stopped."""
        if self.seconds is None:
            return future.result()
        end = time.monotonic() + (self.seconds if seconds is None else seconds)
        while True:
            try:
                return future.result(timeout=max(0.0, min(end - time.monotonic(), _LOOK_SECONDS)))
            except TimeoutError:
                if time.monotonic() >= end or self._stopped.is_set():
                    raise

    def _where(self, tensor: StoredTensor, which: str) -> str:
        return f"{self._folder(tensor.group)}: tensor {tensor.path}{which}"

    def stop(self) -> None:
        """Let nobody wait much longer for reads that are under way, where they had limited seconds."""
        self._stopped.set()

    def close(self) -> None:
        """Close the files. Closing twice is harmless."""
        self._handles.clear()
        self._opening.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _folder(self, group: str) -> Path:
        return self.path / WEIGHTS / group

    def _handle(self, tensor: StoredTensor) -> Any:
        with self._lock:
            if (found := self._handles.get(tensor.path)) is not None:
                return found
            opening = self._opening.get(tensor.path)
            if opening is None:
                opening = self._opening[tensor.path] = _open(self._folder(tensor.group), tensor.path, self._context)
        try:
            found = self._result(opening, None)
        finally:
            if opening.done():  # otherwise it is waited for again
                self._opening.pop(tensor.path, None)
        layout = (tuple(found.shape), found.dtype.numpy_dtype, tuple(found.chunk_layout.read_chunk.shape))
        if layout != (tensor.shape, tensor.dtype, tensor.chunk):
            expected = f"{tensor.dtype} {list(tensor.shape)} in chunks of {list(tensor.chunk)}"
            raise ValueError(f"expected {expected}, got {layout[1]} {list(layout[0])} in {list(layout[2])}")
        self._handles[tensor.path] = found
        return found


def _context(direct: bool = False) -> Any:
    sizes = {"cache_pool": 0, "cache_pool#index": _INDEX_CACHE_BYTES}
    spec: dict[str, Any] = {name: {"total_bytes_limit": size} for name, size in sizes.items()}
    if direct:
        spec["file_io_mode"] = {"mode": "direct"}
    return tensorstore.Context(spec)


def open_tensor(folder: Path, path: str, context: Any = None) -> Any:
    """Open one leaf of an orbax checkpoint for reading."""
    return _open(folder, path, context or _context()).result()


def _open(folder: Path, path: str, context: Any) -> Any:
    """Begin to open a leaf."""
    kvstore = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{os.path.abspath(folder)}/"},
        "path": f"{path}/",
        "cache_pool": "cache_pool#index",
    }
    # Orbax stores every chunk. One that is not there is damage; without the option it would be zeros, without a word.
    spec = {"driver": "zarr3", "kvstore": kvstore, "fill_missing_data_reads": False}
    return tensorstore.open(spec, open=True, read=True, context=context)


@dataclass(frozen=True)
class Verified:
    """What :func:`verify` found.

    Attributes:
        store: the folder.
        tensors: how many were read.
        nbytes: their bytes.
        seconds: how long it took.
        faults: what is damaged or missing; empty for a good store.
    """

    store: str
    tensors: int
    nbytes: int
    seconds: float
    faults: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able values."""
        return {
            "store": self.store, "good": not self.faults, "tensors": self.tensors, "bytes": self.nbytes,
            "seconds": self.seconds, "gigabytes_per_second": self.nbytes / 1e9 / self.seconds,
            "faults": list(self.faults),
        }  # fmt: skip

    def __str__(self) -> str:
        read = f"{self.tensors} tensors, {self.nbytes / 1e9:.3g} GB, {self.nbytes / 1e9 / self.seconds:.3g} GB/s"
        if not self.faults:
            return f"{self.store}: good ({read})"
        return "\n".join([f"{self.store}: {len(self.faults)} faults ({read})", *self.faults])


def verify(store: str | Path, *, progress: bool | None = None) -> Verified:
    """Read a store from end to end, and hold every file and every chunk against the manifest.

    Args:
        store: the folder.
        progress: show a bar; None shows it in a terminal or notebook.

    Returns:
        What was found; damage is in its ``faults``, all of it.

    Raises:
        CheckpointError: it is not a store, its conversion was not finished, or the manifest cannot be read.
    """
    start = time.perf_counter()
    local = threading.local()
    with Store(store, strict=False) as opened:
        faults = opened.faults()
        tasks = [(tensor, index, box) for tensor in opened.tensors.values() for index, box in enumerate(tensor.boxes())]

        def one(task: tuple[StoredTensor, int, Box]) -> str | None:
            tensor, index, box = task
            try:
                opened.read(tensor, index, box, staging(local, tensor, box))
            except CheckpointError as error:
                return str(error)
            return None

        bar = bars.bar(bars.shown(progress), total=opened.nbytes, desc="verifying", unit="B", unit_scale=True)
        with bar, ThreadPoolExecutor(threads(), "jaxinfer-verify") as pool:
            for (tensor, _, box), fault in zip(tasks, pool.map(one, tasks), strict=True):
                bar.update(nbytes_of(shape_of(box), tensor.dtype))
                faults += [fault] if fault else []
        seconds = time.perf_counter() - start
        return Verified(str(store), len(opened.tensors), opened.nbytes, seconds, tuple(faults))


def threads() -> int:
    """Threads that read: a core each."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def staging(local: threading.local, tensor: StoredTensor, box: Box) -> np.ndarray:
    """A thread's own buffer, in the shape of a chunk; the next call overwrites it."""
    wanted = nbytes_of(shape_of(box), tensor.dtype)
    if getattr(local, "buffer", np.empty(0, np.uint8)).nbytes < wanted:
        local.buffer = np.empty(wanted, np.uint8)
    found: np.ndarray = local.buffer[:wanted].view(tensor.dtype)
    return found.reshape(shape_of(box))


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
