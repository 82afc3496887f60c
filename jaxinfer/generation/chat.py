"""Chat templates: from messages to token ids, so that what people write cannot pass for control tokens."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence, Set
from typing import Any

from jaxinfer.errors import ConfigError, RequestError

Message = Mapping[str, str]


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Render messages with the checkpoint's template and encode them, ready for the assistant's answer.

    Text in messages never becomes a control token: one of the tokenizer's special tokens, or another added token that
    the template itself writes. The rendered conversation is encoded as a whole, as transformers does, but if that holds
    other control tokens than the template put there, then the template's parts and the messages' text are encoded
    separately, the latter with control tokens taken as plain text.

    Args:
        tokenizer: a transformers tokenizer.
        messages: ``{"role": ..., "content": ...}`` each.

    Raises:
        RequestError: a message that is not of this form, or that the template refuses.
        ConfigError: the checkpoint has no chat template.
    """
    _check(messages)
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("this checkpoint's tokenizer has no chat template; use generate() with a prompt of your own")
    # Markers stand for the text, so that the template's own parts can be told apart. Random: no message holds one.
    marker = secrets.token_hex(16)
    marked = [{**message, "content": f"{marker}{index}{marker}"} for index, message in enumerate(messages)]
    pieces = re.split(f"{marker}([0-9]+){marker}", _render(tokenizer, marked))
    own = [_encode(tokenizer, part) for part in pieces[0::2]]
    control = _control(tokenizer, {token for ids in own for token in ids})
    whole = _encode(tokenizer, _render(tokenizer, messages))
    if [token for token in whole if token in control] == [token for ids in own for token in ids if token in control]:
        return whole
    texts = [_as_text(tokenizer, messages[int(index)]["content"], control) for index in pieces[1::2]]
    return [token for pair in zip(own, [*texts, []], strict=True) for ids in pair for token in ids]


def _check(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages: expected a list of {{'role', 'content'}}, got {messages!r:.80}")
    for index, message in enumerate(messages):
        # Other fields are refused, because a template may write them out and nothing here would look at their text.
        if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
            raise RequestError(f"messages[{index}]: expected a mapping of 'role' and 'content', got {message!r:.80}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z_]{1,32}", role):
            raise RequestError(f"messages[{index}].role: expected a word such as 'user', got {role!r:.80}")
        if not isinstance(content, str):
            raise RequestError(f"messages[{index}].content: expected a string, got {type(content).__name__}")
        try:
            content.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"messages[{index}].content: not encodable as UTF-8: {error}") from None


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # templates raise jinja errors of their own choosing
        raise RequestError(f"the chat template refuses these messages: {error}") from error


def _control(tokenizer: Any, written: Set[int]) -> set[int]:
    """Special tokens, and the added ones among those that the template has ``written``.

    Some checkpoints add ``<|im_start|>`` without calling it special. Added runs of blanks, which GPT-NeoX has, are text
    all the same.
    """
    added = {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.content.strip()}
    return set(tokenizer.all_special_ids) | (added & written)


def _as_text(tokenizer: Any, text: str, control: Set[int]) -> list[int]:
    """Encode text without control tokens, by cutting it within each stretch that would become one."""
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    spans = [offset for token, offset in zip(ids, offsets, strict=True) if token in control]
    if not spans:
        return ids
    safe: list[int] = []
    begin = 0
    for start, stop in [*spans, (len(text), len(text) + 2)]:
        # A character that is a control token all by itself has no other spelling: it is left out.
        middle, after = ((start + stop) // 2, (start + stop) // 2) if stop - start > 1 else (start, stop)
        if begin < middle:
            safe += _as_text(tokenizer, text[begin:middle], control)
        begin = max(begin, after)
    return safe


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"])
