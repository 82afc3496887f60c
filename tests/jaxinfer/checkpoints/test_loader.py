"""Loading onto eight devices: against numpy, byte for byte; what is read, and how much memory it takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxinfer
from jaxinfer.checkpoints import loader as module
from jaxinfer.checkpoints.folder import Checkpoint
from jaxinfer.checkpoints.loader import Target, load
from jaxinfer.errors import CheckpointError
from jaxinfer.models.sources import Piece, Sources

F16, BF16, F32, F64 = (np.dtype(kind) for kind in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))
NAMES = {F16: "F16", BF16: "BF16", F32: "F32", F64: "F64"}


class Recording(Checkpoint):
    """A checkpoint that marks every byte of its file that a load reads, and counts how often."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        (self.file,) = self._files.values()
        self.reads = np.zeros(self.file.size, np.int32)
        self.lock = threading.Lock()

    def read(self, name: str, source: np.ndarray, out: np.ndarray) -> None:
        super().read(name, source, out)
        start = source.__array_interface__["data"][0] - self.file._base
        offsets = np.full(source.shape, start)
        for axis, (size, stride) in enumerate(zip(source.shape, source.strides, strict=True)):
            offsets += (np.arange(size) * stride).reshape([-1 if a == axis else 1 for a in range(source.ndim)])
        with self.lock:
            for byte in range(source.itemsize):
                np.add.at(self.reads, offsets.reshape(-1) + byte, 1)

    def count(self, name: str) -> np.ndarray:
        """How often each byte of a tensor was read: [*shape, itemsize]."""
        info = self.tensors[name]
        return self.reads[info.offset : info.offset + info.nbytes].reshape(*info.shape, info.dtype.itemsize)


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A file of one checkpoint; the header here is written by hand since the package's writer lacks bfloat16."""
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        header[name] = {"dtype": NAMES[array.dtype], "shape": array.shape, "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    raw = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for array in tensors.values():
            file.write(array.tobytes())
    return folder


def mesh(data: int = 2, tensor: int = 4) -> Mesh:
    return Mesh(np.array(jax.devices()[: data * tensor]).reshape(data, tensor), ("data", "tensor"))


def bits(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


def random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return rng.standard_normal(shape, np.float32).astype(dtype)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[tuple[slice, ...]]]:
    """A parameter's shape, and disjoint regions of it: a grid of random cuts, of which some cells stay empty."""
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    cells: list[tuple[slice, ...]] = [()]
    for size in shape:
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        cells = [(*cell, slice(a, b)) for cell in cells for a, b in pairwise(cuts)]
    return shape, [cell for cell in cells if draw(st.integers(0, 4))]


@settings(max_examples=60)
@given(layout=layouts(), data=st.data(), chunk=st.sampled_from([8, 64, 1 << 24]))
def test_any_pieces_on_any_sharding(
    tmp_path_factory: pytest.TempPathFactory,
    layout: tuple[tuple[int, ...], list[tuple[slice, ...]]],
    data: st.DataObject,
    chunk: int,
):
    """Stacked, split, transposed and sliced pieces in random regions, cut into shards and into chunks of any size."""
    shape, regions = layout
    rng = np.random.default_rng(0)
    kind = data.draw(st.sampled_from([F16, BF16, F32]))
    target = data.draw(st.sampled_from([kind, F32, BF16]))
    tensors, pieces, expected = {}, [], np.zeros(shape, target)
    for i, region in enumerate(regions):
        size = tuple(side.stop - side.start for side in region)
        axes = data.draw(st.permutations(range(len(size))))
        back = tuple(np.argsort(axes))
        margin = data.draw(st.integers(0, 2))  # the file's tensor is larger, the view takes a part
        name = f"piece{i}"
        stored = tuple(size[axis] for axis in axes)
        values = random(rng, (stored[0] + margin, *stored[1:]), kind)

        def view(tensor: np.ndarray, margin: int = margin, back: tuple[int, ...] = back) -> np.ndarray:
            return tensor[margin:].transpose(back)

        tensors[name] = values
        pieces.append(Piece(name, values.shape, view, region))
        expected[region] = view(values).astype(np.float32).astype(target)
    spec = []
    sizes = {"data": 2, "tensor": 4}
    for side in shape:
        fits = [axis for axis, count in sizes.items() if side % count == 0]
        axis = data.draw(st.sampled_from([None, *fits]))
        sizes.pop(axis, None)  # type: ignore[arg-type]
        spec.append(axis)
    where: NamedSharding | SingleDeviceSharding = NamedSharding(mesh(), PartitionSpec(*spec))
    if data.draw(st.booleans()):
        where = SingleDeviceSharding(jax.devices()[3])
    folder = write(tmp_path_factory.mktemp("checkpoint"), tensors)
    with pytest.MonkeyPatch.context() as patch, Checkpoint(folder) as checkpoint:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        loaded = load(checkpoint, {"p": tuple(pieces)}, {"p": Target(shape, target, where)})["p"]
    assert loaded.shape == shape
    assert loaded.dtype == target
    assert loaded.sharding == where
    np.testing.assert_array_equal(bits(loaded), bits(expected))
    for shard in loaded.addressable_shards:
        np.testing.assert_array_equal(bits(shard.data), bits(expected[shard.index]))


HEADS, KV, DIM, HIDDEN, VOCAB = 8, 4, 6, 24, 61


def model(folder: Path) -> tuple[Path, Sources, dict[str, np.ndarray]]:
    """The layouts that families have: stacked q, k, v; interleaved qkv; transposed; gate and up in one; padded rows."""
    rng = np.random.default_rng(1)
    q, k, v = (random(rng, (heads * DIM, HIDDEN), BF16) for heads in (HEADS, KV, KV))
    grouped = random(rng, (HEADS * 3 * DIM, HIDDEN), BF16)
    conv = random(rng, (HIDDEN, 16), BF16)
    gate_up = random(rng, (32, HIDDEN), BF16)
    out = random(rng, (HIDDEN, HEADS * DIM), BF16)
    vocab = random(rng, (VOCAB, HIDDEN), BF16)
    norm = random(rng, (HIDDEN,), BF16)
    tensors = {"q": q, "k": k, "v": v, "grouped": grouped, "conv": conv}
    tensors |= {"gate_up": gate_up, "out": out, "vocab": vocab, "norm": norm}
    write(folder, tensors)
    group = HEADS // KV

    def stacked(name: str, start: int, count: int) -> Piece:  # [kv, group + 2, dim, hidden]
        shape = (KV * count * DIM, HIDDEN)
        return Piece(name, shape, lambda t: t.reshape(KV, count, DIM, HIDDEN), np.s_[:, start : start + count, :, :])

    def third(i: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda t: t.reshape(HEADS, 3, DIM, HIDDEN)[:, i : i + 1].transpose(1, 0, 2, 3)

    sources: Sources = {
        "qkv": (stacked("q", 0, group), stacked("k", group, 1), stacked("v", group + 1, 1)),
        "grouped": tuple(Piece("grouped", grouped.shape, third(i), np.s_[i : i + 1,]) for i in range(3)),
        "conv": (Piece("conv", conv.shape, np.transpose),),
        "gate_up": (Piece("gate_up", gate_up.shape, lambda t: t.reshape(2, 16, HIDDEN)),),
        "out": (Piece("out", out.shape),),
        "vocab": (Piece("vocab", vocab.shape, region=np.s_[:VOCAB,]),),
        "norm": (Piece("norm", norm.shape),),
        "zero": (),
    }
    heads = [array.reshape(KV, -1, DIM, HIDDEN) for array in (q, k, v)]
    expected = {
        "qkv": np.concatenate(heads, axis=1),
        "grouped": grouped.reshape(HEADS, 3, DIM, HIDDEN).transpose(1, 0, 2, 3),
        "conv": conv.T,
        "gate_up": gate_up.reshape(2, 16, HIDDEN),
        "out": out,
        "vocab": np.concatenate([vocab, np.zeros((64 - VOCAB, HIDDEN), BF16)]),
        "norm": norm,
        "zero": np.zeros(8, BF16),
    }
    return folder, sources, expected


SPECS = {
    "qkv": PartitionSpec("tensor"),
    "grouped": PartitionSpec(None, "tensor"),
    "conv": PartitionSpec("tensor"),
    "gate_up": PartitionSpec(None, "tensor"),
    "out": PartitionSpec(None, "tensor"),
    "vocab": PartitionSpec("tensor"),
    "norm": PartitionSpec(),
    "zero": PartitionSpec("tensor"),
}


def targets(expected: dict[str, np.ndarray], mesh: Mesh, dtype: np.dtype = BF16) -> dict[str, Target]:
    return {path: Target(array.shape, dtype, NamedSharding(mesh, SPECS[path])) for path, array in expected.items()}


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (2, 4), (8, 1), (1, 4)], ids=str)
def test_a_model_of_every_layout(tmp_path: Path, shape: tuple[int, int], dtype: np.dtype):
    folder, sources, expected = model(tmp_path)
    with Checkpoint(folder) as checkpoint:
        loaded = load(checkpoint, sources, targets(expected, mesh(*shape), dtype))
    assert list(loaded) == list(expected)
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), array.astype(dtype), err_msg=path)


