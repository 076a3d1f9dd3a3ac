# Every command of this project; `make` alone lists them. CI says the same words: .ci/run calls `make -k check test`.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

CARGO := cargo
# One profile for everything (docs/decisions/0001) and one selection of crates, so that each is compiled once.
RELEASE := --release --workspace --locked

.PHONY: help
help: ## list every command
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  make %-14s %s\n", $$1, $$2 }'

.PHONY: build
build: ## compile both programs into target/release
	$(CARGO) build $(RELEASE) --bins

.PHONY: check
check: ## formatting, lints as errors
	@for part in fmt clippy; do \
		$(CARGO) $$part --version >/dev/null 2>&1 || rustup component add $${part/fmt/rustfmt} || \
			{ echo "check: cargo $$part is missing and could not be added" >&2; exit 1; }; \
	done
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(RELEASE) --all-targets -- -D warnings

.PHONY: test
test: cuda ## every test there is; installs what they need
	$(CARGO) build $(RELEASE) --all-targets
	$(CARGO) test $(RELEASE) --no-fail-fast

.PHONY: cuda
cuda: ## install nvcc from its wheels into the cache folder; the next build compiles the kernels
	@sh kernels/fetch-nvcc.sh

.PHONY: device
device: cuda ## on a host with an NVIDIA card: kernels against the reference, then their speed
	$(CARGO) test --release -p plimsoll-kernels --test device -- --nocapture
	$(CARGO) run --release -p plimsoll-kernels --example bandwidth

.PHONY: deny
deny: ## licences, banned crates and advisories of all dependencies
	@command -v cargo-deny >/dev/null || { echo 'deny: run `cargo install --locked cargo-deny` first' >&2; exit 1; }
	$(CARGO) deny --workspace check
