"""Which layers stay on the devices, which lie in host memory and which on disk; and what that bounds."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp

from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.paging import gathering as prefill
from jaxinfer.paging.gathering import Gathering
from jaxinfer.paging.packing import PAGE, Packing
from jaxinfer.sizes import size
from pallas_kernels import BLOCK_SIZE
from sharding import ShardingRules

if TYPE_CHECKING:
    from jaxinfer.plan import Plan

Tier = Literal["device", "host", "disk"]
OFFLOADS = ("host", "disk", "auto")
KV_OFFLOADS = ("host", "auto")
DEVICE_SLOTS = 2
"""Paged layers on a device at once: one computes, the next arrives."""
ROOMY_SLOTS = 3
"""The same where a layer is a small part of the memory: a layer is handed out while the one before still computes."""
ROOMY = 16
"""How many layers a device's memory must hold for :data:`ROOMY_SLOTS`."""
RING_SLOTS = 4
"""Host buffers of the disk tier: one travels to the devices, two are being read, one is ready."""
MICRO_TOKENS = 4096
"""Most prompt tokens that a layer computes at a time; a pass has many times that."""
KV_WINDOW_BYTES = 256 << 20
"""Of a layer's keys and values in host memory: what travels at a time, at most."""
KV_SHARE = 16
"""A window takes this fraction of a device's memory at most, as far as it has to hold more than one sequence."""
KV_WINDOWS = 2
"""Windows on a device at once: one computes, the next arrives, or the one before leaves."""
PASS_TOKENS = 32768
"""Most prompt tokens of a pass where nobody says: enough to hide a transfer over PCIe 5 at bfloat16, see `Tiers`."""


@dataclass(frozen=True, kw_only=True)
class Tiers:
    """Where the layers of a paged model live.

    Attributes:
        offload: what was asked for.
        layers: the tier of each layer.
        layer_bytes: bytes of each layer on each device.
        buffer_bytes: bytes of each layer in host memory, for all devices together.
        slots: paged layers that a device holds at once.
        ring: host buffers through which layers come from disk.
        micro_tokens: most prompt tokens that a layer computes at a time.
        disk: bytes per second of the disk, or None where unknown.
        kv_rows: where the KV cache lives in host memory, the sequences of each data shard whose keys and values of a
            layer travel together; it divides the plan's slots. None where the cache stays on the devices.
        kv_bytes: bytes of host memory of that cache, for all devices together.
        gathering: whether prefill gathers the weights of a layer on every device.
        device_memory, host_memory: what may be used of each device and of the host; None where nobody said and nobody
            knows.
    """

    offload: str
    layers: tuple[Tier, ...]
    layer_bytes: tuple[int, ...]
    buffer_bytes: tuple[int, ...]
    slots: int = DEVICE_SLOTS
    ring: int = RING_SLOTS
    micro_tokens: int = MICRO_TOKENS
    disk: float | None = None
    kv_rows: int | None = None
    kv_bytes: int = 0
    gathering: Gathering = field(default_factory=Gathering)
    device_memory: int | None = None
    host_memory: int | None = None

    def of(self, tier: Tier) -> list[int]:
        """The layers of a tier."""
        return [layer for layer, own in enumerate(self.layers) if own == tier]

    @property
    def paged(self) -> list[int]:
        """The layers that are not on the devices."""
        return [layer for layer, tier in enumerate(self.layers) if tier != "device"]

    @property
    def device_bytes(self) -> int:
        """Bytes of layers on each device: those that stay, the slots, and one that is gathered."""
        paged = [self.layer_bytes[layer] for layer in self.paged]
        resident = sum(self.layer_bytes[layer] for layer in self.of("device"))
        return resident + min(self.slots, len(paged)) * max(paged, default=0) + self.gathering.nbytes

    @property
    def ring_slots(self) -> int:
        """Host buffers of the disk tier."""
        return min(self.ring, len(self.of("disk")))

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory: layers that live there, the ring, and the KV cache if it lives there."""
        ring = max((self.buffer_bytes[layer] for layer in self.of("disk")), default=0) * self.ring_slots
        return ring + sum(self.buffer_bytes[layer] for layer in self.of("host")) + self.kv_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes that a pass reads from disk."""
        return sum(self.buffer_bytes[layer] for layer in self.of("disk"))

    @property
    def moved_bytes(self) -> int:
        """Bytes that a pass moves to each device."""
        return sum(self.layer_bytes[layer] for layer in self.paged)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What bounds a pass over all layers.

    Attributes:
        link_ms: moving the paged layers, and keys and values from host memory, to each device, in ms; None where the
            rate is not known.
        disk_ms: reading those on disk.
        compute_ms: a decode step of the plan's slots if every layer were there.
        by: the slowest of them: ``link``, ``disk`` or ``compute``; None where a rate is missing.
        hidden_from: tokens a pass from which compute takes as long as link and disk; None where a rate is missing.
    """

    link_ms: float | None
    disk_ms: float | None
    compute_ms: float | None
    by: str | None
    hidden_from: int | None

    @property
    def fetch_ms(self) -> float | None:
        """The least time in which all paged layers come."""
        return None if self.link_ms is None or self.disk_ms is None else max(self.link_ms, self.disk_ms)

    @property
    def step_ms(self) -> float | None:
        """The least time of a decode step."""
        return None if self.fetch_ms is None else max(self.fetch_ms, self.compute_ms or 0.0)


def layer_packings(
    parameters: Mapping[str, ParameterInfo], count: int, rules: ShardingRules, mesh: Mapping[str, int]
) -> list[Packing]:
    """The layout of every layer's buffer."""
    own: list[dict[str, ParameterInfo]] = [{} for _ in range(count)]
    for path, info in parameters.items():
        if path.startswith("layers."):
            _, index, name = path.split(".", 2)
            own[int(index)][name] = info
    return [Packing.of(infos, rules, mesh) for infos in own]


