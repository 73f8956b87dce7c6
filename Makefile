# Every task of a developer or of CI is a target; `make` alone lists them. A target does its own
# set-up.

.DEFAULT_GOAL := help

# The interpreter for the environments. Empty: the first of python3, python3.13, python3.12 and
# python3.11 that has a supported version.
PYTHON ?=
# Number of concurrent test processes.
TEST_WORKERS ?= 2
# The same for tests of faults, which mostly wait.
FAULT_WORKERS ?= 3
# Further arguments of pytest: make test PYTEST_ARGS='tests/store -k fork'
PYTEST_ARGS ?=
# Number of requests that `make fuzz` sends.
CASES ?= 100000
# Minutes for which `make soak` injects faults under load, and idle minutes after that. SEED repeats
# the random choices of an earlier run.
MINUTES ?= 5
IDLE ?= 1
SEED ?=
# Number of switchovers and kills of `make failover`, in each mode and by each route.
ROUNDS ?= 20
# Number of attacks of `make hostile`, and seconds of each. SOAK: run attacks and ordinary users
# together for this many seconds instead.
ATTACKS ?= 300
SECONDS ?= 3
SOAK ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PROTO_VENV := .venv-proto
PROTO_STAMP := $(PROTO_VENV)/.installed
PROTO := $(PROTO_VENV)/bin/python scripts/proto.py
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

# FORCE for an environment that was moved (it contains its absolute path), is broken, or was created
# by another interpreter than PYTHON.
stale = $(shell scripts/venv.sh --stale $(1) "$(PYTHON)")

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: install
install: $(STAMP) ## create .venv: pinned dependencies, and service, client and stubs editable

.PHONY: run
run: install ## install, migrate and serve; Ctrl-C stops
	@exec $(BIN)/chat-history serve --migrate

.PHONY: demo
demo: install ## run the service and the example chatbot, with sample documents; Ctrl-C stops both
	@exec $(BIN)/python -m examples.chatbot.demo

.PHONY: test
test: install ## run the tests; TEST_WORKERS=2 PYTEST_ARGS='tests/store -k fork'
	$(BIN)/pytest -n $(TEST_WORKERS) -m 'not faults and not examples' $(PYTEST_ARGS)

.PHONY: test-faults
test-faults: install ## run the long tests: faults, outages, hostile requests
	$(BIN)/pytest -n $(FAULT_WORKERS) --dist worksteal -m 'faults and not examples and not patroni' \
		$(PYTEST_ARGS)

.PHONY: test-examples
test-examples: install ## run the examples: of the documentation, the chatbot in a browser, Node
	$(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal -m examples $(PYTEST_ARGS)

.PHONY: test-poolers
test-poolers: install ## run the tests of all RPCs through PgBouncer
	$(BIN)/pytest -n $(TEST_WORKERS) --dist worksteal --through pgbouncer tests/rpc $(PYTEST_ARGS)

# Without other tests, which would delay Patroni, so that it fails over without a fault.
.PHONY: test-patroni
test-patroni: install ## run the tests of failover by Patroni
	$(BIN)/pytest -m patroni tests/faults/test_patroni.py $(PYTEST_ARGS)

.PHONY: bench
bench: install ## measure the service and its baselines; QUICK=1: two minutes, docs/ unchanged
	@benchmarks/install_build_tools.sh
	@$(BIN)/python -m benchmarks all $(if $(QUICK),--quick)

.PHONY: fuzz
fuzz: install ## send malformed requests to a server; CASES=100000
	$(BIN)/python -m tests.security.fuzz --cases $(CASES)

.PHONY: soak
soak: install ## inject random faults under load and check the stored data; MINUTES=5 IDLE=1 SEED=
	@$(BIN)/python -m tests.soak --minutes $(MINUTES) --idle $(IDLE) --seed '$(SEED)'

.PHONY: failover
failover: install ## measure failover by Patroni under load; ROUNDS=20 SEED=
	@$(BIN)/python -m tests.soak.failover --rounds $(ROUNDS) --seed '$(SEED)'

.PHONY: hostile
hostile: install ## attack the service as one user, measure another; ATTACKS=300 SEED=1 SOAK=
	@$(BIN)/python -m benchmarks hostile --attacks $(ATTACKS) --seconds $(SECONDS) \
		--seed $(or $(SEED),1) $(if $(SOAK),--soak $(SOAK))

.PHONY: lint
lint: install prose $(PROTO_STAMP) ## check style, wording, types, import rules, protos, stubs
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
	$(BIN)/mdformat --check $(MARKDOWN)

.PHONY: format
format: install $(PROTO_STAMP) ## format code, Markdown and protos; write the generated pages
	$(BIN)/ruff check --fix --exit-zero
	$(BIN)/ruff format
	$(BIN)/mdformat $(MARKDOWN)
	$(PROTO_VENV)/bin/buf format --write protos
	$(BIN)/python -m scripts.docs

.PHONY: proto
proto: $(PROTO_STAMP) ## generate generated/ from protos/
	$(PROTO) generate

.PHONY: version
version: install ## copy the version in service/__init__.py to the client and the stubs
	$(BIN)/python scripts/version.py

.PHONY: proto-release
proto-release: $(PROTO_STAMP) ## record the protos as a release that later changes must not break
	$(PROTO) release

.PHONY: docs
docs: $(DOCS_STAMP) ## build the documentation site into site/; a broken link or anchor fails
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

.PHONY: docs-serve
docs-serve: $(DOCS_STAMP) ## serve the documentation, reloaded on change, on 127.0.0.1:8001
	@NO_MKDOCS_2_WARNING=1 exec $(DOCS_VENV)/bin/mkdocs serve --strict --dev-addr 127.0.0.1:8001

.PHONY: lock
lock: install ## pin the dependencies; a pin changes only if it must, or with UPGRADE=1
	$(BIN)/python scripts/lock.py $(if $(UPGRADE),--upgrade)

.PHONY: clean
clean: ## remove environments and caches, but never .data, which holds the embedded database
	rm -rf $(VENV) $(PROTO_VENV) $(DOCS_VENV) site .hypothesis .mypy_cache .pytest_cache .ruff_cache \
		dist generated/dist client/dist
	find $(wildcard service tests scripts alembic benchmarks generated client examples) \
		-name __pycache__ -prune -exec rm -rf {} +

PROJECTS := pyproject.toml generated/pyproject.toml client/pyproject.toml

$(STAMP): requirements/dev.lock $(PROJECTS) scripts/venv.sh $(call stale,$(VENV))
	@scripts/venv.sh $(VENV) requirements/dev.lock "$(PYTHON)"
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation \
		--editable generated --editable client --editable .
	@# Fails if pyproject.toml has a requirement that the lock does not satisfy.
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
