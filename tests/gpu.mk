# Testing and measuring on a machine with a GPU that need not have Rust.

GPU_PACK := target/gpu-pack

.PHONY: gpu-pack
gpu-pack: cuda ## Collect what a GPU machine needs (stripped programs, goldens, one script) in target/gpu-pack
	$(CARGO) build $(RELEASE) --bins
	$(CARGO) test $(RELEASE) --no-run --message-format=json | python3 tests/gpu/pack.py $(GPU_PACK)
