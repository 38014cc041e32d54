"""What a story of bAbI is, whether it was read from a file or simulated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Story:
    """A question and all sentences before it; `supports` are those that the answer rests on."""

    facts: tuple[str, ...]
    question: str
    answer: str
    supports: tuple[int, ...]

    @property
    def support(self) -> int:
        """The last sentence that the answer rests on."""
        return max(self.supports)

    @property
    def tokens(self) -> int:
        """Bytes of its sentences, as they stand in a sample."""
        sentences = [*self.facts, self.question, self.answer]
        return sum(len(sentence.encode()) + 1 for sentence in sentences)
