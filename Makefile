# What one does with the project. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help run cluster test picture sim sim-planted faults check loom deny bench fuzz fuzz-keep load-tools roundtrip \
	compare jetstream backups drill failover soak full mutants rates load-test dashboards dashboards-test compose-test docs-test

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

run: ## a node on the default ports
	cargo run --release

cluster: ## a broker and three replicas on this machine; Ctrl-C ends all
	load/cluster.sh

test: ## every test
	tests/install.sh
# Two tests for each core: most of them wait for other processes.
	RUST_TEST_THREADS=$$((2 * $$(nproc))) cargo test --locked
	$(MAKE) sim
	$(MAKE) load-test dashboards-test compose-test docs-test

picture: ## the README's picture of the status page
	tests/install.sh
	cargo test --locked --test it page::a_ready_node
	mkdir -p docs
	cp target/tmp/page/ready-light.png docs/status-page.png

SEEDS ?= 3000
# Another first seed for each commit: seeds that were never run are run without anybody asking.
FROM ?= $(shell printf %d 0x$$(git rev-parse HEAD 2>/dev/null | cut -c1-8))
sim: ## a simulated cluster through what can go wrong, SEEDS times from seed FROM
	cargo run --quiet --locked --profile sim -p gradestore-sim -- --seeds $(SEEDS) --from $(FROM)

sim-planted: ## bugs, planted one after the other, that the simulator must find
	tests/sim/planted.sh

FAULTS ?=
faults: ## faults times what a replica is doing, each cell on real processes; FAULTS="kill/restoring" runs one cell
	tests/install-nats.sh
	tests/faults/install.sh
	cargo test --locked --test faults -- $(FAULTS)

