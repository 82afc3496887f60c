"""The engine: a checkpoint, ready to generate, stream, chat, score and give logits."""

from __future__ import annotations

import functools
import html
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer import hardware, process, progress
from jaxinfer.checkpoints import Store, Target
from jaxinfer.errors import CapacityError, ConfigError, JaxinferError, RequestError
from jaxinfer.executor import Executor
from jaxinfer.generation.chat import Message, chat_ids
from jaxinfer.generation.live import LiveRequest, Prompt, as_prompts, encode, is_prompt, output_limit
from jaxinfer.generation.params import GenerationDefaults, SamplingParams, derive_seed
from jaxinfer.generation.requests import RequestOutput, RequestOutputs, ScoreOutput
from jaxinfer.generation.runner import Runner, Running
from jaxinfer.generation.text import TextStream, token_text
from jaxinfer.models.spec import ModelSpec
from jaxinfer.paging.executor import PagedExecutor
from jaxinfer.paging.memory import usable_host
from jaxinfer.paging.pager import Pager
from jaxinfer.paging.report import line, report
from jaxinfer.paging.start import measured, open_pager
from jaxinfer.plan import Plan, make_plan
from jaxinfer.pretrained import Pretrained
from jaxinfer.progress import shown as _shown
from jaxinfer.steps import PromptWish
from pallas_kernels import Choice
from sharding import ShardingRules, describe, make_mesh


def init_inference(
    model: str | Path,
    mesh: Mapping[str, int] | Mesh | None = None,
    dtype: str | None = None,
    *,
    quantize: str | None = None,
    kv_dtype: str = "auto",
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
    kv_offload: str | None = None,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool | None = None,
) -> InferenceEngine:
    """Load a checkpoint onto a mesh.

    Args:
        model: a folder as transformers writes it, a store that ``convert`` made, a Hugging Face hub id, or ``"demo"``
            for the bundled model.
        mesh: axis sizes such as ``{"data": 2, "tensor": 4}``, or a ``jax.sharding.Mesh``. None: all local devices,
            ``tensor`` as far as the model's heads allow, the rest ``data``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None is the checkpoint's own.
        quantize: keep the weights of attention and MLP as ``int8``, ``int4`` or ``fp8``; they are quantized while they
            are read. None: as ``dtype`` says, or as a store that ``convert`` quantized has them.
        kv_dtype: keep cached keys and values as ``int8`` or ``fp8``, each head of each token with a factor of its own;
            ``auto`` keeps them in ``dtype``.
        max_batch: sequences that decode together, over all data shards.
        max_model_len: most tokens of a sequence, prompt and output; None is the model's context length.
        kv_blocks: KV blocks of 64 tokens on each data shard; None: as many as are of use and fit.
        decode_chunk: tokens that a decode step advances by, between which the host looks at what came; smaller streams
            more smoothly, larger costs less. None: 16, or 1 where layers are paged.
        prefill_chunk: most prompt tokens of one sequence in a prefill step; None: 512, or as ``prefill_tokens`` when
            layers are paged.
        prefill_tokens: most prompt tokens of one data shard in a prefill step; None: 2048, or as many as a tenth of the
            memory holds, up to 32768, when layers are paged.
        rules: which mesh axis each logical axis lies on.
        offload: where the layers live: ``host``, in host memory; ``disk``, in a store, from which they are read at
            every step; ``auto``, on the devices as far as they fit, then in host memory, then in the store. None: on
            the devices.
        device_memory, host_memory: what may be used of each device, and of the host for layers: bytes, or a string
            such as ``"2GB"``. None: 92 % of what the device reports, and 80 % of what is free.
        kv_offload: with ``offload``: keys and values of all sequences in ``host`` memory, through the devices with the
            layers; ``auto``: where that gives more tokens a second than the cache that fits. None: on the devices.
        load_format: ``auto``; or ``dummy``, which draws random parameters on the devices and reads the configuration
            alone, so that no weights need be there: for measuring, and for trying a plan.
        seed: what requests that bring no seed of their own derive theirs from, and ``dummy`` its parameters.
        progress: show progress bars; None shows them in a terminal or notebook.

    Raises:
        ConfigError: the configuration is malformed, or asks for something that is not implemented.
        CheckpointError: files are missing, damaged or unsafe, or hold other tensors than the configuration needs.
        sharding.MeshError: the model cannot be split over the mesh; the nearest mesh that works is named.
        CapacityError: the memory of the devices, or of the host, does not hold the model and a cache.
    """
    show = _shown(progress)
    with Pretrained(model, load_format) as pretrained:
        # Everything that can be wrong is found before a device holds anything.
        devices = make_mesh(mesh, pretrained.limits)
        plan = make_plan(
            pretrained.spec,
            dict(devices.shape),
            dtype or pretrained.dtype,
            hardware.of(devices.devices.flat[0]),
            max_batch=max_batch,
            max_model_len=max_model_len,
            kv_blocks=kv_blocks,
            decode_chunk=decode_chunk,
            prefill_chunk=prefill_chunk,
            prefill_tokens=prefill_tokens,
            rules=rules,
            offload=offload,
            device_memory=device_memory,
            host_memory=usable_host(offload, host_memory),
            kv_offload=kv_offload,
            on_disk=isinstance(pretrained.checkpoint, Store),
            quantize=pretrained.quantized(quantize),
            kv_dtype=kv_dtype,
        )
        pretrained.check(plan.layout)
        defaults, eos_token_ids = pretrained.generation()
        tokenizer = pretrained.tokenizer()
        process.keep_compiled(devices)
        placements = Executor.placements(plan, devices)
        targets = {
            path: Target(info.shape, info.dtype, placements[path], info.quantization)
            for path, info in plan.parameters.items()
            if plan.tiers is None or not path.startswith("layers.")
        }
        leaves = pretrained.load(plan.layout, targets, progress=show, seed=seed)
        plan = measured(plan, list(devices.devices.flat), pretrained)
        pager = None if plan.tiers is None else open_pager(pretrained, plan, devices, progress=show, seed=seed)
    return InferenceEngine(
        plan, devices, leaves, pager=pager, tokenizer=tokenizer, defaults=defaults, eos_token_ids=eos_token_ids,
        name=pretrained.name, seed=seed, progress=show,
    )  # fmt: skip


