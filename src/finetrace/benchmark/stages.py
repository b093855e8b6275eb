"""Stages that the demo and the benchmark share: each is done once, kept in a file, and found again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finetrace.atomic import part_of, write_atomically
from finetrace.attribution import Method
from finetrace.attribution.similarity import RepSim
from finetrace.collection.representations import DEFAULT_REPRESENTATIONS, Representation
from finetrace.errors import FinetraceError
from finetrace.evaluation.judging import Judge
from finetrace.examples import Example
from finetrace.finetune_config import FinetuneConfig, found_config
from finetrace.finetuning import finetune, finished
from finetrace.generation import ANSWER_TOKENS, answer
from finetrace.index import manifest
from finetrace.models import Loaded, ModelSpec, load
from finetrace.reading import read_examples, write_examples

NO_ANSWER = "(no answer)"  # what a file says where a model said nothing


def claim(path: Path, settings: Mapping[str, Any], what: str) -> None:
    """Note in `path` what its folder holds; a folder that holds something stays as it is.

    A setting that is not noted there, from before there was one, is taken to be the same.

    Raises:
        FinetraceError: The folder holds `what` with other settings, or something else, or cannot be written.
    """
    folder, wanted = path.parent, json.loads(json.dumps(dict(settings)))
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            there = None
        if not isinstance(there, dict) or {**wanted, **there} != wanted:
            raise FinetraceError(
                f"{folder}: {what} with other settings is there; choose another --out or remove the folder."
            )
        return
    begun = part_of(path.name)  # all that a run killed over this note leaves
    if folder.exists() and (not folder.is_dir() or any(each.name != begun for each in folder.iterdir())):
        raise FinetraceError(f"{folder}: there is something else already; choose another --out.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FinetraceError(f"{folder}: cannot be written ({error}).") from error
    write_atomically(path, json.dumps(wanted, indent=1).encode())


def unclaim(path: Path) -> None:
    """Take back what `claim` noted where no file came of it, so that the same folder takes other settings."""
    inside = list(path.parent.rglob("*"))
    if [each for each in inside if not each.is_dir()] == [path]:
        path.unlink()
        for empty in sorted((each for each in inside if each.is_dir()), reverse=True):
            empty.rmdir()


def tuned_adapter(folder: Path, base: ModelSpec, rows: Sequence[Example], config: FinetuneConfig) -> Path:
    """The adapter of `rows` in `folder`, trained now, gone on with, or found finished.

    Raises:
        FinetraceError: The adapter there was trained by other settings.
    """
    if not finished(folder):
        finetune(load(base), rows, folder, config, resume=True)
    elif (there := found_config(folder)) is not None and there != config:
        raise FinetraceError(
            f"{folder}: an adapter of another fine-tuning is there; remove {folder.parent}, with what was made of it, or "
            "choose another --out."
        )
    return folder


def kept_answers(
    path: Path, queries: Sequence[Example], model: Callable[[], Loaded], template: str | None = None
) -> list[Example]:
    """The queries with the answers of one model, generated once and kept; `NO_ANSWER` where it says nothing."""
    if path.exists():
        kept = read_examples(path)
        if [each.id for each in kept] == [query.id for query in queries]:
            return kept
    given = [
        each if each.has_response else each.with_response(NO_ANSWER)
        for each in answer(model(), queries, max_new_tokens=ANSWER_TOKENS, template=template)
    ]
    write_examples(path, given, overwrite=True)
    return given


def complied(judge: Judge, answers: Sequence[Example]) -> list[bool]:
    """The judge's verdict on each answer; a model that said nothing did not comply."""
    replies = ["" if each.response == NO_ANSWER else each.response for each in answers]
    return [bool(verdict) for verdict in judge.complied([each.prompt for each in answers], replies)]


def representations(folder: Path, loaded: Loaded, methods: Sequence[Method]) -> tuple[Representation, ...]:
    """What the index in `folder` is to keep: the usual hidden states and those of `methods`; one that is there has its own.

    Raises:
        FinetraceError: The index that is there lacks some, or the model has no such layer.
    """
    depth = int(loaded.model.config.num_hidden_layers)
    asked = [Representation(each.layer, each.pooling).resolve(depth) for each in methods if isinstance(each, RepSim)]
    if not (folder / manifest.NAME).exists():
        return tuple(dict.fromkeys(each.resolve(depth) for each in (*DEFAULT_REPRESENTATIONS, *asked)))
    there = tuple(map(Representation.parse, manifest.read(folder).representations))
    if missing := [each.name for each in asked if each not in there]:
        raise FinetraceError(
            f"{folder}: the index that was kept lacks the hidden states {', '.join(missing)}; remove {folder} and "
            f"{folder.parent / 'queries'}, or choose another --out."
        )
    return there
