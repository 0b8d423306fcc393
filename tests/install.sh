#!/bin/sh
# What the tests need: nats-server; schemathesis, which holds the OpenAPI document against a node, in .tools/schemathesis;
# and a Chromium, which looks at the status page. What is there already is left alone. Needs python3 with pip and venv;
# for Chromium root and apt, or it on the PATH.
set -eu
cd "$(dirname "$0")/.."

SCHEMATHESIS=4.32.5

tests/install-nats.sh

test -x .tools/schemathesis/bin/python || python3 -m venv .tools/schemathesis
.tools/schemathesis/bin/pip install --quiet "schemathesis==$SCHEMATHESIS"
.tools/schemathesis/bin/schemathesis --version

browser() {
    command -v chromium || command -v chromium-browser || command -v google-chrome
}
if ! browser >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
    else
        echo "chromium is missing: install it with your system's packages, e.g. sudo apt-get install chromium" >&2
        exit 1
    fi
fi
"$(browser)" --version
