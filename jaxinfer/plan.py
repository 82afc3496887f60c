"""Where every byte of a model lives, and what that bounds; computed before anything is loaded."""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxinfer import hardware as machine
from jaxinfer.checkpoints import Store
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.generation.kv_cache import blocks_for
from jaxinfer.generation.scheduler import power_of_two
from jaxinfer.hardware import Hardware
from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.models.spec import Layout, ModelSpec
from jaxinfer.paging import tiers as paging
from jaxinfer.paging.memory import usable_host
from jaxinfer.paging.tiers import Tiers
from jaxinfer.pretrained import DTYPES, Pretrained
from jaxinfer.sizes import parse_bytes, size
from pallas_kernels import BLOCK_SIZE, SCORE_BYTES
from sharding import MeshError, ShardingRules, make_mesh, mesh_sizes

# Of the memory that a device reports: what XLA's own allocations and fragmentation need is left out.
USABLE = 0.92
# KV cache of a CPU where the caller gives no size: enough for notebooks and tests, small beside a laptop's memory.
CPU_CACHE_BYTES = 2 << 30
CPU_WORKSPACE_TOKENS = 512
BOUND_CONTEXT = 512
"""Tokens of the sequences whose bounds a plan shows."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan:
    """How a model is laid out over a mesh.

    Attributes:
        spec: the architecture.
        layout: how it is laid out for the ``tensor`` axis.
        rules: logical axis -> mesh axis.
        mesh: size of each mesh axis.
        dtype: of parameters, activations and cache.
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
        groups = self.layout.kv_groups // self.mesh.get("tensor", 1)
        itemsize = jnp.dtype(self.dtype).itemsize
        return 2 * self.spec.num_layers * groups * BLOCK_SIZE * self.spec.head_dim * itemsize

    @property
    def cache_bytes_per_device(self) -> int:
        """Bytes of the KV cache on each device."""
        return self.num_blocks * self.block_bytes_per_device

    @property
    def workspace_bytes_per_device(self) -> int:
        """An upper estimate of the temporary arrays of the largest prefill step, in bytes.

        Activations of its tokens; scores, weights and weights in the model's dtype; keys, values and masked values
        gathered from the blocks of one layer; logits.
        """
        spec, tensor = self.spec, self.mesh.get("tensor", 1)
        rows, size = self.micro_tokens, jnp.dtype(self.dtype).itemsize
        width = 4 * spec.hidden + (3 * spec.intermediate + 3 * spec.heads * spec.head_dim) // tensor
        scores = min(4 * rows * spec.heads // tensor * self.micro_blocks * BLOCK_SIZE, SCORE_BYTES) * 3
        read = self.micro_blocks
        if self.tiers is not None and self.hardware.kind == "cpu":  # there, decode gathers what it reads
            read = max(read, self.slots * blocks_for(self.max_model_len))
        gathered = 2 * read * self.block_bytes_per_device // spec.num_layers
        logits = 3 * 4 * spec.vocab_size * max(self.slots, 16)
        # Hidden states of a pass wait between the layers, and are put together at the end.
        waiting = 0 if self.tiers is None else (self.prefill_tokens + 2 * rows) * spec.hidden * size
        return rows * width * size * 2 + scores + gathered + logits + waiting

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
        return paging.at_least(self, bandwidth and 1e3 * self.step_bytes(batch, context) / bandwidth)

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
            if path.startswith("layers.") and len(info.shape) > 1
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
        memory = self.hardware.memory
        devices, shards = self.devices, self.shards
        cache = self.cache_bytes_per_device
        tokens = (self.num_blocks - 1) * BLOCK_SIZE
        table = [
            ("model", self.spec.family, f"{sum(math.prod(i.shape) for i in self.parameters.values()):,} parameters"),
            ("dtype", self.dtype, ""),
            (
                "mesh",
                " ".join(f"{a}={n}" for a, n in self.mesh.items() if n > 1) or "one device",
                f"{devices} x {self.hardware.kind}",
            ),
            ("weights (device)", size(self.weight_bytes_per_device), size(self.weight_bytes_per_device * devices)),
            (f"KV cache (device), {tokens:,} tokens a shard", size(cache), size(cache * devices)),
            ("workspace (device), at most", size(self.workspace_bytes_per_device), ""),
            *paging.rows(self),
            ("memory", "unknown" if memory is None else size(memory), ""),
            ("fits", {True: "yes", False: "no", None: "unknown"}[self.fits], ""),
            ("slots", str(self.slots), f"{self.slots * shards} sequences at once"),
            ("longest sequence", f"{self.max_model_len:,} tokens", ""),
        ]
        context = min(BOUND_CONTEXT, self.max_model_len)
        bounds = [(f"prefill, at least (1 x {context} tokens)", self.prefill_milliseconds(1, context), "")]
        for batch in dict.fromkeys((1, self.slots)):
            bound = self.step_milliseconds(batch, context)
            rate = "" if bound is None else f"{1e3 * batch * shards / bound:,.0f} tokens/s at most"
            bounds.append((f"decode step, at least (batch {batch} a shard, context {context})", bound, rate))
        table += [(what, "rates unknown" if ms is None else f"{ms:.3g} ms", rate) for what, ms, rate in bounds]
        return table

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values, sizes in bytes and times in ms."""
        context = min(BOUND_CONTEXT, self.max_model_len)
        return {
            "family": self.spec.family,
            "dtype": self.dtype,
            "mesh": dict(self.mesh),
            "device": self.hardware.kind,
            "device_memory": self.hardware.memory,
            "parameters": sum(math.prod(info.shape) for info in self.parameters.values()),
            "weight_bytes": self.weight_bytes,
            "per_device": {
                "weight_bytes": self.weight_bytes_per_device,
                "cache_bytes": self.cache_bytes_per_device,
                "workspace_bytes": self.workspace_bytes_per_device,
                "total_bytes": self.total_bytes_per_device,
            },
            "tiers": {"device": self.total_bytes_per_device * self.devices} | paging.elsewhere(self),
            "paging": paging.to_dict(self),
            "fits": self.fits,
            "slots": self.slots,
            "kv_blocks": self.num_blocks,
            "max_model_len": self.max_model_len,
            "bounds": {
                "context": context,
                "prefill_ms": self.prefill_milliseconds(1, context),
                "step_ms": {
                    "batch_1": self.step_milliseconds(1, context),
                    "all_slots": self.step_milliseconds(self.slots, context),
                },
                "measured": self.hardware.measured,
            },
        }

    def __str__(self) -> str:
        rows = [("", "each device", "in all"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows()
        )
        return f"<table><tr><th></th><th>each device</th><th>in all</th></tr>{body}</table>"


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
    offload: str | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
    on_disk: bool = True,
    must_fit: bool = True,
) -> Plan:
    """Lay a model out over a mesh.

    Args:
        spec: the architecture.
        mesh: size of each mesh axis.
        dtype: of parameters, activations and cache: ``float32``, ``bfloat16`` or ``float16``.
        hardware: one device of the mesh.
        max_batch: sequences that decode together, over all data shards; rounded up to a multiple of them.
        max_model_len: most tokens of a sequence; the model's context length where None.
        kv_blocks: KV blocks of 64 tokens on each data shard. None: enough for every slot at full length, as far as the
            memory goes.
        decode_chunk, prefill_chunk, prefill_tokens: see :class:`Plan`.
        rules: logical axis -> mesh axis.
        offload, device_memory, host_memory: as in :func:`jaxinfer.init_inference`.
        on_disk: whether the checkpoint is a store, from which layers can be read at every step.
        must_fit: otherwise, what does not fit is planned all the same, with a cache for one sequence of full length.

    Raises:
        ConfigError: a size that is not a positive integer, an unknown dtype, ``max_model_len`` over the context length;
            layers on disk without a store.
        CapacityError: the memory does not hold the weights and a useful cache.
        sharding.MeshError: rules that the steps do not follow.
    """
    _check_rules(rules or ShardingRules(), mesh)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
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
    paging.check_offload(offload, device_memory, host_memory)
    layout = Layout.of(spec, mesh.get("tensor", 1))
    shards = mesh.get("data", 1)
    longest = max_model_len or spec.context_length
    slots = -(-max_batch // shards)
    if device_memory is not None:
        least = device_memory if hardware.memory is None else min(hardware.memory, device_memory)
        hardware = dataclasses.replace(hardware, memory=least)
    listed = parameters(abstract(spec, layout, jnp.dtype(dtype)))

    def build(blocks: int, tiers: Tiers | None = None) -> Plan:
        # Paged, a step is as long as a transfer of the model, whatever it computes: so one token and many prompts.
        chunk, tokens = (16, 2048) if tiers is None else (1, paging.pass_tokens(tiers, spec.hidden, dtype))
        one = min(longest, prefill_chunk or (512 if tiers is None else prefill_tokens or tokens))
        return Plan(
            spec=spec, layout=layout, rules=rules or ShardingRules(), mesh=dict(mesh), dtype=dtype, parameters=listed,
            hardware=hardware, slots=slots, num_blocks=blocks, max_model_len=longest,
            decode_chunk=decode_chunk or chunk, prefill_chunk=one, prefill_tokens=prefill_tokens or tokens, tiers=tiers,
        )  # fmt: skip

    def paged() -> Plan:
        wanted = slots * blocks_for(longest) + 1 if kv_blocks is None else kv_blocks + 1
        if kv_blocks is None and hardware.kind == "cpu":
            wanted = max(2, min(wanted, CPU_CACHE_BYTES // build(2).block_bytes_per_device))
        cap = device_memory or (None if hardware.memory is None else int(hardware.memory * USABLE))
        first = paging.unassigned(build(2), str(offload), cap, host_memory)
        given = kv_blocks is not None
        return paging.assign(build, first, wanted=wanted, given=given, on_disk=on_disk, must_fit=must_fit)

    if offload in ("host", "disk"):
        return paged()
    if offload == "auto":
        common = blocks_for(min(longest, BOUND_CONTEXT))
        whole = build(slots * common + 1 if kv_blocks is None else kv_blocks + 1)
        if whole.fits is False:
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
    offload: str | None = None,
    device_memory: int | str | None = None,
    host_memory: int | str | None = None,
) -> Plan:
    """Say where every byte of a model would live and what that bounds, without loading it.

    Reads the configuration and the headers of the weights, and checks them as :func:`jaxinfer.init_inference` does. A
    plan that does not fit is no error here: it says ``fits`` False.

    Args:
        model, mesh, dtype: as in :func:`jaxinfer.init_inference`.
        device: a device that need not be here, by name (``"H200"``; :data:`jaxinfer.hardware.KNOWN` lists them) or
            described. Then no device is touched, the mesh may ask for any number of them, and None asks for one.
        max_batch, max_model_len, kv_blocks, decode_chunk, prefill_chunk, prefill_tokens, rules: as in
            :func:`jaxinfer.init_inference`.
        offload, device_memory, host_memory: likewise; with another device, host_memory is without limit where None.

    Raises:
        ConfigError, CheckpointError, sharding.MeshError: as in :func:`jaxinfer.init_inference`; also ConfigError for a
            device that is not known.
    """
    with Pretrained(model) as pretrained:
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
            prefill_tokens=prefill_tokens, rules=rules, offload=offload, device_memory=device_memory,
            host_memory=host_memory, on_disk=isinstance(pretrained.checkpoint, Store), must_fit=False,
        )  # fmt: skip
        pretrained.check(found.layout)
    return found
