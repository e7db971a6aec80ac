# make demo and make test need nothing but Python >= 3.11 and make: they build their own environment in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

# The benchmarks need CIFAR-10 and published weights: EFRAPQ_SHARED names their folder.
.PHONY: demo test test-slow bench-solver bench-results bench-quick bench-export bench-guard lint types install clean

demo: $(READY)
	$(BIN)/efrapq demo

test: $(READY)
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile

test-slow: $(READY)
	$(BIN)/pytest -m slow

bench-solver: $(READY)
	$(BIN)/python benchmarks/solver.py $(ARGS)

bench-results: $(READY)
	$(BIN)/python benchmarks/results.py $(ARGS)

bench-quick: $(READY)
	$(BIN)/python benchmarks/results.py --quick $(ARGS)

bench-export: $(READY)
	$(BIN)/python benchmarks/export.py $(ARGS)

bench-guard: $(READY)
	$(BIN)/python benchmarks/guard.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The installed package is checked, not the folders: they are mapped into it at build time.
types: $(READY)
	rm -rf build
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target build/types .
	cd build/types && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p efrapq

install: $(READY)

# torch first and alone: its version is pinned before anything else asks for a newer one.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("efrapq needs Python 3.11 or newer, this is " + sys.version) if sys.version_info < (3, 11) else 0'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
