# What one does with the project. `make` alone lists it.
.DEFAULT_GOAL := help
.PHONY: help run cluster test check bench load-tools roundtrip compare

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

run: ## a node on the default ports
	cargo run --release

cluster: ## a broker and three replicas on this machine; Ctrl-C ends all
	load/cluster.sh

test: ## every test
	tests/install.sh
	cargo test --locked

check: ## format, lints and docs, warnings as errors
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --no-deps

bench: ## micro benchmarks; figures in benches/README.md
	cargo bench --locked

load-tools: ## k6, oha and wrk into .tools, for the load tests
	load/install.sh

roundtrip: ## a million users in and out of a node that runs on the default ports
	cargo run --locked --release --example roundtrip -- --users 1000000

compare: ## a node beside a bare hyper server, in turns
	cargo build --locked --release --bins --examples
	python3 load/compare.py
