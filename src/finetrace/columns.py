"""Which column holds what, and what a row says: from named values to the turns of a conversation."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetrace.errors import FinetraceError
from finetrace.examples import Message
from finetrace.json_values import json_value

CANDIDATES: Mapping[str, Sequence[str]] = {
    "messages": ("messages", "conversations", "conversation", "chat"),
    "prompt": ("prompt", "prompts", "instruction", "question", "query", "input", "user", "goal"),
    "response": ("response", "responses", "completion", "output", "answer", "target", "assistant", "chosen"),
    "label": ("label", "variation", "class", "category"),
    "id": ("id", "uid", "example_id"),
    "system": ("system", "system_prompt"),
}

_ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
# ShareGPT and its relatives.
_ROLES |= {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}

# Parts of a turn that a model was trained to say and that `content` does not hold: leaving them out would attribute
# an answer to something the model never saw.
_UNREAD_PARTS = ("tool_calls", "function_call", "reasoning_content", "thinking")


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold an example; None leaves it to the names in `CANDIDATES`.

    Attributes:
        messages: A conversation, as a list of turns or the JSON text of one. Of a turn, role and content are read.
        prompt: What is asked: a text, or a list of turns.
        response: What is answered: a text, or a list of turns.
        label: The class of the example.
        id: The identity of the example.
        system: A system prompt, for rows whose conversation does not open with one.
    """

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    id: str | None = None
    system: str | None = None


