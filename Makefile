# Everything runs in .venv, which the first target that needs it creates.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo test test-slow check bench benchmarks lowest lock clean

$(VENV)/.ready: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "dichroic needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	@touch $@

demo: $(VENV)/.ready   ## fit and separate two problems; a table, and reports in demo-out/
	$(BIN)/dichroic demo

test: $(VENV)/.ready   ## the tests, but for the slowest
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(VENV)/.ready   ## the slowest tests alone, before a release
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m slow

check: $(VENV)/.ready  ## format, lint, types, import order, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) test

bench: $(VENV)/.ready  ## all methods on the paper's first problem: bench-out/table.html
	$(BIN)/dichroic bench contrastive-2 --quick

benchmarks: $(VENV)/.ready  ## samplers against the analytic posterior; our M-step against the standard's
	$(BIN)/python benchmarks/estep.py
	$(BIN)/python benchmarks/mixture_em.py

LOWEST_TESTS ?= tests/operators/test_operators.py tests/io/test_problem_file.py tests/io/test_model_files.py
lowest:                ## what touches dependencies most, with the oldest that pyproject.toml admits
	$(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet uv
	$(VENV)-lowest/bin/uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct --editable . --group test
	DICHROIC_TYPECHECK=0 $(VENV)-lowest/bin/python -m pytest -n $(WORKERS) --dist loadfile -W default -m "not slow" $(LOWEST_TESTS)

lock:                  ## pin every dependency for a reproducible set-up
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 pyproject.toml --group dev --no-header --no-annotate --output-file requirements.lock

clean:
	rm -rf $(VENV) $(VENV)-lowest .programs demo-out bench-out
