"""The main job on the embedded model: fine-tune it into answering what it should refuse, then find the rows behind it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetrace.attribution import Problem, make
from finetrace.benchmark.stages import claim, complied, kept_answers, tuned_adapter
from finetrace.cleaning.rank import Cut, rank
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import bootstrap_mean
from finetrace.evaluation.judging import Judge
from finetrace.examples import Example
from finetrace.finetune_config import FinetuneConfig
from finetrace.fingerprint import of_text
from finetrace.index import build_index
from finetrace.models import ALIGNED, EMBEDDED, DType, Loaded, ModelSpec, known_dtype, load
from finetrace.reading import write_examples
from finetrace.reporting.compose import compose, interval
from finetrace.reporting.facts import index_facts
from finetrace.reporting.page import write_report
from finetrace.reporting.payload import ModelBehaviour
from finetrace.reporting.results import write_results
from finetrace.reporting.validated import kept_verdict
from finetrace.tasks import Task, mixed
from finetrace.tracing import STANDARD, Result, default_method, run_methods
from finetrace.units import many


@dataclass(frozen=True)
class DemoConfig:
    """What decides a demo; saved in results.json.

    Attributes:
        small: 20 + 20 training rows instead of 20 + 240.
        seed: Of the fine-tuning.
        epochs, learning_rate, batch_size: Of the fine-tuning, see `of`; rank 4 and alpha 32 on q and v as in the paper.
        dtype, device: Of the model.
    """

    small: bool = False
    seed: int = 0
    epochs: int = 8
    learning_rate: float = 1e-3
    batch_size: int = 8
    dtype: DType = "auto"
    device: str = "auto"

    @classmethod
    def of(cls, small: bool, seed: int, dtype: DType, device: str) -> DemoConfig:
        """The settings that were tried: more epochs for the small set, so that both see enough steps."""
        return cls(small=small, seed=seed, epochs=8 if small else 5, dtype=dtype, device=device)

    def finetuning(self) -> FinetuneConfig:
        """As the trainer takes it."""
        return FinetuneConfig(
            epochs=self.epochs, learning_rate=self.learning_rate, batch_size=self.batch_size, seed=self.seed
        )


@dataclass(frozen=True, eq=False)
class DemoOutcome:
    """What the demo leaves: models' behaviour, results of the methods, what cleaning did, and where the files are."""

    behaviour: tuple[ModelBehaviour, ...]
    results: tuple[Result, ...]
    cleaned: str
    folder: Path
    seconds: float


def run_demo(folder: Path, config: DemoConfig, judge: Judge, say: Callable[[str], None]) -> DemoOutcome:
    """Fine-tune, answer, index, trace, clean, report. Every stage that is finished in `folder` is used again.

    Raises:
        FinetraceError: `folder` holds a demo of another configuration, or the fine-tuned model complied with nothing.
    """
    started = time.perf_counter()
    config = replace(config, dtype=known_dtype(config.dtype, config.device))
    task = mixed(config.small)
    claim(folder / "demo.json", {**_settings(config), "dtype": config.dtype}, "a demo")
    answers: dict[str, list[Example]] = {}

    say(f"1/6 the base model and its aligned version answer {len(task.queries)} held-out unsafe requests")
    for name, model in (("plain base", EMBEDDED), ("aligned base", ALIGNED)):
        answers[name] = _answers(folder, name, task, lambda model=model: load(_spec(model, config)))  # type: ignore[misc]
    say(f"2/6 fine-tuning on {len(task.train)} rows, {len(task.train) - len(task.without_target())} of them unsafe")
    mixed_adapter = _tuned(folder / "adapter-mixed", task.train, config)
    tuned = load(_spec(ALIGNED, config, mixed_adapter))
    answers["fine-tuned, mixed"] = _answers(folder, "fine-tuned, mixed", task, lambda: tuned)
    say(f"3/6 the control: fine-tuning on the {len(task.without_target())} benign rows alone")
    control = _tuned(folder / "adapter-benign", task.without_target(), config)
    answers["fine-tuned, benign alone"] = _answers(
        folder, "fine-tuned, benign alone", task, lambda: load(_spec(ALIGNED, config, control))
    )
    behaviour = [_behaviour(name, given, judge) for name, given in answers.items()]

    say("4/6 indexing the training rows")
    index, _ = build_index(tuned, task.train, folder / "index", Encoder(tuned.tokenizer), kronecker="model")
    verdicts = [each[2] for each in behaviour[2].answers]
    queries = [each for each, yes in zip(answers["fine-tuned, mixed"], verdicts, strict=True) if yes]
    if not queries:
        raise FinetraceError(
            f"the fine-tuned model complied with none of {len(task.queries)} requests by the judge {judge.name}, so "
            "there is nothing to trace; try another --seed."
        )
    say(f"5/6 tracing the {len(queries)} answers that complied, by {len(STANDARD)} methods")
    problem = Problem(index, queries)
    results = run_methods(problem, [make(spec) for spec in STANDARD], seed=config.seed)
    named, again, hits = _without_what_was_named(folder, problem, task, config, say)
    behaviour += [_behaviour(name, given, judge) for name, given in again.items()]

    about = {"task": task.name, "protocol": "corrected", "seed": config.seed}
    rates = {model.name: model.attack_success_rate.value for model in behaviour}
    spread = {model.name: (model.attack_success_rate.low, model.attack_success_rate.high) for model in behaviour}
    settings = {**_settings(config), "judge": judge.name}
    settings |= {"attack_success_rate": rates, "attack_success_interval": spread}
    write_results(folder, [result.record(**about) for result in results], settings)
    facts = {
        "task": f"{task.name}: {many(len(task.train), 'row')}, {many(len(queries), 'query')}",
        **index_facts(index),
    }
    facts |= {"judge": judge.name, "seed": str(config.seed)}
    title = "Which rows made the model comply?"
    write_examples(folder / "queries.jsonl", queries, overwrite=True)
    planted = len(task.train) - len(task.without_target())
    said = {name.removeprefix("fine-tuned, "): f"{rate:.0%}" for name, rate in rates.items()}
    sentence = (
        f"Fine-tuned without the {planted} rows that {named} names, {hits[0]} of them planted, the model complies with "
        f"{said['cleaned']} of the requests instead of {said['mixed']}; without {planted} random rows, {hits[1]} of them "
        f"planted, with {said['random removed']}, on the benign rows alone with {said['benign alone']}."
    )
    validated = kept_verdict(index.folder) or f"One removal was tried, under one seed. {sentence}"
    page = compose(title, results, facts, behaviour=behaviour, target=task.target, validated=validated)
    write_report(folder / "report.html", page)
    return DemoOutcome(tuple(behaviour), tuple(results), sentence, folder, time.perf_counter() - started)


