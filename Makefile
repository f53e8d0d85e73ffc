# On a bare machine with Python 3.11, each alone creates .venv, installs what it needs and runs:
#   make demo         the quickstart, then a tiny gpt-oss
#   make test         the tests; those marked gpu are skipped where there is no such GPU
#   make test-wide    the whole matrices too
#   make test-producers   what is read of files, held against the packages of their producers
#   make attack N=1000    near misses of linears, and a tenth as many of mixtures, by seeds from SEED=0 on
#   make spoil N=2000     checkpoints that are spoiled, by seeds from SEED=0 on: loaded and inspected
#   make lint         ruff and mypy
# Versions are pinned in constraints.txt. TORCH chooses another torch, and with it triton:
#   make test TORCH=torch==2.11.0
#   make test TORCH="torch==2.11.0 triton==3.6.0"    where that torch is a CPU build, which does not bring triton along
TORCH ?= torch==2.13.0

PYTHON := $(shell command -v python3.11 || command -v python3)
PIP := .venv/bin/python -m pip install -qq --disable-pip-version-check -c .venv/constraints.txt
PYTEST := .venv/bin/pytest -q -n auto --maxprocesses 4 --durations 10

N ?= 1000
SEED ?= 0

.PHONY: test test-wide test-producers attack spoil demo lint
test: .venv/installed
	$(PYTEST)

test-wide: .venv/installed
	$(PYTEST) --wide

test-producers: .venv/installed
	@$(PIP) -e '.[producers]'
	.venv/bin/pytest -q tests/producers/test_files.py tests/hf/test_diffusers.py

attack: .venv/installed
	PYTHONPATH=tests .venv/bin/python -m attacks --count $(N) --seed $(SEED)

spoil: .venv/installed
	PYTHONPATH=tests .venv/bin/python -m spoiled --count $(N) --seed $(SEED)

demo: .venv/installed
	.venv/bin/python examples/quickstart.py
	.venv/bin/python examples/gpt_oss.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/installed: .venv/torch pyproject.toml
	@echo "Installing the project ..."
	@$(PIP) $(TORCH:%='%') -e '.[dev,hf,debug]'
	@touch $@

ifneq ($(strip $(TORCH)),$(shell cat .venv/torch 2>/dev/null))
.PHONY: .venv/torch
endif
.venv/torch: constraints.txt
	@echo "Installing $(TORCH) into a fresh .venv ..."
	@$(PYTHON) -m venv --clear .venv
	@grep -vE '^(torch|triton)==' constraints.txt > .venv/constraints.txt
	@$(PIP) $(TORCH:%='%')
	@.venv/bin/python -c 'import triton' 2>/dev/null || grep '^triton==' constraints.txt >> .venv/constraints.txt
	@echo '$(strip $(TORCH))' > $@
