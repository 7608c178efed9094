# RECIPE=recipes/x.yaml picks the run; ARGS="grpo.learning_rate=1e-6" hands further options on.
RECIPE ?= recipes/arithmetic.yaml
ARGS ?=
CHECKPOINT ?= runs/$(basename $(notdir $(RECIPE)))/grpo/checkpoint
PYTHON ?= python3
VENV ?= .venv
DEVICE ?= auto
SPEC ?= math
DATA ?= data/arithmetic/problems.py

BIN := $(VENV)/bin
STAMP := $(VENV)/posttrain.stamp
PINS := requirements/cpu.txt requirements/cuda.txt pyproject.toml scripts/setup.py

.DEFAULT_GOAL := help
.PHONY: help setup sft grpo eval check-reward doctor test test-slow check bench pins clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo '  RECIPE=$(RECIPE) and ARGS="key=value ..." work with sft, grpo, eval, bench'
	@echo '  SPEC=$(SPEC) DATA=$(DATA) work with check-reward'

$(STAMP): $(PINS)
	@$(PYTHON) scripts/setup.py --device $(DEVICE) --venv $(VENV)

setup:  ## make .venv with every pinned package (CPU or CUDA found by itself; DEVICE=cpu|cuda decides)
	@$(PYTHON) scripts/setup.py --device $(DEVICE) --venv $(VENV)

sft: $(STAMP)  ## supervised fine-tuning of RECIPE
	$(BIN)/posttrain sft $(RECIPE) $(ARGS)

grpo: $(STAMP)  ## GRPO of RECIPE, after its SFT stage if that has not run yet
	$(BIN)/posttrain grpo $(RECIPE) $(ARGS)

eval: $(STAMP)  ## score CHECKPOINT (default: what the GRPO stage of RECIPE left)
	$(BIN)/posttrain eval $(CHECKPOINT) $(ARGS)

check-reward: $(STAMP)  ## score the gold answers of DATA with the reward SPEC, and list those below the top score
	$(BIN)/posttrain rewards check $(SPEC) --data $(DATA) $(ARGS)

doctor: $(STAMP)  ## what this machine has, what will be slow, what is wrong and its remedy
	$(BIN)/posttrain doctor

test: $(STAMP)  ## the quick tests and the doctests
	$(BIN)/python -m pytest -q $(ARGS)

test-slow: $(STAMP)  ## the tests that take longer
	$(BIN)/python -m pytest -q -m slow $(ARGS)

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_imports.py

bench: $(STAMP)  ## measure against stock TRL, side by side
	$(BIN)/python bench/rollouts.py $(RECIPE) $(ARGS)

pins: $(STAMP)  ## resolve requirements/*.txt anew (needs uv)
	$(BIN)/python scripts/pins.py $(ARGS)

clean:  ## remove the environment and all caches; runs stay
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
