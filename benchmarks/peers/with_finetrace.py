"""The work with finetrace at its defaults: an index on disk, then one method.

Collection is the index, with the factors of EK-FAC in it where they are wanted; scoring takes the queries' gradients and
multiplies. The rows are encoded inside the clock, the other tools get token ids; both are checked to be the same.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from common import DAMPING, Job, Meter, Row

from finetrace.attribution import Problem, make
from finetrace.encoding import Encoder
from finetrace.examples import Example
from finetrace.index import build_index
from finetrace.models import ModelSpec, load


def examples(rows: list[Row]) -> list[Example]:
    """The rows as finetrace reads them."""
    return [Example.from_prompt(row.prompt, row.response, id=row.id) for row in rows]


def main() -> None:
    """One job."""
    job = Job.parse(__doc__)
    torch.set_num_threads(job.threads)
    loaded = load(ModelSpec(str(job.model), str(job.adapter), job.dtype, "cpu"))  # type: ignore[arg-type]
    encoder = Encoder(loaded.tokenizer)
    rows, queries = examples(job.rows), examples(job.queries)
    for row, example in zip((*job.rows, *job.queries), (*rows, *queries), strict=True):
        if encoder.encode(example).ids.tolist() != row.input_ids:
            raise ValueError(f"{row.id}: finetrace's tokens are not those of the other tools")
    labels = {"gradients": None, "ekfac": "model", "ekfac-data": "data"}[job.work]
    method = "gradsim" if labels is None else f"ekfac:labels={labels},damping={DAMPING}"
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        with meter.stage("collection"):
            index, _ = build_index(loaded, rows, Path(folder) / "index", encoder, kronecker=labels)  # type: ignore[arg-type]
        with meter.stage("scoring"):
            scores = make(method).score(Problem(index, queries)).values
    job.save(meter, scores, ["finetrace's defaults"], ())


if __name__ == "__main__":
    main()
