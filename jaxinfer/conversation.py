"""A conversation with a model: keeps every message, and lets an answer be ended early."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.engine import InferenceEngine
    from jaxinfer.generation.params import SamplingParams


class Conversation:
    """What has been said, and how to go on. Nothing is ever trimmed: when the context is full, answers are refused.

    Args:
        engine: the model; its checkpoint needs a chat template.
        params: how answers are sampled.
        system: what the model is told first.

    Attributes:
        messages: ``{"role": ..., "content": ...}`` each, from the beginning.
    """

    def __init__(self, engine: InferenceEngine, params: SamplingParams, system: str | None = None) -> None:
        self.engine, self.params, self.system = engine, params, system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def answer(self, text: str) -> Iterator[str]:
        """Say something and yield the answer as it comes; closing the iterator ends it, and keeps what was said.

        Raises:
            RequestError: the conversation is too long, or the template refuses it; then ``messages`` is as it was.
            ConfigError: the checkpoint has no chat template.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces: Any = self.engine.stream(self.engine.chat_ids(asked), self.params)
        said: list[str] = []
        try:
            with contextlib.closing(pieces):
                for piece in pieces:
                    said.append(piece)
                    yield piece
        except GeneratorExit:
            raise
        except BaseException:
            asked = self.messages
            raise
        finally:
            if asked is not self.messages:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C into an answer of True by the function it yields; the second is a KeyboardInterrupt.

    A KeyboardInterrupt could fall between any two lines of the generation loop and leave it in disorder.
    """
    pressed = False

    def remember(*_: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False  # signals reach the main thread only
        return
    previous = signal.signal(signal.SIGINT, remember)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)