@dataclass(frozen=True)
class Roles:
    """The columns that were found in one table; None where there is none. `context` is Alpaca's `input`."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    label: str | None = None
    id: str | None = None
    system: str | None = None
    context: str | None = None


def assign(columns: Columns, names: Sequence[str], table: str, *, responses: bool) -> Roles:
    """Settle which of a table's columns plays which role: those named by the user, then the first candidate.

    Args:
        columns: What the user named.
        names: The columns that there are.
        table: Name of the data, for errors.
        responses: Whether a response is needed.

    Raises:
        FinetraceError: A named column does not exist, or there is no prompt or no response to be found.
    """
    there = f"its columns are {', '.join(map(repr, names)) or 'none'}"
    named = {role: name for role in CANDIDATES if (name := getattr(columns, role)) is not None}
    for role, name in named.items():
        if name not in names:
            raise FinetraceError(f"{table} has no column {name!r} for the {role}; {there}")
    if "messages" in named and ("prompt" in named or "response" in named):
        raise FinetraceError(f"{table}: name either a column of messages or columns of prompt and response, not both")

    free = [name for name in names if name not in named.values()]

    def find(role: str) -> str | None:
        return named.get(role) or _first(CANDIDATES[role], free)

    # Who names a prompt or a response means that pair, whatever else the rows hold.
    messages = None if "prompt" in named or "response" in named else find("messages")
    prompt = response = context = None
    if messages is None:
        prompt, response = find("prompt"), find("response")
        missing = "prompt" if prompt is None else "response" if response is None and responses else None
        if missing:
            raise FinetraceError(
                f"{table} has no column known to hold the {missing}; {there}; say which to use with --prompt-column "
                "and --response-column, or with --messages-column for whole conversations (and --label-column and "
                "--id-column where there are such)"
            )
        if prompt is not None and _plain(prompt) == "instruction":
            context = _first(("input",), free)
    return Roles(messages, prompt, response, find("label"), find("id"), find("system"), context)


def mistaken_for_roles(names: Iterable[str], roles: Iterable[str]) -> set[str]:
    """Those of `names` that `assign` could take for one of `roles`."""
    known = {candidate for role in roles for candidate in CANDIDATES[role]}
    return {name for name in names if _plain(name) in known}


def turns_of(row: Mapping[str, Any], roles: Roles, *, responses: bool) -> tuple[list[Message], set[str]]:
    """The conversation in a row, and the columns that it used up.

    Args:
        row: Values as `json_value` leaves them.
        roles: The columns to read.
        responses: Whether the conversation has to end with an answer.

    Raises:
        FinetraceError: The row says too little, or something other than text. The sentence lacks the row's number.
    """
    answer: list[Message] = []
    response_column: str | None
    if roles.messages is not None:
        prompt_column, response_column, used = roles.messages, roles.messages, {roles.messages}
        if not row.get(roles.messages):
            _refuse_mixed(row, roles.messages)
        turns = _listed_turns(row.get(roles.messages), roles.messages)
    else:
        assert roles.prompt is not None  # `assign` sees to it
        prompt_column, response_column = roles.prompt, roles.response
        used = {name for name in (roles.prompt, roles.response, roles.context) if name is not None}
        turns = _prompt_turns(row, roles.prompt, roles.context)
        if response_column is not None:
            answer = _response_turns(row.get(response_column), response_column)
        # Preference data repeats the prompt at the head of the chosen conversation.
        turns = answer if turns and answer[: len(turns)] == turns else turns + answer
    if roles.system is not None and not (turns and turns[0].role == "system"):
        used.add(roles.system)
        system = _text(row.get(roles.system), f"column {roles.system!r}")
        if system.strip():
            turns.insert(0, Message("system", system))

    asked = turns[:-1] if turns and turns[-1].role == "assistant" else turns
    if not any(turn.content.strip() for turn in asked):
        raise FinetraceError(f"the prompt is empty (column {prompt_column!r}); give it a text or remove the row")
    if not responses:
        return turns, used
    if len(asked) == len(turns) and (roles.messages is not None or answer):
        raise FinetraceError(
            f"the conversation in column {response_column!r} ends with a turn of the {turns[-1].role}, not of the "
            "assistant; add the answer or remove the row"
        )
    if len(asked) == len(turns) or not turns[-1].content.strip():
        raise FinetraceError(f"the response is empty (column {response_column!r}); give it a text or remove the row")
    return turns, used


def name_of(value: Any, column: str, names: Sequence[str] | None = None) -> str | None:
    """A label or id as text, None if the cell is blank; a class number is looked up in `names`, and 1.0 is 1.

    Raises:
        FinetraceError: The cell holds a list or an object.
    """
    if names is not None and isinstance(value, int):
        return names[value] if 0 <= value < len(names) else None  # -1 is how `datasets` says unlabelled
    if isinstance(value, list | dict):
        raise FinetraceError(
            f"column {column!r} holds a list or an object where one text or number is expected; "
            "name another with --label-column or --id-column"
        )
    if isinstance(value, float) and value.is_integer():  # a column of integers with a gap is read as one of floats
        value = int(value)
    text = "" if value is None else str(value)
    return text if text.strip() else None


def _first(candidates: Iterable[str], names: Sequence[str]) -> str | None:
    """The first candidate among the names: as it is written, else in other letter case."""
    for candidate in candidates:
        if candidate in names:
            return candidate
        for name in names:
            if _plain(name) == candidate:
                return name
    return None


def _plain(name: str) -> str:
    return name.strip().lower()


def _prompt_turns(row: Mapping[str, Any], column: str, context: str | None) -> list[Message]:
    if isinstance(row.get(column), list):
        return _listed_turns(row[column], column)
    parts = [_text(row.get(name), f"column {name!r}") for name in (column, context) if name is not None]
    text = "\n\n".join(part for part in parts if part.strip())
    return [Message("user", text)] if text else []


def _response_turns(value: Any, column: str) -> list[Message]:
    if isinstance(value, list):
        return _listed_turns(value, column)
    text = _text(value, f"column {column!r}")
    return [Message("assistant", text)] if text.strip() else []


def _listed_turns(value: Any, column: str) -> list[Message]:
    """Turns as {role, content} or {from, value}: a list, its JSON text, or a table of two columns."""
    if isinstance(value, str) and value.strip():
        try:
            value = json_value(json.loads(value))
        except (ValueError, RecursionError):
            raise FinetraceError(
                f"column {column!r} holds text that is not the JSON of a list of messages; write it as JSON, or name "
                "other columns with --prompt-column and --response-column"
            ) from None
    if isinstance(value, dict) and value and all(isinstance(cells, list) for cells in value.values()):
        # How older versions of `datasets` kept a list of objects.
        value = [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    if value is None or value == "":
        value = []
    if not isinstance(value, list):
        raise FinetraceError(f"column {column!r} does not hold a list of messages; name another with --messages-column")
    return [_turn(turn, f"turn {number} in column {column!r}") for number, turn in enumerate(value, 1)]


def _refuse_mixed(row: Mapping[str, Any], messages: str) -> None:
    """A row without messages that has a prompt in another column."""
    others = [name for name in mistaken_for_roles(row, ("prompt",)) if name != messages and row[name]]
    if others:
        raise FinetraceError(
            f"there is no conversation in column {messages!r}, which other rows have, and a prompt in column {others[0]!r}; "
            "write all rows in one of the two ways, or make two files of them"
        )


def _turn(turn: Any, place: str) -> Message:
    keys = turn if isinstance(turn, dict) else {}
    role_key, content_key = ("role", "content") if "role" in keys else ("from", "value")
    if role_key not in keys:
        raise FinetraceError(f'{place} is not a message; write it as {{"role": ..., "content": ...}}')
    role = _ROLES.get(_plain(str(turn[role_key])))
    if role is None:
        raise FinetraceError(
            f"{place} has the unknown role {turn[role_key]!r}; the roles are system, user, assistant and tool "
            "(or human and gpt)"
        )
    for key in _UNREAD_PARTS:
        if turn.get(key):
            raise FinetraceError(f"{place} holds {key!r}, and only plain content is read; move it into the content")
    if role == "assistant" and turn.get("weight") not in (None, 1):
        raise FinetraceError(
            f"{place} has the weight {turn['weight']}, and turns have none of their own; leave 'weight' out and, if only the "
            "last answer counts, take --loss-on last-turn, or weigh its tokens in a column loss_weights with --loss-on weights"
        )
    if turn.get(content_key) is None:
        raise FinetraceError(f"{place} has no {content_key!r}; give it a text or remove the row")
    return Message(role, _text(turn[content_key], place))


def _text(value: Any, place: str) -> str:
    """Text as it is; the parts of a list of text parts joined; nothing for null."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(_part(part, place) for part in value)
    kind = "true or false" if isinstance(value, bool) else "an object" if isinstance(value, dict) else "a number"
    raise FinetraceError(f"{place} holds {kind} where text is expected; turn it into text or remove the row")


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise FinetraceError(f"{place} holds a part of the kind {kind!r}, and only text can be traced; remove the row")
