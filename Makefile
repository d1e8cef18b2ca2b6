# `make demo` and `make test` set up .venv themselves; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint bench clean
.DELETE_ON_ERROR:

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[viz]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[viz,dev]'
	touch $@

demo: $(VENV)/.base
	$(BIN)/python -m sparsify_vlm demo --output_dir runs/demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	scripts/install_chromium.sh
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

bench: $(VENV)/.base
	$(BIN)/python scripts/bench_step.py --size tiny
	$(BIN)/python scripts/bench_capture.py

clean:
	rm -rf $(VENV) runs checkpoints
