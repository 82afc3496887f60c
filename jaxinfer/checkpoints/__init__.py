"""Checkpoints: safetensors files, folders and stores, hub ids, and the way from them onto devices."""

from jaxinfer.checkpoints.dummy import dummy
from jaxinfer.checkpoints.folder import Checkpoint, check, confined
from jaxinfer.checkpoints.hub import resolve
from jaxinfer.checkpoints.loader import Target, load
from jaxinfer.checkpoints.quantizing import load_quantized, packed, unpacked
from jaxinfer.checkpoints.restore import restore
from jaxinfer.checkpoints.safetensors import SafetensorsFile, TensorInfo
from jaxinfer.checkpoints.store import Store, Verified, is_store, verify

__all__ = [
    "Checkpoint", "SafetensorsFile", "Store", "Target", "TensorInfo", "Verified", "check", "confined", "dummy",
    "is_store", "load", "load_quantized", "packed", "resolve", "restore", "unpacked", "verify",
]  # fmt: skip
