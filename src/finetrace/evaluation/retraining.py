"""Fine-tuning again on part of the rows, and what that does to the queries: the truth that influence predicts.

A retraining is decided by the base and its precision, the configuration, the rows in their order, the seed and the versions of
the libraries; what it found is kept in a file under the hash of all of these, so that none is done twice, and a run that was
killed goes on with the next. Where the lowest trained layer is not the first, the hidden states below it are computed once and
every retraining starts from them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from finetrace import fingerprint
from finetrace.collection.losses import mean_losses
from finetrace.encoding import Encoded, Encoder, read_template
from finetrace.errors import FinetraceError
from finetrace.evaluation import retrained as kept
from finetrace.evaluation.forecast import forecast
from finetrace.evaluation.judging import Judge
from finetrace.evaluation.retrained import Retrained
from finetrace.examples import Example
from finetrace.execution import Engine
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import new_adapter
from finetrace.generation import answer
from finetrace.models import Loaded, ModelSpec, load
from finetrace.training import ORDERS, fit
from finetrace.units import duration, many

FOLDER = "retrainings"
FORECAST = 3  # retrainings whose time is estimated before the first of them
RESPONSE = "response"  # the name of the queries' own answers among what is measured


@dataclass(frozen=True)
class Subset:
    """Which rows to train on, by their positions in the training set, and the seed of the fine-tuning."""

    rows: tuple[int, ...]
    seed: int = 0

    @property
    def name(self) -> str:
        """For messages."""
        return f"the retraining on {len(self.rows)} rows with seed {self.seed}"


@dataclass(frozen=True)
class Retraining:
    """The same fine-tuning on other rows.

    Attributes:
        base: The model that fine-tuning starts from, without the adapter.
        config: How it was fine-tuned; the seed is each subset's own, and no row is held out for validation.
        examples: The training set.
        queries: Each with the response whose loss is measured.
        folder: What was found is kept there.
        others: By name, other answers to the queries whose loss is measured too: a refusal, say.
        answer_tokens: Let each model answer the queries in at most so many tokens; 0 for no answers.
    """

    base: ModelSpec
    config: FinetuneConfig
    examples: tuple[Example, ...]
    queries: tuple[Example, ...]
    folder: Path
    others: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    answer_tokens: int = 0

    def run(
        self, subsets: Sequence[Subset], *, workers: int | Engine = 1, say: Callable[[str], None] = lambda text: None
    ) -> list[Retrained]:
        """What each subset's retraining did; those that were done before are read.

        Args:
            subsets: What to train on.
            workers: Processes side by side, or an engine.
            say: Hears how many there are and how long they will take, before `FORECAST` or more and after the first.

        Raises:
            FinetraceError: A subset is empty or names a row that is not there, or a training diverged.
        """
        return run_all([(self, subsets)], workers=workers, say=say)[0]

    def judged(self, judge: Judge, subsets: Sequence[Subset]) -> NDArray[np.bool_]:
        """(s, m) whether the judge takes the answers after these retrainings for compliance; kept with each of them.

        Raises:
            FinetraceError: A retraining has not been run, or its model was not asked to answer.
        """
        identity, prompts = judge.identity, [query.prompt for query in self.queries]
        found: dict[Subset, Sequence[bool]] = {}
        for subset, done in dict(zip(subsets, self._read(subsets), strict=True)).items():
            if done.answers is None:
                raise FinetraceError(f"{subset.name} has no answers to judge; ask for them with answer_tokens.")
            if identity not in done.verdicts:
                given = judge.complied(prompts, done.answers)
                if len(given) != len(prompts):
                    raise FinetraceError(
                        f"the judge {judge.name} gave {len(given)} verdicts on {len(prompts)} answers; it has to give one each."
                    )
                done = replace(done, verdicts={**done.verdicts, identity: given})
                with suppress(FinetraceError, OSError):  # what cannot be written is judged again
                    kept.write(self._path(subset), done)
            found[subset] = done.verdicts[identity]
        verdicts = [found[subset] for subset in subsets]
        return np.array(verdicts, dtype=np.bool_).reshape(len(subsets), len(self.queries))

    def _read(self, subsets: Sequence[Subset]) -> list[Retrained]:
        found = {subset: kept.read(self._path(subset), len(self.queries)) for subset in dict.fromkeys(subsets)}
        return [replace(found[subset], rows=subset.rows) for subset in subsets]  # kept by what the rows are

    def _train(self, missing: Sequence[Subset], engine: Engine) -> Iterator[tuple[int, float]]:
        """Each one's place and seconds, as they are done."""
        work = partial(_retrain, self)
        if not engine.in_process:
            work = partial(_retrain, replace(self, folder=self.folder.resolve()), expected=self._about)
        yield from engine.run_each(work, missing, name=lambda subset: subset.name, shared=self.folder)

    @property
    def everything(self) -> tuple[int, ...]:
        """All rows."""
        return tuple(range(len(self.examples)))

    def _check(self, subsets: Sequence[Subset]) -> None:
        if not self.queries:
            raise FinetraceError("there is no query to measure after retraining; give at least one with a response.")
        for subset in subsets:
            if not subset.rows:
                raise FinetraceError("a subset to retrain on is empty; leave at least one row in it.")
            outside = [row for row in subset.rows if not 0 <= row < len(self.examples)]
            if outside:
                raise FinetraceError(f"a subset names row {outside[0]} of {len(self.examples)}.")
            if len(set(subset.rows)) < len(subset.rows):
                raise FinetraceError("a subset names a row twice.")

    @cached_property
    def _about(self) -> str:
        """Fingerprint of all that every subset has in common, the base and its precision among it."""
        config = self.config.model_dump(mode="json")
        del config["seed"], config["chat_template"]
        loaded = _base(self.base)
        template = read_template(self.config.chat_template)
        about = {
            "base": [fingerprint.of_base(loaded.model), fingerprint.of_embeddings(loaded.model)],
            "tokenizer": fingerprint.of_tokenizer(loaded.tokenizer, template),
            "precision": [loaded.spec.dtype, loaded.model.device.type],
            "versions": [version(name) for name in ("torch", "transformers", "peft")],
            "config": config,
            "orders": ORDERS,
            "queries": fingerprint.texts(self.queries),
            "others": {name: fingerprint.texts(given) for name, given in sorted(self.others.items())},
            "answer_tokens": self.answer_tokens,
        }
        return fingerprint.of_text(json.dumps(about, sort_keys=True))

    @cached_property
    def _rows(self) -> tuple[str, ...]:
        """A fingerprint a row."""
        return tuple(fingerprint.of_text(json.dumps(text)) for text in fingerprint.texts(self.examples))

    def _path(self, subset: Subset) -> Path:
        rows = "".join(self._rows[row] for row in subset.rows)
        return self.folder / FOLDER / f"{fingerprint.of_text(f'{self._about} {subset.seed} {rows}')}.json"


