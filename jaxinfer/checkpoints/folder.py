"""A checkpoint folder as transformers writes it: one safetensors file, or shards with an index.

File names come from the index, which comes from outside, so they are confined to the folder. Tensor names never become
file names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Self

import numpy as np

from jaxinfer.checkpoints.safetensors import SafetensorsFile, TensorInfo, parse_json, quoted
from jaxinfer.errors import CheckpointError, UnsafePathError, UnsupportedFormatError, listed
from jaxinfer.models.sources import Sources

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# The largest published index is some 12 MB (a mixture of 384 experts in 61 layers); its shards number below 200.
MAX_INDEX_BYTES = 64 << 20
MAX_INDEX_FILES = 4096

_PICKLE = "it is a pickle, which can run code when it is read"
_REFUSED = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"), _PICKLE),
    **dict.fromkeys((".npy", ".npz"), "it can hold a pickle, which can run code when it is read"),
    ".msgpack": "Flax's msgpack format has no header that could be checked before it is read",
    **dict.fromkeys((".h5", ".hdf5", ".keras"), "HDF5 is not implemented"),
    ".gguf": "GGUF is not implemented",
}
_FLOATS = frozenset(("bfloat16", "float16", "float32", "float64"))


def confined(folder: str | Path, name: str) -> Path:
    """The real path of a file that a checkpoint names, which must lie in the checkpoint's folder.

    A link may lead elsewhere within the folder. In a snapshot of the Hugging Face hub's cache
    (``models--*/snapshots/<revision>``) it may also lead to that repository's own ``blobs``, where the cache keeps the
    contents.

    Raises:
        UnsafePathError: the name is absolute, has ``..`` or a backslash in it, or leads out through a link.
    """
    root = Path(os.path.realpath(folder))
    parts = name.split("/")
    if not name or not name.isprintable() or "\\" in name or name.startswith("/") or ".." in parts:
        raise UnsafePathError(f"{folder}: expected the name of a file inside the folder, got {quoted(name)}")
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        allowed.append(root.parent.parent / "blobs")
    try:
        path = Path(os.path.realpath(root / name))
    except OSError as error:
        raise UnsafePathError(f"{folder}: {quoted(name)} cannot be followed ({error.strerror})") from None
    if not any(path.is_relative_to(place) for place in allowed):
        raise UnsafePathError(f"{folder}: {quoted(name)} is a link to {path}, out of the folder")
    return path


def weight_files(folder: str | Path) -> tuple[dict[str, Path], dict[str, str] | None]:
    """The safetensors files of a folder and, where it has shards, the index: tensor name -> file name.

    A folder with both a single file and an index is read from the single file, as transformers does.

    Raises:
        CheckpointError: there is no such folder, or the index or a file that it names is missing or malformed.
        UnsafePathError: the index names a file outside the folder.
        UnsupportedFormatError: the folder holds weights in refused formats only.
    """
    root = Path(folder)
    if not root.is_dir():
        what = "a file" if root.exists() else "nothing"
        raise CheckpointError(f"{root}: expected a checkpoint folder, got {what}")
    if os.path.lexists(root / SINGLE_FILE):
        return {SINGLE_FILE: _existing(root, SINGLE_FILE, "the folder")}, None
    if not os.path.lexists(root / INDEX_FILE):
        raise _no_weights(root)
    index = _read_index(root)
    names = sorted(set(index.values()))
    if len(names) > MAX_INDEX_FILES:
        raise CheckpointError(f"{root / INDEX_FILE}: expected at most {MAX_INDEX_FILES} files, got {len(names)}")
    for name in names:
        confined(root, name)
        if not name.endswith(".safetensors"):
            raise UnsupportedFormatError(
                f"{root / INDEX_FILE}: expected names of .safetensors files, got {quoted(name)}{_reason(name)}"
            )
    missing = [quoted(name) for name in names if not confined(root, name).exists()]
    if missing:
        raise CheckpointError(f"{root / INDEX_FILE}: {len(missing)} of {len(names)} files missing: {listed(missing)}")
    files = {name: confined(root, name) for name in names}
    if len(set(files.values())) != len(files):
        raise CheckpointError(f"{root / INDEX_FILE}: several of its file names lead to the same file")
    return files, index


class Checkpoint:
    """The weights of a checkpoint folder: every header checked on opening, tensors as views of the mapped files.

    Attributes:
        path: the folder.
        tensors: tensor name -> `TensorInfo`, of all files.
        nbytes: bytes of all tensors together.

    Raises:
        CheckpointError: see `weight_files` and `SafetensorsFile`; also a tensor that the index names but its file does
            not hold, and one that lies in two files.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self._files: dict[Path, SafetensorsFile] = {}
        try:
            files, index = weight_files(self.path)
            for file in files.values():
                self._files[file] = SafetensorsFile(file)
            self._merge(files)
            if index is not None:
                self._check_index(files, index)
        except BaseException:
            self.close()
            raise
        self.nbytes = sum(info.nbytes for info in self.tensors.values())

    def tensor(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapped file; valid until the checkpoint is closed."""
        return self._file(name).tensor(name)

    def read(self, name: str, source: np.ndarray, out: np.ndarray) -> None:
        """Copy ``source``, a view of the tensor ``name``, to ``out``, of the same shape; see `SafetensorsFile.read`.

        Every byte of a load goes through this method.
        """
        self._file(name).read(source, out)

    def close(self) -> None:
        """Close the files. Closing twice is harmless."""
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file(self, name: str) -> SafetensorsFile:
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.path}: holds no tensor {quoted(name)}")
        return self._files[info.file]

    def _merge(self, files: dict[str, Path]) -> None:
        twice: list[str] = []
        for file in files.values():
            for name, info in self._files[file].tensors.items():
                if name in self.tensors:
                    twice.append(f"{quoted(name)} ({self.tensors[name].file.name}, {file.name})")
                self.tensors[name] = info
        if twice:
            raise CheckpointError(f"{self.path}: {len(twice)} tensors lie in more than one file: {listed(twice)}")

    def _check_index(self, files: dict[str, Path], index: dict[str, str]) -> None:
        lost = [
            f"{quoted(name)} ({file})" for name, file in index.items() if name not in self._files[files[file]].tensors
        ]
        if lost:
            raise CheckpointError(
                f"{self.path / INDEX_FILE}: {len(lost)} tensors not in the file named for them: {listed(lost)}"
            )


def check(checkpoint: Checkpoint, sources: Sources, ignored: Callable[[str], bool]) -> None:
    """Hold a checkpoint against what a model needs, before anything is allocated on a device.

    Arguments:
        checkpoint: the open checkpoint.
        sources: the tensors that the model's parameters are made of, with their shapes.
        ignored: whether a tensor that the model does not use may be there (a stored mask, a tied copy).

    Raises:
        CheckpointError: tensors are missing, unexpected, of another shape, or not of a floating dtype; all faults in
            one message, up to ten names for each.
    """
    pieces = {piece.name: piece for group in sources.values() for piece in group}
    missing, shapes, dtypes, scaled = [], [], [], []
    for name, piece in pieces.items():
        info = checkpoint.tensors.get(name)
        if info is None:
            missing.append(f"{quoted(name)} {list(piece.shape)}")
            continue
        where = f"{quoted(name)} in {info.file.name}"
        if info.shape != piece.shape:
            shapes.append(f"{where} (expected {list(piece.shape)}, got {list(info.shape)})")
        if info.dtype.name.startswith("float8"):
            scaled.append(f"{where} (got {info.dtype})")
        elif info.dtype.name not in _FLOATS:
            dtypes.append(f"{where} (got {info.dtype})")
    unexpected = [
        f"{quoted(name)} in {info.file.name}"
        for name, info in checkpoint.tensors.items()
        if name not in pieces and not ignored(name)
    ]
    faults = (
        ("missing", missing),
        ("unexpected", unexpected),
        ("of the wrong shape", shapes),
        ("of the wrong dtype, expected bfloat16, float16, float32 or float64", dtypes),
        ("of an 8-bit floating dtype, which means nothing without its scales, and those are not implemented", scaled),
    )
    found = [f"{len(names)} tensors {fault}: {listed(names)}" for fault, names in faults if names]
    if found:
        raise CheckpointError(f"{checkpoint.path}: {'; '.join(found)}")


def _existing(root: Path, name: str, whose: str) -> Path:
    path = confined(root, name)
    if not path.exists():
        raise CheckpointError(f"{root}: {quoted(name)} of {whose} is a link to {path}, which does not exist")
    return path


def _read_index(root: Path) -> dict[str, str]:
    where = root / INDEX_FILE
    path = _existing(root, INDEX_FILE, "the folder")
    if not path.is_file():
        raise CheckpointError(f"{where}: expected a regular file")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_INDEX_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from None
    if len(data) > MAX_INDEX_BYTES:
        raise CheckpointError(f"{where}: expected at most {MAX_INDEX_BYTES} bytes, got more")
    index = parse_json(data, str(where))
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{where}: weight_map: expected tensor name -> file name, got {quoted(table)}")
    wrong = [f"{quoted(name)} ({quoted(file)})" for name, file in table.items() if not isinstance(file, str)]
    if wrong:
        raise CheckpointError(f"{where}: weight_map: expected file names, got something else for {listed(wrong)}")
    return table


def _reason(name: str) -> str:
    reason = _REFUSED.get(Path(name).suffix.lower())
    return f" ({reason})" if reason else ""


def _no_weights(root: Path) -> CheckpointError:
    try:
        names = sorted(entry.name for entry in os.scandir(root))
    except OSError as error:
        return CheckpointError(f"{root}: cannot be read ({error.strerror})")
    expected = f"{root}: expected {SINGLE_FILE} or {INDEX_FILE}"
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return CheckpointError(f"{expected}, got only {_quoted_list(others)}")
    refused = [name for name in names if Path(name).suffix.lower() in _REFUSED and name != "training_args.bin"]
    if refused:
        reasons = dict.fromkeys(f"{Path(name).suffix}: {_REFUSED[Path(name).suffix.lower()]}" for name in refused)
        return UnsupportedFormatError(
            f"{expected}, got only {_quoted_list(refused)}; refused ({'; '.join(reasons)}). "
            "Convert the weights to safetensors with transformers' save_pretrained, on a machine that may run them"
        )
    return CheckpointError(f"{expected}, got {_quoted_list(names) if names else 'an empty folder'}")


def _quoted_list(names: Iterable[str]) -> str:
    return listed(quoted(name) for name in names)
