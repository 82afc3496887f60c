"""Checkpoints: safetensors files, folders and hub ids, and the way from them onto devices."""

from jaxinfer.checkpoints.folder import Checkpoint, check, confined
from jaxinfer.checkpoints.hub import resolve
from jaxinfer.checkpoints.loader import Target, load
from jaxinfer.checkpoints.safetensors import SafetensorsFile, TensorInfo

__all__ = ["Checkpoint", "SafetensorsFile", "Target", "TensorInfo", "check", "confined", "load", "resolve"]
