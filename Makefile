# `make demo` shows what gradwatch does, `make test` checks everything, `make check` what needs no server, browser or
# database: run it after each change. All of them install into .venv themselves.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check


.PHONY: demo test test-gpu test-torch test-lowest check constraints dist docs pictures lint types page system clean \
  zoo zoo-sparse zoo-default zoo-report \
  bench-agent bench-agc bench-idle bench-store bench-alerts bench-metrics bench-page bench-paper

demo: .venv/demo-installed
	@$(BIN)/gradwatch demo $(if $(KEEP),--keep)

# What fails is run up to twice more; a test that passes then is named as RERUN at the end: it waits for the wrong thing.
test: .venv/test-installed node_modules/.installed system lint types page
	$(BIN)/python -m pytest -n 2 --reruns 2 $(TESTS)

# What needs a GPU, and that `make test` leaves out: on a machine with one, and a torch that can use it.
test-gpu: .venv/test-installed
	$(BIN)/python -m pytest -q tests/gpu.py

# The agent's tests with another PyTorch: make test-torch TORCH=2.6.0, or TORCH=newest. Some GB, removed afterwards.
test-torch:
	@PYTHON=$(PYTHON) .ci/test-torch "$(TORCH)" $(TESTS)

# Server, diagnosis and agent with the lowest versions that pyproject.toml allows, PyTorch left out.
test-lowest:
	@PYTHON=$(PYTHON) .ci/test-lowest $(TESTS)

# Three at a time, because some tests only wait; the plugin that is left out takes a second to load.
check: .venv/test-installed node_modules/.installed lint types page
	$(BIN)/python -m pytest -q --unit -n 3 -r fE -p no:schemathesis $(TESTS)

lint: .venv/test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/test-installed
	$(BIN)/mypy agent server tests benchmarks dashboards examples

page: node_modules/.installed
	npx --no-install tsc --noEmit

# Programs that no package registry of a language carries: installed where this is possible, explained where it is not.
system:
	@.ci/system

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "gradwatch needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
	  echo "python3 cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }

.venv/demo-installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (once, some minutes) ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[demo]'
	@touch $@

.venv/test-installed: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing into .venv (once, some minutes) ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[test]'
	@touch .venv/demo-installed $@

# Every package at its newest version, into constraints.txt: then `make test`, and commit what passes.
constraints: .venv/test-installed
	@grep -E '^(#|torch==)' constraints.txt > .venv/pinned
	@$(PIP) install --quiet --constraint .venv/pinned --upgrade --upgrade-strategy eager --editable '.[test]'
	@{ grep '^#' .venv/pinned; $(PIP) freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.txt

node_modules/.installed: package.json package-lock.json
	@npm ci --silent --no-audit --no-fund
	@touch $@

# The labelled trainings of benchmarks/zoo through the real agent and a real server, with the table; about 15 minutes.
# `zoo` runs the half to develop on, at every step; `zoo-sparse` at every tenth step, `zoo-default` as the agent chooses on
# steps of 5 and 50 ms, and of 0.3 s for 30 of them, a dozen at a time because they mostly wait. `zoo-report` runs the other
# half, which rules are never tuned on: docs/diagnosis.md says when it may be looked at.
zoo: .venv/test-installed
	$(BIN)/python -m benchmarks.zoo $(ZOO)

zoo-sparse: .venv/test-installed
	$(BIN)/python -m benchmarks.zoo --every 10 --skip-twins $(ZOO)

zoo-default: .venv/test-installed
	@failed=0; for steps in "0.005" "0.05" "0.3 --thirty"; do echo "Steps of $$steps:"; \
	  $(BIN)/python -m benchmarks.zoo --every default --step-seconds $$steps --workers 12 --skip-twins --seeds 1 $(ZOO) \
	    || failed=1; \
	done; exit $$failed

zoo-report: .venv/test-installed
	$(BIN)/python -m benchmarks.zoo --report $(ZOO)
	$(BIN)/python -m benchmarks.zoo --report --every 10 --skip-twins $(ZOO)
	$(BIN)/python -m benchmarks.zoo --report --every default --workers 8 --skip-twins $(ZOO)

# The pictures of docs/, of what the demonstration leaves behind.
pictures: .venv/test-installed
	$(BIN)/python -m tests.page.pictures

# Ours and the peers' side by side in one run, as ratios; on a quiet machine.
bench-agent bench-agc bench-idle bench-store bench-alerts bench-metrics bench-page: bench-%: .venv/test-installed
	$(BIN)/python -m benchmarks.$* $(ARGS)

# The site of docs/, in build/site.
docs: .venv/test-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# sdist and wheel in dist/, looked at as a package index would.
dist: .venv/test-installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl

# What the paper claims of adaptive clipping, again and small; about 15 minutes of one core's time.
bench-paper: .venv/test-installed
	$(BIN)/python -m benchmarks.paper $(PAPER)

clean:
	rm -rf .venv node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis gradwatch-demo
