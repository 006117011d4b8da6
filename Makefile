# Every target sets up what it needs in .venv on a fresh machine. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
USED := $(VENV)/.usable
export HF_HUB_OFFLINE ?= 1
export GRADIO_ANALYTICS_ENABLED ?= False

# Tests run in as many processes as there are cores, a file at a time; PARALLEL= runs them in one.
PARALLEL ?= -n auto --dist loadfile

.PHONY: demo test test-fast test-all lint docs bench clean

$(USED): pyproject.toml
	$(PYTHON) -c "import sys; sys.exit('mmkit needs Python 3.11 or newer' if sys.version_info < (3, 11) else 0)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[apps]"
	touch $(USED)

$(STAMP): $(USED)
	$(BIN)/python -m pip install --disable-pip-version-check -q -e ".[apps,dev]"
	touch $(STAMP)

demo: $(USED)  ## the studio on 127.0.0.1:7860; HEADLESS=1 runs the main job without a browser
	$(BIN)/mmkit demo $(if $(HEADLESS),--headless)

test: $(STAMP)  ## everything
	$(BIN)/python -m pytest -q $(PARALLEL)

test-all: $(STAMP)  ## everything, and README followed in a fresh clone and a fresh environment (minutes, 8 GB)
	$(BIN)/python -m pytest -q $(PARALLEL)
	$(BIN)/python -m pytest -q -m release

test-fast: $(STAMP)  ## without training runs, processes and browsers
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not browser and not release"

TYPES := build/typecheck
lint: $(STAMP)  ## ruff, and mypy on an installed copy (it cannot follow an editable install into the domain folders)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --no-build-isolation --target $(TYPES) .
	cd $(TYPES) && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --python-executable ../../$(BIN)/python -p mmkit

docs: $(STAMP)  ## the documentation, in build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)  ## the adapter benchmark (the others are run by name, see benchmarks/README.md), and the figures of README and docs
	$(BIN)/python benchmarks/adapters.py
	$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) build dist *.egg-info
