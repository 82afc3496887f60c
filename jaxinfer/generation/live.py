"""A request between the caller and the generation loop: prompts checked on the way in, outputs made on the way out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxinfer.errors import RequestError
from jaxinfer.generation.params import UNSET, ResolvedParams, SamplingParams
from jaxinfer.generation.requests import CompletionOutput, RequestMetrics, RequestOutput, logprob_dict
from jaxinfer.generation.runner import Running

Prompt = str | Sequence[int]


def is_prompt(value: Any) -> bool:
    """Whether this is one prompt: a string, or a sequence of integers (an empty one is an empty list of prompts)."""
    if isinstance(value, str):
        return True
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, bytes | bytearray | memoryview):
        return False
    return len(value) > 0 and isinstance(value[0], int | np.integer)


def as_prompts(value: Any) -> tuple[bool, list[Any]]:
    """Whether a caller gave one prompt rather than a list, and the prompts as a list.

    Raises:
        RequestError: it is neither.
    """
    if is_prompt(value):
        return True, [value]
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, bytes | bytearray | memoryview):
        raise RequestError(f"prompts: expected a string, token ids, or a list of either, got {type(value).__name__}")
    return False, list(value)


def encode(prompt: Any, tokenizer: Any, *, vocab_size: int, longest: int) -> list[int]:
    """Turn a prompt, a string or token ids, into checked token ids.

    Args:
        prompt: what the caller gave.
        tokenizer: the checkpoint's, or None.
        vocab_size: ids are below it.
        longest: most tokens of a sequence.

    Raises:
        RequestError: it is of another type, empty, too long, holds ids outside the vocabulary, or is text and there is
            no tokenizer.
    """
    if isinstance(prompt, str):
        if tokenizer is None:
            raise RequestError("this checkpoint has no tokenizer; give prompts as token ids")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"prompt: not encodable as UTF-8: {error}") from None
        ids = list(tokenizer(prompt)["input_ids"])
    elif isinstance(prompt, Sequence | np.ndarray) and not isinstance(prompt, bytes):
        ids = list(prompt)
    else:
        raise RequestError(f"prompt: expected a string or token ids, got {type(prompt).__name__}")
    if not ids:
        raise RequestError("prompt: expected at least one token, got none")
    # A prompt at a time, not a token at a time: of 16,000 tokens that is 4 ms.
    kinds = set(map(type, ids))
    if not all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
        place, token = next(
            (p, t) for p, t in enumerate(ids) if isinstance(t, bool) or not isinstance(t, int | np.integer)
        )
        raise RequestError(f"prompt: token {place} is not an integer: {token!r:.80}")
    try:
        values = np.fromiter(ids, np.int64, len(ids))
        outside = bool(values.min() < 0 or values.max() >= vocab_size)
    except OverflowError:
        outside = True
    if outside:
        place, token = next((p, t) for p, t in enumerate(ids) if not 0 <= t < vocab_size)
        raise RequestError(f"prompt: token {place} is {token}, and the vocabulary has ids 0 to {vocab_size - 1}")
    if len(ids) > longest:
        raise RequestError(f"prompt: {len(ids)} tokens, and the context length is {longest}")
    return ids if kinds == {int} else [int(token) for token in ids]


def output_limit(prompt: int, params: SamplingParams, resolved: ResolvedParams, longest: int) -> int:
    """Output tokens that a request may have: what it asks for, which must fit; or else what fits.

    Args:
        prompt: tokens of the prompt.
        params, resolved: what the caller asked for, and what that came to.
        longest: most tokens of a sequence.

    Raises:
        RequestError: there is no room for output, or for as much as was asked for.
    """
    room = longest - prompt
    if room < 1:
        raise RequestError(f"prompt: {prompt} tokens leave no room for output in a context length of {longest}")
    if resolved.max_tokens is None or params.max_tokens is UNSET:
        return min(room, room if resolved.max_tokens is None else resolved.max_tokens)
    if resolved.max_tokens > room:
        raise RequestError(
            f"prompt of {prompt} tokens + max_tokens={resolved.max_tokens} is {prompt + resolved.max_tokens} "
            f"tokens, and the context length is {longest}"
        )
    return resolved.max_tokens


class LiveRequest:
    """One prompt on its way: its outputs in the making, and what is made of them in the end.

    Attributes:
        request_id: its number within the engine.
        prompt: its text, or None.
        ids: its tokens.
        outputs: one for each of the n outputs; none where the request was refused.
        error: why it was refused, or None.
    """

    def __init__(self, request_id: str, prompt: str | None) -> None:
        self.request_id, self.prompt = request_id, prompt
        self.ids: list[int] = []
        self.outputs: list[Running] = []
        self.error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether all outputs have."""
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
