# Long runs, whose figures are committed in docs/soak; CI runs a short form of each.

SOAK_RESULTS := docs/soak

.PHONY: soak
soak: soak-simulation soak-rollouts soak-scaling soak-fleet ## Hours of what CI runs for seconds; figures land in docs/soak (root)

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

# A checkout of sigs.k8s.io/lws at v0.9.0, to be measured in the same run; none: Plimsoll alone.
LWS ?=

.PHONY: soak-fleet
soak-fleet: setup ## 1,000 objects on a real control plane with fake nodes, and LeaderWorkerSet with LWS=CHECKOUT (root)
	@mkdir -p $(SOAK_RESULTS)
	tests/setup.sh --fleet
	$(if $(LWS),cd $(LWS) && CGO_ENABLED=0 go build -trimpath -ldflags "-s -w" -o manager ./cmd)
	$(CARGO) build $(RELEASE) --all-targets
	PLIMSOLL_SOAK_FLEET=1000 $(if $(LWS),PLIMSOLL_LWS=$(abspath $(LWS))) PLIMSOLL_REQUIRE_CLUSTER=1 \
		PLIMSOLL_SOAK_RESULTS=$(abspath $(SOAK_RESULTS)) $(CARGO) test $(RELEASE) --test fleet -- --nocapture
