# A Kubernetes node of our own; see tests/README.md. Included by the root Makefile.

.PHONY: cluster-setup cluster cluster-down

cluster-setup: ## Install and build once what cluster tests need (Debian packages, Go programs)
	tests/setup.sh

cluster: cluster-setup ## Leave a Kubernetes node running with Plimsoll installed; print its kubeconfig (root)
	cargo run --release --package plimsoll-tests --bin cluster -- up

cluster-down: ## End the node of `make cluster` and remove its files (root)
	cargo run --release --package plimsoll-tests --bin cluster -- down
