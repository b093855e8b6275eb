"""Peak memory of collection: the model, a batch and a shard, however many examples there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = """
import sys
from pathlib import Path
from finetrace.encoding import Encoder
from finetrace.index import build_index
from finetrace.models import Loaded, ModelSpec
from finetrace.planning.measure import peak_memory
from tiny import make_examples, make_llama, make_tokenizer
rows, out = int(sys.argv[1]), Path(sys.argv[2])
tokenizer = make_tokenizer()
loaded = Loaded(make_llama(hidden=64, layers=4), tokenizer, ModelSpec("tiny", None, "float64", "cpu"))
index, _ = build_index(
    loaded, make_examples(rows), out, Encoder(tokenizer), modules=["self_attn"], rows_per_shard=16, batch_tokens=512,
    kronecker="data",
)
row = sum(block.size for block in index.blocks) * 8
print(peak_memory(), row * 16)
"""


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_examples(tmp_path: Path) -> None:
    peaks = []
    shard = 0
    for rows in (32, 512):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(rows), str(tmp_path / str(rows))],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        )
        peak, shard = map(int, done.stdout.split())
        peaks.append(peak)
    whole = 512 // 16 * shard
    assert whole > 10 * shard
    assert peaks[1] - peaks[0] < 5 * shard, (peaks, shard, whole)  # texts and token ids grow a little