def pass_tokens(tiers: Tiers, hidden: int, dtype: str) -> int:
    """Prompt tokens of a pass where nobody says: their hidden states take a tenth of a device's memory at most."""
    if tiers.device_memory is None:
        return PASS_TOKENS
    room = tiers.device_memory // (10 * hidden * jnp.dtype(dtype).itemsize)
    return max(64, min(PASS_TOKENS, 1 << max(room, 1).bit_length() - 1))


def check_offload(
    offload: str | None,
    device_memory: int | None,
    host_memory: int | None,
    kv_offload: str | None = None,
    kv_blocks: int | None = None,
) -> None:
    """Refuse what is no way to offload.

    Raises:
        ConfigError: naming the option.
    """
    if offload is not None and offload not in OFFLOADS:
        raise ConfigError(f"offload: expected None or one of {', '.join(OFFLOADS)}, got {offload!r}")
    if offload is None and host_memory is not None:
        raise ConfigError("host_memory: only with offload, which says what goes there")
    if kv_offload is not None and kv_offload not in KV_OFFLOADS:
        raise ConfigError(f"kv_offload: expected None or one of {', '.join(KV_OFFLOADS)}, got {kv_offload!r}")
    if kv_offload is not None and offload is None:
        raise ConfigError("kv_offload: only with offload, since keys and values travel layer by layer as weights do")
    if kv_offload is not None and kv_blocks is not None:
        raise ConfigError("kv_blocks: not with kv_offload, where every sequence has room for max_model_len tokens")


def unassigned(plan: Plan, offload: str, device_memory: int | None, host_memory: int | None) -> Tiers:
    """Tiers of a plan with every layer on disk, to begin with."""
    count = plan.spec.num_layers
    packings = layer_packings(plan.parameters, count, plan.rules, plan.mesh)
    on_disk: tuple[Tier, ...] = tuple("disk" for _ in range(count))
    largest = max(packing.moved_bytes for packing in packings)
    roomy = device_memory is not None and device_memory >= ROOMY * largest
    return Tiers(
        offload=offload,
        layers=on_disk,
        layer_bytes=tuple(packing.moved_bytes for packing in packings),
        buffer_bytes=tuple(packing.nbytes * packing.parts for packing in packings),
        slots=ROOMY_SLOTS if roomy else DEVICE_SLOTS,
        ring=RING_SLOTS,
        micro_tokens=MICRO_TOKENS,
        device_memory=device_memory,
        host_memory=host_memory,
    )


def window_blocks(plan: Plan) -> int:
    """KV blocks of the largest window that a device of a plan with its cache in host memory holds."""
    assert plan.tiers is not None and plan.tiers.kv_rows is not None
    return max(plan.tiers.kv_rows * plan.longest_blocks, plan.micro_blocks)


