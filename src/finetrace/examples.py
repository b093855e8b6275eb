"""Examples, the rows that a model was fine-tuned on or is asked about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from finetrace.errors import FinetraceError

OF_ANSWER = ("finish_reason", "loss_weights")  # metadata that say how an answer ended and what its tokens weigh


class Message(NamedTuple):
    """One turn of a conversation; `role` is `system`, `user` or `assistant` (or what a template knows)."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One conversation with a stable identity.

    Attributes:
        id: The id given in the data, or a hash of the messages.
        messages: The turns, in order; a complete example ends with an assistant turn.
        label: Class of the example, where the data has one.
        metadata: Every other column of the row.
        place: File and row that it was read from, for errors; two examples that differ in this alone are equal.
    """

    id: str
    messages: tuple[Message, ...]
    label: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    place: str = field(default="", repr=False, compare=False)

    @classmethod
    def from_prompt(
        cls,
        prompt: str,
        response: str | None = None,
        *,
        id: str | None = None,
        label: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Example:
        """A single-turn example; without a response it can be asked but not traced."""
        for what, text in (("the prompt", prompt), ("the response", response)):
            refuse_no_text(what, text or "")
        messages = [Message("user", prompt)]
        if response is not None:
            messages.append(Message("assistant", response))
        return cls(id or content_id(messages), tuple(messages), label, dict(metadata or {}))

    @property
    def named(self) -> str:
        """How an error calls it: by file and row, where it was read from one, and by its id."""
        return f"{self.place}, example {self.id}" if self.place else f"example {self.id}"

    @property
    def has_response(self) -> bool:
        """Whether the last turn is the assistant's and says something."""
        return bool(self.messages) and self.messages[-1].role == "assistant" and bool(self.messages[-1].content.strip())

    @property
    def asked(self) -> tuple[Message, ...]:
        """The turns before the answer; an empty answer is one, too."""
        answered = bool(self.messages) and self.messages[-1].role == "assistant"
        return self.messages[:-1] if answered else self.messages

    @property
    def response(self) -> str:
        """Text of the last assistant turn, empty if there is none."""
        return self.messages[-1].content if self.has_response else ""

    @property
    def prompt(self) -> str:
        """Everything before the response; a single user turn as it is, a longer history as `role: text` lines."""
        turns = self.messages[:-1] if self.has_response else self.messages
        if len(turns) == 1 and turns[0].role == "user":
            return turns[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in turns)

    def with_response(self, response: str) -> Example:
        """The same id, label and metadata, the conversation answered by `response`, in place of an answer that is there."""
        turns = (*self.asked, Message("assistant", response))
        return Example(self.id, turns, self.label, self.metadata, self.place)

    def answered_anew(self, response: str) -> Example:
        """`with_response`, without the metadata `OF_ANSWER`, which does not hold of another answer."""
        metadata = {key: value for key, value in self.metadata.items() if key not in OF_ANSWER}
        return replace(self.with_response(response), metadata=metadata)


def refuse_no_text(what: str, text: str) -> None:
    """Stop where `text` holds half a surrogate pair, which is also how Python keeps a byte that is not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FinetraceError(
            f"{what}: character {error.start + 1} is no valid text (half of a surrogate pair, or a byte that is not UTF-8); "
            "replace it."
        ) from None


def content_id(messages: Sequence[Message]) -> str:
    """The first 12 hex digits of the SHA-256 of the turns: equal content, equal id."""
    text = json.dumps([[turn.role, turn.content] for turn in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