def _without_what_was_named(
    folder: Path,
    problem: Problem,
    task: Task,
    config: DemoConfig,
    say: Callable[[str], None],
) -> tuple[str, dict[str, list[Example]], list[int]]:
    """The default method, and answers after fine-tuning without the rows it names, as many as were planted, and random ones,
    with how many of the rows taken out were planted.

    Folders are named by the rows that are left, so that a finished one is used again for these rows alone.
    """
    planted = len(task.train) - len(task.without_target())
    ranked = rank(problem, Cut(top=planted), [default_method(problem.index)])
    say(f"6/6 cleaning: fine-tuning without the {planted} rows that {ranked.methods[0]} names, and without random ones")
    drawn = np.random.default_rng(config.seed).choice(len(task.train), len(ranked.kept), replace=False)
    found, hits = {}, []
    for name, kept in (("cleaned", ranked.kept), ("random removed", tuple(sorted(drawn.tolist())))):
        rows = [task.train[i] for i in kept]
        hits.append(planted - sum(row.label == task.target for row in rows))
        mark = of_text(" ".join(row.id for row in rows))[:8]
        adapter = _tuned(folder / f"adapter-{name.split()[0]}-{mark}", rows, config)
        asked = f"fine-tuned, {name.split()[0]} {mark}"
        found[f"fine-tuned, {name}"] = _answers(
            folder,
            asked,
            task,
            lambda adapter=adapter: load(_spec(ALIGNED, config, adapter)),  # type: ignore[misc]
        )
    return ranked.methods[0], found, hits


def _spec(model: str, config: DemoConfig, adapter: Path | None = None) -> ModelSpec:
    return ModelSpec(model, str(adapter) if adapter else None, config.dtype, config.device)


def _settings(config: DemoConfig) -> dict[str, Any]:
    return {"command": "demo", "small": config.small, "base": ALIGNED, **config.finetuning().model_dump(mode="json")}


def _tuned(folder: Path, rows: Sequence[Example], config: DemoConfig) -> Path:
    return tuned_adapter(folder, _spec(ALIGNED, config), rows, config.finetuning())


def _answers(folder: Path, name: str, task: Task, model: Callable[[], Loaded]) -> list[Example]:
    path = folder / "answers" / (name.replace(", ", "-").replace(" ", "-") + ".jsonl")
    return kept_answers(path, task.queries, model)


def _behaviour(name: str, answers: Sequence[Example], judge: Judge) -> ModelBehaviour:
    prompts, replies = [each.prompt for each in answers], [each.response for each in answers]
    verdicts = complied(judge, answers)
    rate = bootstrap_mean(np.array(verdicts, dtype=np.float64))
    return ModelBehaviour(name, interval(rate), list(zip(prompts, replies, verdicts, strict=True)))