def test_every_byte_is_read_once_though_every_shard_lies_on_two_devices(tmp_path: Path):
    folder, sources, expected = model(tmp_path)
    with Recording(folder) as checkpoint:
        load(checkpoint, sources, targets(expected, mesh(2, 4)))
        for name in checkpoint.tensors:
            assert (checkpoint.count(name) == 1).all(), name
        assert checkpoint.reads.sum() == checkpoint.nbytes


def test_only_the_bytes_of_the_own_shards_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As in a process that holds the second of four tensor shards."""
    folder, sources, expected = model(tmp_path)
    on = mesh(1, 4)
    mine = on.devices[0, 1]
    real = NamedSharding.addressable_devices_indices_map

    def own(self: NamedSharding, shape: tuple[int, ...]) -> Any:
        return {device: index for device, index in real(self, shape).items() if device == mine}

    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", own)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda shape, sharding, arrays, dtype: arrays)
    with Recording(folder) as checkpoint:
        loaded: dict[str, Any] = load(checkpoint, sources, targets(expected, on))
        read = {name: checkpoint.count(name) for name in checkpoint.tensors}
    for path, array in expected.items():
        (only,) = loaded[path]
        np.testing.assert_array_equal(np.asarray(only), array[real(NamedSharding(on, SPECS[path]), array.shape)[mine]])
    wanted = {name: np.zeros_like(count) for name, count in read.items()}
    wanted["q"].reshape(4, -1)[1] = 1
    wanted["k"].reshape(4, -1)[1] = 1
    wanted["v"].reshape(4, -1)[1] = 1
    wanted["grouped"].reshape(4, -1)[1] = 1
    wanted["conv"][:, 4:8] = 1
    wanted["gate_up"].reshape(2, 4, -1)[:, 1] = 1
    wanted["out"][:, 12:24] = 1
    wanted["vocab"][16:32] = 1
    wanted["norm"][:] = 1
    for name, count in read.items():
        np.testing.assert_array_equal(count, wanted[name], err_msg=name)


ALL_16_BIT = np.arange(2**16, dtype=np.uint16)


def same(got: np.ndarray, expected: np.ndarray) -> None:
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(bits(got)[~nan], bits(expected)[~nan])


@pytest.mark.parametrize("target", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("kind", [BF16, F16, F32, F64], ids=str)
@pytest.mark.parametrize("chunk", [1 << 10, 1 << 24])
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in cast:RuntimeWarning")
def test_casts_of_every_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: np.dtype, target: np.dtype, chunk: int
):
    """Every 16-bit pattern, subnormals and infinities with them; and float32 values around every rounding boundary."""
    if kind.itemsize == 2:
        values = ALL_16_BIT.view(kind)
    else:
        halves = ALL_16_BIT.astype(np.uint32) << 16
        values = np.concatenate([halves, halves | 0x7FFF, halves | 0x8000, halves | 0x8001]).view(F32).astype(kind)
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    with Checkpoint(write(tmp_path, {"x": values})) as checkpoint:
        on = SingleDeviceSharding(jax.devices()[0])
        got = load(checkpoint, {"p": (Piece("x", values.shape),)}, {"p": Target(values.shape, target, on)})["p"]
    same(np.asarray(got), values.astype(F32).astype(target))


def test_pieces_of_unlike_dtypes(tmp_path: Path):
    tensors = {name: random(np.random.default_rng(2), (2, 4), kind) for name, kind in (("a", BF16), ("b", F32))}
    sources: Sources = {"p": (Piece("a", (2, 4), region=np.s_[:2,]), Piece("b", (2, 4), region=np.s_[2:,]))}
    with Checkpoint(write(tmp_path, tensors)) as checkpoint:
        sharding = NamedSharding(mesh(), PartitionSpec("data"))
        for target in (BF16, F32):
            got = load(checkpoint, sources, {"p": Target((4, 4), target, sharding)})["p"]
            np.testing.assert_array_equal(got[:2], tensors["a"].astype(target))
            np.testing.assert_array_equal(got[2:], tensors["b"].astype(target))


def test_arrays_outlive_the_files(tmp_path: Path):
    folder, sources, expected = model(tmp_path)
    with Checkpoint(folder) as checkpoint:
        loaded = load(checkpoint, sources, targets(expected, mesh()))
        with open(folder / "model.safetensors", "r+b") as file:  # in place: a mapping of it would see this
            file.write(b"\xff" * os.path.getsize(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), array)


def test_loaded_arrays_may_be_donated(tmp_path: Path):
    folder, sources, expected = model(tmp_path)
    with Checkpoint(folder) as checkpoint:
        loaded = load(checkpoint, sources, targets(expected, mesh()))
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(loaded["norm"])
    for shard in doubled.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), expected["norm"] * BF16.type(2))


def test_scalars_and_empty_parameters(tmp_path: Path):
    tensors = {"s": np.array(3.5, F32), "e": np.zeros((0, 4), F32)}
    sources: Sources = {"s": (Piece("s", ()),), "e": (Piece("e", (0, 4)),)}
    sharding = NamedSharding(mesh(), PartitionSpec())
    with Checkpoint(write(tmp_path, tensors)) as checkpoint:
        for dtype in (F32, BF16):
            got = load(checkpoint, sources, {"s": Target((), dtype, sharding), "e": Target((0, 4), dtype, sharding)})
            assert float(got["s"]) == 3.5
            assert got["e"].shape == (0, 4)
            assert got["e"].dtype == dtype


@given(
    shape=st.lists(st.integers(0, 12), max_size=4).map(tuple),
    itemsize=st.sampled_from([1, 2, 4]),
    chunk=st.integers(4, 500),
)
def test_chunks_tile_the_shape_in_order(shape: tuple[int, ...], itemsize: int, chunk: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK_BYTES", chunk)
        boxes = list(module.cut(shape, itemsize))
    whole = np.arange(int(np.prod(shape))).reshape(shape)
    parts = [whole[box] for box in boxes]
    assert all(part.nbytes // 8 * itemsize <= chunk for part in parts)
    np.testing.assert_array_equal(np.concatenate([part.reshape(-1) for part in parts]), whole.reshape(-1))


def test_large_matrices_go_in_equal_chunks():
    assert len({module.shape_of(box) for box in module.cut((11008, 4096), 2)}) == 1


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ((Piece("x", (2, 3)),), r"x has shape \(2, 3\) after its view, its region \(4, 3\)"),
        ((Piece("x", (2, 3), region=np.s_[:2, :, :]),), "expected a region of 2 axes"),
        ((Piece("x", (2, 3), region=np.s_[::2,]),), "steps of 1"),
        ((Piece("x", (2, 3), lambda t: t + 0, np.s_[:2,]),), "got a copy of shape"),
        (tuple(Piece("x", (2, 3), region=np.s_[i : i + 2,]) for i in range(3)), "its pieces overlap"),
    ],
)
def test_pieces_that_do_not_fit(tmp_path: Path, pieces: tuple[Piece, ...], message: str):
    target = Target((4, 3), F32, SingleDeviceSharding(jax.devices()[0]))
    with (
        Checkpoint(write(tmp_path, {"x": np.ones((2, 3), F32)})) as checkpoint,
        pytest.raises(ValueError, match=message),
    ):
        load(checkpoint, {"p": pieces}, {"p": target})


@pytest.mark.parametrize("target", [F32, BF16], ids=str)
def test_a_fault_in_one_thread_ends_the_load(tmp_path: Path, target: np.dtype):
    class Faulty(Checkpoint):
        reads = 0

        def read(self, name: str, source: np.ndarray, out: np.ndarray) -> None:
            self.reads += 1
            if name == "x7":
                raise CheckpointError("the disk is gone")
            super().read(name, source, out)

    tensors = {f"x{i}": np.ones((16, 16), F32) for i in range(200)}
    sources: Sources = {name: (Piece(name, (16, 16)),) for name in tensors}
    on = SingleDeviceSharding(jax.devices()[0])
    with Faulty(write(tmp_path, tensors)) as checkpoint, pytest.raises(CheckpointError, match="the disk is gone"):
        load(checkpoint, sources, {name: Target((16, 16), target, on) for name in tensors})
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("jaxinfer-load")]


def test_a_file_that_shrinks_meanwhile(tmp_path: Path):
    folder, sources, expected = model(tmp_path)
    with Checkpoint(folder) as checkpoint:
        os.truncate(folder / "model.safetensors", 4000)
        with pytest.raises(CheckpointError, match="changed its size"):
            load(checkpoint, sources, targets(expected, mesh()))


def test_progress_is_in_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder, sources, expected = model(tmp_path)
    with Checkpoint(folder) as checkpoint:
        load(checkpoint, sources, targets(expected, mesh()))
        assert capsys.readouterr().err == ""
        load(checkpoint, sources, targets(expected, mesh()), progress=True)
    assert "loading: 100%" in capsys.readouterr().err


def test_staging_is_bounded():
    assert module.MAX_THREADS * module.CHUNK_BYTES <= 512 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_on_a_gpu(tmp_path: Path, dtype: np.dtype):
    """Small parameters and one of several chunks, of which each reuses the staging buffers of others."""
    folder, sources, expected = model(tmp_path / "small")
    gpu = Mesh(np.array(jax.devices("gpu")[:1]).reshape(1, 1), ("data", "tensor"))
    with Checkpoint(folder) as checkpoint:
        loaded = load(checkpoint, sources, targets(expected, gpu, dtype))
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), array.astype(dtype), err_msg=path)
    large = {f"x{i}": random(np.random.default_rng(i), (4099, 4096), BF16) for i in range(4)}
    sources = {name: (Piece(name, (4099, 4096)),) for name in large}
    with Checkpoint(write(tmp_path / "large", large)) as checkpoint:
        on = NamedSharding(gpu, PartitionSpec())
        loaded = load(checkpoint, sources, {name: Target((4099, 4096), dtype, on) for name in large})
    for path, array in large.items():
        np.testing.assert_array_equal(np.asarray(loaded[path]), array.astype(dtype), err_msg=path)


PEAK = """
import json, sys
from pathlib import Path
import jax, numpy as np, ml_dtypes
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from jaxinfer.checkpoints.folder import Checkpoint
from jaxinfer.checkpoints.loader import Target, load
from jaxinfer.models.sources import Piece

