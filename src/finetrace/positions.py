"""Which tokens a loss is taken on: the part of an example that an influence answers for."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from typing import Literal

from finetrace.errors import FinetraceError

Kind = Literal["response", "last-turn", "all", "first", "weights", "probe"]
PROBE = "Sure, I can help with that!"  # how far a model complies; chosen by benchmarks/choose_method.py
KNOWN = "response, last-turn, all, first:K, weights, probe or probe:TEXT, each with @N at its end to pad to N tokens"


@dataclass(frozen=True)
class Positions:
    """A parsed `--loss-on`.

    Attributes:
        kind: `response` (every assistant turn, each through its end-of-turn token), `last-turn` (the last one alone),
            `all` (every token that has a token before it), `first` (the first `count` tokens of the last answer),
            `weights` (the last answer's tokens weighed by the row's own `loss_weights`), or `probe` (`probe` is put in
            place of the last answer, for training examples and queries alike).
        count: K of `first`.
        probe: Text of a probe; agreeing to help by default.
        pad_to: Pad on the left to so many tokens (masked from attention, in the loss with `all`), as the study's
            released code does; 0 pads nothing.
    """

    kind: Kind
    count: int = 0
    probe: str = ""
    pad_to: int = 0

    @classmethod
    def parse(cls, text: str) -> Positions:
        """From `response`, `last-turn`, `all`, `first:K`, `weights`, `probe` or `probe:TEXT`, and `@N` for padding."""
        padded = re.fullmatch(r"(.+)@([1-9][0-9]*)", text, re.DOTALL)
        if padded:
            return replace(cls.parse(padded[1]), pad_to=int(padded[2]))
        name, colon, rest = text.partition(":")
        if text in ("response", "last-turn", "all", "weights"):
            return cls(text)  # type: ignore[arg-type]
        if name == "first" and re.fullmatch("[1-9][0-9]*", rest):
            return cls("first", count=int(rest))
        if name == "probe" and (rest.strip() or not colon):
            return cls("probe", probe=rest if colon else PROBE)
        raise FinetraceError(f"--loss-on {text}: not known; use {KNOWN}.")

    @classmethod
    def split(cls, text: str) -> tuple[str, ...]:
        """Several of them, joined by `+`, each checked; a `+` within a probe's text that no known name follows stays."""
        several = tuple(re.split(r"\+(?=(?:response|last-turn|all|weights|probe|first:[0-9]+)(?:[+:@]|$))", text))
        for each in several:
            cls.parse(each)
        return several

    @property
    def last_turn_only(self) -> bool:
        """Whether earlier answers of a conversation are left out."""
        return self.kind not in ("response", "all")

    @property
    def text(self) -> str:
        """What `parse` reads back, a probe's text included."""
        name: str = self.kind
        if self.kind == "first":
            name = f"first:{self.count}"
        if self.kind == "probe":
            name = f"probe:{self.probe}"
        return f"{name}@{self.pad_to}" if self.pad_to else name

    @property
    def slug(self) -> str:
        """A name for a folder: letters, digits and hyphens, different for different texts."""
        if self.kind == "probe":
            return "probe-" + hashlib.sha256(self.text.encode()).hexdigest()[:10]
        return self.text.replace(":", "-").replace("@", "-padded-")