def run_all(
    parts: Sequence[tuple[Retraining, Sequence[Subset]]],
    *,
    workers: int | Engine = 1,
    say: Callable[[str], None] = lambda text: None,
) -> list[list[Retrained]]:
    """`Retraining.run` of several, which differ in what is asked of their models alone; their time is said for all together."""
    for about, subsets in parts:
        about._check(subsets)
    wanted = {about._path(subset): (k, subset) for k, (about, subsets) in enumerate(parts) for subset in subsets}
    absent = [each for path, each in wanted.items() if not path.exists()]
    todo = [(about, [subset for part, subset in absent if part == k]) for k, (about, _) in enumerate(parts)]
    lacking = [subset for _, subset in absent]
    if lacking:
        there = len(wanted) - len(lacking)
        say(f"{many(len(lacking), 'retraining')}, {there} more are there already")
    engine = Engine() if len(lacking) == 1 and not isinstance(workers, Engine) else Engine.of(workers)
    if len(lacking) >= FORECAST:
        answering = sum(len(missing) for about, missing in todo if about.answer_tokens)
        say(_forecast(parts[0][0], lacking, engine, answering))
    started, done = time.perf_counter(), 0
    for about, missing in todo:
        for k, (place, seconds) in enumerate(about._train(missing, engine)):
            done += 1
            if k == 0 and len(missing) > 1:
                rows = sum(len(subset.rows) for subset in missing) / len(missing[place].rows)
                left = (rows - 1) * seconds / min(engine.workers, len(missing))
                others = "the others" if len(missing) == len(lacking) else f"the other {len(missing) - 1} of its kind"
                say(f"the first took {seconds:.0f} s; {others} take about {duration(left)}")
            elif done == len(lacking) > 1:
                say(f"{done} retrainings in {duration(time.perf_counter() - started)}")
    return [about._read(subsets) for about, subsets in parts]


