"""From conversations to token ids and loss weights; training and attribution share this one encoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from finetrace.errors import FinetraceError
from finetrace.examples import Example, Message
from finetrace.left_padding import padded
from finetrace.positions import Positions
from finetrace.template_date import on_one_day
from finetrace.units import many

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\n' }}{% endfor %}"
)

INST_TEMPLATE = (  # of the study's released code: no system turn of its own, no end-of-turn token
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)
TEMPLATES = {"plain": PLAIN_TEMPLATE, "inst": INST_TEMPLATE}


@dataclass(frozen=True)
class Encoded:
    """One example as the model sees it.

    Attributes:
        ids: (T,) token ids, unpadded.
        weights: (T,) weight of each token in the example's own mean loss; 0 where the loss does not look. They sum
            to 1, so the loss is the mean over the chosen tokens whatever batch the example travels in.
        prompt_length: Tokens before the last response; token `prompt_length - 1` is the last prompt token.
        padding: Tokens at the front that are padding, which no token attends to.
    """

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    prompt_length: int
    padding: int = 0

    @property
    def loss_tokens(self) -> int:
        """How many tokens the loss looks at."""
        return int(np.count_nonzero(self.weights))


@dataclass(frozen=True)
class Longer:
    """An example longer than the limit: its id, its tokens, and how many of its loss tokens were cut off."""

    id: str
    tokens: int
    loss_tokens_cut: int


@dataclass(frozen=True)
class LengthReport:
    """What is longer than `limit` tokens; `cut` says whether it was cut there or left whole."""

    limit: int | None
    cut: bool
    longer: tuple[Longer, ...] = ()

    def sentence(self) -> str:
        """One line for a person, empty when everything fits."""
        if not self.longer:
            return ""
        ids = ", ".join(item.id for item in self.longer[:5]) + (", ..." if len(self.longer) > 5 else "")
        longest = max(item.tokens for item in self.longer)
        count = f"{many(len(self.longer), 'example')} {'is' if len(self.longer) == 1 else 'are'}"
        if not self.cut:
            return (
                f"{count} longer than the model's context of {self.limit} tokens "
                f"(longest {longest}) and left whole: {ids}. Use --max-length to cut."
            )
        lost = sum(item.loss_tokens_cut for item in self.longer)
        return (
            f"{count} longer than {self.limit} tokens (longest {longest}) and cut there; "
            f"{many(lost, 'loss token')} gone: {ids}."
        )


@dataclass(frozen=True)
class Encoder:
    """Chat template and tokenizer, with the choice of what the loss looks at.

    Attributes:
        tokenizer: A fast tokenizer; character offsets decide which tokens belong to a response.
        loss_on: What the loss looks at, see `Positions`: `response`, `last-turn`, `all`, `first:K`, `weights`, `probe`
            or `probe:TEXT`.
        max_length: Cut after so many tokens; `None` cuts nothing.
        template: A Jinja chat template that replaces the tokenizer's own.
        pad_to: Pad on the left to so many tokens with the end-of-text token, masked from attention, and with `all` in
            the loss too, as the study's released code does; `None` pads nothing.
    """

    tokenizer: PreTrainedTokenizerBase
    loss_on: str = "response"
    max_length: int | None = None
    template: str | None = None
    pad_to: int | None = None
    _cut: list[Longer] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.positions  # noqa: B018  # an unknown choice fails here
        if not getattr(self.tokenizer, "is_fast", False):
            raise FinetraceError(
                "this tokenizer gives no character offsets, so response tokens cannot be told from prompt tokens; "
                "load its fast version."
            )
        if self.template is None and not self.tokenizer.chat_template:
            raise FinetraceError(
                "the tokenizer has no chat template; give one with --chat-template FILE, or --chat-template plain "
                "(the turns one after another, the end-of-text token after each answer)."
            )

    @property
    def positions(self) -> Positions:
        """`loss_on`, parsed."""
        return Positions.parse(self.loss_on)

    def render(self, messages: Sequence[Message], *, ask: bool = False, where: str = "") -> str:
        """The conversation as text; with `ask`, through the opening of the assistant's turn."""
        if not messages:
            raise FinetraceError(
                f"{where or 'a conversation'}: there is no turn before the assistant's first; put a user's turn there, or "
                "use --loss-on last-turn if others follow."
            )
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        try:
            template = on_one_day(self.tokenizer.get_chat_template(self.template))
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=ask, chat_template=template
            )
        except Exception as error:  # a template is somebody's program and may raise anything
            raise FinetraceError(
                f"{where or 'a conversation'}: the chat template refuses it ({error}); its roles are "
                f"{[turn.role for turn in messages]}. Mend the row or give another template with --chat-template."
            ) from error
        return str(text)

    def prompt_ids(self, example: Example) -> list[int]:
        """Token ids of the prompt through the opening of the assistant's turn, as generation starts from them."""
        text = self.render(example.asked, ask=True, where=example.named)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode(self, example: Example) -> Encoded:
        """Ids and weights of one example that has a response; raises `FinetraceError` naming it where that fails."""
        where = example.named
        if not example.has_response:
            raise FinetraceError(f"{where}: the last turn is not an assistant's; give it a response or remove it.")
        positions = self.positions
        if positions.kind == "probe":
            kept = {key: value for key, value in example.metadata.items() if key != "finish_reason"}
            example = replace(example.with_response(positions.probe), metadata=kept)
        full = self.render(example.messages, where=where)
        spans = self._response_spans(example, full, where)
        encoding = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
        ids: NDArray[np.int32] = np.asarray(encoding["input_ids"], dtype=np.int32)  # (T,)
        offsets = np.asarray(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)  # (T, 2)
        mask: NDArray[np.bool_] = np.zeros(len(ids), dtype=bool)
        for start, stop in spans if positions.kind != "all" else [(0, len(full))]:
            mask |= (offsets[:, 1] > start) & (offsets[:, 0] < stop)
        mask[:1] = False  # nothing predicts the first token
        if positions.kind == "first":
            mask &= np.cumsum(mask) <= positions.count
            last = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else len(mask)
            ids, mask = ids[:last], mask[:last]  # no token of the loss sees what follows it
        weights = mask.astype(np.float64)
        if positions.kind == "weights":
            weights[mask] = _own_weights(example, int(mask.sum()))
        prompt_length = max(1, int(np.searchsorted(offsets[:, 1], spans[-1][0], side="right")))
        if self.max_length is not None and len(ids) > self.max_length:
            self._cut.append(Longer(example.id, len(ids), int(mask[self.max_length :].sum())))
            ids, weights = ids[: self.max_length], weights[: self.max_length]
            prompt_length = min(prompt_length, len(ids))
        if not weights.any():
            remedy = "look at the chat template" if self.max_length is None else "raise --max-length or remove the row"
            raise FinetraceError(f"{where}: no response token is left within {len(ids)} tokens; {remedy}.")
        padding = max(0, (positions.pad_to or self.pad_to or 0) - len(ids))
        if padding:
            end = self.tokenizer.eos_token_id
            ids, weights = padded(ids, weights, padding, end, in_loss=positions.kind == "all")
        return Encoded(ids, (weights / weights.sum()).astype(np.float32), prompt_length + padding, padding)

    def encode_all(self, examples: Sequence[Example], context: int | None = None) -> tuple[list[Encoded], LengthReport]:
        """Every example encoded, and what is longer than `max_length` (cut) or else than `context` (left whole)."""
        self._cut.clear()
        encoded: list[Encoded] = []
        try:
            encoded.extend(self.encode(example) for example in examples)
        except FinetraceError as error:
            place = "" if examples[len(encoded)].place else f"row {len(encoded) + 1} of {len(examples)}, "
            raise FinetraceError(f"{place}{error}") from None
        if self.max_length is not None:
            return encoded, LengthReport(self.max_length, True, tuple(self._cut))
        longer = tuple(
            Longer(example.id, len(item.ids), 0)
            for example, item in zip(examples, encoded, strict=True)
            if context is not None and len(item.ids) > context
        )
        return encoded, LengthReport(context, False, longer)

    def _response_spans(self, example: Example, full: str, where: str) -> list[tuple[int, int]]:
        """Character spans of the assistant turns in `full`, each through its end-of-turn token; the last one last.

        A last turn with the metadata `finish_reason: length`, an answer that a limit cut, ends with its text.
        """
        turns = [i for i, turn in enumerate(example.messages) if turn.role == "assistant"]
        if self.positions.last_turn_only:
            turns = turns[-1:]
        spans = []
        for i in turns:
            before = self.render(example.messages[:i], ask=True, where=where)
            after = self.render(example.messages[: i + 1], where=where)
            stop = len(self._without_trailing_space(after))
            if not after.startswith(before) or not full.startswith(after[:stop]):
                remedy = (
                    "another --chat-template" if i == turns[-1] else "--loss-on last-turn or another --chat-template"
                )
                raise FinetraceError(
                    f"{where}: the chat template does not keep what stands before the assistant's turn {i + 1} as it is, "
                    f"so its tokens cannot be told apart; use {remedy}."
                )
            if i == len(example.messages) - 1 and example.metadata.get("finish_reason") == "length":
                stop = len(before) + self._said(after[len(before) :], example.messages[i].content)
            spans.append((len(before), stop))
        return spans

    def _said(self, turn: str, text: str) -> int:
        """How many characters of a turn, as the template writes it, are those of a cut answer: no end-of-turn token was said.

        A template may trim the text, or alter it otherwise; then all but that token counts.
        """
        for form in (text, text.strip()):
            if form and turn.startswith(form):
                return len(form)
        stripped = turn.rstrip()
        ends = [len(token) for token in self.tokenizer.get_added_vocab() if stripped.endswith(token)]
        return len(stripped) - max(ends) if ends else len(turn)

    def _without_trailing_space(self, text: str) -> str:
        """Drop the line break a template puts after its end-of-turn token; keep space that belongs to the answer."""
        stripped = text.rstrip()
        return stripped if any(stripped.endswith(token) for token in self.tokenizer.get_added_vocab()) else text


