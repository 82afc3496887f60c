"""What a conversation keeps when answers end, are ended, or fail."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from jaxinfer.conversation import Conversation, interruptible
from jaxinfer.errors import RequestError


class Engine:
    """Answers with the number of messages, in two pieces; refuses more than three messages."""

    def chat_ids(self, messages):
        if len(messages) > 3:
            raise RequestError("too long")
        return [len(messages)]

    def stream(self, ids, params):
        yield f"{ids[0]}"
        if params == "fail":
            raise RequestError("not finite")
        yield "!"


def test_a_conversation_grows_by_two_messages():
    talk = Conversation(Engine(), None)
    assert "".join(talk.answer("a")) == "1!"
    assert talk.messages == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "1!"}]
    assert "".join(talk.answer("b")) == "3!"
    assert len(talk.messages) == 4


def test_a_refused_message_is_not_kept_and_nothing_is_trimmed():
    talk = Conversation(Engine(), None, system="be brief")
    list(talk.answer("a"))
    before = list(talk.messages)
    with pytest.raises(RequestError, match="too long"):
        list(talk.answer("b"))
    assert talk.messages == before
    assert before[0] == {"role": "system", "content": "be brief"}
    talk.reset()
    assert talk.messages == before[:1]


def test_an_answer_that_is_ended_early_keeps_what_was_said():
    talk = Conversation(Engine(), None)
    pieces = talk.answer("a")
    next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": "1"}


def test_an_answer_that_fails_is_not_kept():
    talk = Conversation(Engine(), "fail")
    with pytest.raises(RequestError, match="not finite"):
        list(talk.answer("a"))
    assert talk.messages == []


def test_the_first_ctrl_c_is_remembered_and_the_second_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as interrupted:  # noqa: PT012
        assert not interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupted()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_thread_cannot_be_interrupted():
    seen = []

    def work():
        with interruptible() as interrupted:
            seen.append(interrupted())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