check: ## format, lints and docs, warnings as errors; whether the planted bugs still fit
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
	for bug in tests/sim/planted/*.patch; do patch --dry-run --quiet -p1 <"$$bug" || exit 1; done

bench: ## micro benchmarks; figures in docs/internals/benchmarks.md
	cargo bench --locked

loom: ## what threads see of each other's steps, tried in every order
	cargo test --locked --manifest-path tests/loom/Cargo.toml --target-dir target/loom

MUTANTS ?= src/backup/native.rs
mutants: .tools/bin/cargo-mutants ## changes to MUTANTS that no test of its module notices
	.tools/bin/cargo-mutants mutants -f $(MUTANTS) --timeout 300 -C --lib -- -- $(subst /,::,$(patsubst src/%/,%,$(dir $(MUTANTS))))

.tools/bin/cargo-mutants:
	cargo install --locked --root .tools --version 27.1.0 cargo-mutants

deny: ## licences, sources and known vulnerabilities of what is built in
	tests/deny.sh

FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= backup_reader basic_header config header_block log_message patch_body fast_request position_header query stored_batch
FUZZ = .tools/bin/cargo-fuzz
fuzz fuzz-keep: export RUSTC_BOOTSTRAP = 1
fuzz: $(FUZZ) ## each of FUZZ_TARGETS for FUZZ_SECONDS, from what was kept
	for target in $(FUZZ_TARGETS); do \
	    corpus=tests/fuzz/corpus/$$target dict=tests/fuzz/dicts/$$target.dict && \
	    kept=tests/fuzz/kept/$$target.tar.gz && \
	    mkdir -p $$corpus && (test ! -e $$kept || tar -xzf $$kept -C $$corpus) && \
	    $(FUZZ) run --fuzz-dir tests/fuzz $$target $$corpus tests/fuzz/seeds/$$target -- \
	        $$(test ! -e $$dict || echo -dict=$$dict) \
	        -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 || exit 1; \
	done

fuzz-keep: $(FUZZ) ## the least of what has grown that covers as much, for `make test` to try again
	for target in $(FUZZ_TARGETS); do \
	    corpus=tests/fuzz/corpus/$$target least=tests/fuzz/corpus/$$target.least && \
	    rm -rf $$least && mkdir -p $$least && \
	    $(FUZZ) run --fuzz-dir tests/fuzz $$target $$least tests/fuzz/seeds/$$target $$corpus -- \
	        -set_cover_merge=1 && \
	    tar -C $$least --format=ustar --sort=name --owner=0 --group=0 --numeric-owner --mode=644 \
	        --mtime=@0 -c $$(ls $$least) | gzip -9n > tests/fuzz/kept/$$target.tar.gz || exit 1; \
	done

$(FUZZ):
	cargo install --locked --root .tools --version 0.13.2 cargo-fuzz

load-tools: ## what the load tests run, into .tools
	load/install.sh

RATES ?=
rates: ## k6 and oha at fixed rates, on one node and on three; RATES="smoke oha" for parts
	tests/install.sh
	$(if $(filter-out oha,$(RATES)),$(if $(filter oha,$(RATES)),load/install.sh,load/install-k6.sh),load/install.sh)
	cargo build --locked --release
	python3 load/k6.py $(RATES)

OPS_TEST = PROGRAM=target/debug/gradestore .tools/ops/bin/python -m unittest
# With the features that `cargo test` gives the dependencies, or half of them would be built twice.
BUILD_PROGRAM = cargo test --locked --no-run --test it
load-test: ## the k6 scripts and the data generator, on real nodes
	tests/ops/install.sh
	$(BUILD_PROGRAM)
	$(OPS_TEST) tests/ops/test_load.py

dashboards: ## every panel's newest values for the replicas of `make cluster`, as text, from a Prometheus of its own
	tests/ops/install.sh
	python3 dashboards/show.py

dashboards-test: ## every panel and alert, on a real Prometheus and a cluster under load
	tests/ops/install.sh
	$(BUILD_PROGRAM)
	$(OPS_TEST) tests/ops/test_dashboards.py tests/ops/test_alerts.py

docs-test: ## the documents: the protocol on real nodes, the README and the client examples, every link
	tests/ops/install.sh
	$(BUILD_PROGRAM)
	$(OPS_TEST) tests/ops/test_docs.py

IN_NAMESPACES = unshare --map-root-user --net --mount --pid --fork --kill-child --mount-proc
compose-test: ## the files of compose/, against their schemas and run without containers
	tests/ops/install.sh
	$(BUILD_PROGRAM)
	$(IN_NAMESPACES) env $(OPS_TEST) tests/ops/test_compose.py

roundtrip: ## a million users in and out of a node that runs on the default ports
	cargo run --locked --release --example roundtrip -- --users 1000000

COMPARE ?=
compare: ## all that is demanded of speed and size, beside references, as one table; COMPARE="get set" for parts
	tests/install-nats.sh
	load/install.sh
	cargo build --locked --release --bins --examples --features measure
	python3 load/compare.py $(COMPARE)

jetstream: ## writes through the JetStream log beside one message a write, in turns
	tests/install-nats.sh
	cargo build --locked --release --bins --examples
	python3 load/jetstream.py

backups: ## backups: read by other tools, next to pigz and Redis, memory, slow readers
	cargo build --locked --release
	for what in tools compare memory slow; do python3 load/backup.py $$what || exit 1; done

DRILL ?= --users 1000000 --writes-per-s 10000
drill: ## one of three replicas loses its disk under load and comes back; DRILL has the flags
	tests/install-nats.sh
	cargo build --locked --release --bins --examples
	python3 load/drill.py $(DRILL)

FAILOVER ?= --runs 20
failover: ## a server of three that leads the stream is killed under load; FAILOVER has the flags and other faults
	tests/install-nats.sh
	cargo build --locked --release
	python3 load/failover.py $(FAILOVER)

FULL ?= --seconds 600
full: ## ten minutes of new users until three replicas are full, and how they go on; FULL has the flags
	tests/install-nats.sh
	cargo build --locked --release --bins
	python3 load/full.py $(FULL)

SOAK ?= --seconds 3600
soak: ## an hour under load with a fault every 30 s; SOAK has the flags
	tests/install-nats.sh
	cargo build --locked --release --bins --examples
	python3 load/soak.py $(SOAK)