class InferenceEngine:
    """A model that is loaded and ready; made by :func:`init_inference`. Use it as a context manager, or close it.

    Attributes:
        plan: where every byte lives.
        mesh: the devices.
        tokenizer: the checkpoint's, or None where it has none (then prompts are token ids).
        defaults: what the checkpoint's generation_config says about fields of ``SamplingParams`` that are left out.
        progress: whether bars show; may be set.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        leaves: Mapping[str, jax.Array],
        *,
        pager: Pager | None = None,
        tokenizer: Any = None,
        defaults: GenerationDefaults | None = None,
        eos_token_ids: Sequence[int] = (),
        name: str = "",
        seed: int = 0,
        progress: bool = False,
    ) -> None:
        """Allocate the KV cache."""
        self.plan, self.mesh, self.tokenizer, self.name = plan, mesh, tokenizer, name
        self.defaults = defaults or GenerationDefaults()
        self.eos_token_ids = tuple(eos_token_ids)
        self.progress = progress
        self._seed, self._requests = seed, 0
        self._lock = threading.RLock()
        make = Executor if pager is None else functools.partial(PagedExecutor, pager=pager)
        self._runner: Runner | None = Runner(make(plan, mesh, leaves, on_compile=self._compiling))
        process.close_at_exit(self)

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        return self.plan.spec

    @property
    def implementations(self) -> tuple[Choice[str], ...]:
        """Which implementation serves which operation, and why."""
        return self.plan.implementations

    @property
    def executor(self) -> Executor:
        """What runs the steps: compiled programs and caches.

        Raises:
            JaxinferError: the engine is closed.
        """
        return self._open().executor

    # mypy sees that a str is a Sequence[str] too; the first overload that matches is the one that is meant.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, prompts: str | list[int], sampling_params: SamplingParams | None = ..., *, progress: bool | None = ...
    ) -> RequestOutput: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = ...,
        *,
        progress: bool | None = ...,
    ) -> RequestOutputs: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> RequestOutput | RequestOutputs:
        """Continue prompts.

        Args:
            prompts: a string or token ids, or a list of either.
            sampling_params: one for all prompts, or a list with one each. Fields that are left out come from the
                checkpoint's generation_config where it sets them (see :class:`SamplingParams`).
            progress: show a bar; None is as the engine was told.

        Returns:
            For one prompt a :class:`RequestOutput`, for a list a list of them in its order.

        Raises:
            RequestError: the one prompt cannot be served. In a list, such a prompt's output has ``error`` set and
                finish reason ``error`` instead, and the others are served.
            ValueError: ``sampling_params`` are wrong, or not as many as prompts.
        """
        single, items = as_prompts(prompts)
        params = self._params(sampling_params, len(items))
        live = [self._request(item, p) for item, p in zip(items, params, strict=True)]
        if single and live[0].error is not None:
            raise RequestError(live[0].error)
        self._run(live, _shown(progress) if progress is not None else self.progress, "generating")
        if single and live[0].error is not None:
            raise RequestError(live[0].error)
        outputs = RequestOutputs(request.output() for request in live)
        return outputs[0] if single else outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt and yield its text as it comes, in whole characters; ``decode_chunk`` tokens at a time.

        Closing the iterator drops the request. Other calls may run while it is open.

        Raises:
            RequestError: the prompt cannot be served, or the model's logits were not finite.
            ValueError: ``sampling_params`` are wrong, or ask for more than one output.
        """
        if not is_prompt(prompt):
            raise RequestError(f"stream takes one prompt, a string or token ids, got {type(prompt).__name__}")
        params = self._params(sampling_params, 1)[0]
        if params.n != 1:
            raise ValueError(f"n: stream gives one output, got n={params.n}")
        if self.tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer, so there is no text to stream; use generate()")
        request = self._request(prompt, params)
        if request.error is not None:
            raise RequestError(request.error)
        return self._stream(request)

    def chat(self, messages: Sequence[Message], sampling_params: SamplingParams | None = None) -> RequestOutput:
        """Answer a conversation with the checkpoint's chat template.

        Args:
            messages: ``{"role": "user", "content": "..."}`` each. Control tokens in their text stay text.
            sampling_params: as in :meth:`generate`.

        Raises:
            RequestError: the messages are malformed, or too long.
            ConfigError: the checkpoint has no chat template.
        """
        return self.generate(self.chat_ids(messages), sampling_params, progress=False)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt that :meth:`chat` gives the model; see there for errors."""
        if self.tokenizer is None:
            raise ConfigError("this checkpoint has no tokenizer, so it has no chat template")
        return chat_ids(self.tokenizer, messages)

    @overload
    def score(  # type: ignore[overload-overlap]
        self, texts: str | list[int], *, progress: bool | None = ...
    ) -> ScoreOutput: ...

    @overload
    def score(self, texts: Sequence[Prompt], *, progress: bool | None = ...) -> list[ScoreOutput]: ...

    def score(
        self, texts: Prompt | Sequence[Prompt], *, progress: bool | None = None
    ) -> ScoreOutput | list[ScoreOutput]:
        """Compute the log-probability of each token of texts, given those before it.

        Args:
            texts: a string or token ids, or a list of either.
            progress: show a bar; None is as the engine was told.

        Raises:
            RequestError: a text is empty, too long, or holds ids outside the vocabulary; or logits were not finite.
        """
        single = is_prompt(texts)
        live = self._read(texts, PromptWish(logprobs=0), progress, "scoring")
        scores = [
            ScoreOutput(
                text=request.prompt,
                token_ids=request.ids,
                logprobs=[None, *(entry[0] for entry in request.outputs[0].prompt_logprobs)],
            )
            for request in live
        ]
        return scores[0] if single else scores

    @overload
    def logits(  # type: ignore[overload-overlap]
        self, token_ids: str | list[int]
    ) -> np.ndarray: ...

    @overload
    def logits(self, token_ids: Sequence[Prompt]) -> list[np.ndarray]: ...

    def logits(self, token_ids: Prompt | Sequence[Prompt]) -> np.ndarray | list[np.ndarray]:
        """Compute the next-token logits at every position, as float32 [tokens, vocabulary]; a list for a list.

        Raises:
            RequestError: as in :meth:`score`, but logits that are not finite are given as they are.
        """
        single = is_prompt(token_ids)
        live = self._read(token_ids, PromptWish(logits=True), False, "logits", strict=False)
        found = [np.concatenate(request.outputs[0].prompt_logits) for request in live]
        return found[0] if single else found

    def offload_report(self) -> dict[str, Any] | None:
        """What paging moved, how fast, and what it waited for; None where nothing is paged. See `paging.report`."""
        return report(self.executor)

    def close(self) -> None:
        """Wait for what is running, and free the parameters and the KV cache; the engine cannot be used afterwards."""
        with self._lock:
            if self._runner is not None:
                self._runner.executor.free()
            self._runner = None

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        head = f"InferenceEngine({self.name or self.spec.family}, {self.plan.weights}, {describe(self.mesh)})"
        return f"{head}\n{self.plan}"

    def _repr_html_(self) -> str:
        head = f"InferenceEngine {self.name or self.spec.family}, {self.plan.weights}, {describe(self.mesh)}"
        return f"<p>{html.escape(head)}</p>{self.plan._repr_html_()}"

    # Below: from what callers give to sequences that run, and back.

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> list[SamplingParams]:
        params = [given] * count if given is None or isinstance(given, SamplingParams) else list(given)
        if len(params) != count:
            raise ValueError(f"sampling_params: expected one, or one for each of {count} prompts, got {len(params)}")
        for index, item in enumerate(params):
            if item is not None and not isinstance(item, SamplingParams):
                raise ValueError(f"sampling_params[{index}]: expected SamplingParams, got {type(item).__name__}")
        return [item or SamplingParams() for item in params]

    def _request(self, prompt: Any, params: SamplingParams, wish: PromptWish | None = None) -> LiveRequest:
        """Check one prompt and make its sequences; a request that cannot be served has ``error`` set and none."""
        with self._lock:
            number = self._requests
            self._requests += 1
        request = LiveRequest(str(number), prompt if isinstance(prompt, str) else None)
        try:
            request.ids = encode(
                prompt, self.tokenizer, vocab_size=self.spec.vocab_size, longest=self.plan.max_model_len
            )
            resolved = params.resolve(
                self.defaults, self.eos_token_ids, self.spec.vocab_size, derive_seed(self._seed, number)
            )
            limit = 0 if wish else output_limit(len(request.ids), params, resolved, self.plan.max_model_len)
            if wish is None and resolved.prompt_logprobs is not None:
                wish = PromptWish(logprobs=resolved.prompt_logprobs)
            long_from = self.spec.long_from
            for index, one in enumerate(resolved.outputs()):
                running = Running(
                    prompt=request.ids,
                    max_tokens=limit,
                    params=one,
                    wish=(wish or PromptWish()) if index == 0 else PromptWish(),
                    decode_token=self._token_text,
                    # Keys are cached rotated, so a sequence takes one set of frequencies for its whole life: that of
                    # the most tokens it may feed the model (the last one of the output is never fed).
                    long=long_from is not None and len(request.ids) + max(limit - 1, 0) > long_from,
                )
                if self.tokenizer is not None and limit:
                    running.text = TextStream(
                        self.tokenizer, one.stop, one.include_stop_str_in_output, one.skip_special_tokens,
                        min_tokens=one.min_tokens, prompt_ids=request.ids[-8:],
                    )  # fmt: skip
                elif one.stop:
                    raise RequestError(
                        "stop strings need a tokenizer, and this checkpoint has none; use stop_token_ids"
                    )
                request.outputs.append(running)
        except RequestError as error:
            request.error = str(error)
            request.outputs = []
        return request

    def _read(
        self, texts: Prompt | Sequence[Prompt], wish: PromptWish, progress: bool | None, what: str, strict: bool = True
    ) -> list[LiveRequest]:
        """Prefill texts for what their prompts report."""
        neutral = SamplingParams(temperature=0.0, repetition_penalty=1.0, max_tokens=None)
        live = [self._request(item, neutral, wish) for item in as_prompts(texts)[1]]
        self._check_all(live)
        self._run(live, _shown(progress) if progress is not None else self.progress, what)
        if strict:
            self._check_all(live)
        return live

    @staticmethod
    def _check_all(live: Sequence[LiveRequest]) -> None:
        for index, request in enumerate(live):
            error = request.failure()
            if error is not None:
                raise RequestError(error if len(live) == 1 else f"text {index}: {error}")

    def _run(self, live: Sequence[LiveRequest], show: bool, what: str) -> None:
        """Run requests to their end; whatever happens, none of theirs is left behind."""
        runner = self._open()
        sequences = [running for request in live for running in request.outputs]
        with progress.bar(show and len(live) > 1, desc=what, total=len(live), unit="prompt", delay=2) as bar:
            with self._lock:
                self._submit(runner, live)
            try:
                done = 0
                while not all(running.ended for running in sequences):
                    with self._lock:
                        self._open().turn()
                    ended = sum(request.ended for request in live)
                    bar.set_postfix_str(line(runner.executor), refresh=False)
                    bar.update(ended - done)
                    done = ended
            finally:
                with self._lock:
                    runner.abort(running for running in sequences if not running.ended)

    @staticmethod
    def _submit(runner: Runner, live: Sequence[LiveRequest]) -> None:
        for request in live:
            try:
                for running in request.outputs:
                    runner.submit(running)
            except CapacityError as error:
                request.error = str(error)
                for running in request.outputs:
                    running.finish_reason = "error"

    def _stream(self, request: LiveRequest) -> Iterator[str]:
        runner = self._open()
        (running,) = request.outputs
        with self._lock:
            self._submit(runner, [request])
        self._check_all([request])
        try:
            while True:
                text = "".join(running.pieces)
                running.pieces.clear()
                if text:
                    yield text
                elif running.ended:
                    break
                else:
                    with self._lock:
                        self._open().turn()
            self._check_all([request])
        finally:
            with self._lock:
                runner.abort([] if running.ended else [running])

    def _token_text(self, token: int) -> str:
        return "" if self.tokenizer is None else token_text(self.tokenizer, token)

    def _compiling(self, what: str) -> Any:
        return progress.compiling(self.progress, what)

    def _open(self) -> Runner:
        if self._runner is None:
            raise JaxinferError("this engine is closed")
        return self._runner
