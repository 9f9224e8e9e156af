# Everything a developer needs, from nothing but python3 (3.11 or newer), pip and make.
# The venv is made once; it is brought up to date when setup.py or constraints.txt change.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
HF     := $(VENV)/hf/.installed
CONVERT := $(VENV)/convert/.installed
DEMO   := examples/demo/family.yaml
SCHEMA := schema/family.schema.json

.DEFAULT_GOAL := help
.PHONY: help venv system demo test lint format schema clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv and install everything, pinned

# torch first: it brings the setuptools that then builds megagrow, so that nothing is fetched twice.
$(STAMP): setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON): install Python 3.11 or newer, or say make PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old: say make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) cannot make a venv (no ensurepip): on Debian and Ubuntu, apt-get install python3-venv" >&2; exit 2; }
	@echo "make: installing into $(VENV); the first time takes a few minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@

# transformers is for a few tests, in a directory of its own: Megatron-Core would import it, and start half as fast.
# Its older series, which many clusters have, is in another, with the packages that it wants older than the newest.
HF4 := transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
$(HF): $(STAMP)
	$(BIN)/python -m pip install --quiet --target $(VENV)/hf --upgrade --no-deps --constraint constraints.txt transformers safetensors regex
	$(BIN)/python -m pip install --quiet --target $(VENV)/hf4 --upgrade --no-deps $(HF4)
	$(BIN)/python -m pip install --quiet --target $(VENV)/hf4 --upgrade --no-deps --constraint constraints.txt safetensors regex requests urllib3
	@touch $@

# A venv of nothing but what a converting node needs, with megagrow as its user installs it.
$(CONVERT): $(STAMP) requirements-convert.txt
	$(PYTHON) -m venv $(VENV)/convert
	$(VENV)/convert/bin/python -m pip install --quiet --requirement requirements-convert.txt
	$(VENV)/convert/bin/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

system:  ## install what tests need from apt: munge, shellcheck, slurm-wlm (a step of make test)
	@tools/ci/apt.sh

demo: $(STAMP)  ## grow a real tiny family on this machine (under 10 minutes on 2 cores)
	@save=$$(sed -n 's/^save: *//p' $(DEMO)); \
	if [ -d "$$save" ]; then echo "demo: going on where $$save stopped (to start afresh: rm -r $$save)"; \
	else echo "demo: a fresh family in $$save (stop it whenever you like: make demo goes on)"; fi
	$(BIN)/megagrow run $(DEMO)

# A rank of a test is a process of its own: with more threads than cores, ranks only wait for each other.
test: export OMP_NUM_THREADS ?= 1
test: $(HF) $(CONVERT)  ## every suite, with a summary: lint, house, unit, distributed (real ranks), huggingface, slurm
	@BIN=$(BIN) tools/ci/suites.sh

lint: $(STAMP)  ## ruff and mypy, changing nothing; all of them, whatever fails
	@status=0; for check in "ruff check ." "ruff format --check ." mypy; do \
		echo "$(BIN)/$$check"; $(BIN)/$$check || status=1; done; exit $$status

format: $(STAMP)  ## let ruff fix what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

schema: $(STAMP)  ## write the JSON schema of family.yaml, for editors
	$(BIN)/python -m megagrow.config.schema $(SCHEMA)

clean:  ## remove caches and build outputs; .venv and runs stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -path ./.git -prune -o -type d -name __pycache__ -exec rm -rf {} +
