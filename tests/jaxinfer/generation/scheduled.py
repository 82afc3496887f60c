"""A device that runs what a scheduler hands out, on tokens that say whose they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from jaxinfer.generation.scheduler import DecodeStep, PrefillStep, Scheduler, Sequence, Status


@dataclass(eq=False)
class Text(Sequence):
    """A sequence with what the device would know of it: which tokens are where, and when it ends by itself.

    Output token ``i`` of text ``name`` is ``(name, i)``, so a token in a wrong place shows.
    """

    name: int = 0
    ends_at: int = 1 << 30
    cached: dict[int, Any] = field(default_factory=dict)

    def said(self, position: int) -> Any:
        """The token at a position."""
        return self.prompt[position] if position < len(self.prompt) else (self.name, position - len(self.prompt))

    @property
    def wanted(self) -> int:
        """Output tokens that it has in the end."""
        return min(self.max_tokens, self.ends_at)


class Device:
    """Runs steps in the order they are handed out, on blocks of (text, position) instead of keys and values."""

    def __init__(self, scheduler: Scheduler, num_blocks: int) -> None:
        self.scheduler = scheduler
        self.memory: list[dict[tuple[int, int], Any]] = [{} for _ in range(scheduler.shards)]
        self.last: dict[tuple[int, int], Any] = {}
        self.num_blocks = num_blocks

    def write(self, text: Text, position: int, token: Any) -> None:
        assert 0 <= position // 64 < len(text.blocks), "a step writes past the sequence's blocks"
        block = text.blocks[position // 64]
        assert 0 < block < self.num_blocks
        self.memory[text.shard or 0][block, position % 64] = token

    def read(self, text: Text, count: int) -> None:
        """Attention over the first ``count`` tokens: each must be where the table says, as it was written."""
        memory = self.memory[text.shard or 0]
        for position in range(count):
            assert memory.get((text.blocks[position // 64], position % 64)) == text.said(position)

    def run(self, step: PrefillStep | DecodeStep) -> list[tuple[Text, list[Any]]]:
        """The tokens that a step draws for each text."""
        drawn: list[tuple[Text, list[Any]]] = []
        for shard, rows in enumerate(step.rows):
            for row in rows:
                text: Any = row.sequence
                assert text.status is Status.RUNNING
                assert text.shard == shard
                place = (shard, text.slot)
                if isinstance(step, PrefillStep):
                    for position in range(row.start, row.stop):
                        self.write(text, position, text.said(position))
                    self.read(text, row.stop)
                    tokens = [text.said(row.stop)] if row.last and text.max_tokens else []
                else:
                    tokens = []
                    for position in range(row.position, row.position + row.steps):
                        fed = tokens[-1] if tokens else self.last[place]
                        assert fed == text.said(position), "a slot is fed a token that is not its own"
                        self.write(text, position, fed)
                        self.read(text, position + 1)
                        tokens.append(text.said(position + 1))
                if tokens:
                    self.last[place] = tokens[-1]
                drawn.append((text, tokens))
        return drawn
