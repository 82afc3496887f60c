# Every target does its own set-up, once, in .venv; a change of the dependencies does it again.
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --constraint requirements/tested.txt
DEPENDENCIES := pyproject.toml requirements/tested.txt

# A worker takes one to two GB, so a big machine does not get one a core.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 8 ? n : 8)))
PROMPT ?= It was a fine morning, and

.PHONY: help setup setup-test demo test test-gpu lint format notebooks clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: .venv/.setup  ## .venv with what running needs

setup-test: .venv/.setup-test  ## .venv with what tests, lint and notebooks need too

demo: .venv/.setup  ## write some text with the bundled model, offline: make demo PROMPT="..."
	HF_HUB_OFFLINE=1 .venv/bin/jaxinfer generate --model demo "$(PROMPT)"

test: .venv/.setup-test  ## all tests but those on a GPU, in parallel: make test JOBS=2 ARGS="-k mesh"
	$(PY) -m pytest -m "not gpu" -n $(JOBS) --dist worksteal $(ARGS)

test-gpu: .venv/.setup-test  ## the tests on a GPU (first: .venv/bin/pip install -e '.[cuda13]')
	JAXINFER_TEST_PLATFORM=gpu $(PY) -m pytest -m gpu $(ARGS)

# What compiles kernels for Hopper where there is no GPU, see tests/aot.py. Without it those tests are skipped.
.cache/cuda: .venv/.setup-test
	V=$$($(PY) -c 'import jaxlib; print(jaxlib.__version__)') && \
	  $(PY) -m pip --disable-pip-version-check install --no-deps --target $@ \
	  jax-cuda13-plugin==$$V jax-cuda13-pjrt==$$V nvidia-cuda-nvcc==13.0.88

lint: .venv/.setup-test  ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/.setup-test  ## let ruff put the code into shape
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The outputs are kept, so that the notebooks can be read without being run.
notebooks: .venv/.setup-test  ## run the notebooks afresh from their sources and keep what they print
	$(PY) notebooks/execute.py

clean:  ## remove caches and builds, but not .venv
	rm -rf .cache .hypothesis build dist *.egg-info

# Python 3.12 or newer, under whichever name; a version manager's shim may be there and yet not run.
$(PY):
	@for python in $(PYTHON) python3.12 python3 python3.13 python3.14; do \
	  if $$python -c 'import sys; raise SystemExit(sys.version_info < (3, 12))' 2>/dev/null; then \
	    echo "$$python -m venv .venv"; exec $$python -m venv .venv; \
	  fi; \
	done; echo 'Python 3.12 or newer is needed: make PYTHON=/path/to/python3.12' >&2; exit 1

.venv/.setup: $(DEPENDENCIES) | $(PY)
	$(PIP) --editable .
	@touch $@

.venv/.setup-test: $(DEPENDENCIES) | $(PY)
	$(PIP) --editable '.[test]'
	@touch $@ .venv/.setup
