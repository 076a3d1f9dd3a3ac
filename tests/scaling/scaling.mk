# The scaling loop at length; included by the root Makefile.

.PHONY: soak-scaling
soak-scaling: cluster-setup build ## Half an hour of real load on the test node, 5,000 simulated runs; writes docs/scaling (root)
	PLIMSOLL_SCALING_SEEDS=1000 $(CARGO) test $(RELEASE) scale::simulation
	mkdir -p docs/scaling
	PLIMSOLL_REQUIRE_CLUSTER=1 PLIMSOLL_SOAK_SCALING=$(CURDIR)/docs/scaling/run.csv \
		$(CARGO) test $(RELEASE) --test end_to_end soak_ -- --ignored --nocapture
	python3 tests/scaling/plot.py docs/scaling/run.csv docs/scaling/run.svg "A step of load on the test node"
	$(CARGO) build $(RELEASE) --example scaling
	$(BIN)/examples/scaling 200 docs/scaling.md docs/scaling/simulation.csv
	python3 tests/scaling/plot.py docs/scaling/simulation.csv docs/scaling/simulation.svg "One simulated step of load" 4361
