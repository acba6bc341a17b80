# Everything a newcomer needs: `make quickstart` and `make test`. Both set up .venv by themselves and are safe to repeat.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help quickstart quickstart-fast evidence test lint notebook clean
.DEFAULT_GOAL := help

help:  ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Neon needs Python 3.10 or newer; name one: make PYTHON=python3.11 ...") if sys.version_info < (3, 10) else None'
	@echo "Setting up $(VENV) (a few minutes the first time: PyTorch is large) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

quickstart: $(READY)  ## Neon on real images, three seeds, under 5 minutes on 2 cores, no GPU
	$(BIN)/python edm/quickstart.py --out runs/quickstart

quickstart-fast: $(READY)  ## the same with one seed, a shorter training and a smaller set, under a minute
	$(BIN)/python edm/quickstart.py --fast --out runs/quickstart-fast

evidence: $(READY)  ## Neon on real images in every family, three training seeds each: hours on 2 cores; goes on where it stopped
	for row in xar/fashion edm/fashion imm/fashion var/fashion var/fashion_retuned; do \
	  $(BIN)/neon reproduce $$row --repeat 3 --out runs/evidence/$$row || exit; done
	$(BIN)/python benchmarks/evidence.py

test: $(READY)  ## all tests
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

notebook: $(READY)  ## execute toy_appendix.ipynb, fast setting, under half a minute
	$(BIN)/python tests/toy/run_notebook.py

lint: $(READY)  ## style, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:  ## remove the environment and what the quickstart wrote
	rm -rf $(VENV) runs/quickstart runs/quickstart-fast
