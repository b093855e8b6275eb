"""The example of docs/how-to/add-a-method.md, as it stands on the page, against the values that the page promises."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import numpy as np
import pytest

from finetrace.api import build_index
from finetrace.attribution import Problem, make, method
from tiny import make_examples, make_llama, make_tokenizer, with_lora

PAGE = Path(__file__).parent.parent / "docs" / "how-to" / "add-a-method.md"


@pytest.fixture
def problem(tmp_path: Path) -> Problem:
    index = build_index(with_lora(make_llama()), make_tokenizer(), make_examples(14), tmp_path / "idx")
    asked = [dataclasses.replace(example, id=f"q{i}") for i, example in enumerate(make_examples(3, seed=9))]
    return Problem(index, asked)


def test_the_example_of_the_page(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = re.search(
        r'```python title="src/finetrace_overlap.py"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
    assert found is not None
    (tmp_path / "finetrace_overlap.py").write_text(found[1], encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(method, "_METHODS", dict(method._METHODS))  # forgotten when the test is over
    importlib.import_module("finetrace_overlap")
    shares = make("overlap:text=prompt,shortest=2").score(problem).values
    assert shares.shape == (3, 14) and 0 <= shares.min() <= shares.max() <= 1
    damping = 1e7
    limit = damping * make(f"exact:damping={damping}").score(problem).values
    np.testing.assert_allclose(make("blocksim").score(problem).values, limit, rtol=1e-4)
    cosine = make("blocksim:normalise=cosine").score(problem).values
    np.testing.assert_allclose(
        cosine, make(f"exact:normalise=cosine,damping={damping}").score(problem).values, rtol=1e-4
    )
