# Everything here needs Python 3.11 or newer and pip. The first target that you run makes .venv.
#
#   make demo                      the trained sampler, on several processes
#   make test                      the tests that a change must pass (a few minutes on two cores)
#   make PYTHON=python3.12 test    with another Python
#   make PY=python3 gpu            in an environment of your own, with torch and an editable fastpar in it
#   make gpu GPU="--only kernels"  one part of the GPU suite; --help lists its options

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := $(CURDIR)/.venv

ifeq ($(origin PY),command line)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.installed
endif

# Workers of pytest-xdist share the cores; with torch's own threads on top, two of them run slower than one.
TEST_ENV := OMP_NUM_THREADS=1
PYTEST := $(TEST_ENV) $(PY) -m pytest -q -n 2

.PHONY: demo test test-all zoo mutants lint types bench gpu clean

demo: $(READY)
	$(PY) -m fastpar.demo

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m "not gpu"

zoo: $(READY)
	$(PY) -m tests.zoo_report

mutants: $(READY)
	$(PY) -m tests.mutants

lint: $(READY)
	$(PY) -m ruff check .

# In the checkout ./passes is fastpar.passes only through the editable install, which mypy does not follow.
# So it sees the package put together from links, as a wheel would have it.
types: $(READY)
	@rm -rf build/types && mkdir -p build/types/fastpar
	@cd build/types/fastpar && ln -s ../../../fastpar/* ../../../passes ../../../backends .
	cd build/types && $(PY) -m mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache

bench: $(READY)
	$(PY) -m benchmarks

gpu: $(READY)
	$(PY) -m benchmarks gpu $(GPU)

# The environment stays; `rm -r .venv` makes the next target build it anew.
clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find fastpar passes backends tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# torch first and alone: resolved together with the rest, pip may take another version than the one we test.
IN_RANGE := import sys, torch; v = tuple(map(int, torch.__version__.split(".")[:2])); sys.exit(not (2, 11) <= v < (2, 16))
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --no-input

$(VENV)/.installed: pyproject.toml setup.py
	@command -v $(PYTHON) >/dev/null || { \
	  echo "error: there is no '$(PYTHON)'. Name a Python 3.11 or newer: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: fastpar needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "       Name another one: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: '$(PYTHON) -m venv' failed (on Debian and Ubuntu it needs the package python3-venv)." >&2; exit 1; }
	@$(VENV)/bin/python -c '$(IN_RANGE)' 2>/dev/null || { echo "installing $(TORCH) into .venv"; $(PIP) install -q $(TORCH); } || { \
	  echo "error: could not install $(TORCH) (the lines above say why). Without a network, or for another build," >&2; \
	  echo "       install a torch from 2.11 to 2.15 into .venv yourself, or set TORCH, and run make again." >&2; exit 1; }
	@echo "installing fastpar and its tools into .venv"
	@$(PIP) install -q -e '.[dev]' || { \
	  echo "error: could not install fastpar's dependencies (the lines above say why)." >&2; exit 1; }
	@touch $@
