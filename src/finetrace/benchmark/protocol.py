"""Two protocols: what a correct comparison does, and exactly what the study's released code computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from finetrace.attribution.lexical import LEXICAL
from finetrace.encoding import Encoder, read_template
from finetrace.errors import FinetraceError
from finetrace.finetune_config import PRESETS, FinetuneConfig
from finetrace.models import Loaded
from finetrace.tasks import Recipe
from finetrace.tracing import SIMILAR, STANDARD

# the released code's methods: raw products, its damping, its recurrence; RepSim is a cosine that sees the prompt alone
RELEASED = (
    "gradsim",
    "datainf:damping=0.1,damping_rule=entry",
    "lissa:damping=0.1,damping_rule=entry,recurrence=released",
    "repsim",
)
# lexical search that leaves no word out: "I" in a refusal and the 1 of a rule's number tell classes apart
EVERY_WORD = {
    text: tuple(f"{name}:text={text},all_words=true" for name in ("bm25", "tfidf"))
    for text in ("prompt", "response", "both")
}
# what else the corrected protocol asks: which words, which layers and which tokens carry the attribution
MORE = (
    *EVERY_WORD["prompt"],
    *EVERY_WORD["response"],
    *EVERY_WORD["both"],
    "gradcos:loss_on=all",
    "gradcos:layers=last-fifth",
    "exact:normalise=cosine,layers=last-fifth",
    "exact:normalise=cosine,loss_on=first:5,layers=last-fifth",
    "exact:normalise=cosine,loss_on=probe,layers=last-fifth",
    "ekfac:normalise=cosine,loss_on=first:20,layers=last-half,at=start",
    "selfinf:curvature=gradsim",
    "selfinf:curvature=ekfac",
)
CONTROLS = tuple(
    spec
    for spec in STANDARD
    if spec.split(":")[0] in ("random", "length", "gradnorm", "selfinf", *LEXICAL) and "at=start" not in spec
)

# what a method sees: the prompt, the response under its prompt, or both texts; a probe is one answer under every prompt;
# none: the query is not looked at
INPUTS = {
    "prompt": (
        "bm25:text=prompt",
        "tfidf:text=prompt",
        *EVERY_WORD["prompt"],
        "repsim",
        "gradcos:loss_on=probe",
        "ekfac:normalise=cosine,loss_on=probe",
    ),
    "response": (
        "bm25:text=response",
        "tfidf:text=response",
        *EVERY_WORD["response"],
        "opening",
        "repsim:pooling=mean-response",
        SIMILAR,
        "gradcos",
        "ekfac:normalise=cosine",
    ),
    "both": ("bm25", "tfidf", *EVERY_WORD["both"], "repsim:pooling=last-token", "gradcos:loss_on=all"),
    "none": ("random", "length", "gradnorm", "gradnorm:at=start"),
}
LEAST = tuple(
    spec for spec in CONTROLS if not spec.startswith("selfinf")
)  # what every table has, whatever is asked for
LEAST_AT_START = "gradnorm:at=start"  # and that, where gradients at the start of the fine-tuning are asked for


def beside(wanted: Sequence[str]) -> list[str]:
    """The methods asked for with the controls that every table has; none for none, which stands for the protocol's."""
    if not wanted:
        return []
    return [*wanted, *LEAST, *([LEAST_AT_START] if any("at=start" in spec for spec in wanted) else [])]


def share_of(rows: int, classes: int) -> int:
    """How many top rows the study's coverage looks at, whatever the size of the query's class."""
    return max(1, rows // classes)


@dataclass(frozen=True)
class Protocol:
    """How examples are encoded, how the model is fine-tuned, and what is scored and counted.

    Attributes:
        name: `corrected` or `paper`.
        methods: Specifications, controls included.
        window: Tokens to which every example is cut and padded, `None` for no padding and no cut.
        coverage: `class`: the c top examples, c the size of the query's class. `share`: training rows / classes.
    """

    name: Literal["corrected", "paper"]
    methods: tuple[str, ...]
    window: int | None
    coverage: Literal["class", "share"]

    def encoder(self, loaded: Loaded, chat_template: str | None = None) -> Encoder:
        """The encoding of training examples and queries; `paper` has a template of its own."""
        if self.window is None:
            return Encoder(loaded.tokenizer, template=read_template(chat_template))
        return Encoder(loaded.tokenizer, "all", self.window, read_template("inst"), self.window)

    def finetuning(self, recipe: Recipe, seed: int, epochs: int | None = None) -> FinetuneConfig:
        """The recipe's own settings, or the released code's: 10 epochs at batch 24, 50 on the mixed sets."""
        if self.window is None:
            return FinetuneConfig(
                epochs=epochs or recipe.epochs, learning_rate=recipe.learning_rate, batch_size=8, seed=seed
            )
        released = PRESETS["released"]
        return released.model_copy(
            update={"epochs": epochs or (50 if recipe.aligned else released.epochs), "seed": seed}
        )


PROTOCOLS = {
    "corrected": Protocol("corrected", (*STANDARD, *MORE), None, "class"),
    "paper": Protocol("paper", (*RELEASED, *CONTROLS), 128, "share"),
}


def protocol(name: str) -> Protocol:
    """By name; `FinetraceError` for any other."""
    if name not in PROTOCOLS:
        raise FinetraceError(f"--protocol {name}: not known; use {' or '.join(PROTOCOLS)}.")
    return PROTOCOLS[name]
