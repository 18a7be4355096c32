# Every target sets up .venv by itself; a second call finds it ready.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= python3
# Pinned: a range lets the installer pick a build that drags in gigabytes of CUDA packages.
TORCH := torch==2.13.0
READY := $(VENV)/.ready
# The Triton that `make test-triton` tests the kernels with: by default the oldest supported.
TRITON ?= 3.6.0
# A process per core takes file after file of tests, in their order: xdist's own puts files of few
# tests last, and those that take minutes are among them.
SHARED := -n auto --dist loadfile --no-loadscope-reorder
TRITON_VENV := .venv-triton-$(TRITON)

.PHONY: demo test test-triton lint types clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml octomoe/version.py
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"octomoe needs Python 3.11 or newer, {sys.executable} is {v.major}.{v.minor}; run: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo 'python3 lacks the venv module; run: apt-get install python3-venv' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH) -e '.[dev]'
	@touch $@

demo: $(READY)
	@$(BIN)/octomoe demo

test: $(READY)
	$(BIN)/python -m pytest $(SHARED) $(PYTEST_ARGS)

# Triton comes last and by itself: a build of torch may name another one, which pip only warns of.
$(TRITON_VENV)/.ready: pyproject.toml octomoe/version.py
	test -x $(TRITON_VENV)/bin/python || $(PYTHON) -m venv $(TRITON_VENV)
	$(TRITON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(TRITON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	$(TRITON_VENV)/bin/python -m pip install --quiet --disable-pip-version-check triton==$(TRITON)
	@touch $@

# The kernels under another Triton, in an environment of its own: make test-triton TRITON=3.6.0
test-triton: $(TRITON_VENV)/.ready
	$(TRITON_VENV)/bin/python -m pytest $(SHARED) tests/kernels $(PYTEST_ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .venv-triton-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis octomoe-report.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
