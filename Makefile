# Commands of the project; `make` lists them.
.DEFAULT_GOAL := help
.PHONY: help run cluster test picture sim sim-planted faults check loom deny bench fuzz fuzz-keep load-tools roundtrip \
	compare jetstream backups drill failover soak full mutants rates load-test dashboards dashboards-test compose-test docs-test \
	dist dist-test

help: ## list the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

run: ## run a node on the default ports
	cargo run --release

cluster: ## run NATS and three nodes on this machine; Ctrl-C stops all
	load/cluster.sh

# Includes the integration tests that need installed programs; see tests/left_out.rs.
TEST_ALL = --features gradestore/test-all
# One command for all tests, because cargo builds a program again for another choice of packages and targets.
BUILD_TESTS = cargo build --locked --tests --bins -p gradestore -p gradestore-sim $(TEST_ALL)
test: ## run all tests; installs missing programs into .tools/
	tests/install.sh
	$(BUILD_TESTS)
# Four tests per core, because most of them wait for other processes.
	RUST_TEST_THREADS=$$((4 * $$(nproc))) cargo test --locked $(TEST_ALL)
	target/debug/gradestore-sim --seeds $(SEEDS) --from $(FROM)
	tests/ops/install.sh
# In parallel, because they too mostly wait.
	$(MAKE) --jobs=4 --output-sync=target load-test dashboards-test compose-test docs-test

picture: ## update the README's screenshot of the status page
	tests/install.sh
	cargo test --locked $(TEST_ALL) --test it ops::page::a_ready_node
	mkdir -p docs
	cp target/tmp/page/ready-light.png docs/status-page.png

SEEDS ?= 3000
# Derived from the commit, so that each commit runs other seeds.
FROM ?= $(shell printf %d 0x$$(git rev-parse HEAD 2>/dev/null | cut -c1-8))
sim: ## simulate a cluster under faults, for SEEDS seeds starting with FROM
	cargo run --quiet --locked -p gradestore-sim -- --seeds $(SEEDS) --from $(FROM)

sim-planted: ## check that the simulator finds each planted bug
	tests/sim/planted.sh

FAULTS ?=
faults: ## run the fault matrix on real processes; FAULTS="kill/restoring" runs one cell
	tests/install-nats.sh
	tests/faults/install.sh
	cargo test --locked $(TEST_ALL) --test faults -- $(FAULTS)

