"""Chat templates: from messages to token ids, so that what people write cannot pass for control tokens."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from jaxinfer.errors import ConfigError, RequestError

Message = Mapping[str, str]


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Render messages with the checkpoint's template and encode them, ready for the assistant's answer.

    Text in messages never becomes a control token: the rendered conversation is encoded as a whole, as transformers
    does, but if that holds other control tokens than the template put there, then the template's parts and the
    messages' text are encoded separately, the latter with control tokens taken as plain text.

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
    control = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    whole = _encode(tokenizer, _render(tokenizer, messages), split=False)
    # Markers stand for the text, so that the template's own parts can be told apart. Random: no message holds one.
    marker = secrets.token_hex(16)
    marked = [{**message, "content": f"{marker}{index}{marker}"} for index, message in enumerate(messages)]
    safe: list[int] = []
    for index, part in enumerate(re.split(f"{marker}([0-9]+){marker}", _render(tokenizer, marked))):
        text = messages[int(part)]["content"] if index % 2 else part
        safe += _encode(tokenizer, text, split=bool(index % 2))
    same = [i for i in whole if i in control] == [i for i in safe if i in control]
    return whole if same else safe


def _check(messages: Sequence[Message]) -> None:
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError(f"messages: expected a list of {{'role', 'content'}}, got {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError(f"messages[{index}]: expected a mapping with 'role' and 'content', got {message!r:.80}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not re.fullmatch(r"[A-Za-z_]{1,32}", role):
            raise RequestError(f"messages[{index}].role: expected a word such as 'user', got {role!r:.80}")
        if not isinstance(content, str):
            raise RequestError(f"messages[{index}].content: expected a string, got {type(content).__name__}")


def _render(tokenizer: Any, messages: Sequence[Message]) -> str:
    try:
        return str(
            tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # templates raise jinja errors of their own choosing
        raise RequestError(f"the chat template refuses these messages: {error}") from error


def _encode(tokenizer: Any, text: str, *, split: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"])
