# redraft: every target sets up what it needs (virtual environment, pinned packages, demo model) and can be repeated.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DRAFT  := build/demo-draft
SOURCES := core server draft_training clients/python tests benchmarks scripts docs hatch_build.py

.DEFAULT_GOAL := help
.PHONY: help install model demo test tools test-ops test-slow ops-story exactness check format proto bench bench-peers bench-learning clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## virtual environment with pinned dependencies, project installed in place

$(STAMP): pyproject.toml constraints.txt hatch_build.py $(wildcard core/redraft/kernels/*.[ch])
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned dependencies (a minute or two; torch is the large one) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar on --quiet -c constraints.txt "torch" -e ".[dev]"
	@touch $@

model: $(DRAFT)/model.safetensors  ## demo target (downloaded once, about 90 MB) and its pruned draft

$(DRAFT)/model.safetensors: $(STAMP)
	@$(BIN)/python -m redraft.models.demo
	@rm -rf $(DRAFT)
	@$(BIN)/redraft-train init --target demo --layers 0,10,20,29 --output $(DRAFT)

demo: model  ## a draft's life: serve, distil, gate, hot-swap, drift, recover (about 15 minutes on 2 cores)
	@$(BIN)/python -m scripts.demo --draft $(DRAFT) --output build

test: model tools  ## the whole suite (about 20 minutes on 2 cores)
	@$(BIN)/python -m pytest

tools: $(STAMP)  ## helm, promtool, hadolint, an S3 server and the like, pinned and checked, into build/tools
	@scripts/tools.sh

test-ops: tools  ## only the tests of chart, image, alerts and S3, with the real tools
	@$(BIN)/python -m pytest tests/ops

test-slow: model tools  ## what `make test` leaves out: the image built and run, hostile requests, all of the dashboard live
	@scripts/tools.sh --image
	@$(BIN)/python -m pytest -m slow

ops-story: model tools  ## acceptance collapses, an alert, a Job, a new draft, on a real Prometheus (about 15 minutes)
	@rm -rf build/ops-story
	@$(BIN)/python -m scripts.ops_story --output build/ops-story

exactness: model  ## all of benchmarks/results/exactness.md: hours; what is done is kept
	@$(BIN)/python -m benchmarks.exactness --draft $(DRAFT)

check: $(STAMP)  ## format, lint, types, import layers, proto lint and drift, dependencies
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@cd proto && ../$(BIN)/buf lint
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && scripts/proto.sh "$$fresh" && \
	  diff -r -x __init__.py -x __pycache__ "$$fresh/redraft/v1" core/redraft/v1 || { echo "stubs differ from proto/: run make proto"; exit 1; }
	@$(BIN)/python -m scripts.audit

format: $(STAMP)  ## let ruff reformat and fix
	@$(BIN)/ruff format $(SOURCES)
	@$(BIN)/ruff check --fix $(SOURCES)

proto: $(STAMP)  ## regenerate the stubs in core/redraft/v1
	@scripts/proto.sh

bench: model  ## where the engine's time goes, into benchmarks/results; half an hour on 2 cores, what is done is kept
	@$(BIN)/python -m benchmarks.engine $(BENCH_FLAGS)

bench-peers: model  ## the same model on llama.cpp, vLLM, OpenVINO, transformers; hours, what is done is kept
	@$(BIN)/python -m benchmarks.peers $(BENCH_FLAGS)

bench-learning: model  ## how fast a draft learns, into benchmarks/results; hours, what is done is kept
	@$(BIN)/python -m benchmarks.learning

clean:  ## remove what the targets made, the virtual environment included
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
