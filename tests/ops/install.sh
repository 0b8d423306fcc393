#!/bin/sh
# Installs the programs of the tests of load/, dashboards/, compose/ and docs/ into .tools/: nats-server, k6, Prometheus
# with promtool, schema checkers for YAML, Python libraries for NATS and xxHash, DuckDB, pandas, polars, Ruby, PHP,
# nginx, HAProxy, Apache and Caddy. Skips installed ones. Needs python3 with pip and venv, apt-get and dpkg-deb, and root only if apt-get has
# no package lists.
set -eu
cd "$(dirname "$0")/../.."
# One at a time: make runs it for several targets.
mkdir -p .tools
exec 9>.tools/ops.lock
flock 9

CHECK_JSONSCHEMA=0.33.2
KUBERNETES_VALIDATE=1.33.1
NATS_PY=2.16.0
# The version that docs/internals/read.py names.
XXHASH=4.1.0
# 225 MB with numpy.
DUCKDB=2.0.0
PANDAS=3.1.1
# 180 MB.
POLARS=2.1.0

tests/install-nats.sh
load/install-k6.sh

test -x .tools/ops/bin/python || python3 -m venv .tools/ops
.tools/ops/bin/pip install --quiet "check-jsonschema==$CHECK_JSONSCHEMA" "kubernetes-validate==$KUBERNETES_VALIDATE" \
    "nats-py==$NATS_PY" "xxhash==$XXHASH" "duckdb==$DUCKDB" "pandas==$PANDAS" \
    "polars==$POLARS"

unpacked=$(mktemp -d)
trap 'rm -rf "$unpacked"' EXIT

if ! .tools/prometheus/promtool --version >/dev/null 2>&1; then
    mkdir -p .tools/prometheus
    (
        cd "$unpacked"
        apt-get -qq download prometheus || { apt-get -qq update && apt-get -qq download prometheus; }
        dpkg-deb -x prometheus_*.deb .
    )
    cp "$unpacked"/usr/bin/prometheus "$unpacked"/usr/bin/promtool .tools/prometheus/
fi
.tools/prometheus/promtool --version | head -1

if ! test -d .tools/debian; then
    mkdir -p "$unpacked/debian/root"
    (
        cd "$unpacked/debian"
        # Leaves out what is installed on this machine.
        plan() { apt-get -s install --no-install-recommends nginx haproxy apache2-bin caddy ruby php-cli >plan; }
        plan || { apt-get -qq update && plan; }
        sed -n 's/^Inst \([^ ]*\) .*/\1/p' plan | xargs -r apt-get -qq download
        for package in *.deb; do test ! -e "$package" || dpkg-deb -x "$package" root; done
    )
    mv "$unpacked/debian/root" .tools/debian
fi
