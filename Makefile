# Two commands set everything up by themselves, in .venv with the versions of constraints.txt:
#   make demo   restore a photograph with the shipped prior
#   make test   run the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= restored/demo
PYTEST_FLAGS ?=

.PHONY: demo test lint types wheel clean
.DELETE_ON_ERROR:

$(VENV)/.base: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: $(VENV)/.base
	$(BIN)/fewstep restore examples/cat.png --simulate --operator deblur-gaussian --sigma 0.02 --samples 4 --out $(OUT)
	@echo "report: $(abspath $(OUT))/report.html"

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check src tests docs
	$(BIN)/ruff format --check src tests docs

types: $(VENV)/.dev
	$(BIN)/mypy

wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist

clean:
	rm -rf $(VENV) build dist restored .mypy_cache .ruff_cache .pytest_cache