def memory(field):
    return int(next(l for l in open("/proc/self/status") if l.startswith(field)).split()[1]) << 10

checkpoint = Checkpoint(sys.argv[1])
mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "tensor"))
specs = {"column": P(None, "tensor")}
views = {"transposed": np.transpose}
dtype = np.dtype(ml_dtypes.bfloat16)
jax.device_put(np.ones(4), jax.devices()[1]).block_until_ready()
baseline = memory("VmRSS")
sources, targets = {}, {}
for name, info in checkpoint.tensors.items():
    kind, shape = name.split(".")[0], info.shape
    view = views.get(kind, lambda t: t)
    sources[name] = (Piece(name, shape, view),)
    shape = view(checkpoint.tensor(name)).shape
    targets[name] = Target(shape, dtype, NamedSharding(mesh, specs.get(kind, P("tensor"))))
arrays = load(checkpoint, sources, targets)
buffers = {s.data.unsafe_buffer_pointer(): s.data.nbytes for a in arrays.values() for s in a.addressable_shards}
size = sum(buffers.values())
print(json.dumps({"baseline": baseline, "peak": memory("VmHWM"), "size": size}))
"""


def test_peak_memory(tmp_path: Path):
    """1 GiB above the parameters is promised; they are 0.9 GB, so that a second copy of them would show."""
    header: dict[str, Any] = {}
    end = 0
    tensors = {"whole": ("BF16", (60_000, 4096)), "cast": ("F32", (12_288, 4096))}
    for kind in ("row", "column", "transposed"):
        tensors |= {f"{kind}.{i}": ("BF16", (4096, 4096)) for i in range(2)}
    for name, (dtype, shape) in tensors.items():
        size = shape[0] * shape[1] * (2 if dtype == "BF16" else 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)  # sparse: read as zeros, through the page cache as ever
    root = Path(jaxinfer.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    got = json.loads(result.stdout)
    assert got["size"] > 0.85e9
    above = got["peak"] - got["baseline"] - got["size"]
    assert above <= 512 << 20, f"{above / 2**30:.2f} GiB above the parameters"
