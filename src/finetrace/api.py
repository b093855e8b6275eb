"""The Python facade: build or open an index and trace answers, with models and data that are already in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetrace import placement
from finetrace.attribution import Method, Problem, Scores, make
from finetrace.attribution.ranked import Ranked, rank
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS, Representation
from finetrace.encoding import TEMPLATES, Encoder
from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.index import append, store
from finetrace.index import build_index as _build
from finetrace.index.cache import LIMIT
from finetrace.models import Loaded, ModelSpec
from finetrace.reading import Columns, examples_from_rows, read_examples
from finetrace.tracing import default_method
from finetrace.units import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from finetrace.collection.factors import Labels
    from finetrace.index.stored import FeatureDtype
    from finetrace.moments import Moment

Rows = str | Path | Iterable[Mapping[str, Any] | Example]


class Index(store.Index):
    """A finished index that traces queries.

    ```python
    scores = index.trace([{"prompt": "...", "response": "..."}], method="exact", normalise="cosine")
    scores.top(10).to_pandas()
    ```
    """

    def trace(
        self, queries: Rows, method: str | None = None, *, memory: int | None = None, **parameters: Any
    ) -> Scores:
        """Score every training example against every query.

        Args:
            queries: Examples, dictionaries, a `datasets.Dataset` or a file, each with a response.
            method: A name of `finetrace methods`, with parameters after a colon if wanted (`exact:scope=joint`);
                by default the one that `finetrace trace` takes, with `parameters` in place of its own.
            memory: Bytes that scoring may use; half of what is available if not given. What does not fit is streamed.
            parameters: Parameters of the method by name, for instance `normalise="cosine"` or `damping=0.1`.

        Returns:
            `Scores`: (m, n), positive = proponent.

        Raises:
            FinetraceError: An unknown method or parameter, a query without a response, or another model than the
                index was built with.
        """
        problem = self.problem(queries, memory)
        if problem.m * problem.n * 8 > problem.memory:
            raise FinetraceError(
                f"the {problem.m} x {problem.n} scores alone take {size(problem.m * problem.n * 8)}, more than the memory of "
                f"{size(problem.memory)}; ask for the strongest rows with index.top(queries, k), or give more memory."
            )
        return self._method(method, parameters).score(problem)

    def top(
        self,
        queries: Rows,
        k: int = 10,
        method: str | None = None,
        *,
        opponents: bool = False,
        memory: int | None = None,
        **parameters: Any,
    ) -> Ranked:
        """The k strongest rows of each query; the matrix of all scores is never held, so an index may be of any size.

        Args:
            queries: As in `trace`.
            k: Rows kept a query.
            method: As in `trace`.
            opponents: Keep the k lowest too.
            memory: Bytes that scoring may use; half of what is available if not given.
            parameters: Parameters of the method by name.
        """
        return rank(self._method(method, parameters), self.problem(queries, memory), k, opponents=opponents)

    def _method(self, method: str | None, parameters: Mapping[str, Any]) -> Method:
        if method is None:
            best = make(default_method(self))
            method, parameters = best.name, {**best.parameters, **parameters}
        known = make(method)
        for name in parameters:
            if name not in known.parameters:
                raise FinetraceError(
                    f"{method}: there is no parameter {name!r}; it has {', '.join(known.parameters) or 'none'}."
                )
        return make(method, **parameters)

    def append(self, examples: Rows, *, skip_known: bool = False, skip_bad: bool = False) -> Index:
        """The index with more rows, collected by its own model and settings; see `finetrace index append`.

        Args:
            examples: As in `build_index`; their ids are new.
            skip_known: Leave out rows whose ids the index holds, in place of refusing them.
            skip_bad: Leave out rows whose values are not finite.
        """
        grown, _ = append(self, as_examples(examples), skip_known=skip_known, skip_bad=skip_bad)
        return Index(self.folder, grown.model())

    def problem(self, queries: Rows, memory: int | None = None) -> Problem:
        """The queries against this index; score several methods on one problem to share its products.

        `memory` is what scoring may use, in bytes; half of what is available if not given.
        """
        return Problem(self, as_examples(queries), memory=memory, cache=LIMIT)


def build_index(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Rows,
    folder: str | Path,
    *,
    name: str | None = None,
    loss_on: str = "response",
    max_length: int | None = None,
    chat_template: str | None = None,
    modules: Sequence[str] | None = None,
    representations: Sequence[str] | None = None,
    batch_tokens: int | None = None,
    kronecker: Labels | None = None,
    at: Moment = "end",
    feature_dtype: FeatureDtype | None = None,
    projection: str | None = None,
    projection_seed: int = 0,
    disk: int | None = None,
    memory: int | None = None,
    skip_bad: bool = False,
) -> Index:
    """Index training examples under a model in memory.

    Args:
        model: A `PeftModel` with a LoRA adapter, or any causal language model.
        tokenizer: Its tokenizer, with a chat template (or give `chat_template`, Jinja text).
        examples: A `datasets.Dataset`, dictionaries, `Example`s, or a file; prompt/response or messages columns.
        folder: Where the index goes; an unfinished one there is finished.
        name: Base model to load when the index is opened elsewhere; by default what the model says of itself.
        loss_on: Tokens of the loss: `response`, `last-turn`, `all`, `first:K`, `weights`, `probe` or `probe:TEXT`.
        max_length: Cut after so many tokens; nothing is cut if not given.
        chat_template: Jinja text, `plain` or `inst`, in place of the tokenizer's template.
        modules: Regular expressions for plain linear layers, or `all-linear`; by default the LoRA matrices, and of a model
            without an adapter all linear layers.
        representations: Names such as `last-prompt@-1` or `mean-response@0.75`; by default three poolings of the final
            layer, and the answer at three quarters of the depth.
        batch_tokens: Padded tokens a batch holds at most; 2048 on a CPU and 4096 on a GPU if not given.
        kronecker: Fit K-FAC and EK-FAC factors on the way, with labels of the `model` or the `data`; else when asked.
        at: Take gradients at the `end` of the fine-tuning, where the adapter is, or at its `start`, before it had learnt.
        feature_dtype: Store gradients in `bfloat16` or `float16`, half the disk of `float32`; scores are taken in float32.
        projection: `two-sided:KOUTxKIN`, `rademacher:K` or `sparse:K` make gradients smaller, `none` leaves them, `auto` takes
            the largest that fits; by default `auto` where all linear layers are tracked, else `none`.
        projection_seed: Of the random matrices.
        disk: Bytes that `auto` may take on the disk; by default half of what is free.
        memory: Bytes of memory that `auto` may take; by default half of what is available.
        skip_bad: Leave out rows whose loss, gradient or hidden state is not finite, and note them in the manifest
            (`index.manifest.left_out`); without it the first of them stops the run.
    """
    base = name or str(getattr(model.config, "_name_or_path", "") or "in-memory model")
    dtype = str(model.dtype).removeprefix("torch.")
    placement.refuse_offloaded(model, base)
    loaded = Loaded(model, tokenizer, ModelSpec(base, None, dtype, str(model.device)))  # type: ignore[arg-type]
    wanted = DEFAULT_REPRESENTATIONS if representations is None else tuple(map(Representation.parse, representations))
    template = TEMPLATES.get(chat_template or "", chat_template)
    encoder = Encoder(tokenizer, loss_on, max_length, template)
    _build(
        loaded,
        as_examples(examples),
        Path(folder),
        encoder,
        modules=modules,
        representations=wanted,
        batch_tokens=batch_tokens,
        kronecker=kronecker,
        at=at,
        feature_dtype=feature_dtype,
        projection=projection,
        projection_seed=projection_seed,
        disk=disk,
        memory=memory,
        skip_bad=skip_bad,
    )
    return Index(Path(folder), loaded)


def open_index(
    folder: str | Path, model: PreTrainedModel | None = None, tokenizer: PreTrainedTokenizerBase | None = None
) -> Index:
    """Open an index; without a model, the one named in its manifest is loaded when a query needs it."""
    loaded = None
    if model is not None:
        if tokenizer is None:
            raise FinetraceError("open_index: a model without its tokenizer; give both or neither.")
        name = str(getattr(model.config, "_name_or_path", ""))
        placement.refuse_offloaded(model, name)
        loaded = Loaded(model, tokenizer, ModelSpec(name, None))
    return Index(Path(folder), loaded)


def as_examples(rows: Rows, columns: Columns = Columns(), *, responses: bool = True) -> list[Example]:
    """Examples from a file, a data set or rows in memory."""
    if isinstance(rows, (str, Path)):
        return read_examples(rows, columns, responses=responses)
    return examples_from_rows(rows, columns, responses=responses)  # type: ignore[arg-type]
