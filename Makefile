# Everything runs with the executables of $(VENV); nothing has to be activated.

PYTHON ?= python3
VENV ?= .venv
PORT ?= 5000
# Words for `pip install` on top of the project, for example a checker that only CI needs.
PIP_EXTRA ?=
# Words for `python -m benchmarks`, for example --quick.
BENCH ?=

BIN := $(if $(filter /%,$(VENV)),$(VENV),$(CURDIR)/$(VENV))/bin
STAMP := $(VENV)/.spectra-setup
PEERS := $(VENV)/.spectra-peers
SMOKE := build/smoke

# So that what runs `spectra` itself, such as DVC, finds this one.
export PATH := $(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup run test test-slow check smoke bench sweep ui report clean

help: ## list the targets
	@echo 'spectra: make TARGET [PYTHON=python3.12] [VENV=/path] [PORT=5000]'
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-12s %s\n", $$1, $$2 }'

setup: $(STAMP) ## make the virtual environment and install the project into it, once

$(STAMP): pyproject.toml
	@test -x "$(BIN)/python" || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "spectra needs Python 3.10 or newer, and '$(PYTHON)' is not that: make PYTHON=python3.12" >&2; exit 1; }
	test -x "$(BIN)/python" || $(PYTHON) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --disable-pip-version-check -e ".[dev]" $(PIP_EXTRA)
	@touch "$@"

run: setup ## ten strengths from 0 to 0.09 on MNIST, with the figures: the quick look
	"$(BIN)/spectra" sweep --points 10

sweep: setup ## the whole experiment of params.yaml
	"$(BIN)/spectra" sweep

report: setup ## draw the figures and tables again from what is in test_data/
	"$(BIN)/spectra" report

ui: setup ## MLflow's pages on this folder's mlflow.db
	@test -f mlflow.db || { echo "There is no mlflow.db here yet; 'make run' makes one." >&2; exit 1; }
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
	  "$(BIN)/mlflow" ui --backend-store-uri sqlite:///mlflow.db --workers 1 --port $(PORT)

# Processes side by side: NumPy's threads would spin against those of the other (four times as long).
test test-slow: export OPENBLAS_NUM_THREADS = 1

test: setup ## the tests that take seconds, on two cores
	"$(BIN)/python" -m pytest -n 2 --dist worksteal

test-slow: setup ## the tests that take minutes
	"$(BIN)/python" -m pytest -m slow || { test $$? -eq 5 && echo "there are no slow tests"; }

check: setup ## lint, format, types, the imports' arrows and, where actionlint is, the workflow
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"
	@if command -v actionlint >/dev/null; then echo actionlint; actionlint; \
	else echo "actionlint is not on PATH: the workflow was not checked"; fi

# A copy of what git would commit, with its own history, cache and run store, so that neither
# this folder's results nor its settings can make the run pass or fail.
smoke: setup ## two strengths on the shipped sample, by command and by DVC, in build/smoke
	@git rev-parse --is-inside-work-tree >/dev/null
	rm -rf $(SMOKE) && mkdir -p $(SMOKE)
	git ls-files -co --exclude-standard | while read -r f; do test ! -f "$$f" || echo "$$f"; done \
	  | tar -cf - -T - | tar -xf - -C $(SMOKE)
	cp sample/params.yaml $(SMOKE)/params.yaml
	rm -f $(SMOKE)/dvc.lock
	@set -eu; cd $(SMOKE); unset MLFLOW_TRACKING_URI GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE; \
	export MLFLOW_DISABLE_TELEMETRY=true DVC_NO_ANALYTICS=true; \
	run() { echo "+ $$*"; "$$@"; }; \
	run git init -q; \
	run spectra sweep; \
	run dvc repro; \
	echo "+ dvc repro, again"; dvc repro | tee repro.log; \
	grep -q 'Data and pipelines are up to date' repro.log || { \
	  echo "smoke: the second dvc repro found work to do" >&2; exit 1; }; \
	for f in test_data/Model-1.csv mlflow.db report/summary.md report/summary.json \
	  test_data/Hessian-eigenvalues-1-0.00000.csv test_data/Hessian-eigenvalues-1-0.01000.csv; do \
	  test -s "$$f" || { echo "smoke: $(SMOKE)/$$f is missing or empty" >&2; exit 1; }; \
	done; \
	run dvc metrics show; \
	echo "smoke: all there, and a second dvc repro does nothing"

# The peers must compare on this PyTorch, so they may not bring another.
$(PEERS): $(STAMP)
	"$(BIN)/python" -m pip list --format=freeze | grep '^torch' > "$@.tmp"
	"$(BIN)/python" -m pip install --disable-pip-version-check -c "$@.tmp" -e ".[dev,bench]"
	@mv "$@.tmp" "$@"

bench: $(PEERS) ## time spectra and its peers on the same work, in some 20 minutes
	"$(BIN)/python" -m benchmarks $(BENCH)

clean: ## remove build leftovers and caches; results, data and the environment stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find $(wildcard src tests benchmarks) -name __pycache__ -type d -prune -exec rm -rf {} +
