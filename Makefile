# Two commands from a clean clone: `make demo` and `make test`. Each makes its own virtual environment first.

PYTHON ?= python3
VENV ?= .venv
# Installed by itself and first: a range would let pip take a newer build with gigabytes of CUDA libraries. On a GPU machine
# choose yours, for example `make demo TORCH="torch --index-url <the index of your CUDA version>"`.
TORCH ?= torch==2.13.0
# What is to be installed beside the package, such as an older version of something that it needs.
WITH ?=

.PHONY: demo test test-oldest test-gpu gpu clean

demo: $(VENV)/ready
	$(VENV)/bin/rlaif-lite run recipes/tiny.yaml

test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal

# The oldest transformers that is supported (the newest that unsloth allows), in an environment of its own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest WITH="transformers==5.17.*"

test-gpu: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m gpu

# Ten minutes on a machine with a CUDA GPU and the Python packages; without either it says so, and rehearses on the CPU.
gpu:
	@if [ -x $(VENV)/bin/python ]; then $(VENV)/bin/python -m lab.bench.gpu; else $(PYTHON) -m lab.bench.gpu; fi

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" $(if $(WITH),"$(WITH)")
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest runs build dist *.egg-info
