# On a fresh machine with Python 3.11 or newer: `make repro` rebuilds the study, `make test` tests.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
READY := .venv/ready

.PHONY: repro quick smoke test test-all lint params ablation bench clean
.DELETE_ON_ERROR:

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("error: Python %d.%d found; 3.11 or newer is needed (make PYTHON=python3.12 ...)" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $(READY)

## repro: rebuild data, runs, results and report/index.html
repro: $(READY)
	dvc repro

## quick: a first look in a minute: a report over every task, learning nothing, in .gram/quick
quick: $(READY)
	python -m pipelines.quick

## smoke: the same pipeline through DVC, on the smoke profile (rewrites params.yaml; `make params` restores it)
smoke: $(READY)
	python -m pipelines.profiles smoke
	dvc repro

## params: write the default profile to params.yaml
params: $(READY)
	python -m pipelines.profiles cpu

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy
	lint-imports

## test: lint, types, import contracts and the fast tests, with coverage of the core
test: $(READY) lint
	pytest -n 2 --dist loadgroup --no-loadscope-reorder -m "not slow and not gpu" --cov --cov-report=term:skip-covered --cov-fail-under=95

## test-all: every test but those that want a GPU (pytest -m gpu)
test-all: $(READY) lint
	pytest -m "not gpu" --cov --cov-fail-under=95

## ablation: the tables of docs/log.md (rows already in docs/results/ablation_*.csv are kept)
ablation: $(READY)
	OMP_NUM_THREADS=1 python -m benchmarks.ablation settings
	OMP_NUM_THREADS=1 python -m benchmarks.ablation profile
	OMP_NUM_THREADS=1 python -m benchmarks.ablation optimizer

## bench: training and sampling as shares of the GEMM limit, growth of cost, data builders, what ARC
## would cost; halting, and two workers against one (these two want models/nqueens8_gram: make repro)
bench: $(READY)
	python -m benchmarks.speed
	python -m benchmarks.scaling
	python -m benchmarks.data
	python -m benchmarks.arc_cost
	python -m benchmarks.halting
	python -m benchmarks.workers

clean:
	rm -rf .venv
