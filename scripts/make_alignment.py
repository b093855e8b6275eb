"""Make the alignment adapter that ships with the package: python scripts/make_alignment.py OUT.

It teaches the embedded model to refuse, on the refusals and ordinary answers in `src/finetrace/data`. Takes about four
minutes on two cores that multiply in bfloat16. Copy adapter_config.json and adapter_model.safetensors from OUT to
`src/finetrace/data/alignment` to ship it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import finetune
from finetrace.models import ModelSpec, load
from finetrace.tasks import alignment_rows

CONFIG = FinetuneConfig(
    epochs=8, learning_rate=1e-3, batch_size=8, dropout=0.05, schedule="cosine", warmup_steps=10, seed=1
)


def main(out: str) -> None:
    """Fine-tune and save."""
    finetune(load(ModelSpec()), alignment_rows(), Path(out), CONFIG)


if __name__ == "__main__":
    main(sys.argv[1])