check: ## check format, lints, API docs, and that the planted bugs still apply
	cargo fmt --all --check
	cargo clippy --locked --test it -- -D warnings
	cargo clippy --locked --workspace --all-targets $(TEST_ALL) -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps
	for bug in tests/sim/planted/*.patch; do patch --dry-run --quiet -p1 <"$$bug" || exit 1; done

bench: ## run the micro benchmarks; results are in docs/internals/benchmarks.md
	cargo bench --locked

loom: ## check all interleavings of the threads' memory accesses
	cargo test --locked --manifest-path tests/loom/Cargo.toml --target-dir target/loom

MUTANTS ?= src/backup/native.rs
mutants: .tools/bin/cargo-mutants ## find mutations of the file MUTANTS that its tests do not detect
	.tools/bin/cargo-mutants mutants -f $(MUTANTS) --timeout 300 -C --lib -- -- $(subst /,::,$(patsubst src/%/,%,$(dir $(MUTANTS))))

.tools/bin/cargo-mutants:
	cargo install --locked --root .tools --version 27.1.0 cargo-mutants

deny: ## check licences, sources and known vulnerabilities of the dependencies
	tests/deny.sh

FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= backup_reader basic_header config header_block log_message patch_body fast_request position_header query stored_batch
FUZZ = .tools/bin/cargo-fuzz
fuzz fuzz-keep: export RUSTC_BOOTSTRAP = 1
fuzz: $(FUZZ) ## fuzz each of FUZZ_TARGETS for FUZZ_SECONDS, starting with the kept inputs
	for target in $(FUZZ_TARGETS); do \
	    corpus=tests/fuzz/corpus/$$target dict=tests/fuzz/dicts/$$target.dict && \
	    kept=tests/fuzz/kept/$$target.tar.gz && \
	    mkdir -p $$corpus && (test ! -e $$kept || tar -xzf $$kept -C $$corpus) && \
	    $(FUZZ) run --fuzz-dir tests/fuzz $$target $$corpus tests/fuzz/seeds/$$target -- \
	        $$(test ! -e $$dict || echo -dict=$$dict) \
	        -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 || exit 1; \
	done

fuzz-keep: $(FUZZ) ## minimize the corpus and keep it for `make test`
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

load-tools: ## install the tools of the load tests into .tools/
	load/install.sh

RATES ?=
rates: ## run k6 and oha at fixed rates on one node and on three; RATES="smoke oha" for parts
	tests/install.sh
	$(if $(filter-out oha,$(RATES)),$(if $(filter oha,$(RATES)),load/install.sh,load/install-k6.sh),load/install.sh)
	cargo build --locked --release
	python3 load/k6.py $(RATES)

OPS_TEST = PROGRAM=target/debug/gradestore .tools/ops/bin/python -m unittest
load-test: ## test the k6 scripts and the data generator on real nodes
	tests/ops/install.sh
	$(BUILD_TESTS)
	$(OPS_TEST) tests/ops/test_load.py

dashboards: ## print the values of all panels for the nodes of `make cluster`
	tests/ops/install.sh
	python3 dashboards/show.py

dashboards-test: ## test every panel and alert on a real Prometheus and a cluster under load
	tests/ops/install.sh
	$(BUILD_TESTS)
	$(OPS_TEST) tests/ops/test_dashboards.py tests/ops/test_alerts.py

docs-test: ## test the documents: protocol, README's commands, client examples, all links, other tools, proxies
	tests/ops/install.sh
	$(BUILD_TESTS)
	$(OPS_TEST) tests/ops/test_docs.py tests/ops/test_backup_tools.py tests/ops/test_proxies.py

IN_NAMESPACES = unshare --map-root-user --net --mount --pid --fork --kill-child --mount-proc
compose-test: ## test the files of compose/: their schemas, and their services without containers
	tests/ops/install.sh
	$(BUILD_TESTS)
	$(IN_NAMESPACES) env $(OPS_TEST) tests/ops/test_compose.py

dist: ## build a static program and a Debian package with checksums into target/packages
	compose/dist.sh

dist-test: ## test the results of `make dist`: run in an empty root directory, and unpacked
	tests/ops/install.sh
	$(OPS_TEST) tests/ops/test_dist.py

roundtrip: ## write and read back a million users on the node of `make run`
	cargo run --locked --release -p gradestore-load --bin roundtrip -- --users 1000000

COMPARE ?=
compare: ## measure all goals of speed and size against references; COMPARE="get set" for parts
	tests/install-nats.sh
	load/install.sh
	cargo build --locked --profile dist -p gradestore -p gradestore-load --features gradestore/measure
	PROFILE=dist python3 load/compare.py $(COMPARE)

jetstream: ## measure writes through the JetStream log against one message per write
	tests/install-nats.sh
	cargo build --locked --release -p gradestore -p gradestore-load
	python3 load/jetstream.py

backups: ## measure backups: other tools, pigz and Redis, memory, slow readers
	cargo build --locked --release
	for what in tools compare memory slow; do python3 load/backup.py $$what || exit 1; done

DRILL ?= --users 1000000 --writes-per-s 10000
drill: ## wipe the disk of one of three nodes under load and measure its recovery; DRILL has flags
	tests/install-nats.sh
	cargo build --locked --release -p gradestore -p gradestore-load
	python3 load/drill.py $(DRILL)

FAILOVER ?= --runs 20
failover: ## kill the NATS server that leads the stream under load; FAILOVER has flags and other faults
	tests/install-nats.sh
	cargo build --locked --release
	python3 load/failover.py $(FAILOVER)

FULL ?= --seconds 600
full: ## fill three nodes with new users for ten minutes; FULL has flags
	tests/install-nats.sh
	cargo build --locked --release --bins
	python3 load/full.py $(FULL)

SOAK ?= --seconds 3600
soak: ## run an hour of load with a fault every 30 s; SOAK has flags
	tests/install-nats.sh
	cargo build --locked --release -p gradestore -p gradestore-load
	python3 load/soak.py $(SOAK)
