"""The engine: a checkpoint, ready to generate, stream, chat, score and give logits."""

from __future__ import annotations

import html
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import Mesh

from jaxinfer import hardware, progress
from jaxinfer.checkpoints import Checkpoint, Target, check, load, resolve
from jaxinfer.errors import CapacityError, ConfigError, JaxinferError, RequestError
from jaxinfer.executor import Executor, PromptWish
from jaxinfer.generation.chat import Message, chat_ids
from jaxinfer.generation.params import UNSET, GenerationDefaults, ResolvedParams, SamplingParams, derive_seed
from jaxinfer.generation.requests import (
    CompletionOutput,
    RequestMetrics,
    RequestOutput,
    RequestOutputs,
    ScoreOutput,
    logprob_dict,
)
from jaxinfer.generation.runner import Runner, Running
from jaxinfer.generation.text import TextStream, token_text
from jaxinfer.models.config import read_config
from jaxinfer.models.families import ignored, sources_of, spec_of
from jaxinfer.models.spec import ModelSpec
from jaxinfer.plan import DTYPES, Plan, make_plan
from sharding import ShardingRules, TensorLimits, describe, make_mesh

Prompt = str | Sequence[int]


def init_inference(
    model: str | Path,
    mesh: Mapping[str, int] | Mesh | None = None,
    dtype: str | None = None,
    *,
    max_batch: int = 16,
    max_model_len: int | None = None,
    kv_blocks: int | None = None,
    decode_chunk: int = 16,
    prefill_chunk: int = 512,
    prefill_tokens: int = 2048,
    rules: ShardingRules | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> InferenceEngine:
    """Load a checkpoint onto a mesh.

    Args:
        model: a folder as transformers writes it, a Hugging Face hub id, or ``"demo"`` for the bundled model.
        mesh: axis sizes such as ``{"data": 2, "tensor": 4}``, or a ``jax.sharding.Mesh``. None: all local devices,
            ``tensor`` as far as the model's heads allow, the rest ``data``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None is the checkpoint's own.
        max_batch: sequences that decode together, over all data shards.
        max_model_len: most tokens of a sequence, prompt and output; None is the model's context length.
        kv_blocks: KV blocks of 64 tokens on each data shard; None: as many as are of use and fit.
        decode_chunk: tokens that a decode step advances by, between which the host looks at what came; smaller streams
            more smoothly, larger costs less.
        prefill_chunk: most prompt tokens of one sequence in a prefill step.
        prefill_tokens: most prompt tokens of one data shard in a prefill step.
        rules: which mesh axis each logical axis lies on.
        seed: what requests that bring no seed of their own derive theirs from.
        progress: show progress bars; None shows them in a terminal or notebook.

    Raises:
        ConfigError: the configuration is malformed, or asks for something that is not implemented.
        CheckpointError: files are missing, damaged or unsafe, or hold other tensors than the configuration needs.
        sharding.MeshError: the model cannot be split over the mesh; the nearest mesh that works is named.
        CapacityError: the devices' memory does not hold the model and a cache.
    """
    show = _shown(progress)
    folder = resolve(model)
    config = read_config(folder)
    spec = spec_of(config)
    with Checkpoint(folder) as checkpoint:
        # Everything that can be wrong is found before a device holds anything. The layout does not change which tensors
        # are needed, so the file is checked against the one-device layout even if the mesh turns out to be wrong.
        devices = make_mesh(mesh, limits_of(spec))
        plan = make_plan(
            spec,
            dict(devices.shape),
            dtype or _dtype_of(config),
            hardware.of(devices.devices.flat[0]),
            max_batch=max_batch,
            max_model_len=max_model_len,
            kv_blocks=kv_blocks,
            decode_chunk=decode_chunk,
            prefill_chunk=prefill_chunk,
            prefill_tokens=prefill_tokens,
            rules=rules,
        )
        sources = sources_of(spec, plan.layout, checkpoint.tensors)
        check(checkpoint, sources, lambda name: ignored(spec, name))
        generation = _read_json(folder / "generation_config.json")
        defaults = GenerationDefaults.read(generation)
        tokenizer = _tokenizer(folder)
        _keep_compiled(devices)
        placements = Executor.placements(plan, devices)
        targets = {path: Target(info.shape, info.dtype, placements[path]) for path, info in plan.parameters.items()}
        leaves = load(checkpoint, sources, targets, progress=show)
    eos = generation.get("eos_token_id", getattr(config, "eos_token_id", None))
    return InferenceEngine(
        plan,
        devices,
        leaves,
        tokenizer=tokenizer,
        defaults=defaults,
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        name=str(model),
        seed=seed,
        progress=show,
    )


class InferenceEngine:
    """A model that is loaded and ready; made by :func:`init_inference`. Use it as a context manager, or close it.

    Attributes:
        plan: where every byte lives.
        mesh: the devices.
        tokenizer: the checkpoint's, or None where it has none (then prompts are token ids).
        defaults: what the checkpoint's generation_config says about fields of ``SamplingParams`` that are left out.
    """

    def __init__(
        self,
        plan: Plan,
        mesh: Mesh,
        leaves: Mapping[str, jax.Array],
        *,
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
        self._show = progress
        self._seed, self._requests = seed, 0
        self._lock = threading.RLock()
        self._runner: Runner | None = Runner(Executor(plan, mesh, leaves, self._compiling))

    @property
    def spec(self) -> ModelSpec:
        """The architecture."""
        return self.plan.spec

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
        single = _is_prompt(prompts)
        items: list[Any] = [prompts] if single else list(prompts)
        params = self._params(sampling_params, len(items))
        live = [self._request(item, p) for item, p in zip(items, params, strict=True)]
        if single and live[0].error is not None:
            raise RequestError(live[0].error)
        self._run(live, _shown(progress) if progress is not None else self._show, "generating")
        outputs = RequestOutputs(request.output() for request in live)
        return outputs[0] if single else outputs

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[str]:
        """Continue one prompt and yield its text as it comes, in whole characters; ``decode_chunk`` tokens at a time.

        Closing the iterator drops the request. Other calls may run while it is open.

        Raises:
            RequestError: the prompt cannot be served, or the model's logits were not finite.
            ValueError: ``sampling_params`` are wrong, or ask for more than one output.
        """
        if not _is_prompt(prompt):
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
        single = _is_prompt(texts)
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
        single = _is_prompt(token_ids)
        live = self._read(token_ids, PromptWish(logits=True), False, "logits", strict=False)
        found = [np.concatenate(request.outputs[0].prompt_logits) for request in live]
        return found[0] if single else found

    def close(self) -> None:
        """Free the parameters and the KV cache; the engine cannot be used afterwards."""
        with self._lock:
            self._runner = None

    def __enter__(self) -> InferenceEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"InferenceEngine({self.name or self.spec.family}, {self.plan.dtype}, {describe(self.mesh)})\n{self.plan}"
        )

    def _repr_html_(self) -> str:
        head = f"InferenceEngine {self.name or self.spec.family}, {self.plan.dtype}, {describe(self.mesh)}"
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

    def _request(self, prompt: Any, params: SamplingParams, wish: PromptWish | None = None) -> _Request:
        """Check one prompt and make its sequences; a request that cannot be served has ``error`` set and none."""
        with self._lock:
            number = self._requests
            self._requests += 1
        request = _Request(str(number), prompt if isinstance(prompt, str) else None)
        try:
            request.ids = self._encode(prompt)
            resolved = params.resolve(
                self.defaults, self.eos_token_ids, self.spec.vocab_size, derive_seed(self._seed, number)
            )
            limit = 0 if wish else self._limit(len(request.ids), params, resolved)
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
                    # Keys are cached rotated, so a sequence takes one set of frequencies for its whole life.
                    long=long_from is not None and len(request.ids) + limit > long_from,
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

    def _encode(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise RequestError("this checkpoint has no tokenizer; give prompts as token ids")
            try:
                prompt.encode()
            except UnicodeEncodeError as error:
                raise RequestError(f"prompt: not encodable as UTF-8: {error}") from None
            ids = list(self.tokenizer(prompt)["input_ids"])
        elif isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes):
            ids = list(prompt)
        else:
            raise RequestError(f"prompt: expected a string or token ids, got {type(prompt).__name__}")
        if not ids:
            raise RequestError("prompt: expected at least one token, got none")
        vocab = self.spec.vocab_size
        for place, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise RequestError(f"prompt: token {place} is not an integer: {token!r:.80}")
            if not 0 <= token < vocab:
                raise RequestError(f"prompt: token {place} is {token}, and the vocabulary has ids 0 to {vocab - 1}")
        longest = self.plan.max_model_len
        if len(ids) > longest:
            raise RequestError(f"prompt: {len(ids)} tokens, and the context length is {longest}")
        return [int(token) for token in ids]

    def _limit(self, prompt: int, params: SamplingParams, resolved: ResolvedParams) -> int:
        """Output tokens that a request may have: what it asks for, which must fit; or else what fits."""
        room = self.plan.max_model_len - prompt
        if room < 1:
            raise RequestError(
                f"prompt: {prompt} tokens leave no room for output in a context length of {self.plan.max_model_len}"
            )
        if resolved.max_tokens is None or params.max_tokens is UNSET:
            return min(room, room if resolved.max_tokens is None else resolved.max_tokens)
        if resolved.max_tokens > room:
            raise RequestError(
                f"prompt of {prompt} tokens + max_tokens={resolved.max_tokens} is {prompt + resolved.max_tokens} "
                f"tokens, and the context length is {self.plan.max_model_len}"
            )
        return resolved.max_tokens

    def _read(
        self, texts: Prompt | Sequence[Prompt], wish: PromptWish, progress: bool | None, what: str, strict: bool = True
    ) -> list[_Request]:
        """Prefill texts for what their prompts report."""
        items: list[Any] = [texts] if _is_prompt(texts) else list(texts)
        live = [self._request(item, SamplingParams(temperature=0.0, max_tokens=None), wish) for item in items]
        self._check_all(live)
        self._run(live, _shown(progress) if progress is not None else self._show, what)
        if strict:
            self._check_all(live)
        return live

    @staticmethod
    def _check_all(live: Sequence[_Request]) -> None:
        for index, request in enumerate(live):
            error = request.failure()
            if error is not None:
                raise RequestError(error if len(live) == 1 else f"text {index}: {error}")

    def _run(self, live: Sequence[_Request], show: bool, what: str) -> None:
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
                        runner.turn()
                    ended = sum(request.ended for request in live)
                    bar.update(ended - done)
                    done = ended
            finally:
                with self._lock:
                    runner.abort(running for running in sequences if not running.ended)

    @staticmethod
    def _submit(runner: Runner, live: Sequence[_Request]) -> None:
        for request in live:
            try:
                for running in request.outputs:
                    runner.submit(running)
            except CapacityError as error:
                request.error = str(error)
                for running in request.outputs:
                    running.finish_reason = "error"

    def _stream(self, request: _Request) -> Iterator[str]:
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
                        runner.turn()
            self._check_all([request])
        finally:
            with self._lock:
                runner.abort([] if running.ended else [running])

    def _token_text(self, token: int) -> str:
        return "" if self.tokenizer is None else token_text(self.tokenizer, token)

    def _compiling(self, what: str) -> Any:
        return progress.compiling(self._show, what)

    def _open(self) -> Runner:
        if self._runner is None:
            raise JaxinferError("this engine is closed")
        return self._runner


class _Request:
    """One prompt on its way: its outputs in the making, and what is made of them in the end."""

    def __init__(self, request_id: str, prompt: str | None) -> None:
        self.request_id, self.prompt = request_id, prompt
        self.ids: list[int] = []
        self.outputs: list[Running] = []
        self.error: str | None = None

    @property
    def ended(self) -> bool:
        return all(running.ended for running in self.outputs)

    def failure(self) -> str | None:
        """Why it failed, or None."""
        return self.error or next((r.error for r in self.outputs if r.error is not None), None)

    def output(self) -> RequestOutput:
        """What the caller gets."""
        if self.error is not None:
            outputs = [CompletionOutput(index=0, finish_reason="error")]
            return RequestOutput(
                request_id=self.request_id, prompt=self.prompt, prompt_token_ids=self.ids, outputs=outputs,
                error=self.error,
            )  # fmt: skip
        first = self.outputs[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.ids,
            outputs=[self._completion(index, running) for index, running in enumerate(self.outputs)],
            prompt_logprobs=None if first.params.prompt_logprobs is None else self._prompt_logprobs(first),
            error=self.failure(),
            metrics=_metrics(self.outputs),
        )

    @staticmethod
    def _completion(index: int, running: Running) -> CompletionOutput:
        wanted = running.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="" if running.text is None else running.text.text,
            token_ids=list(running.output),
            finish_reason=running.finish_reason,
            stop_reason=running.stop_reason,
            logprobs=running.logprobs if wanted else None,
            cumulative_logprob=running.cumulative_logprob if wanted else None,
        )

    def _prompt_logprobs(self, first: Running) -> list[Any]:
        count = first.params.prompt_logprobs or 0
        rows = zip(self.ids[1:], first.prompt_logprobs, strict=False)
        return [None, *(logprob_dict(token, *row, count, first.decode_token) for token, row in rows)]


def _metrics(outputs: Sequence[Running]) -> RequestMetrics:
    first = outputs[0]
    later = len(first.output) - 1
    ended = max((r.last_token or r.submitted for r in outputs), default=time.perf_counter())
    spread = (first.last_token or 0.0) - (first.first_token or 0.0)
    return RequestMetrics(
        queued=None if first.started is None else first.started - first.submitted,
        time_to_first_token=None if first.first_token is None else first.first_token - first.submitted,
        time_per_output_token=spread / later if later > 0 else None,
        total=ended - first.submitted,
    )


def limits_of(spec: ModelSpec) -> TensorLimits:
    """What a model allows the ``tensor`` axis to be."""
    return TensorLimits(heads=spec.heads, kv_heads=spec.kv_heads, intermediate=spec.intermediate)


def _shown(value: bool | None) -> bool:
    return progress.shown(value)


def _is_prompt(value: Any) -> bool:
    """Whether this is one prompt: a string, or a sequence of integers (an empty one is an empty list of prompts)."""
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence | np.ndarray) and len(value) > 0 and isinstance(value[0], int | np.integer)


def _dtype_of(config: Any) -> str:
    """The checkpoint's own dtype; float32 where it does not say."""
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(
            f"{config.model_type} config: dtype {name!r} is not implemented; give dtype=, one of {DTYPES}"
        )
    return name


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer, or None where the folder has none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # anything from KeyError to a Rust panic for a damaged file
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"{folder}: the tokenizer cannot be read: {type(error).__name__}: {reason}") from error


def _keep_compiled(mesh: Mesh) -> None:
    """Keep compiled programs on disk between runs, unless the user has set JAX's cache up, or on a CPU.

    On a CPU a program is compiled for the very processor, and JAX warns when another reads it.
    """
    if jax.config.jax_compilation_cache_dir is None and mesh.devices.flat[0].platform != "cpu":
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "jaxinfer" / "compiled"))