def _forecast(about: Retraining, subsets: Sequence[Subset], engine: Engine, answering: int) -> str:
    trainer = _trainer(about)
    sizes = [len(subset.rows) for subset in subsets]
    seconds = forecast(trainer.loaded, trainer.train, trainer.measured, about.config, sizes)
    if engine.name == "ray" or trainer.loaded.model.device.type != "cpu":  # workers on one CPU share its cores
        seconds /= min(engine.workers, len(subsets))
    whose = "the models' answers" if answering == len(subsets) else f"the answers of {many(answering, 'model')}"
    beside = f", and {whose} come on top" if answering else ""
    return f"they will take about {duration(seconds)} by a few steps timed now{beside}"


class _Trainer:
    """The base and the encoded texts, loaded once a process."""

    def __init__(self, about: Retraining) -> None:
        self.about = about
        self.loaded: Loaded = _base(about.base)
        config = about.config
        self.template = read_template(config.chat_template)
        train = Encoder(self.loaded.tokenizer, config.loss_on, config.max_length, self.template, config.pad_to)
        self.train = train.encode_all(about.examples)[0]
        asked = Encoder(self.loaded.tokenizer, RESPONSE, config.max_length, self.template)
        self.measured: dict[str, list[Encoded]] = {
            name: asked.encode_all(given)[0] for name, given in {RESPONSE: about.queries, **about.others}.items()
        }

    def __call__(self, subset: Subset) -> tuple[dict[str, list[float]], tuple[str, ...] | None]:
        config = self.about.config.model_copy(update={"seed": subset.seed, "validation": 0.0})
        model = new_adapter(self.loaded, config)
        try:
            fit(model, [self.train[row] for row in subset.rows], config)
            learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
            losses = {name: mean_losses(model, items, learnt=learnt) for name, items in self.measured.items()}
            bad = next((name for name, values in losses.items() if not torch.isfinite(values).all()), None)
            if bad is not None:
                raise FinetraceError(
                    f"after a retraining the loss of a {bad} is not finite; use a smaller learning rate."
                )
            answers = None
            if self.about.answer_tokens:
                tuned = Loaded(model, self.loaded.tokenizer, self.loaded.spec)
                given = answer(
                    tuned, self.about.queries, max_new_tokens=self.about.answer_tokens, template=self.template
                )
                answers = tuple(each.response if each.has_response else "" for each in given)
            return {name: values.tolist() for name, values in losses.items()}, answers
        finally:
            self.loaded.model = model.unload()


_bases: dict[ModelSpec, Loaded] = {}
_trainers: dict[str, _Trainer] = {}


def _base(spec: ModelSpec) -> Loaded:
    """The base, loaded once a process; the one before it goes."""
    if spec not in _bases:
        _bases.clear()
        _bases[spec] = load(spec)
    return _bases[spec]


def _trainer(about: Retraining) -> _Trainer:
    """Of a retraining, made once a process."""
    name = f"{about.base} {about._about} {fingerprint.of_text(' '.join(about._rows))}"
    if name not in _trainers:
        _trainers.clear()  # one base at a time
        _trainers[name] = _Trainer(about)
    return _trainers[name]


def _retrain(about: Retraining, subset: Subset, expected: str | None = None) -> float:
    """Train on a subset, measure the queries, keep what was found; the seconds that took.

    A worker whose base, precision or libraries are not those of the coordinator, `expected`, is refused: what it finds would be
    another retraining.
    """
    if expected is not None and about._about != expected:
        raise FinetraceError(
            "a worker has another base model, precision, kind of device or version of torch, transformers or peft than this "
            "process; install the same everywhere, and give --dtype and --device."
        )
    trainer = _trainer(about)
    started = time.perf_counter()
    losses, answers = trainer(subset)
    seconds = time.perf_counter() - started
    found = Retrained({name: np.array(v) for name, v in losses.items()}, answers, seconds, subset.seed, subset.rows)
    kept.write(about._path(subset), found)
    return seconds
