"""From a checkpoint folder to a store: layer by layer, so that it takes little memory and can go on after a kill.

The store is built in a folder ``OUT.partial`` beside its place. Each group (a layer, the embedding, the head) is one
orbax checkpoint, which orbax commits by a rename; a note with its digests follows. What has no note is done again. A
last rename makes the store appear, whole. (Orbax's own partial saving, an experiment still, merges all parts in a last
step that cannot be begun again once it was interrupted.)
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jaxinfer import progress as bars
from jaxinfer.checkpoints.boxes import Box, nbytes_of, view
from jaxinfer.checkpoints.folder import INDEX_FILE, Checkpoint, confined
from jaxinfer.checkpoints.frugal import Kept, handlers
from jaxinfer.checkpoints.loader import cut
from jaxinfer.checkpoints.manifest import (
    DTYPES,
    MANIFEST,
    PARTIAL,
    VERSION,
    WEIGHTS,
    Manifest,
    Quantized,
    StoredFile,
    StoredTensor,
    chunks,
    digest,
    group_of,
    read_json,
    sync,
    write_json,
)  # fmt: skip
from jaxinfer.checkpoints.quantizing import quantize_box, scale_box
from jaxinfer.checkpoints.store import Store, is_store, open_tensor, threads
from jaxinfer.errors import CheckpointError, ConfigError
from jaxinfer.models.sources import Piece, Sources
from jaxinfer.models.spec import Layout
from jaxinfer.pretrained import Pretrained
from jaxinfer.quantization import Quantization, check_method, wire_dtype, wire_shape

CHUNK_BYTES = 8 << 20
"""Of 1 to 32 MiB the fastest to read: smaller ones cost calls, larger ones page faults."""
SLACK_BYTES = 64 << 20
_SIDE_FILES = re.compile(r"[^/]+\.(json|txt|jinja)|tokenizer\.model")


def convert(
    model: str | Path,
    out: str | Path,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    progress: bool | None = None,
) -> Path:
    """Convert a checkpoint to a store, of which every byte is verified when it is read.

    Host memory: the largest layer, embedding or head, and less than 0.6 GiB (a test watches it). A conversion that was
    ended by anything at all goes on where it was when it is called again with the same arguments; until it is done
    nothing is at ``out``.

    Args:
        model: a folder as transformers writes it, a Hugging Face hub id, or ``"demo"`` for the bundled model.
        out: the store's folder, which must not exist.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None keeps what each tensor has.
        quantize: store the weights of attention and MLP as ``int8``, ``int4`` or ``fp8``, with their factors.
        progress: show a bar; None shows it in a terminal or notebook.

    Returns:
        The store's folder.

    Raises:
        ConfigError: the configuration is malformed, or asks for something that is not implemented; int4 for a weight
            whose inputs no group divides.
        CheckpointError: the checkpoint is damaged; ``out`` exists; the disk is too small; another process converts to
            the same place; a weight that is to be quantized is not finite.
    """
    place = Path(out).expanduser().absolute()
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    check_method(quantize)
    with Pretrained(model) as pretrained:
        if not isinstance(pretrained.checkpoint, Checkpoint):
            raise CheckpointError(f"{pretrained.folder}: expected a folder of safetensors, got a store")
        sources = pretrained.sources(Layout.of(pretrained.spec))
        conversion = _Conversion(pretrained, pretrained.checkpoint, sources, place, dtype, quantize)
        try:
            with conversion.opened() as finished:
                if not finished:
                    conversion.run(bars.shown(progress))
                shutil.rmtree(conversion.folder)
        except OSError as error:
            where = error.filename or conversion.folder
            raise CheckpointError(f"{where}: cannot be written: {error.strerror}") from error
    return place


class _Conversion:
    """One conversion: what to write, and where."""

    def __init__(
        self,
        pretrained: Pretrained,
        checkpoint: Checkpoint,
        sources: Sources,
        place: Path,
        dtype: str | None,
        quantize: str | None,
    ) -> None:
        self.checkpoint, self.sources, self.place, self.dtype = checkpoint, sources, place, dtype
        self.quantize = quantize
        self.source = pretrained.folder
        self.folder = place.with_name(f"{place.name}.partial")
        self.store, self.notes = self.folder / "store", self.folder / "notes"
        self.parameters = pretrained.parameters(quantize=quantize)
        self.dtypes = {path: self._stored(path) for path in self.parameters}
        self.shapes = {
            path: info.shape if info.quantization is None else wire_shape(info.shape, info.quantization.method)
            for path, info in self.parameters.items()
        }
        self.groups: dict[str, list[str]] = {}
        for path in self.parameters:
            self.groups.setdefault(group_of(path), []).append(path)

    @contextlib.contextmanager
    def opened(self) -> Iterator[bool]:
        """Take the unfinished store for this process: a new one, or what an earlier conversion left.

        Yields whether there is nothing more to do than to remove the folder.
        """
        exists, marker = os.path.lexists(self.place), self.folder / PARTIAL
        if exists and not marker.exists():
            what = "a store" if self.place.is_dir() and is_store(self.place) else "something else"
            raise CheckpointError(f"{self.place}: expected a place where nothing is yet, got {what}")
        self.place.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{self.folder}: another process converts to this place") from None
            if not marker.exists() and any(entry.name != f"{PARTIAL}.tmp" for entry in self.folder.iterdir()):
                raise CheckpointError(f"{self.folder}: expected an unfinished conversion or nothing, got other files")
            origin = self._origin()
            same = marker.exists() and read_json(marker) == origin
            if exists and (not same or self.store.exists()):
                raise CheckpointError(f"{self.place}: expected a place where nothing is yet, got something")
            if not same:  # of another checkpoint or dtype: nothing of it can be used
                for left in (self.store, self.notes):
                    shutil.rmtree(left, ignore_errors=True)
                write_json(marker, origin)
            yield exists
        finally:
            os.close(handle)

    def run(self, show: bool) -> None:
        """Write what is not there yet, and commit."""
        weights = self.store / WEIGHTS
        weights.mkdir(parents=True, exist_ok=True)
        self.notes.mkdir(exist_ok=True)
        done = {group: tensors for group in self.groups if (tensors := self._noted(group)) is not None}
        for left in weights.iterdir():
            if left.name not in done:
                shutil.rmtree(left)
        self._check_space(done)
        bar = bars.bar(show, total=self._nbytes(self.groups), desc="converting", unit="B", unit_scale=True)
        with bar:
            bar.update(self._nbytes(done))
            for group in self.groups:
                if group not in done:
                    done[group] = self._write(group)
                    bar.update(self._nbytes([group]))
        self._commit({path: done[group][path] for group, paths in self.groups.items() for path in paths})

    def _origin(self) -> dict[str, Any]:
        """What this conversion would write; one that left something else cannot be gone on with."""
        files = sorted({info.file for info in self.checkpoint.tensors.values()})
        return {
            "version": VERSION,
            "dtype": self.dtype,
            "quantize": self.quantize,
            "files": [[str(file), (status := file.stat()).st_size, status.st_mtime_ns] for file in files],
        }

    def _stored(self, path: str) -> np.dtype:
        info = self.parameters[path]
        if info.quantization is not None:
            return wire_dtype(info.quantization.method)
        if info.factors:
            return np.dtype(np.float32)
        return self._read_as(path) if self.dtype is None else DTYPES[self.dtype]

    def _read_as(self, path: str) -> np.dtype:
        found = {self.checkpoint.tensors[piece.name].dtype for piece in self.sources[path]}
        # As the loader has it: mixed pieces and float64 become float32.
        only = found.pop() if len(found) == 1 else np.dtype(np.float32)
        return np.dtype(np.float32) if only == np.float64 else only

    def _nbytes(self, groups: Any) -> int:
        paths = (path for group in groups for path in self.groups[group])
        return sum(nbytes_of(self.shapes[path], self.dtypes[path]) for path in paths)

    def _check_space(self, done: Mapping[str, Any]) -> None:
        needed = self._nbytes(self.groups) - self._nbytes(done)
        needed += needed // 100 + SLACK_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise CheckpointError(f"{self.folder}: expected {needed} bytes free on the disk, got {free}")

    def _noted(self, group: str) -> dict[str, StoredTensor] | None:
        """The tensors of a group that is written, or None."""
        note = self.notes / f"{group}.json"
        if not note.exists() or not (self.store / WEIGHTS / group).is_dir():
            return None
        entries = read_json(note)
        return {path: StoredTensor.from_json(path, entry, str(note)) for path, entry in entries.items()}

    def _write(self, group: str) -> dict[str, StoredTensor]:
        """Write a group: the checkpoint, then the note that says it is good."""
        folder = self.store / WEIGHTS / group
        arrays: dict[str, np.ndarray] = {}
        for path in self.groups[group]:
            info = self.parameters[path]
            if info.quantization is not None:
                arrays[path], arrays[f"{path}_scale"] = self._quantized(path, info.quantization)
            elif not info.factors:
                arrays[path] = self._array(path, self.dtypes[path])
        arguments = {path: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for path in arrays}
        handler = ocp.PyTreeCheckpointHandler(
            use_ocdbt=True, use_zarr3=True, use_compression=False, type_handler_registry=handlers()
        )
        with ocp.Checkpointer(handler) as checkpointer:
            try:
                kept = {path: values.view(Kept) for path, values in arrays.items()}
                checkpointer.save(folder, args=ocp.args.PyTreeSave(kept, save_args=arguments))
            except ValueError as error:  # TensorStore's: a full disk, a limit on the size of files
                reason = " ".join(str(error).split())[:400]
                raise CheckpointError(f"{folder}: tensors of {group} cannot be written: {reason}") from None
        tensors = {}
        for path, values in arrays.items():
            chunk = tuple(open_tensor(folder, path).chunk_layout.read_chunk.shape)
            found = tuple(digest(values[box]) for box in chunks(values.shape, chunk))
            tensors[path] = StoredTensor(path, values.dtype, values.shape, chunk, found)
        sync(folder.parent)
        write_json(self.notes / f"{group}.json", {path: tensor.to_json() for path, tensor in tensors.items()})
        return tensors

    def _quantized(self, path: str, how: Quantization) -> tuple[np.ndarray, np.ndarray]:
        """A weight as it is stored and its factors; quantized from what the checkpoint has, in threads."""
        weight = self._array(path, self._read_as(path))
        values = np.empty(self.shapes[path], self.dtypes[path])
        scales = np.empty(how.scale_shape(weight.shape), np.float32)
        channels, inputs = weight.shape[: weight.ndim - how.inputs], weight.shape[weight.ndim - how.inputs :]

        def one(box: Box) -> None:
            found = quantize_box(path, view(weight, box), how)
            view(values, box)[...], view(scales, scale_box(box, weight.shape, how))[...] = found

        with ThreadPoolExecutor(threads(), "jaxinfer-quantize") as pool:
            for _ in pool.map(one, cut(channels, math.prod(inputs) * weight.itemsize)):
                pass
        return values, scales

    def _array(self, path: str, dtype: np.dtype) -> np.ndarray:
        """A parameter as the checkpoint has it, laid out for one device."""
        values = np.zeros(self.parameters[path].shape, dtype)
        for piece in self.sources[path]:
            self._read(piece, values[piece.region or ...])
        return values

    def _read(self, piece: Piece, out: np.ndarray) -> None:
        source = piece.view(self.checkpoint.tensor(piece.name))
        if source.dtype == out.dtype:
            source, out = (array.view(f"u{array.itemsize}") for array in (source, out))
        self.checkpoint.read(piece.name, source, out)

    def _commit(self, tensors: Mapping[str, StoredTensor]) -> None:
        """Add the configuration and the manifest, and move the store to its place."""
        files = {}
        for name in sorted(os.listdir(self.source)):
            if _SIDE_FILES.fullmatch(name) and name not in (INDEX_FILE, MANIFEST, PARTIAL):
                content = confined(self.source, name).read_bytes()
                with open(self.store / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                files[name] = StoredFile(len(content), digest(np.frombuffer(content, np.uint8)))
        for path in sorted((self.store / WEIGHTS).rglob("*")):
            if path.is_file():
                files[path.relative_to(self.store).as_posix()] = StoredFile(path.stat().st_size)
        Manifest(self.dtype, tensors, files, self._said()).write(self.store)
        Store(self.store).close()  # reads the manifest back
        os.rename(self.store, self.place)
        sync(self.place.parent)

    def _said(self) -> Quantized | None:
        """What the manifest says of quantization."""
        if self.quantize is None:
            return None
        how = {".".join(path.split(".")[-2:]): info.quantization for path, info in self.parameters.items()}
        return Quantized(self.quantize, {kind: q.group for kind, q in how.items() if q is not None and q.group})
