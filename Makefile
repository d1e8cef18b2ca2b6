# `make demo` and `make test` set up .venv themselves; nothing else has to be installed first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint bench study clean
.DELETE_ON_ERROR:

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[viz,fast]'
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[viz,fast,dev]'
	touch $@

demo: $(VENV)/.base
	$(BIN)/python -m sparsify_vlm demo --output_dir runs/demo

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	scripts/install_chromium.sh
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Figures of other runs are kept on the page if they are stored beside these, for example with
#   python scripts/bench_step.py --config B --check --json runs/bench/step_B.json
# Attribution is printed only; PEER_VENV=DIR measures circuit-tracer beside it, see the script.
bench: $(VENV)/.base
	$(BIN)/python scripts/bench_step.py --config tiny A --rounds 3 --check --json runs/bench/step.json
	$(BIN)/python scripts/bench_capture.py --samples 500 --rounds 3 --json runs/bench/tiny_llava.json
	$(BIN)/python scripts/bench_report.py runs/bench/*.json --output docs/benchmarks.md
	$(BIN)/python scripts/bench_attribution.py $(if $(PEER_VENV),--peer_venv $(PEER_VENV)) --json runs/bench/attribution/text.json

# Cross-layer writes in a text model and in a vision-language model; goes on where it stopped.
study: $(VENV)/.base
	$(BIN)/python scripts/study.py --output_dir runs/study --page docs/study.md

clean:
	rm -rf $(VENV) runs checkpoints
