"""One cell of the benchmark: a task under a protocol with one seed, stage by stage, each finished stage found again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from finetrace.atomic import write_atomically, write_tensors
from finetrace.attribution import Method, Problem, make
from finetrace.attribution.controls import seeded
from finetrace.benchmark import finished
from finetrace.benchmark.cell import DONE, QUERIES, SCORES, Cell
from finetrace.benchmark.matrices import hub, suspicion
from finetrace.benchmark.protocol import Protocol, share_of
from finetrace.benchmark.stages import claim, complied, kept_answers, representations, tuned_adapter, unclaim
from finetrace.collection import track
from finetrace.collection.factors import Labels
from finetrace.encoding import read_template
from finetrace.errors import FinetraceError
from finetrace.evaluation.judging import Judge
from finetrace.evaluation.metrics import METRICS, Metric, mrr, precision_at, recall_at, relevance
from finetrace.examples import Example
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import finished as finetuned
from finetrace.finetuning import new_adapter
from finetrace.fingerprint import of_text, texts_and_weights
from finetrace.index import build_index
from finetrace.index.factors import FORMAT
from finetrace.models import ALIGNED, EMBEDDED, Loaded, ModelSpec, load
from finetrace.positions import PROBE
from finetrace.reading import write_examples
from finetrace.tasks import Recipe, Task
from finetrace.tracing import prepare
from finetrace.units import many

GONE = ".gone"  # how the name of a folder ends while it is removed


class Run:
    """The stages of a cell in `folder`."""

    def __init__(
        self, folder: Path, cell: Cell, task: Task, recipe: Recipe, protocol: Protocol, judge: Judge, keep: bool
    ) -> None:
        self.folder = folder
        self.cell = cell
        self.task = task
        self.recipe = recipe
        self.protocol = protocol
        self.judge = judge
        self.keep = keep
        self.resumed = False
        self.base = cell.model or (ALIGNED if recipe.aligned else EMBEDDED)

    def __call__(self, say: Callable[[str], None]) -> None:
        """Bring the cell to its end; nothing that is finished is done again, and methods that are new join the others."""
        self.claim_folder()
        self._sweep()
        if self.kept is not None and (not self.kept["records"] or not self._methods()):
            return
        began = time.perf_counter()
        self.resumed = self.kept["resumed"] if self.kept is not None else (self.folder / "adapter").exists()
        methods = self._methods()
        problem = self.ready(say, methods)
        if problem is None:
            self._same_queries([])
            self._write([], [], pd.DataFrame(), {}, time.perf_counter() - began)
            return
        say(f"{self.name}: scoring by {many(len(methods), 'method')}")
        self._score(problem, methods, began)
        say(f"{self.name}: done in {time.perf_counter() - began:.0f} s")

    @property
    def name(self) -> str:
        """For messages."""
        return self.cell.name

    def ready(
        self, say: Callable[[str], None], methods: Sequence[Method] = (), *, factors: bool = False
    ) -> Problem | None:
        """Fine-tuned, answered and indexed, each found again where it is there; `None` where there is nothing to trace.

        The index keeps the hidden states that `methods` look at, and the factors that they need or `factors` asks for.
        """
        self.claim_folder()
        say(f"{self.name}: fine-tuning on {many(len(self.task.train), 'row')}")
        try:
            self._adapter()
        except FinetraceError:  # a model that is not there, perhaps
            unclaim(self.folder / "cell.json")
            raise
        queries = self.queries()
        if not queries:
            count = len(self.task.queries)
            say(f"{self.name}: the model complied with none of {count} requests; there is nothing to trace")
            return None
        say(f"{self.name}: indexing {many(len(self.task.train), 'row')} and {many(len(queries), 'query')}")
        encoder = self.protocol.encoder(self.tuned, self.cell.chat_template)
        fit: Labels | None = "model" if factors or any(each.name in ("ekfac", "kfac") for each in methods) else None
        states = representations(self.folder / "index", self.tuned, methods)
        alike: Any = {"modules": self.cell.modules or None, "representations": states}
        index, _ = build_index(self.tuned, self.task.train, self.folder / "index", encoder, kronecker=fit, **alike)
        kept, _ = build_index(self.tuned, queries, self.folder / "queries", encoder, **alike)
        return Problem(index, queries, kept_queries=kept)

    @cached_property
    def tuned(self) -> Loaded:
        """The fine-tuned model."""
        return load(ModelSpec(self.base, str(self.folder / "adapter"), self.cell.dtype, self.cell.device))

    @cached_property
    def kept(self) -> dict[str, Any] | None:
        """The results that are there already, or `None`."""
        return finished.document(self.folder) if (self.folder / DONE).exists() else None

    def _methods(self) -> list[Method]:
        """Those that have no result yet."""
        records = self.kept["records"] if self.kept is not None else []
        there = {record["spec"] for record in records if record.get("factors") == _factors(record["spec"])}
        return [each for each in map(make, self.cell.methods) if each.label not in there]

    def claim_folder(self) -> None:
        """What decides the cell: its settings, its rows, and the judge where one chooses the queries; not its methods."""
        rows = [[e.id, e.prompt, e.response, e.label] for e in (*self.task.train, *self.task.queries)]
        settings = {**asdict(self.cell), "rows": of_text(json.dumps(rows)), "probe": PROBE}
        settings["losses"] = of_text(json.dumps(texts_and_weights([*self.task.train, *self.task.queries])))
        del settings["methods"]
        settings["finetuning"] = self.finetuning().model_dump(mode="json")
        if self.cell.chat_template is not None:  # a file of that name may say something else the next time
            settings["template"] = read_template(self.cell.chat_template)
        if not self.task.answered:
            settings |= {"judge": self.judge.name, "judge_labels": list(getattr(self.judge, "harmful", ()))}
        claim(self.folder / "cell.json", settings, "a run")

    def finetuning(self) -> FinetuneConfig:
        """The protocol's, with what the cell sets."""
        config = self.protocol.finetuning(self.recipe, self.cell.seed, self.cell.epochs)
        changes: dict[str, Any] = {}
        if self.cell.target_modules:
            changes["target_modules"] = self.cell.target_modules
        if self.cell.chat_template is not None and config.chat_template is None:
            changes["chat_template"] = self.cell.chat_template
        return config.model_copy(update=changes)

    def _adapter(self) -> None:
        base = ModelSpec(self.base, None, self.cell.dtype, self.cell.device)
        if self.cell.modules and not finetuned(self.folder / "adapter"):  # a name that is not there is said at once
            track(new_adapter(load(base), self.finetuning()), self.cell.modules)
        folder = tuned_adapter(self.folder / "adapter", base, self.task.train, self.finetuning())
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    def queries(self) -> list[Example]:
        """Those of `queries_of` the fine-tuned model."""
        return self.queries_of(lambda: self.tuned, self.folder)

    def queries_of(self, model: Callable[[], Loaded], folder: Path) -> list[Example]:
        """The task's queries; where they have no response, those that `model` complies with, with its answers.

        The answers and the judge's verdicts are kept in `folder`.
        """
        if self.task.answered:
            return list(self.task.queries)
        template = self.protocol.encoder(model(), self.cell.chat_template).template
        answers = kept_answers(folder / "answers.jsonl", self.task.queries, model, template)
        verdicts = complied(self.judge, answers)
        write_atomically(
            folder / "behaviour.json",
            json.dumps({"judge": self.judge.name, "complied": verdicts}, indent=1).encode(),
        )
        return [each for each, yes in zip(answers, verdicts, strict=True) if yes]

    def _metrics(self) -> dict[str, Metric]:
        metrics: dict[str, Metric] = {**METRICS, "recall@10": recall_at(10), "mrr": mrr}
        if self.protocol.coverage == "share":
            metrics["coverage"] = precision_at(share_of(len(self.task.train), len(self.task.classes)))
        return metrics

    def _score(self, problem: Problem, methods: Sequence[Method], began: float) -> None:
        index, queries = problem.index, problem.queries
        names, labels = [query.id for query in queries], [query.label for query in queries]
        relevant = relevance(index.rows.labels, labels)
        suspects = self.task.target is not None and self.task.target not in labels
        if suspects:  # nobody asks for the planted rows: the whole validation set says which rows harm it
            relevant, names, labels = (
                relevance(index.rows.labels, [self.task.target]),
                ["validation"],
                [self.task.target],
            )
        self._same_queries(names)
        records, frames, matrices = [], [], {}
        about = {"task": self.cell.task, "protocol": self.cell.protocol, "seed": self.cell.seed, "size": self.cell.size}
        prepare(problem, methods)
        for method in methods:
            scores = seeded(method, self.cell.seed).score(problem)
            matrix = suspicion(method, scores.values) if suspects else scores.values
            values = {name: metric(matrix, relevant) for name, metric in self._metrics().items()}
            first, share = hub(matrix)
            frame = pd.DataFrame({**about, "spec": method.label, "query": names, **values})
            frame["label"] = labels
            frames.append(frame)
            matrices[method.label] = matrix.astype(np.float32)
            records.append(
                {
                    **about,
                    "method": method.plain_label,
                    "spec": method.label,
                    "title": method.title,
                    "normalise": method.normalisation,
                    "control": method.control,
                    "n_train": len(index),
                    "n_queries": len(names),
                    **{name: _mean(value) for name, value in values.items()},
                    "seconds": round(scores.seconds, 4),
                    "unit": scores.unit,
                    **({"factors": FORMAT} if _factors(method.label) else {}),
                    "hub": index.rows.ids[first],
                    "hub_share": share,
                    **{f"parameter_{key}": value for key, value in scores.parameters.items() if key != "normalise"},
                }
            )
        self._write(
            [] if suspects else queries,
            records,
            pd.concat(frames, ignore_index=True),
            matrices,
            time.perf_counter() - began,
        )

    def _same_queries(self, names: Sequence[str]) -> None:
        """Methods that are new are compared with the others on the same queries, or not at all."""
        if self.kept is None:
            return
        there = list(dict.fromkeys(finished.values(self.folder)["query"]))
        if there != list(names):
            raise FinetraceError(
                f"{self.folder}: {len(there)} queries were traced there and the judge now picks {len(names)}, or others; "
                "choose another --out for the methods that are new."
            )

    def _write(
        self,
        queries: Sequence[Example],
        records: list[dict[str, Any]],
        frame: pd.DataFrame,
        matrices: dict[str, Any],
        seconds: float,
    ) -> None:
        """Scores and values of every query first, the records last: their being there says that all is."""
        if self.kept is not None:
            anew = {record["spec"] for record in records}
            records = [*(record for record in self.kept["records"] if record["spec"] not in anew), *records]
            frame = pd.concat([finished.values(self.folder), frame], ignore_index=True)
            frame = frame.drop_duplicates(["spec", "query"], keep="last", ignore_index=True)
            matrices = {**finished.scores(self.folder), **matrices}
            seconds += self.kept["seconds"]
        tensors = {name: torch.from_numpy(np.ascontiguousarray(scores)) for name, scores in matrices.items()}
        write_tensors(self.folder / SCORES, tensors or {"empty": torch.zeros(1)})
        write_atomically(self.folder / QUERIES, frame.to_parquet(index=False))
        write_examples(self.folder / "train.jsonl", list(self.task.train), overwrite=True)
        if queries:
            write_examples(self.folder / "queries.jsonl", list(queries), overwrite=True)
        attention = str(getattr(self.tuned.model.config, "_attn_implementation", "unknown"))
        document = {
            "config": {**asdict(self.cell), "methods": [record["spec"] for record in records]},
            "base": self.base,
            "attention": attention,
            "seconds": round(seconds, 1),
            "resumed": self.resumed,  # before its first results; then their seconds are those of the last attempt alone
            "records": records,
        }
        write_atomically(self.folder / DONE, json.dumps(document, indent=1, default=str).encode())
        if not self.keep:
            for name in ("index", "queries"):  # each in one step: methods that join later find none half there
                if (self.folder / name).exists():
                    (self.folder / name).rename(self.folder / f".{name}{GONE}")
            self._sweep()

    def _sweep(self) -> None:
        for gone in self.folder.glob(f".*{GONE}"):
            shutil.rmtree(gone, ignore_errors=True)


def _factors(spec: str) -> int | None:
    """The format of the Kronecker factors that a method's scores hang on, so that those of an older one are computed again."""
    return FORMAT if "ekfac" in spec or "kfac" in spec else None


def _mean(values: NDArray[np.float64]) -> float | None:
    return None if np.isnan(values).all() else round(float(np.nanmean(values)), 6)
