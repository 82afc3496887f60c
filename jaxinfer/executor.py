"""The resident executor: all parameters on the devices; a step over all layers is a program, of prompts two.

A step's body runs under one ``jax.shard_map``, so modules see local blocks and their collectives are explicit. Steps
take parameters as flat leaves (82 us of dispatch for 384 leaves, against 892 us for a module) and donate the caches.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.generation.sampling import (
    PenaltyState,
    SamplerFeatures,
    empty_penalties,
    fill_penalties,
    rank_logprobs,
    sample,
)
from jaxinfer.models.attention import Batch, LayerCache, Pieces, at_ends
from jaxinfer.models.decoder import Decoder, abstract, parameters
from jaxinfer.plan import Plan
from jaxinfer.programs import Part, compiler_options, prefill_parts
from jaxinfer.steps import (
    ERROR_TOKEN,
    DecodeInputs,
    Drawn,
    InputLayout,
    PrefillInputs,
    PromptReport,
    PromptWish,
)
from pallas_kernels import Device, compiling_for

CACHE_AXES = ("blocks", "kv_heads", "block_tokens", "head_dim")


class Executor:
    """Runs prefill and decode steps of a plan on a mesh.

    Args:
        plan: the plan.
        mesh: the mesh, with the plan's sizes.
        leaves: parameters by path, placed as :meth:`placements` says.
        on_compile: called with a description; returns a context that spans the compilation of a step.

    Attributes:
        trace: where a list is put here, each step is added to it as ``prefill`` or ``decode`` and a function that runs
            it again, for measuring.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        leaves: Mapping[str, jax.Array],
        on_compile: Callable[[str], contextlib.AbstractContextManager[Any]] | None = None,
    ) -> None:
        """Allocate the caches."""
        self.plan, self.mesh = plan, mesh
        decoder = self._decoder()
        self._graphdef, state = nnx.split(decoder)
        self._treedef = jax.tree.structure(state)
        self._paths = list(parameters(decoder))
        self._leaves = [leaves[path] for path in self._paths]
        self._leaf_specs = [plan.rules.spec(plan.parameters[path].axes) for path in self._paths]
        self._cache_specs = tuple(plan.rules.spec(CACHE_AXES[: len(shape)]) for shape, _ in plan.cache_arrays)
        self._specs = [self._cache_specs] * plan.spec.num_layers
        self._rows = plan.rules.spec(("batch",))
        self._steps_rows = plan.rules.spec((None, "batch"))
        self._parts = prefill_parts(self._paths, plan.spec.num_layers)
        self._part_leaves = [part.of(self._leaves) for part in self._parts]
        self._on_compile = on_compile or (lambda _: contextlib.nullcontext())
        self._compiled: dict[Any, Any] = {}
        self._penalties: PenaltyState | None = None
        self.trace: list[tuple[str, Callable[[], Any]]] | None = None
        self.batch = plan.slots * plan.shards
        self.caches, self.last = self._allocate()

    @property
    def parameters(self) -> dict[str, jax.Array]:
        """The parameters by path, as they lie on the devices."""
        return dict(zip(self._paths, self._leaves, strict=True))

    @staticmethod
    def placements(plan: Plan, mesh: Mesh) -> dict[str, NamedSharding]:
        """Where each parameter of a plan belongs."""
        return {path: NamedSharding(mesh, plan.rules.spec(info.axes)) for path, info in plan.parameters.items()}

    def prefill(self, inputs: PrefillInputs, features: SamplerFeatures, wish: PromptWish) -> tuple[Drawn, PromptReport]:
        """Compute chunks of prompts; rows that complete theirs sample a token. Returns at once."""
        if self.trace is not None:
            self.trace.append(("prefill", functools.partial(self.prefill, inputs, features, wish)))
        penalties = self._penalty_state() if features.penalties else None
        layout = self._layout(inputs)
        # All of them first: where one cannot be compiled, none must have run.
        programs = self._prefill_programs(inputs, layout, features, wish, penalties)
        words, hidden = layout.pack(inputs), None
        for part, leaves, program in zip(self._parts[:-1], self._part_leaves, programs, strict=False):
            written, hidden = program(leaves, self.caches[part.own], hidden, words)
            self.caches[part.own] = written
        own = self._parts[-1].own
        written, self.last, penalties, drawn, report = programs[-1](
            self._part_leaves[-1], self.caches[own], self.last, penalties, hidden, words
        )
        self.caches[own] = written
        if features.penalties:
            self._penalties = penalties
        return _fetching(drawn), _fetching(report)

    def decode(self, inputs: DecodeInputs, features: SamplerFeatures) -> Drawn:
        """Advance sequences by the plan's ``decode_chunk`` tokens, or fewer where it says so. Returns at once."""
        if self.trace is not None:
            self.trace.append(("decode", functools.partial(self.decode, inputs, features)))
        penalties = self._penalty_state() if features.penalties else None
        step = self._decode_program(inputs, features, penalties)
        words = self._layout(inputs).pack(inputs)
        self.caches, self.last, penalties, drawn = step(self._leaves, self.caches, self.last, penalties, words)
        if features.penalties:
            self._penalties = penalties
        return _fetching(drawn)

    def recover(self) -> None:
        """Be ready for other steps after one has failed. What slots held may be gone: nothing may go on from it."""
        state = self.caches, self.last, self._penalties
        try:
            # Given away to a step that then failed, or what came out of it.
            jax.block_until_ready(state)
        except RuntimeError:
            for leaf in jax.tree.leaves(state):
                leaf.delete()
            self._penalties = None
            self.caches, self.last = self._allocate()

    def compiled(self) -> dict[str, Any]:
        """The compiled steps by description, for their HLO and memory analysis."""
        return {str(key): value for key, value in self._compiled.items()}

    def free(self) -> None:
        """Wait for what is running, and give the memory of parameters and caches back, whoever still refers to them."""
        # What a step failed of has been said where its results were asked for.
        with contextlib.suppress(RuntimeError):
            running = not self.last.is_ready()
            jax.block_until_ready(self.caches)
            if running:
                # XLA's threads let go of a step's inputs a little after its results are there, and need Python for
                # that; one that comes too late for an ending process aborts it.
                time.sleep(0.1)
        for leaf in jax.tree.leaves((self._leaves, self.caches, self.last, self._penalties)):
            leaf.delete()
        self._compiled.clear()

    # The bodies below run under shard_map: every array is this device's block.

    def _prefill_front(
        self,
        leaves: list[jax.Array],
        caches: list[LayerCache],
        hidden: jax.Array | None,
        inputs: PrefillInputs,
        *,
        part: Part,
    ) -> tuple[list[LayerCache], jax.Array]:
        hidden, caches = self._prefill_layers(self._model(part.among(leaves)), part, caches, hidden, inputs)
        return caches, hidden

    def _prefill_back(
        self,
        leaves: list[jax.Array],
        caches: list[LayerCache],
        last: jax.Array,
        penalties: PenaltyState | None,
        hidden: jax.Array | None,
        inputs: PrefillInputs,
        *,
        part: Part,
        features: SamplerFeatures,
        wish: PromptWish,
    ) -> tuple[list[LayerCache], jax.Array, PenaltyState | None, Drawn, PromptReport]:
        model = self._model(part.among(leaves))
        # Of the last layer most tokens give keys and values, and nothing else that anybody looks at.
        narrow = wish == PromptWish()
        hidden, caches = self._prefill_layers(model, part, caches, hidden, inputs, inputs.last if narrow else None)
        ends = hidden[:, 0] if narrow else at_ends(hidden, inputs.last, packed=inputs.pieces is not None)
        return caches, *self._prefill_end(model, hidden, ends, last, penalties, inputs, features, wish)

    @staticmethod
    def _prefill_layers(
        model: Decoder,
        part: Part,
        caches: list[LayerCache],
        hidden: jax.Array | None,
        inputs: PrefillInputs,
        ends: jax.Array | None = None,
    ) -> tuple[jax.Array, list[LayerCache]]:
        pieces = None if inputs.pieces is None else Pieces.of(inputs.pieces, inputs.positions, inputs.tables)
        batch = Batch(inputs.tokens, inputs.positions, inputs.tables, inputs.long, pieces)
        return model.hidden_states(batch, caches, hidden, part.layers, ends)

    def _prefill_end(
        self,
        model: Decoder,
        hidden: jax.Array,
        ends: jax.Array,
        last: jax.Array,
        penalties: PenaltyState | None,
        inputs: PrefillInputs,
        features: SamplerFeatures,
        wish: PromptWish,
    ) -> tuple[jax.Array, PenaltyState | None, Drawn, PromptReport]:
        """What comes after the layers of a prefill step: of hidden states, and those [P, H] that are sampled from."""
        logits = model.logits(ends)
        own: Any = None  # a PenaltyState where penalties are asked for
        if features.penalties:
            assert inputs.history is not None
            nothing = empty_penalties(1, logits.shape[-1])
            own = jax.vmap(lambda said: fill_penalties(nothing, jnp.int32(0), said[0], said[1]))(inputs.history)
            own = jax.tree.map(lambda values: values[:, 0], own)
        sampled, own = sample(logits, inputs.rows, own, inputs.step, features)
        last = last.at[inputs.slots].set(sampled.token, mode="drop")
        if penalties is not None and own is not None:
            penalties = jax.tree.map(lambda all_, new: all_.at[inputs.slots].set(new, mode="drop"), penalties, own)
        return last, penalties, _drawn(sampled, features), self._report(model, hidden, inputs.targets, wish)

    def _report(self, model: Decoder, hidden: jax.Array, targets: jax.Array | None, wish: PromptWish) -> PromptReport:
        # One row at a time: the logits of all would be the largest arrays of the step.
        logits = jax.lax.map(model.logits, hidden) if wish.logits else None
        if wish.logprobs is None or targets is None:
            return PromptReport(logits=logits)
        count = wish.logprobs

        def of_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            return rank_logprobs(model.logits(row[0]), row[1], count)

        logprob, rank, top_ids, top_logprobs = jax.lax.map(of_row, (hidden, targets))
        return PromptReport(logits, logprob, rank, top_ids, top_logprobs)

    def _decode_body(
        self,
        leaves: list[jax.Array],
        caches: list[LayerCache],
        last: jax.Array,
        penalties: PenaltyState | None,
        inputs: DecodeInputs,
        *,
        features: SamplerFeatures,
    ) -> tuple[list[LayerCache], jax.Array, PenaltyState | None, Drawn]:
        model = self._model(leaves)

        def one(carry: tuple[Any, ...], index: jax.Array) -> tuple[tuple[Any, ...], Drawn]:
            caches, last, penalties = carry
            hidden, caches = model.hidden_states(self._decode_batch(last, inputs, index), caches)
            last, penalties, drawn = self._decode_end(model, hidden, last, penalties, inputs, index, features)
            return (caches, last, penalties), drawn

        # A static trip count: a while loop that looks at its data syncs with the host at every token.
        steps = jnp.arange(self.plan.decode_chunk, dtype=jnp.int32)
        mine: Any = (caches, _seated(last, inputs.slots), _seated(penalties, inputs.slots))
        (caches, *found), drawn = jax.lax.scan(one, mine, steps)
        last, penalties = _kept(last, inputs.slots, found[0]), _kept(penalties, inputs.slots, found[1])
        return caches, last, penalties, drawn

    @staticmethod
    def _decode_batch(last: jax.Array, inputs: DecodeInputs, index: jax.Array) -> Batch:
        """The tokens that advance every sequence by one, the ``index``-th time; ``last`` is theirs."""
        positions = jnp.where(index < inputs.steps, inputs.positions + index, -1)
        return Batch(last[:, None], positions[:, None], inputs.tables, inputs.long)

    @staticmethod
    def _decode_end(
        model: Decoder,
        hidden: jax.Array,
        last: jax.Array,
        penalties: Any,
        inputs: DecodeInputs,
        index: jax.Array,
        features: SamplerFeatures,
    ) -> tuple[jax.Array, Any, Drawn]:
        """What comes after the layers of a decode step; last tokens and penalties are those of its sequences."""
        sampled, penalties = sample(model.logits(hidden[:, 0]), inputs.rows, penalties, inputs.step + index, features)
        return jnp.where(index < inputs.steps, sampled.token, last), penalties, _drawn(sampled, features)

    def _decoder(self) -> Decoder:
        """The model of which a step holds all parameters."""
        return abstract(self.plan.spec, self.plan.layout, jnp.dtype(self.plan.dtype), self.plan.quantize)

    def _model(self, leaves: Sequence[jax.Array | None]) -> Decoder:
        """The model; None stands for parameters that nobody is going to look at."""
        return nnx.merge(self._graphdef, jax.tree.unflatten(self._treedef, leaves))

    def _prefill_programs(
        self,
        inputs: PrefillInputs,
        layout: InputLayout,
        features: SamplerFeatures,
        wish: PromptWish,
        penalties: PenaltyState | None,
    ) -> list[Any]:
        """The compiled programs of a prefill step, one for each part; all but the last take and give less."""
        keys: list[Any] = [("prefill front", layout, part.layers) for part in self._parts[:-1]]
        keys.append(("prefill", layout, features, wish))
        known = [self._compiled.get(key) for key in keys]
        if None not in known:  # looked up before anything else is put together: a prompt waits
            return known
        rows, tokens = inputs.tokens.shape
        spec, dtype = self.plan.spec, jnp.dtype(self.plan.dtype)
        between = jax.ShapeDtypeStruct((rows, tokens, spec.hidden), dtype, sharding=self._sharding(self._rows))
        back = functools.partial(self._prefill_back, features=features, wish=wish)
        packed = "" if inputs.pieces is None else "packed "
        what = f"{packed}prefill of {rows} x {tokens} tokens, context {inputs.tables.shape[1] * 64}"
        with self._on_compile(what):
            lowered, hidden = {}, None
            for key, part, leaves in zip(keys, self._parts, self._part_leaves, strict=True):
                specs, caches, cache_specs = part.of(self._leaf_specs), self.caches[part.own], self._specs[part.own]
                given: tuple[Any, ...] = (leaves, caches, hidden, inputs)
                front = functools.partial(self._prefill_front, part=part)
                if part is self._parts[-1]:
                    given = (leaves, caches, self.last, penalties, hidden, inputs)
                    kept, results = (cache_specs, self._rows, self._rows), (self._rows, self._rows)
                    lowered[key] = self._lower_step(functools.partial(back, part=part), given, specs, kept, results)
                elif key not in self._compiled:  # whatever else is asked of the others
                    lowered[key] = self._lower_step(front, given, specs, (cache_specs,), (self._rows,))
                hidden = between
            self._finish(lowered, self._options(inputs.tokens.size // self.plan.shards))
        return [self._compiled[key] for key in keys]

    def _decode_program(self, inputs: DecodeInputs, features: SamplerFeatures, penalties: PenaltyState | None) -> Any:
        """The compiled program of a decode step."""
        key = ("decode", self._layout(inputs), features)
        if key not in self._compiled:
            body = functools.partial(self._decode_body, features=features)
            kept = (self._specs, self._rows, self._rows)
            given = (self._leaves, self.caches, self.last, penalties, inputs)
            with self._on_compile(f"decode of {len(inputs.slots)} sequences, context {inputs.tables.shape[1] * 64}"):
                lowered = self._lower_step(body, given, self._leaf_specs, kept, (self._steps_rows,))
                self._finish({key: lowered}, self._options(0))
        return self._compiled[key]

    def _lower_step(
        self,
        body: Callable[..., Any],
        arguments: tuple[Any, ...],
        leaf_specs: Any,
        kept: tuple[Any, ...],
        results: tuple[Any, ...],
    ) -> jax.stages.Lowered:
        """Trace a step.

        Args:
            body: what a device computes.
            arguments: parameters; what is given away and comes back, its specs ``kept``; what is given by row; and the
                inputs, which the step takes packed.
            leaf_specs, kept, results: specs of the parameters, of what comes back, and of what comes after it.
        """
        *given, inputs = arguments
        layout, rest = self._layout(inputs), len(given) - len(kept)

        def unpacked(*packed: Any) -> Any:
            *given, words = packed
            return body(*given, layout.unpack(words))

        unpacked.__name__ = getattr(body, "func", body).__name__  # what profiles and dumps call the step
        in_specs = (leaf_specs, *kept, *[self._rows] * rest)
        donated = tuple(range(1, 1 + len(kept)))
        return self._lower(unpacked, (*given, layout.pack(inputs)), in_specs, (*kept, *results), donated)

    def _layout(self, inputs: Any) -> InputLayout:
        return InputLayout.of(inputs, self.plan.shards)

    def _options(self, tokens: int) -> dict[str, str]:
        """Options of XLA for a step that computes so many tokens of a shard's prompts."""
        # Not with quantized weights: Triton widens them inside the product, and nothing else has been timed.
        return compiler_options(Device.of(self.mesh.devices.flat[0]), tokens) if self.plan.quantize is None else {}

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
        """Compile a body that runs under ``shard_map``, and keep it."""
        with self._on_compile(description):
            self._finish({key: self._lower(body, arguments, in_specs, out_specs, donated)}, options)
        return self._compiled[key]

    def _lower(
        self,
        body: Callable[..., Any],
        arguments: tuple[Any, ...],
        in_specs: tuple[Any, ...],
        out_specs: Any,
        donated: tuple[int, ...],
    ) -> jax.stages.Lowered:
        """Trace a body that runs under ``shard_map``."""
        mapped = jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        in_shardings = jax.tree.map(self._sharding, in_specs, is_leaf=lambda x: isinstance(x, PartitionSpec))
        jitted = jax.jit(mapped, in_shardings=in_shardings, donate_argnums=donated)
        precision: Any = contextlib.nullcontext()
        if self.plan.dtype == "float32":
            # Without it a GPU multiplies float32 as TF32, with 10 bits of mantissa.
            precision = jax.default_matmul_precision("highest")
        # By the mesh's devices, which need not be those that JAX takes by default, nor be here.
        with precision, compiling_for(Device.of(self.mesh.devices.flat[0])):
            return jitted.lower(*arguments)

    def _finish(self, lowered: Mapping[Any, jax.stages.Lowered], options: dict[str, str] | None) -> None:
        """Compile programs, at the same time, and keep all or none."""
        with ThreadPoolExecutor(len(lowered)) as pool:
            compiled = list(pool.map(lambda one: one.compile(compiler_options=options), lowered.values()))
        self._compiled |= dict(zip(lowered, compiled, strict=True))

    def _penalty_state(self) -> PenaltyState:
        """What penalties know of each slot; allocated at first use."""
        if self._penalties is None:
            build = jax.jit(
                functools.partial(empty_penalties, self.batch, self.plan.spec.vocab_size),
                out_shardings=self._sharding(self._rows),
            )
            self._penalties = build()
        return self._penalties

    def _allocate(self) -> tuple[list[LayerCache], Any]:
        """Empty caches, and the last token of each slot."""
        last = jax.device_put(np.zeros(self.batch, np.int32), self._sharding(self._rows))
        return self._empty_caches(), last

    def _empty_caches(self) -> list[LayerCache]:
        # Zeros as factors too: what nobody wrote is never read.
        builds = [
            jax.jit(functools.partial(jnp.zeros, shape, dtype), out_shardings=self._sharding(spec))
            for (shape, dtype), spec in zip(self.plan.cache_arrays, self._cache_specs, strict=True)
        ]
        return [tuple(build() for build in builds) for _ in range(self.plan.spec.num_layers)]

    def _sharding(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self.mesh, spec)


def _seated[State](values: State, slots: jax.Array) -> State:
    """What the sequences in some slots have of values [slots, ...]."""
    return jax.tree.map(lambda all_: jnp.take(all_, slots, axis=0, mode="clip"), values)


def _kept[State](values: State, slots: jax.Array, new: State) -> State:
    """Values with what those sequences have now; what is no slot's is dropped."""
    return jax.tree.map(lambda all_, own: all_.at[slots].set(own, mode="drop"), values, new)


def _drawn(sampled: Any, features: SamplerFeatures) -> Drawn:
    tokens = jnp.where(sampled.finite, sampled.token, ERROR_TOKEN)
    if not features.logprobs:
        return Drawn(tokens)
    return Drawn(tokens, sampled.logprob, sampled.rank, sampled.top_ids, sampled.top_logprobs)


def _fetching[Tree](tree: Tree) -> Tree:
    """Start copying a step's results to the host, so that they are there when they are looked at."""
    for leaf in jax.tree.leaves(tree):
        leaf.copy_to_host_async()
    return tree
