# Pip takes further options from its environment variables, such as PIP_INDEX_URL.
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$p && break; done)
QUICK := -m "not slow and not shared and not bench and not trackers"

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all faults soak lint audit format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

venv: .venv/dev.stamp ## virtual environment in .venv, with the package and its development tools

demo: .venv/core.stamp ## pairs of its own, a start by likelihood, DPO, a before/after table: in minutes
	$(BIN)/dpo-ray demo

test: lint ## lint and all tests but those marked slow, shared, bench or trackers
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit $(QUICK) -n auto --maxprocesses 8 --dist loadfile
	$(BIN)/python -m pytest tests/integration $(QUICK)

test-all: lint ## lint and all tests; those whose model or data is missing skip and say so
	$(BIN)/python -m pytest

faults: .venv/dev.stamp ## the fault suite: processes, nodes and storage fail under real runs; about an hour
	$(BIN)/python -m pytest -m faults

soak: .venv/dev.stamp ## twenty random faults on one long run: goodput, times to recovery, nothing lost or repeated
	$(BIN)/python -m tests.faults.soak

lint: .venv/dev.stamp ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: .venv/dev.stamp ## known vulnerabilities of what constraints.txt pins; asks a database on the network
	$(PIP) -q pip-audit
	$(BIN)/pip-audit -s osv -r constraints.txt --no-deps --disable-pip

format: .venv/dev.stamp ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv, build outputs and caches
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/core.stamp: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "dpo_ray needs Python 3.11 or later: none found on PATH" >&2; exit 2; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv .venv || \
		{ rm -rf .venv; echo "$(PYTHON) cannot make virtual environments: install its venv module" >&2; exit 2; }
	$(PIP) torch
	$(PIP) -e .
	@touch $@

.venv/dev.stamp: .venv/core.stamp
	$(PIP) -e '.[data,dev]'
	@touch $@
