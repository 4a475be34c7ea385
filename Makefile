# Strongroom's tasks, one line each. `make` lists them. Everything is installed into .venv, from hash-locked files.
PYTHON ?= python3
ARGS ?=
# Test processes: two a core, since half of a test is waiting; 0 runs in this process (for a debugger).
WORKERS ?= $(shell echo $$(($$(getconf _NPROCESSORS_ONLN) * 2)))

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
# Bytecode is kept, whatever the shell says: each of the many processes of a test run would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

pip := .venv/bin/python -m pip --disable-pip-version-check -qq
typed := src $(foreach folder,benchmarks examples tests,$(if $(shell find $(folder) -name '*.py' -print -quit 2>/dev/null),$(folder)))

# A .venv whose interpreter is gone, or that was moved with its folder, is made again instead of failing oddly.
ifneq ($(wildcard .venv/.made),)
ifneq ($(shell cat .venv/.made; .venv/bin/python -c '' 2>/dev/null || echo broken),$(CURDIR))
$(shell rm -f .venv/.made .venv/.serve .venv/.dev .venv/.bench)
endif
endif

.PHONY: help serve test soak lint format bench docs lock clean

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

serve: .venv/.serve ## run the server on SQLite under ./data, at http://127.0.0.1:8080
	@exec .venv/bin/strongroom serve $(ARGS)

test: .venv/.dev ## run all the tests but the soak tests; ARGS="-k keys" passes on to pytest
	@.venv/bin/python -m pytest -n $(WORKERS) --dist loadgroup $(ARGS)

soak: .venv/.dev ## run the tests that take minutes, then all that make up their examples with many more of them
	@.venv/bin/python -m pytest -m soak -n 0 --timeout 3600 $(ARGS)
	@.venv/bin/python -m pytest -m "hypothesis and not soak" --hypothesis-profile thorough -n $(WORKERS) --dist loadgroup --timeout 3600 $(ARGS)

lint: .venv/.dev ## ruff, mypy --strict and the direction of imports
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy --strict $(typed)
	@.venv/bin/lint-imports --no-logo

format: .venv/.dev ## format the code and repair what ruff can
	@.venv/bin/ruff check --fix-only .
	@.venv/bin/ruff format .

bench: .venv/.bench ## benchmarks beside peers
	@.venv/bin/python -m benchmarks $(ARGS)

docs: .venv/.dev ## write the generated reference pages again
	@.venv/bin/python -m strongroom.cli.docs $(ARGS)

# uv lives in a throw-away environment. The largest lock is resolved first and the smaller ones prefer its versions, so
# that each is a subset of the next. ARGS=--upgrade takes the newest versions. No address may stand in a lock.
lock: ## resolve the dependencies again, with hashes
	@tools=$$(mktemp -d); trap 'rm -rf "$$tools"' EXIT; \
	$(PYTHON) -m venv "$$tools"; "$$tools/bin/python" -m pip --quiet install uv; \
	compile() { "$$tools/bin/uv" pip compile pyproject.toml --universal --python-version 3.11 --generate-hashes \
	  --no-header --no-emit-index-url --no-emit-find-links --quiet --extra all --group build "$$@"; }; \
	compile --group dev --group bench -o requirements/bench.txt $(ARGS); \
	cp requirements/bench.txt requirements/dev.txt; compile --group dev -o requirements/dev.txt; \
	cp requirements/dev.txt requirements/serve.txt; compile -o requirements/serve.txt; \
	for pair in serve:dev dev:bench; do \
	  if grep '^[a-z0-9]' "requirements/$${pair%:*}.txt" | grep -vxFf "requirements/$${pair#*:}.txt"; then \
	    echo "requirements/$${pair%:*}.txt is not a subset of requirements/$${pair#*:}.txt" >&2; exit 1; fi; done; \
	if grep -nE '://|^-' requirements/*.txt; then echo "a lock names an address or an option" >&2; exit 1; fi

clean: ## remove .venv and every cache; ./data is never touched
	rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .schemathesis
	find . -name __pycache__ -type d -not -path './data/*' -prune -exec rm -rf {} +

# One .venv, three levels; each lock is a superset of the one before. A changed lock is installed again.
.venv/.made:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "strongroom: there is no $(PYTHON) here. Install Python 3.11 or later, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "strongroom: $$($(PYTHON) -V) is too old: Python 3.11 or later is needed. Name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "strongroom: this Python cannot make virtual environments. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv
	@echo "$(CURDIR)" >$@

.venv/.serve: requirements/serve.txt pyproject.toml | .venv/.made
	@echo "strongroom: installing requirements/serve.txt into .venv" >&2
	@$(pip) install --require-hashes -r requirements/serve.txt
	@$(pip) install --no-deps --no-build-isolation --editable .
	@touch $@

.venv/.dev: requirements/dev.txt .venv/.serve
	@echo "strongroom: installing requirements/dev.txt into .venv" >&2
	@$(pip) install --require-hashes -r requirements/dev.txt
	@touch $@

.venv/.bench: requirements/bench.txt .venv/.dev
	@echo "strongroom: installing requirements/bench.txt into .venv" >&2
	@$(pip) install --require-hashes -r requirements/bench.txt
	@touch $@
