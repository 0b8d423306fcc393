#!/bin/sh
# Installs the programs of the tests of load/, dashboards/, compose/ and docs/ into .tools/: nats-server, k6, Prometheus
# with promtool, schema checkers for YAML, Python libraries for NATS and xxHash, DuckDB and pandas. Skips installed ones.
# Needs python3 with pip and venv, apt-get and dpkg-deb, and root only if apt-get has no package lists.
set -eu
cd "$(dirname "$0")/../.."

CHECK_JSONSCHEMA=0.33.2
KUBERNETES_VALIDATE=1.33.1
NATS_PY=2.16.0
# The version that docs/internals/read.py names.
XXHASH=4.1.0
# 225 MB with numpy. polars would be 180 MB more.
DUCKDB=2.0.0
PANDAS=3.1.1

tests/install-nats.sh
load/install-k6.sh

test -x .tools/ops/bin/python || python3 -m venv .tools/ops
.tools/ops/bin/pip install --quiet "check-jsonschema==$CHECK_JSONSCHEMA" "kubernetes-validate==$KUBERNETES_VALIDATE" \
    "nats-py==$NATS_PY" "xxhash==$XXHASH" "duckdb==$DUCKDB" "pandas==$PANDAS"

if ! .tools/prometheus/promtool --version >/dev/null 2>&1; then
    unpacked=$(mktemp -d)
    trap 'rm -rf "$unpacked"' EXIT
    mkdir -p .tools/prometheus
    (
        cd "$unpacked"
        apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }
        dpkg-deb -x prometheus_*.deb .
    )
    cp "$unpacked"/usr/bin/prometheus "$unpacked"/usr/bin/promtool .tools/prometheus/
fi
.tools/prometheus/promtool --version | head -1
