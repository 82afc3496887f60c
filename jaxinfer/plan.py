"""Where every byte of a model lives, and what that bounds; computed before anything is loaded."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import hardware as machine
from jaxinfer import plan_table as table
from jaxinfer.checkpoints import Store
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.generation.kv_cache import blocks_for
from jaxinfer.generation.scheduler import power_of_two
from jaxinfer.hardware import Hardware
from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.models.shapes import shapes_of
from jaxinfer.models.spec import Layout, ModelSpec
from jaxinfer.paging import tiers as paging
from jaxinfer.paging.memory import usable_host
from jaxinfer.paging.tiers import Tiers
from jaxinfer.pretrained import DTYPES, Pretrained
from jaxinfer.programs import PARTED_LAYERS
from jaxinfer.quantization import check_method
from jaxinfer.sizes import parse_bytes, size
from pallas_kernels import BLOCK_SIZE, SCORE_BYTES, Choice, choices
from sharding import MeshError, ShardingRules, make_mesh, mesh_sizes

# Of the memory that a device reports: what XLA's own allocations and fragmentation need is left out.
USABLE = 0.92
# KV cache of a CPU where the caller gives no size: enough for notebooks and tests, small beside a laptop's memory.
CPU_CACHE_BYTES = 2 << 30
CPU_WORKSPACE_TOKENS = 512
KV_DTYPES: dict[str, str | None] = {"auto": None, "int8": "int8", "fp8": "float8_e4m3fn"}
"""Names of ``kv_dtype``, and JAX's; None is that of the model."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """How a model is laid out over a mesh.

    Attributes:
        spec: the architecture.
        layout: how it is laid out for the ``tensor`` axis.
        rules: logical axis -> mesh axis.
        mesh: size of each mesh axis.
        dtype: of parameters and activations.
        kv_dtype: of cached keys and values: ``auto`` is ``dtype``; ``int8`` or ``fp8`` with a factor for each head of
            each token.
        quantize: how the weights of attention and MLP are, ``int8``, ``int4`` or ``fp8``; None: of ``dtype``.
        parameters: every parameter by path.
        hardware: one device of the mesh.
        slots: sequences that decode together, on each data shard.
        num_blocks: KV blocks of each data shard, the null block included.
        max_model_len: most tokens of a sequence, prompt and output.
        decode_chunk: tokens of a decode step.
        prefill_chunk: most tokens of one sequence in a prefill step.
        prefill_tokens: most tokens of one data shard in a prefill step.
        tiers: where each layer lives, or None where all stay on the devices.
    """

    spec: ModelSpec
    layout: Layout
    rules: ShardingRules
    mesh: Mapping[str, int]
    dtype: str
    parameters: Mapping[str, ParameterInfo]
    hardware: Hardware
    slots: int
    num_blocks: int
    max_model_len: int
    decode_chunk: int
    prefill_chunk: int
    prefill_tokens: int
    quantize: str | None = None
    kv_dtype: str = "auto"
    tiers: Tiers | None = None

    @property
    def shards(self) -> int:
        """Data shards."""
        return self.mesh.get("data", 1)

    @property
    def devices(self) -> int:
        """Devices of the mesh."""
        return math.prod(self.mesh.values())

    @property
    def parameter_count(self) -> int:
        """The model's parameters; the factors of quantized weights are not counted."""
        return sum(math.prod(info.shape) for info in self.parameters.values() if not info.factors)

    @property
    def weights(self) -> str:
        """The dtype, and how weights are quantized, in words: ``bfloat16, weights int4 in groups of 128``."""
        if self.quantize is None:
            return self.dtype
        groups = {info.quantization.group for info in self.parameters.values() if info.quantization is not None}
        sizes = " and ".join(str(group) for group in sorted(filter(None, groups), reverse=True))
        return f"{self.dtype}, weights {self.quantize}{f' in groups of {sizes}' if sizes else ''}"

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, each counted once."""
        return sum(info.nbytes for info in self.parameters.values())

    @property
    def weight_bytes_per_device(self) -> int:
        """Bytes of parameters on each device; of a paged model those that stay, and the slots for the others."""
        kept = (path for path in self.parameters if self.tiers is None or not path.startswith("layers."))
        held = sum(self.parameters[path].nbytes // self._ways(self.parameters[path].axes) for path in kept)
        return held + (0 if self.tiers is None else self.tiers.device_bytes)

    @property
    def step_bytes_per_device(self) -> int:
        """Bytes of parameters that a device reads in a decode step: all but table rows that no token asks for."""
        skipped = () if self.spec.tied_head else ("embed.tokens",)
        return sum(
            info.nbytes // self._ways(info.axes)
            for path, info in self.parameters.items()
            if path not in (*skipped, "embed.positions")
        )

    @property
    def block_bytes_per_device(self) -> int:
        """Bytes of one KV block, keys and values of every layer, on each device."""
        arrays = sum(math.prod(shape[1:]) * jnp.dtype(dtype).itemsize for shape, dtype in self.cache_arrays)
        return self.spec.num_layers * arrays // self.mesh.get("tensor", 1)

    @property
    def cache_dtype(self) -> str:
        """Dtype of cached keys and values, in JAX's words."""
        return KV_DTYPES[self.kv_dtype] or self.dtype

    @property
    def cache_arrays(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Shape, over all devices, and dtype of each array of a layer's cache: a ``LayerCache``."""
        shape = (self.num_blocks * self.shards, self.layout.kv_groups, BLOCK_SIZE, self.spec.head_dim)
        factors = ((shape[:-1], "float32"),) * 2 if KV_DTYPES[self.kv_dtype] else ()
        return ((shape, self.cache_dtype),) * 2 + factors

    @property
    def cache_bytes_per_device(self) -> int:
        """Bytes of the KV cache on each device; of one in host memory, those of its windows on the device."""
        if self.tiers is None or self.tiers.kv_rows is None:
            return self.num_blocks * self.block_bytes_per_device
        return paging.KV_WINDOWS * paging.window_blocks(self) * self.block_bytes_per_device // self.spec.num_layers

    @property
    def longest_blocks(self) -> int:
        """KV blocks of the longest sequence."""
        return blocks_for(self.max_model_len)

    @property
    def slot_blocks(self) -> int | None:
        """KV blocks that each slot has of its own; None where any block may be anybody's."""
        return None if self.tiers is None or self.tiers.kv_rows is None else self.longest_blocks

    @property
    def workspace_bytes_per_device(self) -> int:
        """An upper estimate of the temporary arrays of the largest prefill step, in bytes.

        Activations of its tokens; scores and weights, also in the model's dtype; what is gathered of a layer; logits.
        """
        spec, tensor = self.spec, self.mesh.get("tensor", 1)
        rows, size = self.micro_tokens, jnp.dtype(self.dtype).itemsize
        # Where weights are gathered: all of the MLP and of the heads for own tokens, and own heads for all tokens.
        whole = 1 if self.tiers is None or self.tiers.gathering.tokens is None else tensor
        width = 4 * spec.hidden + 3 * (spec.intermediate + spec.heads * spec.head_dim * min(whole, 2)) * whole // tensor
        scores = min(4 * rows * whole * spec.heads // tensor * self.micro_blocks * BLOCK_SIZE, SCORE_BYTES) * 3
        widened = 2 * (self.layout.kv_groups // tensor) * BLOCK_SIZE * spec.head_dim * size
        read = self.micro_blocks
        if self.tiers is not None and self.hardware.platform == "cpu":  # there, decode gathers what it reads
            read = max(read, self.slots * self.longest_blocks)
        gathered = read * (self.block_bytes_per_device // spec.num_layers + widened)
        logits = 3 * 4 * spec.vocab_size * max(self.slots, 16)
        # Hidden states of a pass wait between layers, and are put together at the end; or between two programs.
        waiting = rows * (spec.num_layers >= PARTED_LAYERS) if self.tiers is None else self.prefill_tokens + 2 * rows
        return (rows * width * 2 + waiting * spec.hidden) * size + scores + gathered + logits

    @property
    def micro_tokens(self) -> int:
        """Most prompt tokens of one data shard that a layer computes at a time."""
        return self.prefill_tokens if self.tiers is None else min(self.prefill_tokens, self.tiers.micro_tokens)

    @property
    def micro_blocks(self) -> int:
        """Most KV blocks that a layer reads at a time in prefill, of several sequences; see :attr:`prefill_blocks`."""
        return max(power_of_two(blocks_for(self.max_model_len)), self.micro_tokens // 16)

    @property
    def prefill_blocks(self) -> int:
        """Most KV blocks that a prefill step of several sequences reads on one shard, padding included.

        Enough for one sequence of full length, or for as many short ones as ``prefill_tokens`` allow.
        """
        return max(power_of_two(blocks_for(self.max_model_len)), self.prefill_tokens // 16)

    @property
    def total_bytes_per_device(self) -> int:
        """Weights, cache and workspace of each device, in bytes."""
        return self.weight_bytes_per_device + self.cache_bytes_per_device + self.workspace_bytes_per_device

    @property
    def fits(self) -> bool | None:
        """Whether a device's memory holds it all; None where the memory is not known."""
        memory = self.hardware.memory
        if memory is None:
            return None
        given = None if self.tiers is None else self.tiers.device_memory
        return self.total_bytes_per_device <= (memory * USABLE if given is None else min(memory, given))

    @property
    def implementations(self) -> tuple[Choice[str], ...]:
        """Which implementation serves which operation on the plan's hardware, and why."""
        weights = {path: info.dtype for path, info in self.parameters.items()}
        shapes = shapes_of(self.spec, self.layout, self.dtype, self.cache_dtype, weights, paged=self.tiers is not None)
        return choices(self.hardware.device, shapes)

    def step_bytes(self, batch: int = 1, context: int = 0) -> float:
        """Bytes that a device must read in a decode step: parameters, and the keys and values of every sequence.

        Args:
            batch: sequences on each data shard.
            context: tokens of each.
        """
        return self.step_bytes_per_device + batch * context * self.block_bytes_per_device / BLOCK_SIZE

    def step_milliseconds(self, batch: int = 1, context: int = 0) -> float | None:
        """The least time of a decode step, in ms: :meth:`step_bytes` at the device's copy bandwidth, or the transfers.

        Returns:
            None where a rate is not known.
        """
        bandwidth = self.hardware.bandwidth
        return paging.at_least(self, bandwidth and 1e3 * self.step_bytes(batch, context) / bandwidth, batch)

    def prefill_flops(self, batch: int, tokens: int) -> float:
        """Floating-point operations of a device in the prefill of prompts, a multiply-add counted as two.

        Products with weights, and the scores and sums of causal attention without what a window would leave out. The
        head counts once a sequence, since only the last position is sampled from.

        Args:
            batch: sequences on each data shard.
            tokens: of each.
        """
        layers = sum(
            math.prod(info.shape) // self._ways(info.axes)
            for path, info in self.parameters.items()
            if path.startswith("layers.") and len(info.shape) > 1 and not info.factors
        )
        spec, tensor = self.spec, self.mesh.get("tensor", 1)
        head = spec.hidden * self.layout.vocab_rows // tensor
        attention = 2 * tokens * tokens * spec.num_layers * spec.heads * spec.head_dim // tensor
        return float(batch * (2 * (tokens * layers + head) + attention))

    def prefill_milliseconds(self, batch: int, tokens: int) -> float | None:
        """The least time of a prefill, in ms: :meth:`prefill_flops` at the device's rate, or a read of the parameters.

        Returns:
            None where the rates are not known.
        """
        matmul, bandwidth = self.hardware.matmul, self.hardware.bandwidth
        if matmul is None or bandwidth is None:
            return None
        least = max(self.prefill_flops(batch, tokens) / matmul, self.step_bytes_per_device / bandwidth)
        return paging.at_least(self, 1e3 * least)

    def _ways(self, axes: tuple[str | None, ...]) -> int:
        """Devices among which an array with these axes is divided."""
        spec = self.rules.spec(axes)
        return math.prod(self.mesh.get(axis, 1) for axis in spec if axis is not None)

    def rows(self) -> list[tuple[str, str, str]]:
        """The plan as (what, on each device, in all) rows."""
        return table.rows(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values, sizes in bytes and times in ms."""
        return table.to_dict(self)

    def __str__(self) -> str:
        return table.text(self)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return table.html(self)


def make_plan(
    spec: ModelSpec,
    mesh: Mapping[str, int],
    dtype: str,
    hardware: Hardware,
    *,
    max_batch: int = 16,
    max_model_len: int | None = None,
    kv_blocks: int | None = None,
    decode_chunk: int | None = None,
    prefill_chunk: int | None = None,
    prefill_tokens: int | None = None,
    rules: ShardingRules | None = None,
    quantize: str | None = None,
    kv_dtype: str = "auto",
    offload: str | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    kv_offload: str | None = None,
    on_disk: bool = True,
    must_fit: bool = True,
) -> Plan:
    """Lay a model out over a mesh.

    Args:
        spec: the architecture.
        mesh: size of each mesh axis.
        dtype: of parameters and activations: ``float32``, ``bfloat16`` or ``float16``.
        hardware: one device of the mesh.
        max_batch: sequences that decode together, over all data shards; rounded up to a multiple of them.
        max_model_len: most tokens of a sequence; the model's context length where None.
        kv_blocks: KV blocks of 64 tokens on each data shard. None: enough for every slot at full length, as far as the
            memory goes.
        decode_chunk, prefill_chunk, prefill_tokens: see :class:`Plan`.
        rules: logical axis -> mesh axis.
        quantize: how the weights of attention and MLP are: ``int8``, ``int4``, ``fp8`` or None.
        kv_dtype: of cached keys and values: ``auto``, ``int8`` or ``fp8``; see :class:`Plan`.
        offload, device_memory, host_memory, kv_offload: as in :func:`jaxinfer.init_inference`.
        on_disk: whether the checkpoint is a store, from which layers can be read at every step.
        must_fit: otherwise, what does not fit is planned all the same, with a cache for one sequence of full length.

    Raises:
        ConfigError: a size that is not a positive integer, an unknown dtype, ``max_model_len`` over the context length;
            int4 for a weight whose inputs on one device no group divides; layers on disk without a store.
        CapacityError: the memory does not hold the weights and a useful cache.
        sharding.MeshError: rules that the steps do not follow.
    """
    _check_rules(rules or ShardingRules(), mesh)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if kv_dtype not in KV_DTYPES:
        raise ConfigError(f"kv_dtype: expected one of {', '.join(KV_DTYPES)}, got {kv_dtype!r}")
    check_method(quantize)
    numbers = {
        "max_batch": max_batch, "max_model_len": max_model_len, "kv_blocks": kv_blocks, "decode_chunk": decode_chunk,
        "prefill_chunk": prefill_chunk, "prefill_tokens": prefill_tokens,
    }  # fmt: skip
    for name, value in numbers.items():
        optional = name != "max_batch"
        if not (value is None and optional) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{name}: expected a positive integer, got {value!r}")
    if max_model_len is not None and max_model_len > spec.context_length:
        raise ConfigError(f"max_model_len: the model's context is {spec.context_length} tokens, got {max_model_len}")
    device_memory = parse_bytes("device_memory", device_memory)
    host_memory = parse_bytes("host_memory", host_memory)
    paging.check_offload(offload, device_memory, host_memory, kv_offload, kv_blocks)
    layout = Layout.of(spec, mesh.get("tensor", 1))
    shards = mesh.get("data", 1)
    longest = max_model_len or spec.context_length
    slots = -(-max_batch // shards)
    if device_memory is not None:
        least = device_memory if hardware.memory is None else min(hardware.memory, device_memory)
        hardware = dataclasses.replace(hardware, memory=least)
    listed = parameters(abstract(spec, layout, jnp.dtype(dtype), quantize))

    def build(blocks: int, tiers: Tiers | None = None) -> Plan:
        # Paged, a step is as long as a transfer of the model, whatever it computes: so one token and many prompts.
        chunk, tokens = (16, 2048) if tiers is None else (1, paging.pass_tokens(tiers, spec.hidden, dtype))
        one = min(longest, prefill_chunk or (512 if tiers is None else prefill_tokens or tokens))
        return Plan(
            spec=spec, layout=layout, rules=rules or ShardingRules(), mesh=dict(mesh), dtype=dtype, parameters=listed,
            hardware=hardware, slots=slots, num_blocks=blocks, max_model_len=longest, quantize=quantize,
            kv_dtype=kv_dtype, decode_chunk=decode_chunk or chunk, prefill_chunk=one,
            prefill_tokens=prefill_tokens or tokens, tiers=tiers,
        )  # fmt: skip

    def paged() -> Plan:
        wanted = slots * blocks_for(longest) + 1 if kv_blocks is None else kv_blocks + 1
        if kv_blocks is None and hardware.kind == "cpu" and kv_offload is None:
            wanted = max(2, min(wanted, CPU_CACHE_BYTES // build(2).block_bytes_per_device))
        cap = device_memory or (None if hardware.memory is None else int(hardware.memory * USABLE))
        first = paging.unassigned(build(2), str(offload), cap, host_memory)
        return paging.assign(
            build, first, wanted=wanted, given=kv_blocks is not None, on_disk=on_disk, must_fit=must_fit,
            kv_offload=kv_offload,
        )  # fmt: skip

    if offload in ("host", "disk"):
        return paged()
    if offload == "auto":
        common = blocks_for(min(longest, table.BOUND_CONTEXT))
        whole = build(slots * common + 1 if kv_blocks is None else kv_blocks + 1)
        if whole.fits is False or kv_offload == "host":
            return paged()

    if kv_blocks is not None:
        plan = build(kv_blocks + 1)
        # Without the workspace, which is an estimate: what is refused here could never be allocated.
        needed = plan.weight_bytes_per_device + plan.cache_bytes_per_device
        if must_fit and hardware.memory is not None and needed > hardware.memory:
            raise CapacityError(
                f"{size(plan.weight_bytes_per_device)} of weights and kv_blocks={kv_blocks}, which are "
                f"{size(plan.cache_bytes_per_device)}, are more than the {size(hardware.memory)} of one {hardware.kind}"
            )
        return plan
    wanted = slots * blocks_for(longest) + 1
    plan = build(wanted)
    room = CPU_CACHE_BYTES if hardware.kind == "cpu" else None
    if hardware.memory is not None:
        left = int(hardware.memory * USABLE) - plan.weight_bytes_per_device - plan.workspace_bytes_per_device
        room = left if room is None else min(room, left)
    if room is None:
        return plan
    blocks = min(wanted, room // plan.block_bytes_per_device)
    if blocks < 2 and not must_fit:
        return build(blocks_for(longest) + 1)
    if blocks < 2:
        raise CapacityError(
            f"{size(plan.weight_bytes_per_device)} of weights and {size(plan.workspace_bytes_per_device)} of workspace "
            f"leave no room for a KV cache in the {size(hardware.memory or 0)} of one {hardware.kind}; "
            "use more devices on the tensor axis"
        )
    return build(blocks)


def _check_rules(rules: ShardingRules, mesh: Mapping[str, int]) -> None:
    """Refuse rules under which the collectives of a step, which are written out, would add up the wrong things."""
    for field in dataclasses.fields(rules):
        chosen, usual = getattr(rules, field.name), field.default
        free = field.name == "heads" or (field.name == "vocab" and chosen is None)  # unused; merely not divided
        divided = any(mesh.get(axis, 1) > 1 for axis in (chosen, usual) if isinstance(axis, str))
        if chosen != usual and divided and not free:
            raise MeshError(f"rule {field.name}={chosen!r}: steps are written for {usual!r} on a mesh of {dict(mesh)}")


def plan(
    model: str | Path,
    mesh: Mapping[str, int] | Mesh | None = None,
    dtype: str | None = None,
    *,
    device: str | Hardware | None = None,
    max_batch: int = 16,
    max_model_len: int | None = None,
    kv_blocks: int | None = None,
    decode_chunk: int | None = None,
    prefill_chunk: int | None = None,
    prefill_tokens: int | None = None,
    rules: ShardingRules | None = None,
    quantize: str | None = None,
    load_format: str = "auto",
    kv_dtype: str = "auto",
    offload: str | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    kv_offload: str | None = None,
) -> Plan:
    """Say where every byte of a model would live and what that bounds, without loading it.

    Reads the configuration and the headers of the weights, and checks them as :func:`jaxinfer.init_inference` does. A
    plan that does not fit is no error here: it says ``fits`` False.

    Args:
        model, mesh, dtype: as in :func:`jaxinfer.init_inference`.
        device: a device that need not be here, by name (``"H200"``; :data:`jaxinfer.hardware.KNOWN` lists them) or
            described. Then no device is touched, the mesh may ask for any number of them, and None asks for one.
        max_batch, max_model_len, kv_blocks, decode_chunk, prefill_chunk, prefill_tokens, rules, quantize, load_format,
            kv_dtype, offload, device_memory, kv_offload: as in :func:`jaxinfer.init_inference`.
        host_memory: likewise; with a device that is not here, without limit where None.

    Raises:
        ConfigError, CheckpointError, sharding.MeshError: as in :func:`jaxinfer.init_inference`; also ConfigError for a
            device that is not known.
    """
    with Pretrained(model, load_format) as pretrained:
        if device is None:
            devices = make_mesh(mesh, pretrained.limits)
            sizes, of = dict(devices.shape), machine.of(devices.devices.flat[0])
            host_memory = usable_host(offload, host_memory)
        else:
            of = machine.named(device) if isinstance(device, str) else device
            sizes = mesh_sizes(dict(mesh.shape) if isinstance(mesh, Mesh) else mesh or {}, pretrained.limits)
        found = make_plan(
            pretrained.spec, sizes, dtype or pretrained.dtype, of, max_batch=max_batch, max_model_len=max_model_len,
            kv_blocks=kv_blocks, decode_chunk=decode_chunk, prefill_chunk=prefill_chunk,
            prefill_tokens=prefill_tokens, rules=rules, quantize=pretrained.quantized(quantize), kv_dtype=kv_dtype,
            offload=offload, device_memory=device_memory, host_memory=host_memory, kv_offload=kv_offload,
            on_disk=isinstance(pretrained.checkpoint, Store), must_fit=False,
        )  # fmt: skip
        pretrained.check(found.layout)
    return found