def kv_array_bytes(plan: Plan, rows: int) -> list[int]:
    """Bytes of each array of a layer's cache, of one device and one group of slots, padded to whole pages."""
    own = plan.mesh.get("tensor", 1) * plan.num_blocks * plan.shards
    sizes = [math.prod(shape) * jnp.dtype(dtype).itemsize // own for shape, dtype in plan.cache_arrays]
    return [-(-rows * plan.longest_blocks * nbytes // PAGE) * PAGE for nbytes in sizes]


def kv_in_host(plan: Plan, first: Tiers) -> Tiers:
    """Tiers with the KV cache in host memory.

    Args:
        plan: of all blocks that its slots can use.
        first: its tiers.
    """
    cap = first.device_memory
    most = KV_WINDOW_BYTES if cap is None else min(KV_WINDOW_BYTES, cap // KV_SHARE)
    row = plan.longest_blocks * plan.block_bytes_per_device // plan.spec.num_layers
    # A device's slots in equal groups: each is computed at once, by the same function.
    rows = max(n for n in range(1, plan.slots + 1) if plan.slots % n == 0 and (n * row <= most or n == 1))
    parts = plan.shards * plan.mesh.get("tensor", 1)
    groups = plan.spec.num_layers * (plan.slots // rows)
    return dataclasses.replace(first, kv_rows=rows, kv_bytes=parts * groups * sum(kv_array_bytes(plan, rows)))


def _pays(plan: Plan, first: Tiers, blocks: int) -> bool:
    """Whether more tokens a second come with the cache in host memory than with one of ``blocks`` on the devices.

    As long as the link bounds a step: a sequence on the devices costs nothing, one in host memory the transfer of its
    keys and values, but all slots share the transfer of the layers.
    """
    here = max(0, blocks - 1) // plan.longest_blocks
    if here >= plan.slots:
        return False
    layers, each = sum(first.layer_bytes), plan.longest_blocks * plan.block_bytes_per_device
    return plan.slots / (layers + plan.slots * each) > here / layers


def assign(build: Callable[[int, Tiers], Plan], first: Tiers, **options: Any) -> Plan:
    """As :func:`assign_to`; weights are gathered in prefill where that pays and there is room for it."""
    gathering = prefill.choose(build(2, first), first)
    if gathering.tokens is not None:
        with contextlib.suppress(CapacityError):
            found = assign_to(build, dataclasses.replace(first, gathering=gathering), **options)
            if found.fits is not False:
                return found
        gathering = Gathering(why=f"no room for {size(gathering.nbytes)}, a whole layer")
    return assign_to(build, dataclasses.replace(first, gathering=gathering), **options)


def assign_to(
    build: Callable[[int, Tiers], Plan],
    first: Tiers,
    *,
    wanted: int,
    given: bool,
    on_disk: bool,
    must_fit: bool,
    kv_offload: str | None = None,
) -> Plan:
    """Decide where each layer lives, and how many KV blocks there are.

    The cache comes first: each block lets a transferred layer serve more tokens, while a layer that stays saves its
    own transfer only.

    Args:
        build: makes a plan of a number of KV blocks and tiers.
        first: tiers with every layer on disk.
        wanted: KV blocks of each data shard that are of use.
        given: whether ``wanted`` is what the caller asked for, not to be reduced.
        on_disk: whether the checkpoint is a store, from which layers can be read.
        must_fit: otherwise what does not fit is planned all the same.
        kv_offload: ``host`` has the cache in host memory, ``auto`` where that gives more tokens a second.

    Raises:
        CapacityError: device or host memory is too small.
        ConfigError: layers would have to be read from disk, and the checkpoint is not a store.
    """
    count, cap = len(first.layers), first.device_memory
    plan = build(2, first)
    while cap is not None and first.micro_tokens > 64 and plan.workspace_bytes_per_device > cap // 4:
        first = dataclasses.replace(first, micro_tokens=first.micro_tokens // 2)
        plan = build(2, first)
    fixed = plan.total_bytes_per_device - plan.cache_bytes_per_device
    blocks, resident = wanted, 0
    if kv_offload is not None:
        whole = build(wanted, first)
        fitting = wanted if cap is None else (cap - fixed) // plan.block_bytes_per_device
        there = kv_in_host(whole, first)
        fits = cap is None or build(wanted, there).total_bytes_per_device <= cap
        if kv_offload == "host" or (fits and _pays(whole, first, fitting)):
            first = there
    if cap is not None and first.kv_rows is not None:
        whole = build(wanted, first)
        if must_fit and whole.total_bytes_per_device > cap:
            raise CapacityError(
                f"device memory: paging needs {size(whole.total_bytes_per_device)} at least ({first.slots} layers of "
                f"{size(max(first.layer_bytes))}, embedding and head of "
                f"{size(plan.weight_bytes_per_device - first.device_bytes)}, workspace of "
                f"{size(plan.workspace_bytes_per_device)}, {KV_WINDOWS} windows of the KV cache of "
                f"{size(whole.cache_bytes_per_device // KV_WINDOWS)}), got {size(cap)}"
            )
        if first.offload == "auto":
            left = cap - whole.total_bytes_per_device
            resident = max(0, min(count, left // max(first.layer_bytes)))
    elif cap is not None:
        blocks = min(wanted, (cap - fixed) // plan.block_bytes_per_device)
        if blocks < (wanted if given else 2):
            if must_fit:
                least = wanted if given else 2
                raise CapacityError(
                    f"device memory: paging needs {size(fixed + plan.block_bytes_per_device * least)} at least "
                    f"({first.slots} layers of {size(max(first.layer_bytes))}, embedding and head of "
                    f"{size(plan.weight_bytes_per_device - first.device_bytes)}, workspace of "
                    f"{size(plan.workspace_bytes_per_device)}, {least} KV blocks of "
                    f"{size(plan.block_bytes_per_device)}), got {size(cap)}"
                )
            blocks = wanted if given else 2
        if first.offload == "auto":
            left = cap - fixed - blocks * plan.block_bytes_per_device
            resident = max(0, min(count, left // max(first.layer_bytes)))
    # Spread evenly, so that the transfers of the others have time between them.
    stays = [(i + 1) * resident // count > i * resident // count for i in range(count)]
    others = [i for i in range(count) if not stays[i]]
    in_host = len(others)
    if first.offload == "disk":
        in_host = 0
    elif first.host_memory is not None:
        in_host = 0
        room = first.host_memory - first.kv_bytes
        while in_host < len(others) and room >= first.buffer_bytes[others[in_host]]:
            room -= first.buffer_bytes[others[in_host]]
            in_host += 1
        if in_host < len(others) and first.offload == "auto":
            ring = max(first.buffer_bytes) * first.ring
            while in_host and room < ring:
                in_host -= 1
                room += first.buffer_bytes[others[in_host]]
    if in_host < len(others) and first.offload == "host" and must_fit:
        needed = sum(first.buffer_bytes[i] for i in others) + first.kv_bytes
        what = " and the KV cache" if first.kv_bytes else ""
        raise CapacityError(
            f"host memory: {len(others)} layers{what} need {size(needed)}, got {size(first.host_memory or 0)}; "
            "host_memory says how much may be used, and offload='auto' keeps the rest on disk"
        )
    if in_host < len(others) and first.offload != "host" and not on_disk:
        raise ConfigError(
            f"offload={first.offload!r}: {len(others) - in_host} layers would be read from disk at every step, which "
            "needs a store: make one with `jaxinfer convert MODEL STORE`"
        )
    hosted = set(others if first.offload == "host" else others[:in_host])
    layers: list[Tier] = ["device" if stays[i] else "host" if i in hosted else "disk" for i in range(count)]
    found = build(blocks, dataclasses.replace(first, layers=tuple(layers)))
    assert found.tiers is not None
    if must_fit and first.host_memory is not None and found.tiers.host_bytes > first.host_memory:
        cache = f"the KV cache of {size(first.kv_bytes)} and " if first.kv_bytes else ""
        raise CapacityError(
            f"host memory: {cache}{found.tiers.ring_slots} buffers, through which layers come from disk, need "
            f"{size(found.tiers.host_bytes)}, got {size(first.host_memory)}"
        )
    return found


def kv_moved_bytes(plan: Plan, sequences: int, context: int) -> int:
    """Bytes of keys and values that a decode step moves to each device, of sequences on each data shard."""
    if plan.tiers is None or plan.tiers.kv_rows is None:
        return 0
    return sequences * -(-context // BLOCK_SIZE) * plan.block_bytes_per_device


def bounds(plan: Plan, sequences: int | None = None) -> Bounds:
    """What bounds a pass of a plan with tiers: a decode step of some sequences on each data shard, or of all slots."""
    tiers, hardware = plan.tiers, plan.hardware
    assert tiers is not None
    context = min(512, plan.max_model_len)
    compute = None if hardware.bandwidth is None else 1e3 * plan.step_bytes(plan.slots, context) / hardware.bandwidth
    moved = tiers.moved_bytes + kv_moved_bytes(plan, plan.slots if sequences is None else sequences, context)
    link = None if hardware.link is None else 1e3 * moved / hardware.link
    disk = 0.0 if not tiers.disk_bytes else None if tiers.disk is None else 1e3 * tiers.disk_bytes / tiers.disk
    times = {"link": link, "disk": disk, "compute": compute}
    known = {name: ms for name, ms in times.items() if ms is not None}
    # On a CPU compute has no known rate, and the link is what paging is bound by.
    by = max(known, key=lambda name: known[name]) if link is not None and disk is not None else None
    tokens = None
    if link is not None and disk is not None and hardware.matmul is not None:
        tokens = int(max(link, disk) / 1e3 * hardware.matmul / plan.prefill_flops(1, 1))
    return Bounds(link_ms=link, disk_ms=disk, compute_ms=compute, by=by, hidden_from=tokens)


def at_least(plan: Plan, ms: float | None, sequences: int = 0) -> float | None:
    """A time in ms, or that in which layers, and keys and values of sequences, come, whichever is longer.

    None where either is not known.
    """
    if plan.tiers is None or ms is None:
        return ms
    fetch = bounds(plan, sequences).fetch_ms
    return None if fetch is None else max(ms, fetch)


def rows(plan: Plan) -> list[tuple[str, str, str]]:
    """The lines of a plan that tell of its tiers, as (what, each device, in all)."""
    tiers = plan.tiers
    if tiers is None:
        return [("host", "0 B", "nothing is paged"), ("disk", "0 B", "nothing is paged")]
    found = bounds(plan)
    counts = {tier: len(tiers.of(tier)) for tier in ("device", "host", "disk")}

    def rate(bytes_per_second: float | None) -> str:
        return "unknown" if bytes_per_second is None else f"{bytes_per_second / 1e9:.3g} GB/s"

    times = {"link": found.link_ms, "disk": found.disk_ms if tiers.disk_bytes else None}
    shown = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items() if ms is not None)
    ring = f"{tiers.ring_slots} buffers for disk" if tiers.ring_slots else ""
    return [
        ("layers", f"{counts['device']} stay, {counts['host']} in host memory, {counts['disk']} on disk", ""),
        ("slots for paged layers", f"{min(tiers.slots, len(tiers.paged))}", size(max(tiers.layer_bytes)) + " each"),
        ("host", size(tiers.host_bytes), _together(plan, ring)),
        *_kv_rows(plan),
        *prefill.rows(plan),
        ("disk", size(tiers.disk_bytes), _together(plan, "read at every pass") if tiers.disk_bytes else ""),
        ("link, disk", f"{rate(plan.hardware.link)}, {rate(tiers.disk)}", shown and f"a pass: {shown}"),
        ("bound by", found.by or "unknown", "" if found.step_ms is None else f"{found.step_ms:.3g} ms a decode step"),
        (
            "compute hides transfers from",
            "unknown" if found.hidden_from is None else f"{found.hidden_from:,} tokens a pass",
            f"a pass takes {plan.prefill_tokens:,} prompt tokens a shard",
        ),
    ]


def _together(plan: Plan, more: str) -> str:
    """What is said beside bytes that are no device's own."""
    return ", ".join(filter(None, ("for all devices" if plan.devices > 1 else "", more)))


def _kv_rows(plan: Plan) -> list[tuple[str, str, str]]:
    tiers = plan.tiers
    if tiers is None or tiers.kv_rows is None:
        return []
    context = min(512, plan.max_model_len)
    moved = kv_moved_bytes(plan, plan.slots, context)
    groups = f"{plan.slots // tiers.kv_rows} x {tiers.kv_rows} sequences a shard"
    return [("KV cache in host memory", size(tiers.kv_bytes), f"{groups}; {size(moved)} a decode step at {context}")]


def elsewhere(plan: Plan) -> dict[str, int]:
    """Bytes that a plan has off the devices, by tier."""
    tiers = plan.tiers
    return {"host": 0 if tiers is None else tiers.host_bytes, "disk": 0 if tiers is None else tiers.disk_bytes}


def to_dict(plan: Plan) -> dict[str, Any] | None:
    """The tiers of a plan as JSON-able values; None where nothing is paged."""
    tiers = plan.tiers
    if tiers is None:
        return None
    found = bounds(plan)
    return {
        "offload": tiers.offload,
        "layers": {tier: tiers.of(tier) for tier in ("device", "host", "disk")},
        "layer_bytes": max(tiers.layer_bytes),
        "slots": tiers.slots,
        "ring": tiers.ring_slots,
        "moved_bytes": tiers.moved_bytes,
        "host_bytes": tiers.host_bytes,
        "disk_bytes": tiers.disk_bytes,
        "link_bytes_per_second": plan.hardware.link,
        "disk_bytes_per_second": tiers.disk,
        "kv": {
            "tier": "device" if tiers.kv_rows is None else "host",
            "rows": tiers.kv_rows,
            "host_bytes": tiers.kv_bytes,
            "step_bytes": kv_moved_bytes(plan, plan.slots, min(512, plan.max_model_len)),
        },
        "gathering": dataclasses.asdict(tiers.gathering),
        "micro_tokens": tiers.micro_tokens,
        "bounds": dataclasses.asdict(found) | {"step_ms": found.step_ms},
    }