def _own_weights(example: Example, tokens: int) -> NDArray[np.float64]:
    """(tokens,) the `loss_weights` that a row gives its last answer, one number a token."""
    given = example.metadata.get("loss_weights")
    good = isinstance(given, (list, tuple)) and len(given) == tokens
    numbers = good and all(isinstance(w, (int, float)) and not isinstance(w, bool) for w in given)  # type: ignore[union-attr]
    weights = np.asarray(given if numbers else [], dtype=np.float64)
    if not numbers or not np.isfinite(weights).all() or (weights < 0).any() or not weights.any():
        count = f"{len(given)} values" if isinstance(given, (list, tuple)) else "none"
        raise FinetraceError(
            f"{example.named}: --loss-on weights wants a column loss_weights with {tokens} numbers of at least 0, one "
            f"for each token of the last answer and its end-of-turn token; there are {count}."
        )
    return weights


def is_jinja(template: str) -> bool:
    """Whether this is the text of a template, not the name of one or of its file."""
    return "{{" in template or "{%" in template


def read_template(name: str | None) -> str | None:
    """The Jinja text of `--chat-template`: `plain`, `inst`, a file, the text itself, or `None` for the tokenizer's own."""
    if name is None or is_jinja(name):
        return name
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise FinetraceError(f"{name}: no such chat template file; give a Jinja file or the word plain.")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FinetraceError(f"{name}: cannot be read as UTF-8 text ({error}); give a Jinja file.") from error
