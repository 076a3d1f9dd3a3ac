# Long runs, whose figures are committed in docs/soak; CI runs a short form of each.

SOAK_RESULTS := docs/soak

.PHONY: soak
soak: soak-simulation soak-rollouts soak-scaling ## Hours of what CI runs for seconds; figures land in docs/soak (root)

.PHONY: soak-simulation
soak-simulation: ## The operator against a simulated API server over 5,000 seeds
	@mkdir -p $(SOAK_RESULTS)
	PLIMSOLL_SOAK_SEEDS=5000 PLIMSOLL_SOAK_RESULTS=$(abspath $(SOAK_RESULTS)) \
		$(CARGO) test $(RELEASE) simulation::seeds -- --nocapture

.PHONY: soak-rollouts
soak-rollouts: setup ## 100 surge updates and 100 deleted pods under load, 10 killed engines, on a real node (root)
	@mkdir -p $(SOAK_RESULTS)
	$(CARGO) build $(RELEASE) --all-targets
	PLIMSOLL_SOAK_ROLLOUTS=100 PLIMSOLL_SOAK_RESULTS=$(abspath $(SOAK_RESULTS)) PLIMSOLL_REQUIRE_CLUSTER=1 \
		$(CARGO) test $(RELEASE) --test rollouts -- --nocapture
