"""What a user gets back: outputs, log-probabilities, scores; readable in a terminal, a notebook and as JSON."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "error"]
_SHOWN = 60
_SHOWN_ROWS = 20


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token's log-probability (natural log), its rank (1 is the most likely) and its text.

    They are the model's own: before penalties, temperature and truncation.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


def logprob_dict(
    token_id: int,
    logprob: float,
    rank: int,
    top_ids: Sequence[int],
    top_logprobs: Sequence[float],
    count: int,
    decode: Callable[[int], str],
) -> dict[int, Logprob]:
    """A position's log-probabilities as vLLM gives them: the token that came first, then the ``count`` most likely.

    Args:
        token_id, logprob, rank: the token that stands at the position.
        top_ids, top_logprobs: the most likely tokens, best first, at least ``count`` of them.
        count: how many of them to keep.
        decode: token id -> text.
    """
    entries = {int(token_id): Logprob(float(logprob), int(rank), decode(int(token_id)))}
    for place, (token, value) in enumerate(zip(top_ids[:count], top_logprobs[:count], strict=True), start=1):
        if int(token) not in entries:
            entries[int(token)] = Logprob(float(value), place, decode(int(token)))
    return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestMetrics:
    """Times of one request in seconds; None where a stage was not reached.

    Attributes:
        queued: from submission to the start of prefill.
        time_to_first_token: from submission to the first token (TTFT).
        time_per_output_token: mean time between later tokens (TPOT).
        total: from submission to the end.
    """

    queued: float | None = None
    time_to_first_token: float | None = None
    time_per_output_token: float | None = None
    total: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """JSON-able; non-finite numbers become None."""
        return {
            "queued": _finite(self.queued),
            "time_to_first_token": _finite(self.time_to_first_token),
            "time_per_output_token": _finite(self.time_per_output_token),
            "total": _finite(self.total),
        }


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt.

    Attributes:
        index: which of the n outputs.
        text: the generated text, without the stop string unless it was asked for.
        token_ids: the generated tokens, including the one that ended the output.
        finish_reason: "stop" (end-of-sequence, stop token or stop string), "length", "error", or None while it runs.
        stop_reason: the stop string or stop token id that ended it; None for end-of-sequence and the other reasons.
        logprobs: for each token, token id -> Logprob for it and the alternatives asked for; None if not asked.
        cumulative_logprob: sum of the tokens' log-probabilities; None if logprobs were not asked for.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    cumulative_logprob: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; non-finite numbers become None."""
        return {
            "index": self.index,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "finish_reason": self.finish_reason,
            "stop_reason": self.stop_reason,
            "logprobs": None if self.logprobs is None else [_logprobs_json(entry) for entry in self.logprobs],
            "cumulative_logprob": _finite(self.cumulative_logprob),
        }

    def __repr__(self) -> str:
        ending = f", {self.finish_reason}" if self.finish_reason else ""
        return f"CompletionOutput({_short(self.text)}, {len(self.token_ids)} tokens{ending})"


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """What came of one prompt.

    Attributes:
        request_id: its number within the engine.
        prompt: its text; None if it was given as token ids.
        prompt_token_ids: its tokens; empty if it was refused before it had any.
        prompt_logprobs: for each prompt token, token id -> Logprob (None for the first, which nothing predicts).
        outputs: the n continuations.
        error: why the request failed, or None.
        metrics: times in seconds.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: str | None = None
    metrics: RequestMetrics | None = None

    @property
    def finished(self) -> bool:
        """Whether every output has ended."""
        return all(output.finish_reason is not None for output in self.outputs)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; non-finite numbers become None."""
        prompt_logprobs = self.prompt_logprobs
        return {
            "request_id": self.request_id,
            "prompt": self.prompt,
            "prompt_token_ids": list(self.prompt_token_ids),
            "prompt_logprobs": (
                None
                if prompt_logprobs is None
                else [None if entry is None else _logprobs_json(entry) for entry in prompt_logprobs]
            ),
            "outputs": [output.to_dict() for output in self.outputs],
            "error": self.error,
            "metrics": None if self.metrics is None else self.metrics.to_dict(),
        }

    def __repr__(self) -> str:
        prompt = f"{len(self.prompt_token_ids)} tokens" if self.prompt is None else _short(self.prompt)
        error = f", error={_short(self.error)}" if self.error else ""
        return f"RequestOutput({self.request_id}, {prompt} -> {self.outputs}{error})"

    def _repr_html_(self) -> str:
        return RequestOutputs([self])._repr_html_()


class RequestOutputs(list[RequestOutput]):
    """A list of `RequestOutput` that a notebook shows as a table."""

    def to_dict(self) -> list[dict[str, Any]]:
        """JSON-able; non-finite numbers become None."""
        return [output.to_dict() for output in self]

    def _repr_html_(self) -> str:
        rows = []
        for request in self[:_SHOWN_ROWS]:
            prompt = f"{len(request.prompt_token_ids)} tokens" if request.prompt is None else request.prompt
            for output in request.outputs:
                text = output.text if request.error is None else f"{output.text} [{request.error}]".lstrip()
                rows.append((prompt, text, str(len(output.token_ids)), output.finish_reason or "running"))
            if not request.outputs:
                rows.append((prompt, f"[{request.error}]" if request.error else "", "0", "error"))
        table = _html_table(("prompt", "text", "tokens", "finish"), rows)
        hidden = len(self) - _SHOWN_ROWS
        return table if hidden <= 0 else f"{table}<p>and {hidden} more</p>"


@dataclass(slots=True, kw_only=True)
class ScoreOutput:
    """How likely a model finds a text.

    Attributes:
        text: the text; None if it was given as token ids.
        token_ids: its tokens.
        logprobs: each token's log-probability given the ones before it (natural log); None for the first, unless a
            beginning-of-sequence token precedes it.
    """

    text: str | None
    token_ids: list[int]
    logprobs: list[float | None]

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return math.fsum(value for value in self.logprobs if value is not None)

    @property
    def perplexity(self) -> float:
        """Exponential of the mean negative log-probability; NaN if there is none, inf where it overflows."""
        count = sum(value is not None for value in self.logprobs)
        if not count:
            return math.nan
        try:
            return math.exp(-self.total / count)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; non-finite numbers become None."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "logprobs": [_finite(value) for value in self.logprobs],
            "total": _finite(self.total),
            "perplexity": _finite(self.perplexity),
        }

    def __repr__(self) -> str:
        text = f"{len(self.token_ids)} tokens" if self.text is None else _short(self.text)
        return f"ScoreOutput({text}, total={self.total:.4f}, perplexity={self.perplexity:.4f})"

    def _repr_html_(self) -> str:
        text = f"{len(self.token_ids)} tokens" if self.text is None else self.text
        row = (text, str(len(self.token_ids)), f"{self.total:.4f}", f"{self.perplexity:.4f}")
        return _html_table(("text", "tokens", "total", "perplexity"), [row])


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _logprobs_json(entry: dict[int, Logprob]) -> list[dict[str, Any]]:
    # A list, since JSON would turn the ids that are the keys into strings.
    return [
        {"token_id": token, "logprob": _finite(it.logprob), "rank": it.rank, "decoded_token": it.decoded_token}
        for token, it in entry.items()
    ]


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    style = ' style="text-align:left;white-space:pre-wrap"'
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td{style}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
