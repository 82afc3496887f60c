"""The paged executor: one compiled function for each kind of layer, called layer by layer with weights from a pager.

It stands in for the resident executor: the same steps, inputs, caches and results. Every layer serves all micro-batches
of a pass before the next one (zig-zag), so that a transfer is paid once for all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from jaxinfer.executor import Executor, _fetching, _kept, _seated
from jaxinfer.generation.kv_cache import NULL_BLOCK
from jaxinfer.generation.runner import bucket_width
from jaxinfer.generation.sampling import PenaltyState, SamplerFeatures
from jaxinfer.models.attention import Batch, LayerCache, at_ends
from jaxinfer.models.decoder import Decoder
from jaxinfer.paging.gathering import gathers, micro_batches
from jaxinfer.paging.host_cache import Chunks, HostCache, SlotGroup, newest, window_tables
from jaxinfer.paging.pager import Pager
from jaxinfer.paging.tiers import ROOMY_SLOTS
from jaxinfer.plan import Plan
from jaxinfer.steps import Array, DecodeInputs, Drawn, PrefillInputs, PromptReport, PromptWish
from pallas_kernels import Device
from sharding import all_gather, own_part

Piece = tuple[jax.Array, Batch]
"""Hidden states on their way through the layers, and the batch they belong to."""


class PagedExecutor(Executor):
    """Runs prefill and decode steps of a plan with tiers.

    Args:
        plan, mesh, on_compile: as of :class:`jaxinfer.executor.Executor`.
        leaves: parameters of embedding and head by path.
        pager: where the layers come from; closed with the executor.

    Attributes:
        passes: how often all layers were run.
        kv: the KV cache where it lives in host memory; ``caches`` is empty then.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        leaves: Mapping[str, jax.Array],
        pager: Pager,
        on_compile: Callable[[str], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        """Allocate the caches."""
        assert plan.tiers is not None
        self.pager, self.tiers, self.passes = pager, plan.tiers, 0
        self.kv: HostCache | None = None
        self._windows: dict[tuple[int, ...], Any] = {}
        try:
            super().__init__(plan, mesh, leaves, on_compile)
        except BaseException:
            pager.close()
            raise

    def prefill(self, inputs: PrefillInputs, features: SamplerFeatures, wish: PromptWish) -> tuple[Drawn, PromptReport]:
        """Compute chunks of prompts; see :meth:`Executor.prefill`. Returns when the last layer has been handed out.

        Raises:
            CheckpointError: a layer on disk cannot be read, or is damaged; nothing was computed with it.
        """
        if self.trace is not None:
            self.trace.append(("prefill", functools.partial(self.prefill, inputs, features, wish)))
        assert inputs.pieces is None, "prompts of a paged plan are not packed: see packing_of"
        rows, tokens = inputs.tokens.shape
        about = rows // self.plan.shards, tokens, inputs.tables.shape[1]
        gathered = gathers(self.plan, self.tiers, *about)
        groups, columns = self._split(*about, gathered)
        parts = [self._part(inputs, group, groups) for group in range(groups)]
        if self.kv is not None:
            visits = [Chunks.of(part.tables, part.positions, self.plan.longest_blocks) for part in parts]
            self.kv.begin(visits)
            parts = [dataclasses.replace(part, tables=self._window(part.tables.shape)) for part in parts]
        what = f"prefill of {rows // groups} x {tokens} tokens, context {inputs.tables.shape[1] * 64}"
        pieces = [self._embed(part, columns, gathered, what) for part in parts]
        pieces = self._through_layers(pieces, what)
        found = []
        for part, own in zip(parts, pieces, strict=True):
            penalties = self._penalty_state() if features.penalties else None
            hidden = [piece for piece, _ in own]
            arguments = (self._leaves, hidden, self.last, penalties, part)
            step = self._once(
                ("prefill end", _shapes((hidden, part)), features, wish, gathered),
                f"head of {what}",
                functools.partial(self._prefill_tail, features=features, wish=wish, gathered=gathered),
                arguments,
                (self._leaf_specs, self._hidden_spec(gathered), self._rows, self._rows, self._rows),
                (self._rows, self._rows, self._rows, self._rows),
                (2, 3),
            )
            self.last, penalties, drawn, report = step(*arguments)
            if features.penalties:
                self._penalties = penalties
            found.append((drawn, report))
        drawn, report = found[0] if len(found) == 1 else self._joined(found)
        return _fetching(drawn), _fetching(report)

    def decode(self, inputs: DecodeInputs, features: SamplerFeatures) -> Drawn:
        """Advance sequences; see :meth:`Executor.decode`. Passes that would advance none are left out.

        Raises:
            CheckpointError: as :meth:`prefill`.
        """
        if self.trace is not None:
            self.trace.append(("decode", functools.partial(self.decode, inputs, features)))
        most = max(1, min(int(np.max(inputs.steps)), self.plan.decode_chunk))
        placed = jax.device_put(inputs, jax.tree.map(lambda _: self._sharding(self._rows), inputs))
        what = f"decode of {len(inputs.slots)} sequences, context {inputs.tables.shape[1] * 64}"
        groups = None if self.kv is None else self._slot_groups(inputs)
        drawn = [self._decode_one(placed, np.int32(index), features, what, groups) for index in range(most)]
        return _fetching(_stacked(drawn))

    def device_bytes(self) -> int:
        """Bytes of parameters and caches on all devices, now."""
        held = jax.tree.leaves((self._leaves, self.caches, self.last, self._penalties))
        windows = 0 if self.kv is None else self.kv.device_bytes()
        return (
            windows + self.pager.device_bytes() + sum(s.data.nbytes for leaf in held for s in leaf.addressable_shards)
        )

    def free(self) -> None:
        """Wait for what is running, and give all memory back, that of the host as well."""
        with contextlib.suppress(RuntimeError):
            jax.block_until_ready((self.caches, self.last))
        if self.kv is not None:
            self.kv.close()
        self.pager.close()
        super().free()

    def _decode_one(
        self,
        inputs: DecodeInputs,
        index: np.int32,
        features: SamplerFeatures,
        what: str,
        groups: list[SlotGroup] | None = None,
    ) -> Drawn:
        rows = self._rows
        arguments: tuple[Any, ...] = (self._leaves, self.last, inputs, index)
        embed = self._once(
            ("decode begin", _shapes(inputs)), f"embedding of {what}", self._decode_head, arguments,
            (self._leaf_specs, rows, rows, PartitionSpec()), rows, (),
        )  # fmt: skip
        pieces: list[Piece] = embed(*arguments)
        if self.kv is None or groups is None:
            self._through_layers([pieces], what)
        else:
            # Groups of which no sequence is advanced are left as they are, and so is what is drawn of them.
            visits = {i: visit for i, group in enumerate(groups) if (visit := group.at(int(index))) is not None}
            self.kv.begin(list(visits.values()))
            own = [[(pieces[i][0], dataclasses.replace(pieces[i][1], tables=groups[i].tables))] for i in visits]
            for i, [piece] in zip(visits, self._through_layers(own, what), strict=True):
                pieces[i] = piece
        hidden = [piece for piece, _ in pieces]
        penalties = self._penalty_state() if features.penalties else None
        arguments = (self._leaves, hidden, self.last, penalties, inputs, index)
        end = self._once(
            ("decode end", _shapes(inputs), features),
            f"head of {what}",
            functools.partial(self._decode_tail, features=features),
            arguments,
            (self._leaf_specs, rows, rows, rows, rows, PartitionSpec()),
            (rows, rows, rows),
            (2, 3),
        )
        self.last, penalties, drawn = end(*arguments)
        if features.penalties:
            self._penalties = penalties
        return drawn

    def _embed(self, part: PrefillInputs, columns: int, gathered: bool, what: str) -> list[Piece]:
        batch = Batch(part.tokens, part.positions, part.tables, part.long, gathered=gathered)
        arguments = (self._leaves, batch)
        step = self._once(
            ("prefill begin", _shapes(batch), columns),
            f"embedding of {what}",
            functools.partial(self._prefill_head, columns=columns),
            arguments,
            (self._leaf_specs, self._rows),
            (self._hidden_spec(gathered), self._rows),
            (),
        )
        pieces: list[Piece] = [(hidden, batch) for hidden, batch in zip(*step(*arguments), strict=True)]
        return pieces

    def _through_layers(self, groups: list[list[Piece]], what: str) -> list[list[Piece]]:
        """Run all layers over all pieces, layer by layer."""
        shapes = [[_shapes(piece) for piece in group] for group in groups]
        if self.kv is not None and not groups:
            return groups
        with self._starting_over():
            for layer in range(self.plan.spec.num_layers):
                # In a function of its own: a layer's arrays must not outlive their turn in a local variable.
                self._through_layer(layer, groups, shapes, what)
        self.passes += 1
        return groups

    def _through_layer(self, layer: int, groups: list[list[Piece]], shapes: list[list[Any]], what: str) -> None:
        """Run a layer over all pieces, which are replaced by what comes out."""
        if self.kv is not None:
            self.kv.ahead(layer, 0)  # or it would come after the next layer
        segments, kind, mark = self.pager.take(layer), self._kinds[layer], None
        if groups[0][0][1].gathered:
            segments = self._gather(layer, segments)  # once for all pieces, whose tokens pay for it
        for number, (group, keys) in enumerate(zip(groups, shapes, strict=True)):
            cache = self.caches[layer] if self.kv is None else self.kv.take(layer, number)
            new: LayerCache = ()
            for i, ((hidden, batch), key) in enumerate(zip(group, keys, strict=True)):
                step = self._compiled.get(("layer", kind, key))
                if step is None:
                    step = self._layer(layer, ("layer", kind, key), segments, cache, hidden, batch, what)
                hidden, cache, mark, new = step(segments, cache, hidden, batch)
                group[i] = hidden, batch
            assert mark is not None
            if self.kv is None:
                self.caches[layer] = cache
            else:
                self.kv.done(layer, number, cache, new, mark)
        assert mark is not None
        self.pager.done(layer, mark)

    @contextlib.contextmanager
    def _starting_over(self) -> Iterator[None]:
        """After an error the next pass begins with the first layer, and nothing of this one is left."""
        try:
            yield
        except BaseException:
            self.pager.reset()
            if self.kv is not None:
                self.kv.reset()
            raise

    def _compile(
        self,
        key: Any,
        description: str,
        body: Callable[..., Any],
        arguments: tuple[Any, ...],
        in_specs: tuple[Any, ...],
        out_specs: Any,
        donated: tuple[int, ...],
        options: dict[str, str] | None = None,
    ) -> Any:
        """As :meth:`Executor._compile`, in no more memory of the device than the plan says."""
        roomy = self.tiers.slots >= ROOMY_SLOTS
        options = (options or {}) | frugal_options(Device.of(self.mesh.devices.flat[0]), roomy)
        return super()._compile(key, description, body, arguments, in_specs, out_specs, donated, options)

    def _layer(
        self,
        layer: int,
        key: Any,
        segments: list[jax.Array],
        cache: LayerCache,
        hidden: jax.Array,
        batch: Batch,
        what: str,
    ) -> Any:
        """Compile the function of a layer, and of all of its kind."""
        packing, gathered = self.pager.packings[layer], batch.gathered
        graphdef, treedef = self._layers[layer]
        one_token = self.kv is not None and hidden.shape[1] == 1

        def body(
            segments: list[jax.Array], cache: LayerCache, hidden: jax.Array, batch: Batch
        ) -> tuple[jax.Array, LayerCache | None, jax.Array, LayerCache]:
            leaves = segments if gathered else packing.unpack(segments)
            module = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves))
            hidden, written = module(hidden, batch, cache)
            new: LayerCache = ()
            if one_token:
                assert written is not None and batch.tables is not None
                new = newest(written, batch.tables, batch.positions)
            # Ready when the layer is; hidden states and cache are given away to the next call.
            return hidden, written, hidden[0, 0, 0], new

        new_specs = tuple(
            self.plan.rules.spec(("batch", None, "kv_heads", "head_dim")[: leaf.ndim]) for leaf in cache if one_token
        )
        cache_specs = jax.tree.map(lambda leaf: leaf.sharding.spec, cache)
        specs = [PartitionSpec()] * len(segments) if gathered else [segment.spec for segment in packing.segments]
        stream = self._hidden_spec(gathered)
        return self._compile(
            key, f"a layer of {what}", body, (segments, cache, hidden, batch),
            (specs, cache_specs, stream, self._rows), (stream, cache_specs, PartitionSpec(), new_specs), (1, 2),
            self._options(batch.tokens.size // self.plan.shards),
        )  # fmt: skip

    def _gather(self, layer: int, segments: list[jax.Array]) -> list[jax.Array]:
        """The whole parameters of a layer, on every device."""
        return self._gather_step(layer, segments)(segments)

    def _gather_step(self, layer: int, segments: list[jax.Array]) -> Any:
        packing = self.pager.packings[layer]
        about = packing.gather, (segments,), ([segment.spec for segment in packing.segments],), PartitionSpec(), ()
        return self._once(("gather", packing), "gathering of a layer", *about)

    def _hidden_spec(self, gathered: bool) -> PartitionSpec:
        """Where hidden states [B, T, H] lie: with gathered weights each device has its part of the tokens."""
        return PartitionSpec(*self._rows, "tensor") if gathered else self._rows

    # The bodies below run under shard_map: every array is this device's block.

    def _prefill_head(
        self, leaves: list[jax.Array], batch: Batch, *, columns: int
    ) -> tuple[list[jax.Array], list[Batch]]:
        hidden, _ = self._model(leaves).hidden_states(batch, [])
        width = hidden.shape[1] // columns
        pieces: tuple[list[jax.Array], list[Batch]] = [], []
        for start in range(0, hidden.shape[1], width):
            part = slice(start, start + width)
            pieces[0].append(own_part(hidden[:, part], "tensor", 1) if batch.gathered else hidden[:, part])
            own = dataclasses.replace(batch, tokens=batch.tokens[:, part], positions=batch.positions[:, part])
            pieces[1].append(own)
        return pieces

    def _prefill_tail(
        self,
        leaves: list[jax.Array],
        hidden: list[jax.Array],
        last: jax.Array,
        penalties: PenaltyState | None,
        inputs: PrefillInputs,
        *,
        features: SamplerFeatures,
        wish: PromptWish,
        gathered: bool,
    ) -> tuple[jax.Array, PenaltyState | None, Drawn, PromptReport]:
        hidden = [all_gather(own, "tensor", 1) for own in hidden] if gathered else hidden
        whole = jnp.concatenate(hidden, axis=1)
        ends = at_ends(whole, inputs.last, packed=inputs.pieces is not None)
        return self._prefill_end(self._model(leaves), whole, ends, last, penalties, inputs, features, wish)

    def _decode_head(
        self, leaves: list[jax.Array], last: jax.Array, inputs: DecodeInputs, index: jax.Array
    ) -> list[Piece]:
        """The sequences of the step; or, where the cache is in host memory, all slots, group by group."""
        batch = self._decode_batch(_seated(last, inputs.slots), inputs, index)
        hidden, _ = self._model(leaves).hidden_states(batch, [])
        if self.tiers.kv_rows is None:
            return [(hidden, batch)]
        count, pieces = len(inputs.slots), []
        row_of = jnp.full(self.plan.slots, count).at[inputs.slots].set(jnp.arange(count), mode="drop")
        for rows in jnp.split(row_of, self.plan.slots // self.tiers.kv_rows):
            own: Batch = _seated(batch, rows)
            own = dataclasses.replace(own, positions=jnp.where(rows[:, None] < count, own.positions, -1))
            pieces.append((_seated(hidden, rows), own))
        return pieces

    def _decode_tail(
        self,
        leaves: list[jax.Array],
        hidden: list[jax.Array],
        last: jax.Array,
        penalties: PenaltyState | None,
        inputs: DecodeInputs,
        index: jax.Array,
        *,
        features: SamplerFeatures,
    ) -> tuple[jax.Array, PenaltyState | None, Drawn]:
        whole = hidden[0] if self.tiers.kv_rows is None else _seated(jnp.concatenate(hidden), inputs.slots)
        own = _seated(last, inputs.slots), _seated(penalties, inputs.slots)
        token, counted, drawn = self._decode_end(self._model(leaves), whole, *own, inputs, index, features)
        last, penalties = _kept(last, inputs.slots, token), _kept(penalties, inputs.slots, counted)
        return last, penalties, drawn

    def _empty_caches(self) -> list[LayerCache]:
        """Caches on the devices, or in host memory, where one that is there already is kept."""
        if self.tiers.kv_rows is None:
            return super()._empty_caches()
        if self.kv is None:
            self.kv = HostCache(self.plan, self.mesh, self.pager.link)
        return []

    def _window(self, shape: tuple[int, ...]) -> Any:
        """Block tables of windows, for tables of a shape; on the devices."""
        if shape not in self._windows:
            tables = window_tables(shape[0] // self.plan.shards, self.plan.shards, shape[1])
            self._windows[shape] = jax.device_put(tables, self._sharding(self._rows))
        return self._windows[shape]

    def _slot_groups(self, inputs: DecodeInputs) -> list[SlotGroup]:
        """The slots of a decode step in the groups whose cache travels together."""
        rows, shards, count = self.tiers.kv_rows, self.plan.shards, len(inputs.slots)
        assert rows is not None
        (taken,) = np.nonzero(np.asarray(inputs.slots) < self.plan.slots)
        places = taken // (count // shards), np.asarray(inputs.slots)[taken]

        def by_slot(values: Array) -> np.ndarray:
            found = np.zeros((shards, self.plan.slots), np.int32)
            found[places] = np.asarray(values)[taken]
            return found

        used = by_slot((np.asarray(inputs.tables) != NULL_BLOCK).sum(axis=1))
        positions, steps = by_slot(inputs.positions), by_slot(inputs.steps)
        found = []
        for group in range(self.plan.slots // rows):
            own = slice(group * rows, (group + 1) * rows)
            # What is not advanced needs not travel.
            longest = int(np.max(used[:, own], where=steps[:, own] > 0, initial=0))
            width = min(bucket_width(max(1, longest)), self.plan.longest_blocks)
            tables = self._window((shards * rows, width))
            found.append(SlotGroup(group, width, positions[:, own].ravel(), steps[:, own].ravel(), tables))
        return found

    def _decoder(self) -> Decoder:
        """The model without its layers, which are kept apart."""
        decoder = super()._decoder()
        split = [nnx.split(layer) for layer in decoder.layers]
        self._layers = [(graphdef, jax.tree.structure(state)) for graphdef, state in split]
        kinds: list[Any] = []
        self._kinds: list[int] = []
        for (graphdef, _), packing in zip(self._layers, self.pager.packings, strict=True):
            if (graphdef, packing) not in kinds:
                kinds.append((graphdef, packing))
            self._kinds.append(kinds.index((graphdef, packing)))
        decoder.layers = nnx.List([])
        return decoder

    def _once(self, key: Any, *about: Any) -> Any:
        """The compiled step for a key, compiled now if this is its first use."""
        return self._compiled[key] if key in self._compiled else self._compile(key, *about)

    def _split(self, rows: int, tokens: int, blocks: int, gathered: bool) -> tuple[int, int]:
        return micro_batches(self.plan, self.tiers, rows, tokens, blocks, gathered)

    def _part(self, inputs: PrefillInputs, group: int, groups: int) -> PrefillInputs:
        """A group of rows: the same rows of every data shard."""
        shards, rows = self.plan.shards, len(inputs.tokens) // self.plan.shards // groups

        def cut(values: Any) -> np.ndarray:
            rest = np.shape(values)[1:]
            return np.asarray(values).reshape(shards, groups, rows, *rest)[:, group].reshape(shards * rows, *rest)

        return inputs if groups == 1 else jax.tree.map(cut, inputs)

    def _joined(self, found: list[Any]) -> Any:
        """Put the results of groups together, in the order of the rows."""
        shards, sharding = self.plan.shards, self._sharding(self._rows)

        def join(*parts: jax.Array) -> jax.Array:
            rows, *rest = parts[0].shape
            by_shard = [part.reshape(shards, rows // shards, *rest) for part in parts]
            return jnp.concatenate(by_shard, axis=1).reshape(len(parts) * rows, *rest)

        key = ("joined", _shapes(found))
        if key not in self._compiled:
            self._compiled[key] = jax.jit(lambda trees: jax.tree.map(join, *trees), out_shardings=sharding)
        return self._compiled[key](found)


def frugal_options(on: Device, roomy: bool) -> dict[str, str]:
    """Options with which XLA's compiler takes little of the device's memory, or none where that is scarce.

    Where it tries products out it gives each candidate operands of its own. On an H200 a plan of 1.39 GB took 1.97 GB
    at its peak that way; one of 35 GB was not exceeded (``benchmarks/offload.py``). Without trials its Triton products
    were far slower than the link, so there are none of them.
    """
    if on.platform != "gpu":
        return {}
    return {"xla_gpu_enable_triton_gemm": "False"} | ({} if roomy else {"xla_gpu_autotune_level": "0"})


@jax.jit
def _stacked(drawn: list[Drawn]) -> Drawn:
    return jax.tree.map(lambda *steps: jnp.stack(steps), *drawn)


def _shapes(tree: Any) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return (structure, *((leaf.shape, leaf.dtype) for leaf in leaves))
