#!/bin/sh
# Checks licences, crates and sources with deny.toml, and known vulnerabilities if the advisory database can be
# fetched from GitHub. Prints a warning if it cannot.
set -eu
cd "$(dirname "$0")/.."

CARGO_DENY=0.20.2

if [ "$(.tools/bin/cargo-deny --version 2>/dev/null)" != "cargo-deny $CARGO_DENY" ]; then
    # A debug build compiles faster, and the check takes seconds.
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --root .tools --version "$CARGO_DENY" cargo-deny
fi
check() { .tools/bin/cargo-deny "$1" check --hide-inclusion-graph $2; }
check --locked 'bans licenses sources'
if .tools/bin/cargo-deny fetch db; then
    check --offline advisories
else
    echo 'advisories NOT checked: cannot fetch the advisory database' >&2
fi
