"""From token ids to text as they come: whole characters only, and stop strings cut wherever they fall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Tokens without finished text that are decoded again and again before they are given up as undecodable. A UTF-8
# character has at most four bytes, so four would do if every such token were a byte; a model that writes garbage for
# thousands of tokens must not make decoding quadratic.
_LONGEST_PENDING = 32
_PROMPT_CONTEXT = 8


def fast_tokenizer(tokenizer: Any) -> Tokenizer:
    """The `tokenizers.Tokenizer` inside a transformers tokenizer (or the tokenizer itself).

    Raises:
        TypeError: a tokenizer without one (a pure Python tokenizer).
    """
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            f"tokenizer: expected one that is backed by the tokenizers library (tokenizer.json), got {type(tokenizer)}"
        )
    return backend


def token_text(tokenizer: Any, token_id: int) -> str:
    """The text of one token alone, special tokens included; U+FFFD stands for bytes that are no whole character."""
    return fast_tokenizer(tokenizer).decode([token_id], skip_special_tokens=False)


class _Pieces:
    """Token by token to text, by `DecodeStream`, which never errs and never stalls.

    DecodeStream alone does both: it raises for good when a byte-fallback decoder turns bytes that it has already
    given out into U+FFFD (a whole character followed by a stray byte), and it waits as long as text ends in U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._context: list[int] = []  # tokens before the pending ones, for decoders that join or strip
        self._pending: list[int] = []  # tokens whose text is not out yet
        # DecodeStream would keep skipped tokens in its window: with ignore_eos there may be thousands of them.
        added = tokenizer.get_added_tokens_decoder().items() if skip_special_tokens else ()
        self._skipped = frozenset(token_id for token_id, token in added if token.special)
        context = [token_id for token_id in prompt_ids if token_id not in self._skipped][-_PROMPT_CONTEXT:]
        if not context or self._decode(context).endswith(_REPLACEMENT):
            context = []
        self._restart(context)

    def step(self, token_id: int) -> str:
        """The text that this token finishes, perhaps none."""
        if token_id in self._skipped:
            return ""
        self._pending.append(token_id)
        try:
            piece = self._stream.step(self._tokenizer, token_id)
        except Exception as error:  # the binding raises bare Exception
            if "prefix" not in str(error):
                raise
            pending = self._pending
            self._restart([])
            self._pending = pending
            piece = self._stream.step(self._tokenizer, pending)
        if piece is not None:
            self._context, self._pending = self._pending, []
            return piece
        return self._give_up() if len(self._pending) >= _LONGEST_PENDING else ""

    def flush(self) -> str:
        """The text of what is left, with U+FFFD for bytes that did not become a character."""
        piece = self._unfinished()
        self._context, self._pending = self._pending, []
        return piece

    def _give_up(self) -> str:
        text, pending = self._unfinished(), self._pending
        if not text:  # tokens without text, such as ids that the tokenizer does not know
            self._restart(self._context)
            return ""
        # A character under way began in the last three tokens; cut before it, where both sides decode as the whole.
        for count in range(3, 9):
            kept = self._decode(pending[-count:])
            if text.endswith(kept) and self._decode(pending[:-count]) + kept == text:
                break
        else:
            count = 3
        self._pending = pending[:-count]
        piece = self._unfinished()
        self._restart([])
        self._pending = pending[-count:]
        self._stream.step(self._tokenizer, self._pending)
        return piece

    def _unfinished(self) -> str:
        before, text = self._decode(self._context), self._decode(self._context + self._pending)
        return text[len(before) :] if text.startswith(before) else self._decode(self._pending)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)

    def _restart(self, context: list[int]) -> None:
        self._stream = DecodeStream(ids=context, skip_special_tokens=self._skip)
        self._context, self._pending = context, []


class TextStream:
    """Text of one output as its tokens come, the same however the tokens are split into pushes.

    The pieces together are ``tokenizer.decode`` of all tokens (of the `tokenizers` library: transformers' optional
    ``clean_up_tokenization_spaces`` is not applied), up to the stop string. Ill-formed UTF-8 is the one exception: a
    byte-fallback decoder replaces a whole run of bytes when one of them is bad, after its good characters are out.
    A stop string is found at the first token that completes one; where one token completes several, the one that
    ends first counts, then the longest.

    Args:
        tokenizer: a transformers fast tokenizer, or a `tokenizers.Tokenizer`.
        stop: strings that end the text.
        include_stop: keep the stop string at the end of the text (what follows it in the same token is cut).
        skip_special_tokens: leave special tokens out.
        min_tokens: stop strings that are completed within this many tokens do not count.
        prompt_ids: tokens before the first one. Without them a SentencePiece-like decoder strips the space that
            begins the first word; with them the text is what follows the prompt's text.
    """

    def __init__(
        self,
        tokenizer: Any,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        *,
        min_tokens: int = 0,
        prompt_ids: Sequence[int] = (),
    ) -> None:
        self._pieces = _Pieces(fast_tokenizer(tokenizer), skip_special_tokens, prompt_ids)
        self._stop = stop
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._count = 0
        self._held = ""  # text that is not given out: it may be the beginning of a stop string
        self._final: list[str] = []
        self.stopped: str | None = None
        self.token_count_at_stop: int | None = None

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._final)

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens make final; nothing after a stop string."""
        step = self._pieces.step
        for token_id in token_ids:
            if self.stopped is not None:
                return ""
            self._count += 1
            piece = step(token_id)
            if piece and self._add(piece):
                return self._give(len(self._held))
        return self._give(len(self._held) - self._possible_stop())

    def finish(self) -> str:
        """The rest of the text once there are no more tokens."""
        if self.stopped is None:
            piece = self._pieces.flush()
            if piece:
                self._add(piece)
        return self._give(len(self._held))

    def _add(self, piece: str) -> bool:
        """Append to the held text, cut it at a stop string that ends in this piece, and say whether there was one."""
        before = len(self._held)
        self._held += piece
        if not self._stop or self._count <= self._min_tokens:
            return False
        found = []
        for stop in self._stop:
            start = self._held.find(stop, max(before - len(stop) + 1, 0))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        if not found:
            return False
        end, start, self.stopped = min(found)
        self.token_count_at_stop = self._count
        self._held = self._held[: end if self._include_stop else start]
        return True

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that is a beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _give(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        if text:
            self._final.append(text)
        return text
