# What one does with the project. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help run cluster test sim sim-planted faults check bench fuzz load-tools roundtrip compare jetstream backups \
	drill soak

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

run: ## a node on the default ports
	cargo run --release

cluster: ## a broker and three replicas on this machine; Ctrl-C ends all
	load/cluster.sh

test: ## every test
	tests/install.sh
	cargo test --locked
	$(MAKE) sim

SEEDS ?= 1000
sim: ## a simulated cluster through what can go wrong, SEEDS times
	cargo run --quiet --locked --profile sim -p gradestore-sim -- --seeds $(SEEDS)

sim-planted: ## five bugs, planted one after the other, that the simulator must find
	tests/sim/planted.sh

FAULTS ?=
faults: ## faults times what a replica is doing, each cell on real processes; FAULTS="kill/restoring" runs one cell
	tests/install.sh
	tests/faults/install.sh
	cargo test --locked --test faults -- $(FAULTS)

check: ## format, lints and docs, warnings as errors
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

bench: ## micro benchmarks; figures in benches/README.md
	cargo bench --locked

FUZZ_SECONDS ?= 60
fuzz: export RUSTC_BOOTSTRAP = 1
fuzz: ## each target in tests/fuzz for FUZZ_SECONDS
	test -x .tools/bin/cargo-fuzz || cargo install --locked --root .tools --version 0.13.2 cargo-fuzz
	for target in backup_reader patch_body; do \
	    mkdir -p tests/fuzz/corpus/$$target && \
	    .tools/bin/cargo-fuzz run --fuzz-dir tests/fuzz $$target tests/fuzz/corpus/$$target tests/fuzz/seeds/$$target -- \
	        -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 || exit 1; \
	done

load-tools: ## what the load tests run, into .tools
	load/install.sh

roundtrip: ## a million users in and out of a node that runs on the default ports
	cargo run --locked --release --example roundtrip -- --users 1000000

compare: ## a node beside a bare hyper server, in turns
	cargo build --locked --release --bins --examples
	python3 load/compare.py

jetstream: ## writes through the JetStream log beside one message a write, in turns
	tests/install.sh
	cargo build --locked --release --bins --examples
	python3 load/jetstream.py

backups: ## backups: read by other tools, next to pigz and Redis, memory, slow readers
	cargo build --locked --release
	for what in tools compare memory slow; do python3 load/backup.py $$what || exit 1; done

DRILL ?= --users 1000000 --writes-per-s 10000
drill: ## one of three replicas loses its disk under load and comes back; DRILL has the flags
	tests/install.sh
	cargo build --locked --release --bins --examples
	python3 load/drill.py $(DRILL)

SOAK ?= --seconds 3600
soak: ## an hour under load with a fault every 30 s; SOAK has the flags
	tests/install.sh
	cargo build --locked --release --bins --examples
	python3 load/soak.py $(SOAK)
