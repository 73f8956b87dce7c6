# Everything a person or CI does here is a target; `make` alone lists them. Each target does its own set-up.

.DEFAULT_GOAL := help

# Interpreter to make the environments with; empty: the first of python3, python3.13, python3.12, python3.11 that fits.
PYTHON ?=
# How many test processes run side by side.
TEST_WORKERS ?= 2
# More for pytest: make test PYTEST_ARGS='tests/store -k fork'
PYTEST_ARGS ?=
# How many cases `make fuzz` tries.
CASES ?= 100000
# How long `make soak` loads and breaks, and how long it leaves all idle afterwards; SEED repeats the draws of an earlier run.
MINUTES ?= 5
IDLE ?= 1
SEED ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTO_VENV := .venv-proto
PROTO_STAMP := $(PROTO_VENV)/.installed
PROTO := $(PROTO_VENV)/bin/python scripts/proto.py
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

# FORCE for an environment that was moved (it knows its absolute path), is broken, or was made by another PYTHON than the
# one asked for.
stale = $(shell scripts/venv.sh --stale $(1) "$(PYTHON)")

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## make .venv with the pinned dependencies; the service, the client and the stubs are editable

.PHONY: run
run: install ## set everything up, migrate and serve; Ctrl-C stops
	@exec $(BIN)/chat-history serve --migrate

.PHONY: demo
demo: install ## the service and the example chatbot on 127.0.0.1:8000, with sample documents; Ctrl-C stops both
	@exec $(BIN)/python -m examples.chatbot.demo

.PHONY: test
test: install ## run the tests; TEST_WORKERS=2 PYTEST_ARGS='tests/store -k fork'
	$(BIN)/pytest -n $(TEST_WORKERS) -m 'not faults' $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: install ## run the long tests: faults, outages, the browser, all RPCs through PgBouncer
	$(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal -m faults $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),,$(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal --through pgbouncer tests/rpc)

.PHONY: bench
bench: install ## measure the service beside an echo and others, into docs/; QUICK=1 takes two minutes and keeps apart
	@benchmarks/needs.sh
	@$(BIN)/python -m benchmarks all $(if $(QUICK),--quick)

.PHONY: fuzz
fuzz: install ## send bytes of all kinds to a server of its own; CASES=100000
	$(BIN)/python -m tests.security.fuzz --cases $(CASES)

.PHONY: soak
soak: install ## load replicas of its own, break things at random, judge what is stored; MINUTES=5 IDLE=1 SEED=
	@$(BIN)/python -m tests.soak --minutes $(MINUTES) --idle $(IDLE) --seed '$(SEED)'

.PHONY: lint
lint: install $(PROTO_STAMP) ## check style, types, imports between modules, protos and generated code
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(PROTO) check

# The Markdown that the formatter owns: not the texts in tests/, which tests search as they are.
MARKDOWN := $(wildcard *.md */README.md docs examples .github)

.PHONY: prose
prose: install ## check wording, spelling, lines over 100 columns and the layout of Markdown
	$(BIN)/python scripts/prose.py
	$(BIN)/codespell
	$(BIN)/ruff check --select E501
	$(BIN)/mdformat --check $(MARKDOWN)

.PHONY: format
format: install $(PROTO_STAMP) ## put code and protos into the one format, and mend what ruff can
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format
	$(BIN)/mdformat $(MARKDOWN)
	$(PROTO_VENV)/bin/buf format --write protos
	$(BIN)/python -m scripts.docs

.PHONY: proto
proto: $(PROTO_STAMP) ## make generated/ from protos/
	$(PROTO) generate

.PHONY: version
version: install ## copy the version in service/__init__.py to the client and the stubs
	$(BIN)/python scripts/version.py

.PHONY: proto-release
proto-release: $(PROTO_STAMP) ## take the protos of now as the release that later changes must not break
	$(PROTO) release

.PHONY: docs
docs: $(DOCS_STAMP) ## build the documentation site into site/; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet --strict

.PHONY: docs-serve
docs-serve: $(DOCS_STAMP) ## serve the documentation on 127.0.0.1:8001 and rebuild pages as they change; Ctrl-C stops
	@NO_MKDOCS_2_WARNING=1 exec $(DOCS_VENV)/bin/mkdocs serve --strict --dev-addr 127.0.0.1:8001

.PHONY: lock
lock: install ## pin the dependencies anew: what still fits stays, or all of them with UPGRADE=1
	$(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

.PHONY: clean
clean: ## remove the environments and caches; never .data, where the embedded database is
	rm -rf $(VENV) $(PROTO_VENV) $(DOCS_VENV) site .hypothesis .mypy_cache .pytest_cache .ruff_cache dist generated/dist client/dist
	find $(wildcard service tests scripts alembic generated client examples) -name __pycache__ -prune -exec rm -rf {} +

$(STAMP): requirements/dev.lock pyproject.toml generated/pyproject.toml client/pyproject.toml scripts/venv.sh $(call stale,$(VENV))
	@scripts/venv.sh $(VENV) requirements/dev.lock "$(PYTHON)"
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation --editable generated --editable client --editable .
	@# Fails when pyproject.toml asks for what the lock does not have.
	@broken=$$($(BIN)/python -m pip check) || { echo "$$broken"; echo "run: make lock"; exit 1; }
	@scripts/venv.sh --done $(VENV) "$(PYTHON)"

$(PROTO_STAMP): requirements/proto.lock scripts/venv.sh $(call stale,$(PROTO_VENV))
	@scripts/venv.sh $(PROTO_VENV) requirements/proto.lock "$(PYTHON)"
	@scripts/venv.sh --done $(PROTO_VENV) "$(PYTHON)"

$(DOCS_STAMP): requirements/docs.lock scripts/venv.sh $(call stale,$(DOCS_VENV))
	@scripts/venv.sh $(DOCS_VENV) requirements/docs.lock "$(PYTHON)"
	@scripts/venv.sh --done $(DOCS_VENV) "$(PYTHON)"

.PHONY: FORCE
FORCE:
