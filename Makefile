# Every command of this project; `make` alone lists them. CI says the same words: .ci/run calls `make -k check test`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/plimsoll
BIN := $(abspath $(or $(CARGO_TARGET_DIR),target))/release
CARGO := cargo
# One profile for everything (docs/decisions/0001) and one selection of crates, so that each is compiled once.
RELEASE := --release --workspace --locked

.PHONY: help
help: ## List every command
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

include tests/cluster.mk
include tests/gpu.mk
include tests/scaling/scaling.mk
include tests/soak.mk

.PHONY: build
build: ## Compile both programs into target/release
	$(CARGO) build $(RELEASE) --bins

QUESTION := "Who is the harbour master of Plimsoll Bay?"

.PHONY: serve
serve: build ## Build, and serve the bundled model with no cluster: plan, address, a first answer (Ctrl-C drains)
	$(BIN)/plimsoll up examples/local.yaml --ask $(QUESTION)

.PHONY: bench
bench: build ## Tokens per second of the bundled model on this machine
	$(BIN)/plimsoll-engine bench --model tests/model

.PHONY: check
check: dependencies figures ## Formatting, lints as errors, dependencies, and tables that their figures give
	@for part in fmt clippy; do \
		$(CARGO) $$part --version >/dev/null 2>&1 || rustup component add $${part/fmt/rustfmt} || \
			{ echo "check: cargo $$part is missing and could not be added" >&2; exit 1; }; \
	done
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(RELEASE) --all-targets -- -D warnings

.PHONY: figures
figures:
	@python3 tests/gpu/tables.py h100 --check

.PHONY: dependencies
dependencies: ## Licences, bans and sources of all dependencies, as deny.toml says; takes a second
	@python3 -m doctest tests/dependencies.py
	@python3 tests/dependencies.py

.PHONY: test
test: setup ## Every test there is; installs what they need (cluster tests need root, and say so without)
	$(CARGO) build $(RELEASE) --all-targets
	@status=0; \
	PLIMSOLL_ENGINE=$(BIN)/plimsoll-engine tests/api/run.sh || status=1; \
	$(CARGO) test $(RELEASE) --no-fail-fast || status=1; \
	exit $$status

.PHONY: api
api: build ## OpenAI's own Python client against the engine with the bundled model
	PLIMSOLL_ENGINE=$(BIN)/plimsoll-engine tests/api/run.sh

.PHONY: fuzz
fuzz: ## Every fuzz target for 60 s: bodies, templates, checkpoints (PLIMSOLL_FUZZ_SEED repeats a run)
	PLIMSOLL_FUZZ_SECONDS=60 $(CARGO) test $(RELEASE) fuzz_ -- --nocapture --test-threads 1

.PHONY: setup
setup: cuda
	@if [ "$$(id -u)" = 0 ]; then tests/setup.sh; else echo 'setup: not root, so nothing is installed for cluster tests'; fi

.PHONY: generate
generate: ## Write the files that come from the types: CRD, rules, dashboards, pages of docs
	$(CARGO) run --release --locked -p plimsoll-crds --example generate

.PHONY: cuda
cuda: ## Install nvcc from its wheels into the cache folder; the next build compiles the kernels
	@sh kernels/fetch-nvcc.sh

# torch and transformers, which only goldens and comparisons need (5 GB).
PEERS := torch==2.11.0 transformers==5.17.0 safetensors==0.8.0 numpy==2.4.6
PEERS_PYTHON := $(CACHE)/venv-peers/bin/python

$(CACHE)/venv-peers/installed:
	python3 -m venv $(CACHE)/venv-peers
	$(PEERS_PYTHON) -m pip install --quiet $(PEERS)
	touch $@

.PHONY: goldens
goldens: $(CACHE)/venv-peers/installed ## Make the golden log-probabilities again, with transformers (5 GB of wheels)
	$(PEERS_PYTHON) tests/goldens/make.py random
	$(PEERS_PYTHON) tests/goldens/make.py bundled

CARGO_DENY := $(CACHE)/cargo-deny-0.20.2

$(CARGO_DENY)/bin/cargo-deny:
	$(CARGO) install cargo-deny --version 0.20.2 --locked --root $(CARGO_DENY)

.PHONY: deny
deny: $(CARGO_DENY)/bin/cargo-deny ## cargo-deny against deny.toml, advisories included (compiles it once, minutes; fetches their database)
	$< --workspace check
