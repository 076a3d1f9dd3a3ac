# A Kubernetes node of our own; see tests/README.md. Included by the root Makefile.

.PHONY: cluster
cluster: cluster-setup build ## Leave a Kubernetes node running with Plimsoll installed; print how to use it (root)
	$(BIN)/cluster up

.PHONY: cluster-down
cluster-down: ## End the node of `make cluster` and remove its files (root)
	$(CARGO) build $(RELEASE) --bins
	$(BIN)/cluster down

.PHONY: cluster-setup
cluster-setup: ## Install and build, once, what cluster tests need (Debian packages, Go programs; root or sudo)
	tests/setup.sh
