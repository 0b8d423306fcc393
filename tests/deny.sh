#!/bin/sh
# Checks licences, crates and sources by deny.toml, and what is known of vulnerabilities where the list of
# them can be fetched: it comes from GitHub and from nowhere else. Says which of the two it did.
set -eu
cd "$(dirname "$0")/.."

CARGO_DENY=0.20.2

if [ "$(.tools/bin/cargo-deny --version 2>/dev/null)" != "cargo-deny $CARGO_DENY" ]; then
    # What is shipped is built for minutes to be fast; this runs for seconds.
    CARGO_PROFILE_DEV_DEBUG=0 cargo install --quiet --locked --debug --root .tools --version "$CARGO_DENY" cargo-deny
fi
check() { .tools/bin/cargo-deny "$1" check --hide-inclusion-graph $2; }
check --locked 'bans licenses sources'
if .tools/bin/cargo-deny fetch db; then
    check --offline advisories
else
    echo 'advisories NOT checked: the list of them can not be fetched from here' >&2
fi
