# `make` or `make help` lists what there is.
PYTHON ?= .venv/bin/python
SCRIPT ?= air_multimnist
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup test lint train figures bench results showcase table clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup:  ## Make a fresh .venv with all that running and testing need
	rm -rf .venv
	python3 -m venv .venv
	.venv/bin/pip install -r requirements-test.txt

test:  ## Run the test suite
	$(PYTHON) -m pytest

lint:  ## Check the style
	$(PYTHON) -m ruff check .

train:  ## Train one script: make train ARGS="--preset quick"
	$(PYTHON) $(SCRIPT).py $(ARGS)

figures:  ## Draw the figures of one script again: make figures SCRIPT=... ARGS="--run DIR"
	$(PYTHON) $(SCRIPT).py figures $(ARGS)

bench:  ## Time the scripts beside the same models in PyTorch
	$(PYTHON) -m bench.speed $(ARGS)

results:  ## Run what the tables rest on that has no record yet (hours, if none has)
	$(PYTHON) -m bench.results $(SCRIPT)

showcase:  ## Draw and collect the committed figures, GIF and weights from those runs
	$(PYTHON) -m bench.results $(SCRIPT) --showcase

table:  ## Write the result tables from the committed metrics
	$(PYTHON) -m viz.table README.md results/*/README.md

clean:  ## Delete caches (runs/ stays)
	rm -rf .pytest_cache .ruff_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
